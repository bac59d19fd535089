"""A detector of a critic that does not learn."""

from jaxrlhf.config import has_critic
from jaxrlhf.diagnosis.finding import Finding
from jaxrlhf.diagnosis.history import History

VALUE_AFTER = 20
"""Iterations that a critic is given."""

USELESS, HARMFUL = 0.0, -1.0
"""Explained variance at which a critic is no better than a constant, and at which its errors vary
twice as much as the returns."""


def value_function(history: History) -> list[Finding]:
    """Explained variance 1 − Var(R − V) / Var(R) at or below 0 when the critic should know."""
    if not has_critic(history.config):
        return []
    late = history.training.late("explained_variance")
    count = len(history.training.known("explained_variance").step_I)
    if late is None or count < VALUE_AFTER or late.median > USELESS:
        return []
    critic = history.config.critic
    return [
        Finding(
            "value_function",
            "problem" if late.median < HARMFUL else "warning",
            f"explained variance {late.median:.2g} ({late.steps}, median) after {count} iterations",
            f"raise critic.warmup ({critic.warmup}) or "
            + (
                "critic.learning_rate"
                if critic.kind == "separate"
                else "algorithm.value_coef, or set critic.kind separate"
            )
            + "; bring rewards to a standard deviation near 1 (their weight); or take an algorithm "
            "without a critic (rloo, grpo)",
        )
    ]

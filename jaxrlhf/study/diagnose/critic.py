"""A detector of a critic that does not learn."""

from jaxrlhf.config import has_critic
from jaxrlhf.study.diagnose.finding import Finding
from jaxrlhf.study.diagnose.history import History, fifth

VALUE_AFTER = 20
"""Iterations that a critic is given."""

USELESS, HARMFUL = 0.0, -1.0
"""Explained variance at which a critic is no better than a constant, and at which its errors vary
twice as much as the returns."""

SPREAD = 0.1
"""Of the first rewards' standard deviation, what an iteration's must have: where rewards are nearly
equal there is nothing to explain, and the ratio is noise."""


def value_function(history: History) -> list[Finding]:
    """Explained variance 1 − Var(R − V) / Var(R) at or below 0 when the critic should know."""
    if not has_critic(history.config):
        return []
    known = history.training.known("explained_variance", "score_std")
    if len(known.step_I) < VALUE_AFTER:
        return []
    spread_I = known["score_std"]
    known = known.where(spread_I > SPREAD * spread_I[: fifth(len(spread_I))].mean())
    late, count = known.late("explained_variance"), len(known.step_I)
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

"""Detectors of responses that never end, or that end before they begin."""

from jaxrlhf.study.diagnose.finding import Finding
from jaxrlhf.study.diagnose.history import History

NEVER = 0.005
"""Fraction of responses that end by themselves, below which none does."""

MIN_RESPONSES = 200
"""Responses, none of which ends, before it is told: of 200 none is below 1.5 % (3/n, with 95 %)."""

USED_TO = 0.2
"""Fraction that ended at the start, above which the policy has unlearnt to stop."""

AT_ONCE = 1.05
"""Mean tokens of a response, the stop token included, below which there is no other token."""


def no_eos(history: History) -> list[Finding]:
    """No response ends by itself: all are cut off at sample.max_new_tokens."""
    late, change = history.training.late("ended"), history.training.change("ended")
    if late is None or late.mean > NEVER:
        return []
    unlearnt = change is not None and change.before > USED_TO
    if not unlearnt and not _ever_since(history):
        return []
    most = history.config.sample.max_new_tokens
    return [
        Finding(
            "no_eos",
            "problem" if unlearnt else "warning",
            f"ended {change if unlearnt else f'{late.mean:.2g} ({late.steps})'} of responses of at "
            f"most {most} tokens",
            "set algorithm.missing_eos_penalty, and see whether a reward pays for length"
            if unlearnt
            else f"if responses should end, raise sample.max_new_tokens ({most}), name the model's "
            "end token in sample.stop, or start from a model that was trained to end (sft)",
        )
    ]


def _ever_since(history: History) -> bool:
    """Whether none has ended in as many of the last iterations as say something."""
    config, ended_I = history.config, history.training.known("ended")["ended"]
    count = -(-MIN_RESPONSES // (config.data.batch_size * config.sample.n))
    return len(ended_I) >= count and ended_I[-count:].mean() <= NEVER


def empty_responses(history: History) -> list[Finding]:
    """Every response is a single token: it ends at once."""
    late = history.training.late("length")
    if late is None or late.mean > AT_ONCE or history.config.sample.max_new_tokens == 1:
        return []
    return [
        Finding(
            "empty_responses",
            "problem",
            f"length {late.mean:.3g} tokens ({late.steps})",
            "see whether data.train's prompts end where an answer begins (no end token, chat "
            "template complete) and whether the reward of an empty answer is below that of others; "
            "raise algorithm.kl_coef",
        )
    ]

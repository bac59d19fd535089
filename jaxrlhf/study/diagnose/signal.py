"""Detectors of rewards that say nothing, say it in the wrong size, or are not there."""

import numpy as np

from jaxrlhf.config import Config, is_on_policy, on_policy
from jaxrlhf.study.diagnose.finding import Finding
from jaxrlhf.study.diagnose.history import History, Late, Series, fifth

SAME = 1e-6
"""Standard deviation, relative to the mean (at least 1), below which rewards are all equal."""

SILENT, MUTE = 0.8, 0.99
"""Fraction of groups whose rewards are all equal: most of the sampling wasted, and all of it."""

KEPT = 0.5
"""Fraction of groups with a signal below which dynamic sampling did not find enough prompts."""

SMALL, LARGE = 0.02, 20.0
"""Standard deviation of rewards that is far from the 1 that kl_coef and value_coef are set for."""

EXPLODING = 10.0
"""Growth of that standard deviation over a run; learning makes it fall."""

SCALE_FREE = frozenset({"grpo", "dapo", "gspo", "cispo", "reinforce_pp"})
"""Algorithms that divide rewards by their standard deviation: without a KL among the rewards,
their size does not matter."""

AT_LIMIT = 0.8
"""Share of rewards that are exactly the highest there is."""

KINDS = 5
"""Different rewards early on below which a reward is a verdict (0 or 1), which has a highest."""

LENGTH_CORRELATION = 0.5
"""Correlation of reward and length from which on length decides."""

MIN_ROWS = 50
"""Completions without which a correlation is not told: its standard error is 1/√n."""

EXCLUDED, MOST_EXCLUDED = 0.05, 0.5
"""Share of rows without a reward that is too much, and that leaves a run with too little."""


def equal_rewards(history: History) -> list[Finding]:
    """All rewards of an iteration are the same number: no advantage, nothing to learn."""
    known = history.training.known("score", "score_std")
    if not len(known.step_I):
        return []
    same_I = known["score_std"] <= SAME * np.maximum(1, np.abs(known["score"]))
    n = fifth(len(same_I))
    if same_I[-n:].mean() < 0.5:
        return []
    always = same_I[:n].mean() >= 0.5
    return [
        Finding(
            "equal_rewards",
            "problem" if always else "warning",
            f"rewards without any spread in {same_I.sum()} of {len(same_I)} iterations, the last "
            f"of them {known['score'][-1]:.3g} everywhere (step {known.step_I[-1]})",
            "call the function in rewards by hand on lines of samples.jsonl; give it completions "
            "to tell apart (sample.temperature, easier prompts in data.train)"
            if always
            else "the reward is at its limit: stop here, take harder prompts (data.train) or a "
            "finer reward",
        )
    ]


def groups_without_signal(history: History) -> list[Finding]:
    """Groups of samples of one prompt whose rewards are all equal: their advantages are 0."""
    silent, kept = (history.training.late(x) for x in ("groups_without_signal", "groups_kept"))
    found = []
    if silent and silent.mean >= SILENT:
        found.append(f"{silent.mean:.0%} of groups have equal rewards ({silent.steps})")
    if kept and kept.mean <= KEPT:
        found.append(f"dynamic sampling filled {kept.mean:.0%} of groups ({kept.steps})")
    if not found:
        return []
    return [
        Finding(
            "groups_without_signal",
            "problem" if silent and silent.mean >= MUTE else "warning",
            "; ".join(found),
            f"raise sample.n ({history.config.sample.n}) or sample.temperature; take prompts that "
            "are neither always nor never solved (data.train); algorithm dapo draws until groups "
            "differ (algorithm.rounds)",
        )
    ]


def reward_scale(history: History) -> list[Finding]:
    """Rewards whose standard deviation is far from 1 or grows, or that stand at a limit."""
    config, spread = history.config, history.training.known("score_std")
    if not is_on_policy(config) or not len(spread.step_I):
        return []
    found, severity = [], "warning"
    n = fifth(len(spread.step_I))
    start = float(spread["score_std"][:n].mean())
    if not _scale_free(config) and (SAME < start < SMALL or start > LARGE):
        found.append(f"score_std {start:.3g} at the start (steps up to {spread.step_I[n - 1]})")
    change = spread.change("score_std")
    if change and change.before > SAME and change.after > EXPLODING * change.before:
        found.append(f"score_std {change}")
        severity = "problem"
    if (share := _at_limit(history)) >= AT_LIMIT:
        found.append(f"{share:.0%} of the last completions have exactly the highest reward")
    if not found:
        return []
    return [
        Finding(
            "reward_scale",
            severity,
            "; ".join(found),
            "if the task is learnt, stop here or take harder prompts (data.train); a reward that "
            "is cut off needs another formula"
            if share >= AT_LIMIT and len(found) == 1
            else "set the weight in rewards so that score_std is near 1 at the start (and kl_coef, "
            "in reward units a nat, with it); a reward that is cut off or grows without bound "
            "needs another formula",
        )
    ]


def _scale_free(config: Config) -> bool:
    settings = on_policy(config)
    return settings.name in SCALE_FREE and (settings.kl_in != "reward" or not settings.kl_coef)


def _at_limit(history: History) -> float:
    """Share of the last fifth's rewards that equal the highest, 0 if rewards are verdicts."""
    steps = list(history.samples)
    n = fifth(len(steps))
    first, last = (
        [
            row["reward"]
            for step in part
            for row in history.samples[step]
            if row.get("reward") is not None
        ]
        for part in (steps[:n], steps[len(steps) - n :])
    )
    if len(set(first)) < KINDS or len(last) < KINDS:
        return 0.0
    return float(np.mean(np.array(last) >= max(first + last)))


def length_correlation(history: History) -> list[Finding]:
    """Rewards that go with the length of what they judge, be it a policy's or a reward model's.

    From the completions of the first evaluation, which training has not touched yet; for a reward
    model from ``length_correlation`` among its held-out figures.
    """
    r, where = _measured(history.evaluation.late("length_correlation"))
    if r is None:
        r, where = _of_samples(history)
    if r is None or abs(r) < LENGTH_CORRELATION:
        return []
    return [
        Finding(
            "length_correlation",
            "warning",
            f"correlation {r:.2f} between reward and length of completions ({where})",
            "train the reward model on pairs of like length, or add a source to rewards that "
            "charges for length; watch length against eval.gold",
        )
    ]


def _measured(late: Late | None) -> tuple[float | None, str]:
    return (float(late.value_I[-1]), f"step {late.last}") if late else (None, "")


def _of_samples(history: History) -> tuple[float | None, str]:
    for step, rows in history.eval_samples.items():
        pairs = [
            (len(row["completion"]), row["proxy"]) for row in rows if row.get("proxy") is not None
        ]
        length, proxy = np.array(pairs, float).reshape(-1, 2).T
        if len(pairs) >= MIN_ROWS and length.std() > 0 and proxy.std() > 0:
            return float(np.corrcoef(length, proxy)[0, 1]), f"step {step}, {len(pairs)} completions"
        break
    return None, ""


def excluded_rows(history: History) -> list[Finding]:
    """Completions whose reward could not be had, and that nothing is learnt from."""
    known: Series = history.training.known("valid")
    valid_I = known["valid"]
    if not len(valid_I) or 1 - valid_I.mean() <= EXCLUDED:
        return []
    worst = int(valid_I.argmin())
    return [
        Finding(
            "excluded_rows",
            "problem" if 1 - valid_I.mean() > MOST_EXCLUDED else "warning",
            f"{1 - valid_I.mean():.1%} of completions have no reward, {1 - valid_I[worst]:.1%} at "
            f"step {known.step_I[worst]}",
            "look at the log for what rewards raised or returned (None and NaN count as missing); "
            "mend the function, or what it asks",
        )
    ]

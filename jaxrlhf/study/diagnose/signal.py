"""Rewards that say nothing, say it in the wrong size, or are not there."""

import numpy as np

from jaxrlhf.config import is_on_policy, on_policy
from jaxrlhf.study.diagnose.history import Detector, History, Said, fifth

SAME = 1e-6  # standard deviation, relative to the mean (at least 1), below which all are equal
SILENT, MUTE = 0.8, 0.99  # fraction of silent groups: most of the sampling wasted, and all of it
KEPT = 0.5  # fraction of groups with a signal: below, dynamic sampling did not find enough prompts

# Standard deviation of rewards that is far from the 1 that kl_coef and value_coef are set for, and
# its growth over a run; learning makes it fall.
SMALL, LARGE, EXPLODING = 0.02, 20.0, 10.0
# Algorithms that divide rewards by their standard deviation: without a KL among the rewards, their
# size does not matter.
SCALE_FREE = frozenset({"grpo", "dapo", "gspo", "cispo", "reinforce_pp"})
AT_LIMIT = 0.8  # share of rewards that are exactly the highest there is
KINDS = 5  # fewer different rewards early on are a verdict (0 or 1), which has a highest

LENGTH_CORRELATION = 0.5  # of reward and length, from which on length decides
MIN_ROWS = 50  # completions without which a correlation is not told: its standard error is 1/√n
EXCLUDED, MOST_EXCLUDED = 0.05, 0.5  # share without a reward: too much; too little is left


@Detector
def equal_rewards(history: History) -> Said:
    """All rewards of an iteration are the same number: no advantage, nothing to learn."""
    known = history.training.known("score", "score_std")
    same_I = known["score_std"] <= SAME * np.maximum(1, np.abs(known["score"]))
    n = fifth(len(same_I))
    if not n or same_I[-n:].mean() < 0.5:
        return None
    always = same_I[:n].mean() >= 0.5
    return (
        always,
        f"rewards without any spread in {same_I.sum()} of {len(same_I)} iterations, the last "
        f"of them {known['score'][-1]:.3g} everywhere (step {known.step_I[-1]})",
        "call the function in rewards by hand on lines of samples.jsonl; give it completions to "
        "tell apart (sample.temperature, easier prompts in data.train)"
        if always
        else "the reward is at its limit: stop here, take harder prompts (data.train) or a finer "
        "reward",
    )


@Detector
def groups_without_signal(history: History) -> Said:
    """Groups of samples of one prompt whose rewards are all equal: their advantages are 0."""
    silent, kept = (history.training.late(x) for x in ("groups_without_signal", "groups_kept"))
    found = []
    if silent and silent.mean >= SILENT:
        found.append(f"{silent.mean:.0%} of groups have equal rewards ({silent.steps})")
    if kept and kept.mean <= KEPT:
        found.append(f"dynamic sampling filled {kept.mean:.0%} of groups ({kept.steps})")
    return (
        silent is not None and silent.mean >= MUTE,
        found,
        f"raise sample.n ({history.config.sample.n}) or sample.temperature; take prompts that "
        "are neither always nor never solved (data.train); algorithm dapo draws until groups "
        "differ (algorithm.rounds)",
    )


@Detector
def reward_scale(history: History) -> Said:
    """Rewards whose standard deviation is far from 1 or grows, or that stand at a limit."""
    start, change = history.training.early("score_std"), history.training.change("score_std")
    if not is_on_policy(history.config) or start is None:
        return None
    settings, found = on_policy(history.config), []
    kl_in_reward = settings.kl_in == "reward" and settings.kl_coef != 0
    matters = settings.name not in SCALE_FREE or kl_in_reward
    # with no spread at all, it is equal_rewards that speaks
    if matters and (SAME < start.mean < SMALL or start.mean > LARGE):
        found.append(f"score_std {start.mean:.3g} at the start (steps up to {start.step_I[-1]})")
    grows = bool(change and change.before > SAME and change.after > EXPLODING * change.before)
    if grows:
        found.append(f"score_std {change}")
    if (share := _at_limit(history)) >= AT_LIMIT:
        found.append(f"{share:.0%} of the last completions have exactly the highest reward")
    return (
        grows,
        found,
        "if the task is learnt, stop here or take harder prompts (data.train); a reward that is "
        "cut off needs another formula"
        if share >= AT_LIMIT and len(found) == 1
        else "set the weight in rewards so that score_std is near 1 at the start (and kl_coef, in "
        "reward units a nat, with it); a reward that is cut off or grows without bound needs "
        "another formula",
    )


def _at_limit(history: History) -> float:
    """Share of the last fifth's rewards that equal the highest, 0 if rewards are verdicts."""
    first, last = (
        [row["reward"] for row in rows if row.get("reward") is not None] for rows in history.ends()
    )
    if len(set(first)) < KINDS or len(last) < KINDS:
        return 0.0
    return float(np.mean(np.array(last) >= max(first + last)))


@Detector
def length_correlation(history: History) -> Said:
    """Rewards that go with the length of what they judge, be it a policy's or a reward model's.

    From the completions of the first evaluation, which training has not touched yet; for a reward
    model from ``length_correlation`` among its held-out figures.
    """
    if late := history.evaluation.late("length_correlation"):
        r, where = late.value_I[-1], f"step {late.step_I[-1]}"
    else:
        r, where = _of_first_evaluation(history)
    if abs(r) < LENGTH_CORRELATION:
        return None
    return (
        False,
        f"correlation {r:.2f} between reward and length of completions ({where})",
        "train the reward model on pairs of like length, or add a source to rewards that charges "
        "for length; watch length against eval.gold",
    )


def _of_first_evaluation(history: History) -> tuple[float, str]:
    """The correlation and where it is from; 0 where there are too few, or all are alike."""
    step, rows = next(iter(history.eval_samples.items()), (0, ()))
    pairs = [(len(row["completion"]), row["proxy"]) for row in rows if row.get("proxy") is not None]
    length, proxy = np.array(pairs, float).reshape(-1, 2).T
    if len(pairs) >= MIN_ROWS and length.std() > 0 and proxy.std() > 0:
        return float(np.corrcoef(length, proxy)[0, 1]), f"step {step}, {len(pairs)} completions"
    return 0.0, ""


@Detector
def excluded_rows(history: History) -> Said:
    """Completions whose reward could not be had, and that nothing is learnt from."""
    known = history.training.known("valid")
    valid_I = known["valid"]
    if not len(valid_I) or 1 - valid_I.mean() <= EXCLUDED:
        return None
    missing, worst = 1 - valid_I.mean(), int(valid_I.argmin())
    return (
        missing > MOST_EXCLUDED,
        f"{missing:.1%} of completions have no reward, {1 - valid_I[worst]:.1%} at step "
        f"{known.step_I[worst]}",
        "excluded/NAME says which reward failed (raised, or gave NaN or text), and applies/NAME to "
        "how many rows each applies (None: not to this one): mend the function, or what it asks, "
        "or add a reward for the other rows",
    )

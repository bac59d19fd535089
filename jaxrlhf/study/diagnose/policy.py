"""A policy that runs away from its reference, stands still, is updated wrongly, or does not end;
and a critic that does not learn."""

import math

import numpy as np

from jaxrlhf.config import has_critic, is_on_policy, on_policy
from jaxrlhf.study.diagnose.history import MIN_POINTS, Detector, History, Said, Series

# Nats a token from which on the reference would never say what the policy says: at the entropy of
# a language model, 1 to 3 nats a token, this is as far as a fixed text.
KL_PER_TOKEN = 2.0
KL_SPIKE = 5.0  # this many times the median of the ten iterations before, and nats above: a jump
KL_OFF_TARGET = 2.0  # times kl_target that an adaptive controller may end at
KL_STILL = 0.01  # nats a sequence below which a policy is the reference: best of 2 is at 0.19
STILL_AFTER = 20  # iterations after which this is told; the learning rate has warmed up by then
KL_BELOW_ZERO = 0.1  # nats that a mean of Σ log π − log π_ref may be below 0 by chance

# Of the entropy at the start, what is little and what is nothing to explore with. A policy that
# keeps 6 of 14 words keeps 0.7 of it.
ENTROPY_LOW, ENTROPY_GONE = 0.2, 0.05
ENTROPY_START = 0.2  # nats a token below which a start had no entropy to lose

# Fraction of tokens that clipping stops: 0.05 to 0.2 is usual, from a half on most of what was
# sampled teaches nothing. GSPO clips at 3e-4 around a whole response's ratio, most responses by
# intention (arXiv:2507.18071).
CLIP_HIGH, CLIP_EXTREME = 0.3, 0.5
CLIP_BY_DESIGN = frozenset({"gspo"})
# Largest π/π_old of an iteration, as the median over iterations: single tokens reach 10 where an
# update is too large, and 1000 only where it has nothing to do with the rollout. It is the extreme
# of thousands of tokens: the median of the first few iterations is told only beyond 1000.
RATIO_HIGH, RATIO_EXTREME = 10.0, 1000.0
UPDATE_KL = 0.1  # nats a token of KL(π_old‖π) in one rollout; stopping rules are at 0.01 to 0.05

# Nats a token between the sampler's log-prob and the update's: float32 has 1e-5, bfloat16 0.02.
SAMPLER_GAP = math.log(1.05)
FIRST_CLIP = 0.01  # of the only update on a rollout: its ratio is 1, so nothing should be clipped
SKIPPED = 0.05  # share of updates left out as not finite, from which on it is a problem

VALUE_AFTER = 20  # iterations that a critic is given
# Explained variance at which a critic is no better than a constant, and at which its errors vary
# twice as much as the returns.
USELESS, HARMFUL = 0.0, -1.0
# Of the first rewards' standard deviation, what an iteration's must have: where rewards are nearly
# equal there is nothing to explain, and the ratio is noise.
SPREAD = 0.1

NEVER = 0.005  # fraction of responses that end by themselves, below which none does
MIN_RESPONSES = 200  # of which none ends, before it is told: below 1.5 % do (3/n, with 95 %)
USED_TO = 0.2  # fraction that ended at the start, above which the policy has unlearnt to stop
AT_ONCE = 1.05  # mean tokens, the stop token included, below which there is no other token


@Detector
def kl_blow_up(history: History) -> Said:
    """KL(π‖π_ref) beyond any use, jumping, or far above an adaptive controller's target."""
    curve = history.training.known("kl", "length")
    late, length = curve.late("kl"), curve.late("length")
    if late is None or length is None or length.mean <= 0:
        return None
    found, per_token = [], late.mean / length.mean
    if per_token > KL_PER_TOKEN:
        found.append(f"KL {late.mean:.3g} nats, {per_token:.2g} a token ({late.steps})")
    if jump := _jump(curve):
        found.append(jump)
    settings = on_policy(history.config)
    if settings.kl_controller == "adaptive" and late.mean > KL_OFF_TARGET * settings.kl_target:
        target = f"algorithm.kl_target {settings.kl_target:g}"
        found.append(f"KL {late.mean:.3g} nats ({late.steps}) against {target}")
    return (
        per_token > KL_PER_TOKEN,
        found,
        "raise algorithm.kl_coef, lower optim.learning_rate, or set algorithm.target_kl; with "
        "algorithm.kl_controller adaptive, lower algorithm.kl_horizon",
    )


def _jump(curve: Series) -> str:
    kl = curve["kl"]
    for i in range(10, len(kl)):
        usual = float(np.median(kl[i - 10 : i]))
        if kl[i] > KL_SPIKE * max(usual, 0) + KL_SPIKE:
            return f"KL {kl[i]:.3g} nats at step {curve.step_I[i]} after a median of {usual:.3g}"
    return ""


@Detector
def kl_stall(history: History) -> Said:
    """A policy that has not left its reference, while the reward does not move either."""
    # while the critic warms up, the policy stands still as it should
    learning = history.training.after(history.config.critic.warmup)
    kl, score = learning.late("kl"), learning.change("score")
    count = len(learning.known("kl").step_I)
    if kl is None or score is None or count < STILL_AFTER or abs(kl.mean) >= KL_STILL or score.rose:
        return None
    return (
        False,
        f"KL {kl.mean:.2g} nats ({kl.steps}) after {count} iterations, score {score}",
        f"raise optim.learning_rate ({history.config.optim.learning_rate:g}); see whether "
        "rewards differ (score_std) and whether updates are skipped; lower algorithm.kl_coef",
    )


@Detector
def kl_negative(history: History) -> Said:
    """A KL estimate on the policy's own samples that is negative beyond chance: impossible, so the
    two log-probs are not of the same tokens, temperature or weights."""
    kl = history.training.late("kl")
    if kl is None or len(kl.value_I) < 2:
        return None
    error = float(kl.value_I.std(ddof=1)) / math.sqrt(len(kl.value_I))
    if kl.mean >= -KL_BELOW_ZERO - 2 * error:
        return None
    return (
        True,
        f"KL {kl.mean:.3g} ± {2 * error:.2g} nats ({kl.steps}), which cannot be below 0",
        "see whether sampling is truncated (set sample.top_k 0, top_p 1, min_p 0) and whether "
        "algorithm.old_logp rescore changes it; if it does, set model.dtype float32",
    )


@Detector
def entropy_collapse(history: History) -> Said:
    """Entropy a token far below its start: the policy has stopped to explore."""
    change = history.training.change("entropy_estimate")
    if change is None or change.before < ENTROPY_START:
        return None
    left = change.after / change.before
    if left >= ENTROPY_LOW:
        return None
    return (
        left < ENTROPY_GONE,
        f"entropy {change} nats a token",
        "set algorithm.entropy_coef (1e-3 to 1e-2), raise algorithm.kl_coef, lower "
        "optim.learning_rate or algorithm.epochs; where the algorithm has clip_high, raise it "
        "above clip_low",
    )


@Detector
def large_updates(history: History) -> Said:
    """Clip fraction, ratio or KL(π_old‖π) of the updates on one rollout out of range."""
    training = history.training.with_ratio("clip_fraction", "weight")
    training = training.with_ratio("approx_kl", "weight")
    clip, ratio, kl = (training.late(name) for name in ("clip_fraction", "ratio_max", "approx_kl"))
    found, extreme = [], False
    if clip and clip.mean > CLIP_HIGH and history.config.algorithm.name not in CLIP_BY_DESIGN:
        found.append(f"clip fraction {clip.mean:.2g} ({clip.steps})")
        extreme |= clip.mean > CLIP_EXTREME
    enough = len(training.known("ratio_max").step_I) >= MIN_POINTS
    if ratio and ratio.median > (RATIO_HIGH if enough else RATIO_EXTREME):
        found.append(f"largest ratio {ratio.median:.3g} ({ratio.steps}, median)")
        extreme |= ratio.median > RATIO_EXTREME
    if kl and kl.mean > UPDATE_KL:
        found.append(f"KL(old‖new) {kl.mean:.2g} nats a token ({kl.steps})")
    return (
        extreme,
        found,
        "lower optim.learning_rate, algorithm.epochs or algorithm.minibatches, or set "
        "algorithm.target_kl (0.02)",
    )


@Detector
def sampler_mismatch(history: History) -> Said:
    """Log-probs of the sampler and of the update that differ on the same tokens."""
    config, sample = history.config, history.config.sample
    gap, ratio = history.training.late("sample_gap"), history.training.late("sample_ratio")
    clip = history.training.with_ratio("clip_fraction", "weight").late("clip_fraction")
    found = []
    if gap and gap.mean > SAMPLER_GAP:
        found.append(f"|log π − log of the sampler| {gap.mean:.2g} nats a token ({gap.steps})")
    elif ratio and abs(math.log(max(ratio.mean, 1e-9))) > SAMPLER_GAP:
        found.append(f"π over the sampler's probability {ratio.mean:.3g} ({ratio.steps})")
    once = is_on_policy(config) and on_policy(config).epochs * on_policy(config).minibatches == 1
    if once and clip and clip.mean > FIRST_CLIP:
        found.append(f"the only update on a rollout clips {clip.mean:.1%} ({clip.steps})")
    # truncated sampling renormalises over the tokens it keeps: there the two differ by intention
    cut = sample.top_k != 0 or sample.top_p < 1 or sample.min_p > 0
    if found and cut:
        found[-1] += ", with truncated sampling"
    remedy = (
        "set model.dtype float32, or algorithm.old_logp rescore with algorithm.off_policy token"
    )
    if sample.router_replay is False:
        remedy = f"leave sample.router_replay out; or {remedy}"
    if cut:
        remedy = "set sample.top_k 0, top_p 1 and min_p 0, or algorithm.off_policy token"
    return not cut, found, remedy


@Detector
def non_finite_updates(history: History) -> Said:
    """Updates that were left out because loss or gradient was not finite."""
    found, worst = [], 0.0
    for name, whose in (("skipped", "updates"), ("critic/skipped", "the critic's updates")):
        known = history.training.known(name)
        share_I = known[name]
        steps = known.step_I[share_I > 0]
        if len(steps):
            worst = max(worst, float(share_I.mean()))
            found.append(
                f"{share_I.mean():.1%} of {whose} left out, in {len(steps)} of {len(share_I)} "
                f"iterations (steps {', '.join(map(str, steps[:5]))}{', …' * (len(steps) > 5)})"
            )
    return (
        worst > SKIPPED,
        found,
        "lower optim.learning_rate, set model.dtype float32, and look for extreme rewards at "
        "these steps in samples.jsonl",
    )


@Detector
def value_function(history: History) -> Said:
    """Explained variance 1 − Var(R − V) / Var(R) at or below 0 when the critic should know."""
    known = history.training.known("explained_variance", "score_std")
    start = known.early("score_std")
    if not has_critic(history.config) or start is None:
        return None
    known = known.where(known["score_std"] > SPREAD * start.mean)
    late, count = known.late("explained_variance"), len(known.step_I)
    # the median, since a single iteration's ratio may be far below −1
    if late is None or count < VALUE_AFTER or late.median > USELESS:
        return None
    critic = history.config.critic
    return (
        late.median < HARMFUL,
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


@Detector
def no_eos(history: History) -> Said:
    """No response ends by itself: all are cut off at sample.max_new_tokens."""
    config = history.config
    late, change = history.training.late("ended"), history.training.change("ended")
    if late is None or late.mean > NEVER:
        return None
    most = config.sample.max_new_tokens
    if change and change.before > USED_TO:
        return (
            True,
            f"ended {change} of responses of at most {most} tokens",
            "set algorithm.missing_eos_penalty, and see whether a reward pays for length",
        )
    # as many of the last iterations as have MIN_RESPONSES between them, rounded up
    ended_I = history.training.known("ended")["ended"]
    count = -(-MIN_RESPONSES // (config.data.batch_size * config.sample.n))
    if len(ended_I) < count or ended_I[-count:].mean() > NEVER:
        return None
    return (
        False,
        f"ended {late.mean:.2g} ({late.steps}) of responses of at most {most} tokens",
        f"if responses should end, raise sample.max_new_tokens ({most}), name the model's "
        "end token in sample.stop, or start from a model that was trained to end (sft)",
    )


@Detector
def empty_responses(history: History) -> Said:
    """Every response is a single token: it ends at once."""
    late = history.training.late("length")
    if late is None or late.mean > AT_ONCE or history.config.sample.max_new_tokens == 1:
        return None
    return (
        True,
        f"length {late.mean:.3g} tokens ({late.steps})",
        "see whether data.train's prompts end where an answer begins (no end token, chat "
        "template complete) and whether the reward of an empty answer is below that of others; "
        "raise algorithm.kl_coef",
    )

"""Detectors of a policy that runs away from its reference, stands still, or is updated wrongly."""

import math

import numpy as np

from jaxrlhf.config import Config, is_on_policy, on_policy
from jaxrlhf.study.diagnose.finding import Finding
from jaxrlhf.study.diagnose.history import MIN_POINTS, History, Series

KL_PER_TOKEN = 2.0
"""Nats a token from which on the reference would never say what the policy says: at the entropy
of a language model, 1 to 3 nats a token, this is as far as a fixed text."""

KL_SPIKE = 5.0
"""A KL this many times the median of the ten iterations before, and as many nats above, jumped."""

KL_OFF_TARGET = 2.0
"""Times ``kl_target`` that an adaptive controller may end at."""

KL_STILL = 0.01
"""Nats a sequence below which a policy is the reference: best of 2 is already at 0.19."""

STILL_AFTER = 20
"""Iterations after which standing still is told; a warm-up of the learning rate is over by then."""

KL_BELOW_ZERO = 0.1
"""Nats below 0 that a mean of Σ log π − log π_ref may be by chance, besides two standard errors."""

ENTROPY_LOW, ENTROPY_GONE = 0.2, 0.05
"""Of the entropy at the start, what is little and what is nothing to explore with. A policy that
keeps 6 of 14 words keeps 0.7 of it."""

ENTROPY_START = 0.2
"""Nats a token below which a start had no entropy to lose."""

CLIP_HIGH, CLIP_EXTREME = 0.3, 0.5
"""Fraction of tokens that clipping stops: 0.05 to 0.2 is usual, from a half on most of what was
sampled teaches nothing."""

CLIP_BY_DESIGN = frozenset({"gspo"})
"""Clips at 3e-4 around a whole response's ratio, most responses by intention (arXiv:2507.18071)."""

RATIO_HIGH, RATIO_EXTREME = 10.0, 1000.0
"""Largest π/π_old of an iteration, as the median over iterations: single tokens reach 10 where an
update is too large, and 1000 only where it has nothing to do with the rollout. It is the extreme of
thousands of tokens: the median of the first few iterations is told only beyond 1000."""

UPDATE_KL = 0.1
"""Nats a token of KL(π_old‖π) within one rollout; stopping rules are set at 0.01 to 0.05."""

GAP = math.log(1.05)
"""Nats a token between the sampler's log-prob and the update's; float32 has 1e-5, bfloat16 up to
0.02."""

FIRST_CLIP = 0.01
"""Clip fraction of the only update on a rollout: its ratio is 1, so nothing should be clipped."""

SKIPPED = 0.05
"""Share of updates that may have had a gradient that is not finite before it is a problem."""


def kl_blow_up(history: History) -> list[Finding]:
    """KL(π‖π_ref) beyond any use, jumping, or far above an adaptive controller's target."""
    curve = history.training.known("kl", "length")
    late, per_token = curve.late("kl"), _per_token(curve)
    if late is None or per_token is None:
        return []
    found, severity = [], "warning"
    if per_token > KL_PER_TOKEN:
        severity = "problem"
        found.append(f"KL {late.mean:.3g} nats, {per_token:.2g} a token ({late.steps})")
    if (jump := _jump(curve)) is not None:
        found.append(jump)
    settings = on_policy(history.config)
    if settings.kl_controller == "adaptive" and late.mean > KL_OFF_TARGET * settings.kl_target:
        target = f"algorithm.kl_target {settings.kl_target:g}"
        found.append(f"KL {late.mean:.3g} nats ({late.steps}) against {target}")
    if not found:
        return []
    return [
        Finding(
            "kl_blow_up",
            severity,
            "; ".join(found),
            "raise algorithm.kl_coef, lower optim.learning_rate, or set algorithm.target_kl; with "
            "algorithm.kl_controller adaptive, lower algorithm.kl_horizon",
        )
    ]


def _per_token(curve: Series) -> float | None:
    kl, length = curve.late("kl"), curve.late("length")
    return kl.mean / length.mean if kl and length and length.mean > 0 else None


def _jump(curve: Series) -> str | None:
    kl = curve["kl"]
    for i in range(10, len(kl)):
        usual = float(np.median(kl[i - 10 : i]))
        if kl[i] > KL_SPIKE * max(usual, 0) + KL_SPIKE:
            return f"KL {kl[i]:.3g} nats at step {curve.step_I[i]} after a median of {usual:.3g}"
    return None


def kl_stall(history: History) -> list[Finding]:
    """A policy that has not left its reference, while the reward does not move either."""
    learning = history.training.after(history.config.critic.warmup)
    kl, score = learning.late("kl"), learning.change("score")
    count = len(learning.known("kl").step_I)
    if kl is None or score is None or count < STILL_AFTER:
        return []
    if abs(kl.mean) >= KL_STILL or score.rose:
        return []
    return [
        Finding(
            "kl_stall",
            "warning",
            f"KL {kl.mean:.2g} nats ({kl.steps}) after {count} iterations, score {score}",
            f"raise optim.learning_rate ({history.config.optim.learning_rate:g}); see whether "
            "rewards differ (score_std) and whether updates are skipped; lower algorithm.kl_coef",
        )
    ]


def kl_negative(history: History) -> list[Finding]:
    """A KL estimate on the policy's own samples that is negative beyond chance: impossible, so the
    two log-probs are not of the same tokens, temperature or weights."""
    kl = history.training.late("kl")
    if kl is None or len(kl.value_I) < 2:
        return []
    error = float(kl.value_I.std(ddof=1)) / math.sqrt(len(kl.value_I))
    if kl.mean >= -KL_BELOW_ZERO - 2 * error:
        return []
    return [
        Finding(
            "kl_negative",
            "problem",
            f"KL {kl.mean:.3g} ± {2 * error:.2g} nats ({kl.steps}), which cannot be below 0",
            "see whether sampling is truncated (set sample.top_k 0, top_p 1, min_p 0) and whether "
            "algorithm.old_logp rescore changes it; if it does, set model.dtype float32",
        )
    ]


def entropy_collapse(history: History) -> list[Finding]:
    """Entropy a token far below its start: the policy has stopped to explore."""
    change = history.training.change("entropy_estimate")
    if change is None or change.before < ENTROPY_START:
        return []
    left = change.after / change.before
    if left >= ENTROPY_LOW:
        return []
    return [
        Finding(
            "entropy_collapse",
            "problem" if left < ENTROPY_GONE else "warning",
            f"entropy {change} nats a token",
            "set algorithm.entropy_coef (1e-3 to 1e-2), raise algorithm.kl_coef, lower "
            "optim.learning_rate or algorithm.epochs; where the algorithm has clip_high, raise it "
            "above clip_low",
        )
    ]


def large_updates(history: History) -> list[Finding]:
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
    if not found:
        return []
    return [
        Finding(
            "large_updates",
            "problem" if extreme else "warning",
            "; ".join(found),
            "lower optim.learning_rate, algorithm.epochs or algorithm.minibatches, or set "
            "algorithm.target_kl (0.02)",
        )
    ]


def sampler_mismatch(history: History) -> list[Finding]:
    """Log-probs of the sampler and of the update that differ on the same tokens."""
    config = history.config
    gap, ratio = history.training.late("sample_gap"), history.training.late("sample_ratio")
    clip = history.training.with_ratio("clip_fraction", "weight").late("clip_fraction")
    found = []
    if gap and gap.mean > GAP:
        found.append(f"|log π − log of the sampler| {gap.mean:.2g} nats a token ({gap.steps})")
    elif ratio and abs(math.log(max(ratio.mean, 1e-9))) > GAP:
        found.append(f"π over the sampler's probability {ratio.mean:.3g} ({ratio.steps})")
    once = is_on_policy(config) and on_policy(config).epochs * on_policy(config).minibatches == 1
    if once and clip and clip.mean > FIRST_CLIP:
        found.append(f"the only update on a rollout clips {clip.mean:.1%} ({clip.steps})")
    if not found:
        return []
    cut = _truncates(config)
    return [
        Finding(
            "sampler_mismatch",
            "warning" if cut else "problem",
            "; ".join(found) + (", with truncated sampling" if cut else ""),
            "set sample.top_k 0, top_p 1 and min_p 0, or algorithm.off_policy token"
            if cut
            else "set model.dtype float32, or algorithm.old_logp rescore with algorithm.off_policy "
            "token",
        )
    ]


def _truncates(config: Config) -> bool:
    sample = config.sample
    return bool(sample.top_k) or sample.top_p < 1 or sample.min_p > 0


def non_finite_updates(history: History) -> list[Finding]:
    """Updates that were left out because loss or gradient was not finite."""
    found, worst = [], 0.0
    for name in ("skipped", "critic/skipped"):
        known = history.training.known(name)
        share_I = known[name]
        if len(share_I) and share_I.max() > 0:
            worst = max(worst, float(share_I.mean()))
            steps = known.step_I[share_I > 0]
            who = "the critic's updates" if name.startswith("critic") else "updates"
            found.append(
                f"{share_I.mean():.1%} of {who} left out, in {len(steps)} of {len(share_I)} "
                f"iterations (steps {', '.join(map(str, steps[:5]))}{', …' * (len(steps) > 5)})"
            )
    if not found:
        return []
    return [
        Finding(
            "non_finite_updates",
            "problem" if worst > SKIPPED else "warning",
            "; ".join(found),
            "lower optim.learning_rate, set model.dtype float32, and look for extreme rewards at "
            "these steps in samples.jsonl",
        )
    ]

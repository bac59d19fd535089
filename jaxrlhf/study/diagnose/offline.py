"""Detectors for learning from rows: reward models, DPO and its relatives, SFT."""

import math
from dataclasses import replace

from jaxrlhf.algorithms.preference_losses import SMOOTHED_KINDS
from jaxrlhf.config import OfflineConfig, is_on_policy
from jaxrlhf.study.diagnose.finding import Finding
from jaxrlhf.study.diagnose.history import History

MIN_STEPS = 20
"""Updates before held-out accuracy is held against a run."""

MIN_PAIRS = 30
"""Held-out pairs without which accuracy is too coarse: its interval is ± 0.18 at 30."""

GAP = 0.15
"""Accuracy on training pairs above that on held-out pairs."""

LOSS_RISE = 0.1
"""Rise of the held-out loss, relative, above its least (a warning) or its start (a problem)."""

NLL_RISE, NLL_LOST = 0.1, 1.0
"""Nats a token that the chosen answers may lose: a tenth is a perplexity up by 10 %, one makes
each of their tokens e times less likely."""

MARGIN_LARGE, MARGIN_EXTREME = 20.0, 100.0
"""Margin at which the sigmoid's gradient is 1 − σ = 2e-9, and one that no such loss asks for."""

NO_SIGMOID = frozenset({"ipo", "hinge", "sppo_hard"})
"""Losses on pairs that are squares or straight: with margins of their own, in other units."""

BOUNDED_BY_SMOOTHING = SMOOTHED_KINDS - {"robust"}
"""Losses that are least at a finite margin under ``label_smoothing``; robust has none at all."""


def chance_accuracy(history: History) -> list[Finding]:
    """Held-out pairs told apart no better than by a coin, within the 95 % interval.

    Of pairs alone, and of all pairs of rankings: where answers have labels, one half is no chance.
    """
    kind = history.config.algorithm
    if not isinstance(kind, OfflineConfig) or kind.rows not in ("pairs", "ranked"):
        return []
    counted = "pairs" if kind.is_reward_model else "rows"  # DPO and its relatives: each is a pair
    known = history.evaluation.known("accuracy", counted).after(MIN_STEPS - 1)
    if not len(known.step_I):
        return []
    accuracy, pairs = float(known["accuracy"][-1]), float(known[counted][-1])
    if pairs < MIN_PAIRS:
        return []
    half_width = 1.96 * math.sqrt(0.25 / pairs)
    if accuracy > 0.5 + half_width:
        return []
    swapped = accuracy < 0.5 - half_width
    return [
        Finding(
            "chance_accuracy",
            "problem" if swapped or kind.is_reward_model else "warning",
            f"accuracy {accuracy:.3f} ± {half_width:.3f} on {pairs:.0f} held-out pairs "
            f"(step {known.step_I[-1]})" + (": below chance" if swapped else ""),
            "see whether chosen and rejected are swapped in data.train or data.eval"
            if swapped
            else "raise optim.learning_rate or steps; see whether chosen and rejected differ in "
            "data.train, and whether both are cut to the same beginning",
        )
    ]


def overfitting(history: History) -> list[Finding]:
    """Held-out loss that rises again, or accuracy that only training pairs have.

    Of the step whose parameters the run ends with: with ``eval.patience``, that of the least loss.
    """
    if is_on_policy(history.config):
        return []
    history = _until_best(history) if history.config.eval.patience else history
    found, severity = [], "warning"
    curve = history.evaluation.known("loss")
    loss, step_I = curve["loss"], curve.step_I
    if len(loss) >= 2:
        least = int(loss.argmin())
        if loss[-1] - loss[least] > LOSS_RISE * abs(loss[least]):
            found.append(
                f"held-out loss {loss[least]:.3g} (step {step_I[least]}) → {loss[-1]:.3g} "
                f"(step {step_I[-1]})"
            )
        if loss[-1] - loss[0] > LOSS_RISE * abs(loss[0]):
            severity = "problem"
    held_out = history.evaluation.known("accuracy", "rows").after(0)
    train = history.training.late("accuracy")
    if train and len(held_out.step_I) and held_out["rows"][-1] >= MIN_PAIRS:
        gap = train.mean - held_out["accuracy"][-1]
        if gap > max(GAP, 1.96 * math.sqrt(0.25 / held_out["rows"][-1])):
            found.append(
                f"accuracy {train.mean:.3f} in training ({train.steps}), "
                f"{held_out['accuracy'][-1]:.3f} held out (step {held_out.step_I[-1]})"
            )
    if not found:
        return []
    return [
        Finding(
            "overfitting",
            severity,
            "; ".join(found),
            "take fewer steps, more rows (data.train), a lower optim.learning_rate, or "
            "optim.weight_decay; adapters (model.lora) have less to overfit with",
        )
    ]


def _until_best(history: History) -> History:
    """Up to the evaluation whose parameters early stopping keeps."""
    known = history.evaluation.known("loss")
    if not len(known.step_I):
        return history
    best = known.step_I[known["loss"].argmin()]
    training, evaluation = history.training, history.evaluation
    return replace(
        history,
        training=training.where(training.step_I <= best),
        evaluation=evaluation.where(evaluation.step_I <= best),
    )


def chosen_logp_falls(history: History) -> list[Finding]:
    """The chosen answers, or the desirable ones, get less likely (arXiv:2402.13228).

    Of labelled rows ``nll`` sums over the desirable ones, ``desirable`` of the batch.
    """
    training = history.training
    if "desirable" in training.values:
        training = training.with_ratio("nll", "desirable")
    change = training.change("nll")
    if is_on_policy(history.config) or change is None or not change.rose:
        return []
    if change.rise < NLL_RISE:
        return []
    margin = training.change("margin")
    return [
        Finding(
            "chosen_logp_falls",
            "problem" if change.rise >= NLL_LOST else "warning",
            f"−log π of chosen answers {change} nats a token"
            + (f", while the margin went {margin}" if margin else ""),
            "set algorithm.sft_coef where there is one (dpo), raise algorithm.beta, lower "
            "optim.learning_rate, or start from a model trained on the chosen answers (sft)",
        )
    ]


def margin_explosion(history: History) -> list[Finding]:
    """Chosen minus rejected far beyond where a loss of the sigmoid asks for more."""
    late = history.training.late("margin")
    if is_on_policy(history.config) or late is None or late.mean <= MARGIN_LARGE:
        return []
    algorithm = history.config.algorithm
    kind = getattr(algorithm, "kind", "sigmoid")
    if kind in NO_SIGMOID:
        return []
    names = ["centre_coef", "score_l2"] + ["label_smoothing"] * (kind in BOUNDED_BY_SMOOTHING)
    options = [f"algorithm.{name}" for name in names if hasattr(algorithm, name)]
    return [
        Finding(
            "margin_explosion",
            "problem" if late.mean > MARGIN_EXTREME else "warning",
            f"margin {late.mean:.3g} ({late.steps})",
            "lower optim.learning_rate or steps"
            + (f", raise {' or '.join(options)}" if options else "")
            + "; see whether data.train gives the answer away (an end, a length)",
        )
    ]

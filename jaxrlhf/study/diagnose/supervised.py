"""Learning from rows: reward models, DPO and its relatives, SFT."""

import math

from jaxrlhf.algorithms.preference_losses import SMOOTHED_KINDS
from jaxrlhf.config import OfflineConfig, is_on_policy
from jaxrlhf.study.diagnose.history import Detector, History, Said

MIN_STEPS = 20  # updates before held-out accuracy is held against a run
MIN_PAIRS = 30  # held out, without which accuracy is too coarse: its interval is ± 0.18 at 30
ACCURACY_GAP = 0.15  # accuracy on training pairs above that on held-out pairs
LOSS_RISE = 0.1  # of the held-out loss, relative: above its least a warning, its start a problem

# Nats a token that the chosen answers may lose: a tenth is a perplexity up by 10 %, one makes each
# of their tokens e times less likely.
NLL_RISE, NLL_LOST = 0.1, 1.0

# Margin at which the sigmoid's gradient is 1 − σ = 2e-9, and one that no such loss asks for.
MARGIN_LARGE, MARGIN_EXTREME = 20.0, 100.0
# Losses on pairs that are squares or straight: with margins of their own, in other units.
NO_SIGMOID = frozenset({"ipo", "hinge", "sppo_hard"})
# Losses that are least at a finite margin under label_smoothing; robust has none at all.
BOUNDED_BY_SMOOTHING = SMOOTHED_KINDS - {"robust"}


def _interval(pairs: float) -> float:
    """Half the width of the 95 % interval of a coin's accuracy, 1.96·√(¼/n)."""
    return 1.96 * math.sqrt(0.25 / pairs)


@Detector
def chance_accuracy(history: History) -> Said:
    """Held-out pairs told apart no better than by a coin, within the 95 % interval.

    Of pairs alone, and of all pairs of rankings: where answers have labels, one half is no chance.
    """
    kind = history.config.algorithm
    if not isinstance(kind, OfflineConfig) or kind.rows not in ("pairs", "ranked"):
        return None
    counted = "pairs" if kind.is_reward_model else "rows"  # DPO and its relatives: each is a pair
    known = history.evaluation.known("accuracy", counted).after(MIN_STEPS - 1)
    if not len(known.step_I) or known[counted][-1] < MIN_PAIRS:
        return None
    accuracy, pairs = known["accuracy"][-1], known[counted][-1]
    half_width = _interval(pairs)
    if accuracy > 0.5 + half_width:
        return None
    swapped = accuracy < 0.5 - half_width
    return (
        swapped or kind.is_reward_model,
        f"accuracy {accuracy:.3f} ± {half_width:.3f} on {pairs:.0f} held-out pairs "
        f"(step {known.step_I[-1]})" + (": below chance" if swapped else ""),
        "see whether chosen and rejected are swapped in data.train or data.eval"
        if swapped
        else "raise optim.learning_rate or steps; see whether chosen and rejected differ in "
        "data.train, and whether both are cut to the same beginning",
    )


@Detector
def overfitting(history: History) -> Said:
    """Held-out loss that rises again, or accuracy that only training pairs have.

    Of the step whose parameters the run ends with: with ``eval.patience``, that of the least loss.
    """
    if is_on_policy(history.config):
        return None
    training, evaluation = history.training, history.evaluation
    curve = evaluation.known("loss")
    if history.config.eval.patience and len(curve.step_I):
        best = curve.step_I[curve["loss"].argmin()]
        training, evaluation, curve = (
            x.where(x.step_I <= best) for x in (training, evaluation, curve)
        )
    found, worse_than_start = [], False
    loss, step_I = curve["loss"], curve.step_I
    if len(loss) >= 2:
        least = int(loss.argmin())
        if loss[-1] - loss[least] > LOSS_RISE * abs(loss[least]):
            found.append(
                f"held-out loss {loss[least]:.3g} (step {step_I[least]}) → {loss[-1]:.3g} "
                f"(step {step_I[-1]})"
            )
        worse_than_start = loss[-1] - loss[0] > LOSS_RISE * abs(loss[0])
    # before the first update, nothing has been learnt by heart
    held_out, train = evaluation.known("accuracy", "rows").after(0), training.late("accuracy")
    if train and len(held_out.step_I) and held_out["rows"][-1] >= MIN_PAIRS:
        accuracy, rows = held_out["accuracy"][-1], held_out["rows"][-1]
        if train.mean - accuracy > max(ACCURACY_GAP, _interval(rows)):
            found.append(
                f"accuracy {train.mean:.3f} in training ({train.steps}), {accuracy:.3f} held out "
                f"(step {held_out.step_I[-1]})"
            )
    return (
        worse_than_start,
        found,
        "take fewer steps, more rows (data.train), a lower optim.learning_rate, or "
        "optim.weight_decay; adapters (model.lora) have less to overfit with",
    )


@Detector
def chosen_logp_falls(history: History) -> Said:
    """The chosen answers, or the desirable ones, get less likely (arXiv:2402.13228).

    Of labelled rows ``nll`` sums over the desirable ones, ``desirable`` of the batch.
    """
    training = history.training
    if "desirable" in training.values:
        training = training.with_ratio("nll", "desirable")
    change, margin = training.change("nll"), training.change("margin")
    if is_on_policy(history.config) or change is None or not change.rose or change.rise < NLL_RISE:
        return None
    return (
        change.rise >= NLL_LOST,
        f"−log π of chosen answers {change} nats a token"
        + (f", while the margin went {margin}" if margin else ""),
        "set algorithm.sft_coef where there is one (dpo), raise algorithm.beta, lower "
        "optim.learning_rate, or start from a model trained on the chosen answers (sft)",
    )


@Detector
def margin_explosion(history: History) -> Said:
    """Chosen minus rejected far beyond where a loss of the sigmoid asks for more."""
    algorithm, late = history.config.algorithm, history.training.late("margin")
    kind = getattr(algorithm, "kind", "sigmoid")
    if is_on_policy(history.config) or kind in NO_SIGMOID:
        return None
    if late is None or late.mean <= MARGIN_LARGE:
        return None
    # only what this algorithm has, and what makes a finite margin its loss's least
    names = ["centre_coef", "score_l2"] + ["label_smoothing"] * (kind in BOUNDED_BY_SMOOTHING)
    options = [f"algorithm.{name}" for name in names if hasattr(algorithm, name)]
    return (
        late.mean > MARGIN_EXTREME,
        f"margin {late.mean:.3g} ({late.steps})",
        "lower optim.learning_rate or steps"
        + (f", raise {' or '.join(options)}" if options else "")
        + "; see whether data.train gives the answer away (an end, a length)",
    )

"""One optimizer step as a pure function: an algorithm's loss, joined to a model, and its gradient.

``policy_loss``, ``critic_loss``, ``pairs_loss``, ``reward_model_loss``, ``sft_loss`` and
``distillation_loss`` make the loss(params, frozen, batch) that ``make_update`` differentiates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf.algorithms import Algorithm
from jaxrlhf.config import OptimConfig
from jaxrlhf.core.types import (
    Array,
    Batch,
    Outputs,
    Params,
    PreferenceBatch,
    TokenBatch,
    TrainState,
)
from jaxrlhf.models.quantise import MAGNITUDE
from jaxrlhf.models.transformer import Model, combine_params
from jaxrlhf.steps.divergence import Taught, divergence_to
from jaxrlhf.steps.packed import Piece, keeps_apart, pieces_of, read
from jaxrlhf.steps.score import forward, reward, score, token_scores, value

Metrics = dict[str, Array]
Loss = Callable[[Params, Any, Any], tuple[Array, Metrics]]
"""loss(params, frozen, batch) → (scalar, metrics), both additive over rows."""


def policy_loss(
    model: Model,
    algorithm: Algorithm,
    temperature: float = 1.0,
    first: int = 1,
    value_coef: float | None = None,
) -> Loss:
    """Join an algorithm's losses to a model: loss(params, frozen, batch) for ``make_update``.

    Args:
      temperature: that of the sampler.
      first: static; the first response column (P), which saves the prompt's logits.
      value_coef: if given, the head on the policy's trunk learns the value function too, with this
        weight.
    """
    entropy = "entropy" in algorithm.needs

    def loss(params: Params, frozen: Params | None, batch: Batch | Piece) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)

        def passed(token: Array, mask: Array, **rows: Any) -> Outputs:
            asked = {"entropy": entropy, "value": value_coef is not None, "lora": lora}
            return forward(model, weights, token, mask, temperature, **asked, **rows)

        outputs, batch = read(batch, passed, first=first)
        total, metrics = algorithm.loss(outputs, batch)
        if value_coef is not None:
            assert algorithm.value_loss is not None
            extra, more = algorithm.value_loss(outputs, batch)
            total, metrics = total + value_coef * extra, {**metrics, **more}
        return total, metrics

    return loss


def critic_loss(model: Model, algorithm: Algorithm, head_only: bool = False) -> Loss:
    """Join an algorithm's value loss to a critic.

    ``head_only`` holds the trunk still: the warm-up of a head that shares the policy's trunk.
    """

    def loss(params: Params, frozen: Params | None, batch: Batch | Piece) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        if head_only:
            # The head learns from hidden states as they are; nothing flows into what made them.
            trunk = {name: child for name, child in weights.items() if name != "head"}
            trunk, lora = jax.lax.stop_gradient((trunk, lora))
            weights = {**trunk, "head": weights["head"]}

        def passed(token: Array, mask: Array, segment_BT: Any = None, **_: Any) -> Outputs:
            value_BT = value(model, weights, token, mask, lora, segment_BT)
            return Outputs(logp_BT=jnp.zeros_like(value_BT), value_BT=value_BT)

        outputs, batch = read(batch, passed)
        assert algorithm.value_loss is not None
        return algorithm.value_loss(outputs, batch)

    return loss


def sft_loss(model: Model, algorithm: Algorithm) -> Loss:
    """Join an imitation loss to a model."""

    def loss(params: Params, frozen: Params | None, batch: TokenBatch) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        rows = (batch.token_BT, batch.attention_mask_BT)
        outputs = forward(model, weights, *rows, lora=lora, segment_BT=batch.segment_BT)
        return algorithm.loss(outputs, batch)

    return loss


def distillation_loss(
    model: Model, teacher: Model, algorithm: Algorithm, temperature: float = 1.0, first: int = 1
) -> Loss:
    """Join the divergence from a teacher to two models; ``frozen`` is a ``Taught``.

    The teacher reads the same rows in the same pass, and of either only hidden states are kept.

    Args:
      temperature: that of the sampler; both models' distributions are those at it.
      first: as in ``policy_loss``.
    """
    divergence = algorithm.divergence
    if divergence is None:
        raise ValueError("algorithm.divergence is None: there is nothing to learn from a teacher")

    def loss(params: Params, frozen: Taught, batch: TokenBatch | Piece) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen.base)

        def passed(token: Array, mask: Array, **rows: Any) -> Outputs:
            networks = model, weights, teacher, frozen.teacher
            given = token, mask, divergence, temperature, lora
            divergence_BT = divergence_to(*networks, *given, **rows)
            return Outputs(logp_BT=jnp.zeros_like(divergence_BT), divergence_BT=divergence_BT)

        outputs, batch = read(batch, passed, first=first)
        return algorithm.loss(outputs, batch)

    return loss


def reward_model_loss(model: Model, algorithm: Algorithm) -> Loss:
    """Join a reward-model loss to a model: scores [B, C] of the candidates, or of their tokens."""
    scores = candidate_token_scores if algorithm.reads == "steps" else candidate_scores

    def loss(
        params: Params, frozen: Params | None, batch: PreferenceBatch
    ) -> tuple[Array, Metrics]:
        return algorithm.loss(scores(model, params, frozen, batch), batch)

    return loss


def pairs_loss(
    model: Model, algorithm: Algorithm, temperature: float = 1.0, first: int = 1
) -> Loss:
    """Join a loss on whole answers to a model: log-probs [B, C, T] of the candidates."""

    def loss(
        params: Params, frozen: Params | None, batch: PreferenceBatch
    ) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        logp_BCT = candidate_logp(model, weights, batch, lora, temperature, first)
        return algorithm.loss(logp_BCT, batch)

    return loss


def candidate_scores(
    model: Model, params: Params, frozen: Params | None, batch: PreferenceBatch
) -> Array:
    """The reward of every candidate of a batch, [B, C]."""
    weights, lora = combine_params(params, frozen)
    score_R = reward(model, weights, *candidate_rows(batch), lora)
    return score_R.reshape(batch.token_BCT.shape[:2])


def candidate_token_scores(
    model: Model, params: Params, frozen: Params | None, batch: PreferenceBatch
) -> Array:
    """The head at every token of every candidate of a batch, [B, C, T]."""
    weights, lora = combine_params(params, frozen)
    return token_scores(model, weights, *candidate_rows(batch), lora).reshape(batch.token_BCT.shape)


def candidate_logp(
    model: Model,
    params: Params,
    batch: PreferenceBatch,
    lora: Params | None = None,
    temperature: float = 1.0,
    first: int = 1,
) -> Array:
    """log π of every token of every candidate, nats, [B, C, T]; see ``forward``."""
    logp_RT = score(model, params, *candidate_rows(batch), temperature, lora, first)
    return logp_RT.reshape(batch.token_BCT.shape)


def candidate_rows(batch: PreferenceBatch) -> tuple[Array, Array]:
    """Candidates as rows of one pass, tokens and attention mask [B·C, T]."""
    width = batch.token_BCT.shape[-1]
    return batch.token_BCT.reshape(-1, width), batch.attention_mask_BCT.reshape(-1, width)


def make_optimizer(config: OptimConfig, steps: int | None = None) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; eps is added outside the square root.

    Args:
      config: learning rate and its schedule, betas, weight decay (relative to the learning rate).
      steps: optimizer steps that the state is to take in the whole run, over which a schedule
        decays.

    Raises:
      ValueError: if the schedule decays and ``steps`` is not given.
    """
    rate = rate_schedule(config, steps)
    tx = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays
        ),
    )
    return tx if config.state_dtype == "float32" else keep_state_in(config.state_dtype, tx)


def rate_schedule(config: OptimConfig, steps: int | None = None) -> optax.Schedule:
    """rate(t), the learning rate of a state's optimizer step t (from 0), of T = ``steps``.

    With peak η and w = ``warmup``: η·(t + 1)/w while t < w; then, of u = (t − w)/(T − w): η if
    constant, η·(1 − u) if linear, η·(1 + cos πu)/2 if cosine, and 0 from T on where it decays.

    Raises:
      ValueError: as ``make_optimizer``.
    """
    if config.schedule != "constant" and steps is None:
        raise ValueError(f"optim.schedule={config.schedule}: make_optimizer needs steps")
    decay = max((steps or 0) - config.warmup, 1)
    peak = config.learning_rate
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(peak, decay),
    }[config.schedule]
    rise = optax.linear_schedule(peak / max(config.warmup, 1), peak, max(config.warmup - 1, 1))
    return optax.join_schedules([rise, after], [config.warmup]) if config.warmup else after


def at_position(state: TrainState, position: int) -> TrainState:
    """``state`` with its schedule at step ``position``: the t of the next step's rate(t).

    Nothing else of it changes: Adam's count, of which its bias correction is, goes on. The number
    is laid out where the old one was, so that no program is compiled anew; a process makes it for
    its own devices. A state without a schedule is returned as it is.
    """

    def moved(x: Any) -> Any:
        if not _is_schedule(x):
            return x
        count = np.asarray(position, x.count.dtype)
        put = jax.make_array_from_callback((), x.count.sharding, lambda _: count)
        return x._replace(count=put)

    return replace(state, opt_state=jax.tree.map(moved, state.opt_state, is_leaf=_is_schedule))


def _position(state: TrainState) -> Array:
    """t of the state's next step, as its schedule counts."""
    parts = jax.tree.leaves(state.opt_state, is_leaf=_is_schedule)
    return next(x.count for x in parts if _is_schedule(x))


def _is_schedule(x: Any) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)


def keep_state_in(dtype: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` with the float32 arrays of its state kept in ``dtype`` from one step to the next.

    A step computes in float32 and rounds the new state to nearest. In bfloat16, eight bits of
    precision, a moment m ← b·m + (1 − b)·x stays where it is once (1 − b)·|x − m| < 2⁻⁸·|m|: of a
    steady gradient Adam's first moment comes within 4 % with b1 = 0.9, and the root of the second
    within 4 % with b2 = 0.95. That, and no more, is lost: parameters and gradients stay float32.
    """

    def cast(state: Any, before: Any, after: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(after) if x.dtype == before else x, state)

    def init(params: Params) -> Any:
        return cast(tx.init(params), jnp.float32, dtype)

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, cast(state, dtype, jnp.float32), params)
        return updates, cast(state, jnp.float32, dtype)

    return optax.GradientTransformation(init, update)


def decays(params: Params) -> Any:
    """True for the weights that decay: not for norms, biases, sinks, heads and magnitudes."""
    spared = ("scale", "bias", "sinks", MAGNITUDE)

    def leaf(path: Any, _: Any) -> bool:
        names = [getattr(entry, "key", "") for entry in path]
        return "head" not in names and names[-1] not in spared

    return jax.tree_util.tree_map_with_path(leaf, params)


def make_update(
    tx: optax.GradientTransformation,
    loss: Loss,
    microbatches: int = 1,
    donate: bool = True,
    layout: Any = None,
    rate: optax.Schedule | None = None,
    packed: int | None = None,
    model: Model | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """update(state, batch, frozen=None) → (state, metrics), jitted.

    The gradient of ``loss`` with respect to ``state.params`` is summed over ``microbatches``
    pieces of the rows (the loss carries its normaliser in the batch's weights, so the split
    changes nothing but rounding) and applied by ``tx``. If it is not finite, parameters and
    optimizer stay as they are, ``state.skipped`` grows by one, and ``metrics["skipped"]`` is 1.

    Args:
      loss: loss(params, frozen, batch) → (scalar, metrics); both additive over rows. Metrics whose
        name ends in _max or _min are combined so.
      microbatches: static; must divide the number of rows.
      donate: the old state's buffers are reused. Whatever else holds them (a reference policy that
        is the same array) must be a copy.
      layout: shardings of the new state (sharding.train_state_shardings), so that it lies where
        the old one did; None leaves it to the compiler.
      rate: the schedule of ``tx`` (``rate_schedule``): ``metrics["learning_rate"]`` is the rate of
        this step. None leaves it out.
      packed: static; if given, the rows of a Batch or TokenBatch are packed, at most so many packed
        rows at once in place of ``microbatches``: ``loss`` is given a ``packed.Piece``, as those
        that ``policy_loss``, ``critic_loss`` and ``distillation_loss`` make can be.
      model: that of the loss, whose attention says whether rows may share a packed row
        (``packed.keeps_apart``); None: they may.

    ``frozen`` is an argument, not a closure: it is neither donated nor differentiated.
    """

    def update(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, Metrics]:
        def value_and_grad(piece: Any) -> tuple[Array, Metrics, Params]:
            (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
                state.params, frozen, piece
            )
            return total, metrics, grads

        if packed is not None:
            apart = model is not None and keeps_apart(model)
            total, metrics, grads = _accumulate(value_and_grad, *pieces_of(batch, packed, apart))
        elif microbatches == 1:
            total, metrics, grads = value_and_grad(batch)
        else:
            total, metrics, grads = _accumulate(value_and_grad, *_split(batch, microbatches))
        if rate is not None:
            metrics = {**metrics, "learning_rate": jnp.float32(rate(_position(state)))}
        return apply_gradients(tx, state, total, metrics, grads)

    return jax.jit(update, donate_argnums=(0,) if donate else (), out_shardings=(layout, None))


def _split(batch: Any, pieces: int) -> tuple[Callable[[Any], Any], int]:
    """(i → piece i, their number): B/pieces rows each, i, i + pieces, …, so that rows stay on their
    devices."""

    def leaf(x: Array) -> Array:
        if x.shape[0] % pieces:
            raise ValueError(f"{x.shape[0]} rows % microbatches={pieces}: must be 0")
        # [B] is split over devices in stretches: with the pieces as the inner axis none moves.
        return jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0)

    split = jax.tree.map(leaf, batch)
    return lambda i: jax.tree.map(lambda x: x[i], split), pieces


def _accumulate(value_and_grad: Any, piece: Callable[[Any], Any], pieces: int | Array) -> Any:
    """Sum over pieces, one at a time, from nothing, so that one piece's program is all there is."""
    if isinstance(pieces, int) and pieces == 1:
        return value_and_grad(piece(0))

    def add(i: Any, total: Any) -> Any:
        value, metrics, grads = value_and_grad(piece(i))
        both = {name: combine(name, total[1][name], metrics[name]) for name in metrics}
        return total[0] + value, both, jax.tree.map(jnp.add, total[2], grads)

    value, metrics, grads = jax.eval_shape(lambda: value_and_grad(piece(0)))
    start = {name: nothing(name, x) for name, x in metrics.items()}
    zeros = jax.tree.map(jnp.zeros_like, (value, grads))
    return jax.lax.fori_loop(0, pieces, add, (zeros[0], start, zeros[1]))


def nothing(name: str, x: Any) -> Array:
    """A metric of no rows, of x's shape and dtype: what ``combine`` takes no notice of."""
    least, most = -jnp.inf, jnp.inf
    if not jnp.issubdtype(x.dtype, jnp.floating):
        least, most = jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max
    return jnp.full(x.shape, {"_max": least, "_min": most}.get(name[-4:], 0), x.dtype)


def combine(name: str, left: Array, right: Array) -> Array:
    """How a metric of two parts becomes that of the whole: by its name."""
    if name.endswith("_max"):
        return jnp.maximum(left, right)
    return jnp.minimum(left, right) if name.endswith("_min") else left + right


def combine_updates(minibatches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of an iteration from those of its updates, which may still be on the device.

    Means, but the maximum of names that end in ``_max``, the minimum of those in ``_min``, and the
    last of ``learning_rate``; over the minibatches that have the name.
    """
    how = {"max": np.max, "min": np.min}
    columns: dict[str, list[Any]] = {}
    for metrics in jax.device_get(list(minibatches)):
        for name, x in metrics.items():
            columns.setdefault(name, []).append(x)
    whole = {
        name: float(how.get(name.rpartition("_")[2], np.mean)(column))
        for name, column in columns.items()
    }
    rates = {n: float(x[-1]) for n, x in columns.items() if n.endswith("learning_rate")}
    return whole | rates


def apply_gradients(
    tx: optax.GradientTransformation, state: TrainState, value: Array, metrics: Metrics, grads: Any
) -> tuple[TrainState, Metrics]:
    """The optimizer's step, unless the loss or a gradient is not finite."""
    norm = optax.tree.norm(grads)
    # One bad gradient through Adam would leave NaN in its moments for ever.
    finite = jnp.isfinite(norm) & jnp.isfinite(value)

    def step(_: None) -> tuple[Params, Any]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(finite, step, lambda _: (state.params, state.opt_state), None)
    taken = finite.astype(jnp.int32)
    state = TrainState(
        params=params,
        opt_state=opt_state,
        step=state.step + taken,
        skipped=(state.skipped + 1) * (1 - taken),
    )
    return state, {**metrics, "loss": value, "grad_norm": norm, "skipped": 1.0 - taken}

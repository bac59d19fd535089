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
from jaxrlhf.mesh.sharding import devices_in_mesh, platform
from jaxrlhf.models.quantise import MAGNITUDE
from jaxrlhf.models.transformer import Model, combine_params
from jaxrlhf.steps.balance import (
    Balance,
    Loss,
    Metrics,
    balanced,
    first_said,
    measured,
    with_sums,
)
from jaxrlhf.steps.divergence import Taught, divergence_to
from jaxrlhf.steps.packed import Piece, read
from jaxrlhf.steps.pieces import accumulate, cut
from jaxrlhf.steps.score import at_the_end, forward, score, value


def policy_loss(
    model: Model,
    algorithm: Algorithm,
    temperature: float = 1.0,
    first: int = 1,
    value_coef: float | None = None,
    routers: bool = False,
) -> Loss:
    """Join an algorithm's losses to a model: loss(params, frozen, batch) for ``make_update``.

    Args:
      temperature: that of the sampler.
      first: static; the first response column (P), which saves the prompt's logits.
      value_coef: if given, the head on the policy's trunk learns the value function too, with this
        weight.
      routers: the metrics hold what a mixture's routers say, for ``make_update`` with ``balance``.
    """
    entropy = "entropy" in algorithm.needs

    def loss(params: Params, frozen: Params | None, batch: Batch | Piece) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)

        def passed(token: Array, mask: Array, **rows: Any) -> Outputs:
            asked = {"entropy": entropy, "value": value_coef is not None, "lora": lora}
            asked["routers"] = routers
            return forward(model, weights, token, mask, temperature, **asked, **rows)

        outputs, batch = read(batch, passed, first=first)
        total, metrics = algorithm.loss(outputs, batch)
        if value_coef is not None:
            assert algorithm.value_loss is not None
            extra, more = algorithm.value_loss(outputs, batch)
            total, metrics = total + value_coef * extra, {**metrics, **more}
        return total, with_sums(metrics, outputs.routers)

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

        def passed(token: Array, mask: Array, segment_BT: Any = None, **more: Any) -> Outputs:
            # A critic of its own has routers of its own; the policy's trunk took what it took.
            expert_BTM = more.get("expert_BTM") if head_only else None
            value_BT = value(model, weights, token, mask, lora, segment_BT, expert_BTM)
            return Outputs(logp_BT=jnp.zeros_like(value_BT), value_BT=value_BT)

        outputs, batch = read(batch, passed)
        assert algorithm.value_loss is not None
        return algorithm.value_loss(outputs, batch)

    return loss


def sft_loss(model: Model, algorithm: Algorithm, routers: bool = False) -> Loss:
    """Join an imitation loss to a model; ``routers`` as in ``policy_loss``."""

    def loss(params: Params, frozen: Params | None, batch: TokenBatch) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        rows = (batch.token_BT, batch.attention_mask_BT)
        how = {"segment_BT": batch.segment_BT, "routers": routers}
        outputs = forward(model, weights, *rows, lora=lora, **how)
        total, metrics = algorithm.loss(outputs, batch)
        return total, with_sums(metrics, outputs.routers)

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


def reward_model_loss(model: Model, algorithm: Algorithm, routers: bool = False) -> Loss:
    """Join a reward-model loss to a model: scores [B, C] of the candidates, or of their tokens;
    ``routers`` as in ``policy_loss``."""
    tokens = algorithm.reads == "steps"

    def loss(
        params: Params, frozen: Params | None, batch: PreferenceBatch
    ) -> tuple[Array, Metrics]:
        scores, sums = _scored(model, params, frozen, batch, tokens, routers)
        total, metrics = algorithm.loss(scores, batch)
        return total, with_sums(metrics, sums)

    return loss


def pairs_loss(
    model: Model,
    algorithm: Algorithm,
    temperature: float = 1.0,
    first: int = 1,
    routers: bool = False,
) -> Loss:
    """Join a loss on whole answers to a model: log-probs [B, C, T] of the candidates; ``routers``
    as in ``policy_loss``."""

    def loss(
        params: Params, frozen: Params | None, batch: PreferenceBatch
    ) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        how = {"lora": lora, "first": first, "routers": routers}
        outputs = forward(model, weights, *candidate_rows(batch), temperature, **how)
        total, metrics = algorithm.loss(outputs.logp_BT.reshape(batch.token_BCT.shape), batch)
        return total, with_sums(metrics, outputs.routers)

    return loss


def candidate_scores(
    model: Model, params: Params, frozen: Params | None, batch: PreferenceBatch
) -> Array:
    """The reward of every candidate of a batch, [B, C]."""
    return _scored(model, params, frozen, batch)[0]


def candidate_token_scores(
    model: Model, params: Params, frozen: Params | None, batch: PreferenceBatch
) -> Array:
    """The head at every token of every candidate of a batch, [B, C, T]."""
    return _scored(model, params, frozen, batch, tokens=True)[0]


def _scored(
    model: Model,
    params: Params,
    frozen: Params | None,
    batch: PreferenceBatch,
    tokens: bool = False,
    routers: bool = False,
) -> tuple[Array, Any]:
    """Scores of candidates, or of their tokens, and a mixture's sums if they are asked for."""
    weights, lora = combine_params(params, frozen)
    token_RT, mask_RT = candidate_rows(batch)
    hidden, sums = model.apply(weights, token_RT, mask_RT, lora, routers=routers)
    if tokens:
        score, shape = model.scalar(weights, hidden), batch.token_BCT.shape
    else:
        score = at_the_end(model, weights, hidden, mask_RT)
        shape = batch.token_BCT.shape[:2]
    return score.reshape(shape), sums if routers else None


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
    """True for the weights that decay: not for norms, biases, sinks, heads and magnitudes, nor for
    what nothing trains."""
    spared = ("scale", "bias", "sinks", "layer_scale", "router_scale", "expert_scale", MAGNITUDE)

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
    balance: Balance | None = None,
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
      balance: of a mixture whose loss was made with ``routers``: what is added to it, over all rows
        of ``batch`` at once, and measured.

    ``frozen`` is an argument, not a closure: it is neither donated nor differentiated.
    """

    def update(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, Metrics]:
        piece, pieces = cut(batch, microbatches, packed, model)
        given = state.params, frozen
        whole = loss if balance is None else _balanced(loss, balance, given, piece, pieces)

        def value_and_grad(i: Any) -> tuple[Array, Metrics, Params]:
            (total, metrics), grads = jax.value_and_grad(whole, has_aux=True)(
                state.params, frozen, piece(i)
            )
            return total, metrics, grads

        total, metrics, grads = accumulate(value_and_grad, pieces)
        metrics = metrics if balance is None else measured(metrics)
        if rate is not None:
            metrics = {**metrics, "learning_rate": jnp.float32(rate(_position(state)))}
        return apply_gradients(tx, state, total, metrics, grads)

    return jax.jit(update, donate_argnums=(0,) if donate else (), out_shardings=(layout, None))


def _balanced(
    loss: Loss,
    balance: Balance,
    given: tuple[Params, Any],
    piece: Callable[[Any], Any],
    pieces: int | Array,
) -> Loss:
    """``loss`` of a piece with its part in the balance of all of them."""
    if not balance.asked or (isinstance(pieces, int) and pieces == 1):
        return balanced(loss, balance)
    first = first_said(loss, balance)

    def said(i: Any) -> tuple[Array, Metrics, tuple[()]]:
        return jnp.zeros(()), first(*given, piece(i)), ()

    return balanced(loss, balance, accumulate(said, pieces)[1])


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

    def stepped(old: Any) -> Any:
        updates, opt_state = tx.update(grads, old[1], old[0])
        return optax.apply_updates(old[0], updates), opt_state

    old = state.params, state.opt_state
    if platform() == "cpu" and devices_in_mesh() == 1:
        # Else a CPU copies the moments: it computes them with the parameters and for themselves.
        params, opt_state = jax.lax.cond(finite, stepped, lambda old: old, old)
    else:
        # Number by number, so that each stands where the old one stood: of a branch other devices
        # write all of parameters and optimizer a second time.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), stepped(old), old
        )
    taken = finite.astype(jnp.int32)
    state = TrainState(
        params=params,
        opt_state=opt_state,
        step=state.step + taken,
        skipped=(state.skipped + 1) * (1 - taken),
    )
    return state, {**metrics, "loss": value, "grad_norm": norm, "skipped": 1.0 - taken}

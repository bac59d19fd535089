"""What a network says of rows that exist: log-probs, entropies, values, rewards.

``score`` is a projection of ``forward``, ``value`` its shift and mask without the logits. The
update differentiates ``forward`` itself: what is scored and what is trained are the same code.
"""

import chex
import jax.numpy as jnp

from jaxrlhf.core.types import Array, Outputs, Params
from jaxrlhf.mesh.sharding import constrain
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.logp import token_logp


def forward(
    model: Model,
    params: Params,
    token_BT: Array,
    attention_mask_BT: Array,
    temperature: float | Array = 1.0,
    entropy: bool = False,
    value: bool = False,
    lora: Params | None = None,
    first: int = 1,
    segment_BT: Array | None = None,
    wanted_BT: Array | None = None,
    routers: bool = False,
    expert_BTM: Array | None = None,
) -> Outputs:
    """One pass over whole rows; the [B, T, V] logits never exist at once.

    ``logp_BT[:, t] = log softmax(logits_{t−1} / temperature)[token_t]``, likewise the entropy of
    that distribution and ``value_BT[:, t] = head(hidden_{t−1})``: all known before token t. They
    are 0 in column 0 and wherever the attention mask is 0 at t or t−1.

    Args:
      token_BT: int32 [B, T], padded on either side.
      attention_mask_BT: [B, T], 1 on real tokens.
      temperature: > 0; that of the sampler, if the result is to be its log-prob.
      entropy, value: also return these (value: from the head in ``params``).
      routers: also return what a mixture's routers say of all real tokens.
      lora: adapters, or None.
      first: static, ≥ 1; columns before it, a prompt's, are left at 0, which saves their logits.
      segment_BT: int32 [B, T]; rows are several rows one after the other, and this says which (from
        1; 0 on padding). Each is then as if it stood alone.
      wanted_BT: bool [B, T]; where it is False, log-probs and entropies are 0, and few logits are
        computed for nothing. Of packed rows it does what ``first`` does of others.
      expert_BTM: of a mixture, the experts that tokens are to take, a ``Rollout``'s; None: routers
        choose.

    Returns:
      Outputs, float32 [B, T] each; log-probs and entropies in nats.
    """
    chex.assert_rank([token_BT, attention_mask_BT], 2)
    chex.assert_equal_shape([token_BT, attention_mask_BT])
    given = token_BT, attention_mask_BT, lora, segment_BT
    hidden, sums = model.apply(params, *given, routers=routers, expert_BTM=expert_BTM)
    known, asked = predicted(attention_mask_BT, first, segment_BT, wanted_BT)
    some = None if wanted_BT is None else asked
    # Token t is predicted by the hidden state at t − 1.
    before = hidden[:, first - 1 : -1]
    rows, c = (before, *model.projection(params), token_BT[:, first:]), model.decoder
    logp, spread = token_logp(*rows, temperature, entropy, some, c.logit_scale, c.logit_softcap)
    return Outputs(
        logp_BT=in_full(logp, asked, first),
        entropy_BT=in_full(spread, asked, first) if entropy else None,
        value_BT=in_full(model.scalar(params, before), known, first) if value else None,
        routers=sums if routers else None,
    )


def predicted(
    attention_mask_BT: Array, first: int, segment_BT: Array | None, wanted_BT: Array | None
) -> tuple[Array, Array]:
    """bool, columns from ``first`` on: the tokens that have one of their row before them, and those
    of them that are wanted; see ``forward``."""
    real = attention_mask_BT != 0
    known = real[:, first:] & real[:, first - 1 : -1]
    if segment_BT is not None:
        known &= segment_BT[:, first:] == segment_BT[:, first - 1 : -1]
    return known, known if wanted_BT is None else known & wanted_BT[:, first:]


def in_full(x: Array, where: Array, first: int) -> Array:
    """A number a token, columns from ``first`` on → [B, T], 0 before them and where it is False."""
    return jnp.pad(jnp.where(where, x, 0.0), ((0, 0), (first, 0)))


def score(
    model: Model,
    params: Params,
    token_BT: Array,
    attention_mask_BT: Array,
    temperature: float | Array = 1.0,
    lora: Params | None = None,
    first: int = 1,
    expert_BTM: Array | None = None,
) -> Array:
    """log π(token t | tokens < t), nats, float32 [B, T]; see ``forward``."""
    rows, more = (token_BT, attention_mask_BT), {"first": first, "expert_BTM": expert_BTM}
    return forward(model, params, *rows, temperature, lora=lora, **more).logp_BT


def value(
    model: Model,
    params: Params,
    token_BT: Array,
    attention_mask_BT: Array,
    lora: Params | None = None,
    segment_BT: Array | None = None,
    expert_BTM: Array | None = None,
) -> Array:
    """V(tokens < t), reward units, float32 [B, T]; column 0 is 0; see ``forward``."""
    chex.assert_rank([token_BT, attention_mask_BT], 2)
    given = token_BT, attention_mask_BT, lora, segment_BT
    hidden, _ = model.apply(params, *given, expert_BTM=expert_BTM)
    real = attention_mask_BT != 0
    known = real[:, 1:] & real[:, :-1]
    if segment_BT is not None:
        known &= segment_BT[:, 1:] == segment_BT[:, :-1]
    return jnp.pad(jnp.where(known, model.scalar(params, hidden[:, :-1]), 0.0), ((0, 0), (1, 0)))


def reward(
    model: Model,
    params: Params,
    token_BT: Array,
    attention_mask_BT: Array,
    lora: Params | None = None,
) -> Array:
    """r(x, y): the scalar head at each row's last real token, float32 [B], reward units.

    The last real token is found by the attention mask, never by a padding id, so that a model
    whose padding is its end-of-sequence token is read in the right place, padded on either side.
    A row without a real token reads column 0 and means nothing.
    """
    chex.assert_rank([token_BT, attention_mask_BT], 2)
    hidden, _ = model.apply(params, token_BT, attention_mask_BT, lora)
    return at_the_end(model, params, hidden, attention_mask_BT)


def at_the_end(model: Model, params: Params, hidden: Array, attention_mask_BT: Array) -> Array:
    """``reward`` of rows whose hidden states [B, T, D] are known."""
    last_BD = hidden[jnp.arange(hidden.shape[0]), last_token(attention_mask_BT)]
    return model.scalar(params, constrain(last_BD, ("batch", "activation")))


def token_scores(
    model: Model,
    params: Params,
    token_BT: Array,
    attention_mask_BT: Array,
    lora: Params | None = None,
    segment_BT: Array | None = None,
) -> Array:
    """The scalar head at every token, unshifted: float32 [B, T]; ``reward`` is its last column's.

    Process reward models read it at the last token of each step. Columns without a real token mean
    nothing. ``segment_BT`` as in ``forward``.
    """
    chex.assert_rank([token_BT, attention_mask_BT], 2)
    hidden, _ = model.apply(params, token_BT, attention_mask_BT, lora, segment_BT=segment_BT)
    return model.scalar(params, hidden)


def last_token(attention_mask_BT: Array) -> Array:
    """Column of each row's last 1, int32 [B]."""
    columns = jnp.arange(attention_mask_BT.shape[1])
    return jnp.max(jnp.where(attention_mask_BT != 0, columns, 0), axis=1)

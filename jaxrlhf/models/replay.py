"""Router replay: the experts that the sampler took, kept to be taken again where its tokens are
scored and learnt from (rollout routing replay, R3; arXiv:2510.11370).

Sampling and scoring round differently, and a router's near ties then go another way: a token is
scored by other experts than those that it was drawn with. Only the choice is replayed. The experts'
weights are those of the router as it is now, and its gradient flows through them.

Kept are k ids a layer and token, a byte each of up to 255 experts: of eight experts in 48 layers
384 bytes a token. M, their axis, has the k of layer 0, then those of layer 1, and so on. Where no
choice is known, as of a response's last token, which the sampler never reads, the largest number of
the dtype stands, which is nobody's id: there a router chooses by itself.
"""

import jax.numpy as jnp

from jaxrlhf.config import DecoderConfig
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import constrain


def compact(decoder: DecoderConfig, expert: Array) -> Array:
    """Ids in as few bytes as hold them and nobody's: uint8, or uint16 from 256 experts on."""
    assert decoder.moe is not None
    return expert.astype(jnp.uint8 if decoder.moe.experts < 256 else jnp.uint16)


def nobody(expert: Array) -> int:
    """The id that stands among these where no choice is known."""
    return int(jnp.iinfo(expert.dtype).max)


def unknown(decoder: DecoderConfig, shape: tuple[int, ...]) -> Array:
    """No choice at all, [*shape, M]."""
    assert decoder.moe is not None
    none = compact(decoder, jnp.zeros((), jnp.int32))
    return jnp.full((*shape, decoder.layers * decoder.moe.per_token), nobody(none), none.dtype)


def where_known(known: Array, expert: Array) -> Array:
    """Ids [..., M] where ``known`` [...] is not 0, and nobody's elsewhere."""
    return jnp.where((known != 0)[..., None], expert, nobody(expert))


def joined(expert: Array) -> Array:
    """Ids of the layers [L, ..., k] → [..., M]."""
    each = jnp.moveaxis(expert, 0, -2)
    return each.reshape(*each.shape[:-2], -1)


def by_layer(decoder: DecoderConfig, expert_BTM: Array) -> Array:
    """[B, T, M] → [L, B, T, k], laid out as tokens are."""
    each = expert_BTM.reshape(*expert_BTM.shape[:2], decoder.layers, -1)
    return constrain(jnp.moveaxis(each, 2, 0), (None, "batch", "length", None))

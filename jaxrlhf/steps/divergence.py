"""How far a model's next-token distributions are from a teacher's, exactly, some columns at a time.

Of both models' hidden states, at no time of all their logits; in the backward pass these are
computed again, and only the student's have a gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.core.types import Array, Params
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.columns import Projection, cut, gathered, logits_of, numbers, pulled_back
from jaxrlhf.steps.score import in_full, predicted

Divergence = Callable[[Array, Array], Array]
"""(logits, the teacher's logits) [..., V] → [...], such as ``generalised_jsd`` with its β."""


class Taught(NamedTuple):
    """What a student is trained on top of and towards: ``frozen`` of its loss."""

    base: Params | None
    """The weights under adapters, or None."""
    teacher: Params


class Side(NamedTuple):
    """One model's way to its logits."""

    hidden_BTD: Array
    """In the compute dtype; D of each model is its own."""
    weight: Array
    """[D, V] or [V, D], V the same of both."""
    to: Projection


class How(NamedTuple):
    """What is static of a call."""

    student: Projection
    teacher: Projection
    divergence: Divergence
    temperature: float


class Saved(NamedTuple):
    """What the gradient reads again; hidden states in pieces, weights ``gathered``."""

    hidden: Array
    weight: Array
    theirs: Array
    """The teacher's hidden states."""
    their_weight: Array
    trained: Array | None
    """None if nobody asks for the weight's gradient."""
    used: Array | None


def divergence_to(
    model: Model,
    params: Params,
    teacher: Model,
    teacher_params: Params,
    token_BT: Array,
    attention_mask_BT: Array,
    divergence: Divergence,
    temperature: float = 1.0,
    lora: Params | None = None,
    first: int = 1,
    segment_BT: Array | None = None,
    wanted_BT: Array | None = None,
) -> Array:
    """D(teacher, student) of the distributions of token t given the tokens before it, [B, T], nats.

    Of logits divided by the temperature, of either model. 0 wherever ``forward`` is. No gradient
    flows into the teacher.

    Args:
      teacher: any model of the same vocabulary.
      divergence: static.
      temperature: static, > 0; that of the sampler.
      token_BT, attention_mask_BT, lora, first, segment_BT, wanted_BT: as in ``forward``.
    """
    chex.assert_rank([token_BT, attention_mask_BT], 2)
    chex.assert_equal_shape([token_BT, attention_mask_BT])

    def side(model: Model, params: Params, lora: Params | None = None) -> Side:
        given = params, token_BT, attention_mask_BT, lora
        hidden, _ = model.apply(*given, segment_BT=segment_BT)
        weight, axis = model.projection(params)
        to = Projection(axis, model.decoder.logit_scale, model.decoder.logit_softcap)
        # Token t is predicted by the hidden state at t − 1.
        return Side(hidden[:, first - 1 : -1], weight, to)

    _, asked = predicted(attention_mask_BT, first, segment_BT, wanted_BT)
    some = None if wanted_BT is None else asked
    ours, theirs = side(model, params, lora), side(teacher, teacher_params)
    return in_full(token_divergence(ours, theirs, divergence, temperature, some), asked, first)


def token_divergence(
    student: Side,
    teacher: Side,
    divergence: Divergence,
    temperature: float = 1.0,
    wanted_BT: Array | None = None,
) -> Array:
    """divergence(z, z′) of the logits z = h·W/temperature of two models, float32 [B, T].

    Args:
      student: gets a gradient; ``teacher`` gets none.
      divergence: static.
      temperature: static, > 0.
      wanted_BT: bool; anything may stand where it is False (``columns.cut``).
    """
    vocab = student.weight.shape[1 - student.to.axis]
    # of two models at once
    parts = cut(student.hidden_BTD.shape[:2], 2 * vocab, wanted_BT)
    hidden, theirs = (parts.split(x.hidden_BTD, "activation") for x in (student, teacher))
    how = How(student.to, teacher.to, divergence, temperature)
    found: Any = _in_pieces(how, hidden, student.weight, theirs, teacher.weight, parts.used)
    return parts.joined(found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_pieces(
    how: How, hidden: Array, weight: Array, theirs: Array, their_weight: Array, used: Array | None
) -> Array:
    """``token_divergence`` of pieces; of the first ``used``, and 0 of the others."""
    return _forward(how, hidden, theirs, *_whole(how, hidden, weight, theirs, their_weight), used)


def _whole(how: How, hidden: Any, weight: Any, theirs: Any, their_weight: Any) -> tuple[Any, Any]:
    ours = gathered(weight, how.student.axis, hidden.dtype)
    return ours, gathered(their_weight, how.teacher.axis, theirs.dtype)


def _forward(
    how: How, hidden: Array, theirs: Array, weight: Array, their_weight: Array, used: Array | None
) -> Array:
    def work(item: tuple[Array, Array]) -> tuple[Array]:
        hidden, theirs = item
        z = logits_of(hidden, weight, how.student, how.temperature)
        return (how.divergence(z, _teacher_logits(how, theirs, their_weight)),)

    return numbers(used, 1, (hidden, theirs), work)[0]


def _teacher_logits(how: How, theirs: Array, their_weight: Array) -> Array:
    return logits_of(theirs, their_weight, how.teacher, how.temperature)


def _keep(how: How, hidden: Any, weight: Any, theirs: Any, their_weight: Any, used: Any) -> Any:
    given = (x.value for x in (hidden, weight, theirs, their_weight))
    whole = _whole(how, *given)
    used = None if used is None else used.value
    found = _forward(how, hidden.value, theirs.value, *whole, used)
    trained = jnp.zeros(()) if weight.perturbed else None
    return found, Saved(hidden.value, whole[0], theirs.value, whole[1], trained, used)


def _backward(how: How, saved: Saved, given: Array) -> Any:
    def slope(z: Array, item: tuple[Array, Array]) -> Array:
        theirs, up = item
        logits = _teacher_logits(how, theirs, saved.their_weight)
        return jax.vjp(lambda z: how.divergence(z, logits), z)[1](up)[0]

    network = how.student, saved.hidden, saved.weight, how.temperature, saved.trained is not None
    found = pulled_back(*network, saved.used, (saved.theirs, given), slope)
    return found.hidden, found.weight, None, None, None


_in_pieces.defvjp(_keep, _backward, symbolic_zeros=True)

"""Keeping the experts of a mixture busy: what is added to a loss, and what is measured.

A loss that is made with ``routers`` has among its metrics what the model's routers say, summed over
real tokens (``RouterSums``). Of the sums over a whole minibatch, with f_e the share of tokens that
take expert e, and P_e its mean probability, over tokens and layers:

- load balancing (arXiv:2101.03961; ``router_aux_loss_coef`` of transformers): E·Σ_e f_e·P_e, which
  is k, the experts that a token takes, where all have the same load, and E where k have all of it;
- router z-loss (arXiv:2202.08906): the mean of (log Σ exp logits)², which keeps logits small.

f_e is a count, without a gradient. The product is of the minibatch, and no sum over its pieces: so
where there are several, a forward pass over all of them counts first, and each piece then adds its
part. The result does not depend on how a minibatch is split, over pieces or devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.core.types import Array, Params, RouterSums

Metrics = dict[str, Any]
Loss = Callable[[Params, Any, Any], tuple[Array, Metrics]]
"""loss(params, frozen, batch) → (scalar, metrics), both additive over rows."""

ROUTERS = "routers"
"""Among a loss's metrics: its ``RouterSums``."""


class Balance(NamedTuple):
    """What both are multiplied by."""

    aux: float = 0.0
    z: float = 0.0

    @property
    def asked(self) -> bool:
        """Whether anything is added to a loss."""
        return self.aux > 0 or self.z > 0


def with_sums(metrics: Metrics, sums: RouterSums | None) -> Metrics:
    """A loss's metrics with the sums, if there are any."""
    return metrics if sums is None else {**metrics, ROUTERS: sums}


def first_said(loss: Loss, balance: Balance) -> Callable[..., Metrics]:
    """(params, frozen, piece) → what has to be known of all pieces before any has its gradient."""

    def said(*given: Any) -> Metrics:
        sums = loss(*given)[1][ROUTERS]
        return {"tokens": sums.tokens} | ({"chosen_LE": sums.chosen_LE} if balance.aux else {})

    return said


def balanced(loss: Loss, balance: Balance, said: Metrics | None = None) -> Loss:
    """``loss`` with the parts of a piece in both added.

    Args:
      said: ``first_said`` of all pieces, added up; None: there is but one.
    """
    if not balance.asked:
        return loss

    def whole(*given: Any) -> tuple[Array, Metrics]:
        total, metrics = loss(*given)
        sums = metrics[ROUTERS]
        known = said or {"tokens": sums.tokens, "chosen_LE": sums.chosen_LE}
        known = jax.lax.stop_gradient(known)
        if balance.aux:
            parts = sums.replace(chosen_LE=known["chosen_LE"], tokens=known["tokens"])
            total += balance.aux * load_balance(parts)
        if balance.z:
            total += balance.z * z_loss(sums.replace(tokens=known["tokens"]))
        return total, metrics

    return whole


def load_balance(sums: RouterSums) -> Array:
    """E·Σ_e f_e·P_e, as ``load_balancing_loss_func`` of transformers has it: over all layers."""
    layers, experts = sums.chosen_LE.shape
    product = (sums.chosen_LE.sum(0) * (sums.chance_LE.sum(0) / _rows(sums, layers))).sum()
    return experts * product / _rows(sums, layers)


def z_loss(sums: RouterSums) -> Array:
    """The mean of (log Σ exp logits)² over tokens and layers."""
    return sums.square_L.sum() / _rows(sums, len(sums.square_L))


def _rows(sums: RouterSums, layers: int) -> Array:
    return jnp.maximum(sums.tokens * layers, 1)


def measured(metrics: Metrics) -> Metrics:
    """The metrics of a minibatch, with figures in the place of the sums."""
    sums = metrics[ROUTERS]
    layers = len(sums.square_L)
    load_LE = sums.chosen_LE / jnp.maximum(sums.chosen_LE.mean(1, keepdims=True), 1e-30)
    figures = {
        "router_aux_loss": load_balance(sums),
        "router_z_loss": z_loss(sums),
        "router_entropy": sums.entropy_L.sum() / _rows(sums, layers),
        "router_load_max": load_LE.max(),
    }
    return {name: x for name, x in metrics.items() if name != ROUTERS} | figures

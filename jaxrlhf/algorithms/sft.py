"""Supervised fine-tuning."""

import chex
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.config.algorithms import SFTConfig
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array, Outputs, TokenBatch


def sft(config: SFTConfig) -> Algorithm:
    """−Σ weight·log π over the tokens to imitate."""
    del config

    def loss(outputs: Outputs, batch: TokenBatch) -> tuple[Array, Metrics]:
        """Negative log-likelihood, nats a token.

        Args:
          outputs: its ``logp_BT`` [B, T]; columns of weight 0 are never read.
          batch: its ``weight_BT`` [B, T], 0 on prompt and padding.

        Returns:
          The loss, and the sums ``weight`` and ``tokens`` (how many were trained on).
        """
        chex.assert_rank([outputs.logp_BT, batch.weight_BT], 2)
        chex.assert_equal_shape([outputs.logp_BT, batch.weight_BT])
        logp_BT = masked.fill(outputs.logp_BT, batch.weight_BT)
        tokens = (batch.weight_BT != 0).sum().astype(jnp.float32)
        metrics = {"weight": batch.weight_BT.sum(), "tokens": tokens}
        return -(batch.weight_BT * logp_BT).sum(), metrics

    return Algorithm(targets=None, loss=loss)

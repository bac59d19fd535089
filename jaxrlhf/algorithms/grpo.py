"""Group-relative policy optimisation and its kin: which advantage, ratio and clip sets each apart.

All compare a response with the other samples of its prompt, and have no critic.
"""

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Algorithm, Loss
from jaxrlhf.algorithms.groups import batch_advantage, each_advantage, group_advantage
from jaxrlhf.algorithms.on_policy import (
    Credit,
    Priced,
    groups,
    needs,
    ratio_loss,
    spread,
    targets_of,
)
from jaxrlhf.algorithms.policy_losses import cispo_loss, ppo_policy_loss
from jaxrlhf.config.algorithms import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
)
from jaxrlhf.core.types import Array


def grpo(config: GRPOConfig) -> Algorithm:
    """PPO's loss on (R − mean) / (std + ε) of the prompt's samples (arXiv:2402.03300).

    The paper's KL is a k3 term in the loss (``kl_in: loss``); its gradient is that of the other
    direction (see ``kl_loss``). With ``kl_in: reward``, and k1 as by default there, the optimum is
    that of the KL-regularised objective.
    """
    return group_relative(config)


def dr_grpo(config: DrGRPOConfig) -> Algorithm:
    """PPO's loss on R − mean of the prompt's samples, summed over tokens (arXiv:2503.20783).

    Not divided by the group's standard deviation, which favours questions that are nearly always or
    nearly never answered, and with ``aggregation: fixed`` not by the response's own length, which
    favours long wrong answers.
    """
    return group_relative(config, scale="none")


def dapo(config: DAPOConfig) -> Algorithm:
    """GRPO with ``clip_high`` > ``clip_low`` and token means (arXiv:2503.14476).

    The loop samples on until data.batch_size groups have a signal (``rounds``); ``overlong_buffer``
    and ``mask_truncated`` are the paper's soft penalty and filter for long responses.
    """
    return group_relative(config)


def gspo(config: GSPOConfig) -> Algorithm:
    """GRPO with one ratio a response, the geometric mean over its tokens (arXiv:2507.18071).

    Clipping then takes or leaves whole responses.
    """
    return group_relative(config, ratio="sequence")


def cispo(config: CISPOConfig) -> Algorithm:
    """−Σ weight·sg(clip(ρ))·A·log π, A as in GRPO (MiniMax-M1; arXiv:2506.13585).

    Where PPO's clip stops a token's gradient, here only its weight is bounded.
    """
    return group_relative(config, cispo_loss)


def group_relative(
    config: GRPOConfig | DrGRPOConfig | DAPOConfig | GSPOConfig | CISPOConfig,
    policy_loss: Loss = ppo_policy_loss,
    scale: Literal["std", "none"] = "std",
    **options: Any,
) -> Algorithm:
    """A policy loss of ``group_advantage`` of the returns, on every token alike.

    With ``normalise: each`` it is that of each source's scores, weighted, summed, and normalised
    over the rollout; ``targets`` is then given score_BS, [B, S], not finite where a source does not
    apply, and weight_S.
    """
    each = config.normalise == "each"

    def credit(priced: Priced, *scores: Array, **named: Array) -> Credit:
        rollout = priced.rollout
        return_QG, known_QG = groups(priced.returns(), rollout), groups(priced.valid_B, rollout)
        if each:
            advantage_QG = summed(known_QG, *scores, **named)
        else:
            advantage_QG = group_advantage(return_QG, known_QG, scale)
        # all rewards of such a group are equal, so it teaches nothing
        silent = (jnp.abs(advantage_QG).max(1) == 0).mean(dtype=jnp.float32)
        if each:
            advantage_QG = batch_advantage(advantage_QG, known_QG)
        advantage_BT = spread(advantage_QG.reshape(-1), priced.mask_BT)
        return Credit(advantage_BT, metrics={"groups_without_signal": silent})

    def summed(known_QG: Array, score_BS: Array, weight_S: Array) -> Array:
        return each_advantage(score_BS.T.reshape(-1, *known_QG.shape), weight_S, known_QG)

    clipped = partial(policy_loss, clip_low=config.clip_low, clip_high=config.clip_high, **options)
    wanted = needs(config, *(["scores"] if each else []))
    return Algorithm(targets_of(config, credit), ratio_loss(config, clipped), needs=wanted)

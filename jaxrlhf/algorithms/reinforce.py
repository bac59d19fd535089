"""REINFORCE and its kin: no critic, each with a baseline of its own."""

from functools import partial

import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.gae import to_go
from jaxrlhf.algorithms.groups import rloo_advantage
from jaxrlhf.algorithms.on_policy import (
    Credit,
    Priced,
    gradient_loss,
    groups,
    needs,
    ratio_loss,
    score_penalty,
    spread,
    targets_of,
)
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.algorithms import (
    OnPolicyConfig,
    ReinforceConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
)
from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array, Batch, Rollout


def reinforce(config: ReinforceConfig) -> Algorithm:
    """Loss −Σ_t log π(a_t|s_t)·(G_t − b), G_t = Σ_{s≥t} γ^{s−t} r_s (Williams 1992).

    b is 0, or with ``baseline: mean`` the mean over responses of the return of their first token: a
    constant, so the gradient stays unbiased up to the 1/B that a response has in its own baseline.
    """

    def credit(priced: Priced) -> Credit:
        mask_BT = priced.mask_BT
        advantage_BT = to_go(priced.reward_BT, mask_BT, config.gamma)
        if config.baseline == "mean":
            # not column P: where a tool wrote the first tokens, the policy's first one comes later
            first_BT = (mask_BT != 0) & (jnp.cumsum(mask_BT != 0, axis=1) == 1)
            first_B = masked.sum(advantage_BT, first_BT, axis=1)
            baseline = masked.mean(first_B, mask_BT.any(1))
            advantage_BT = masked.fill(advantage_BT - baseline, mask_BT)
        return Credit(advantage_BT)

    return Algorithm(targets_of(config, credit), gradient_loss(config), needs=needs(config))


def reinforce_pp(config: ReinforcePPConfig) -> Algorithm:
    """Returns to go, whitened over all tokens of the rollout, in PPO's loss (arXiv:2501.03262)."""

    def credit(priced: Priced) -> Credit:
        return_BT = to_go(priced.reward_BT, priced.mask_BT)
        return Credit(masked.whiten(return_BT, priced.mask_BT))

    clipped = partial(ppo_policy_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    return Algorithm(targets_of(config, credit), ratio_loss(config, clipped), needs=needs(config))


def rloo(config: RLOOConfig) -> Algorithm:
    """Loss −log π(y|x)·(R − mean R of the prompt's other samples) (arXiv:2402.14740).

    A response is one action: R is its score minus β·Σ KL, credited to every token alike.
    """

    def credit(priced: Priced) -> Credit:
        rollout = priced.rollout
        return_QG, known_QG = groups(priced.returns(), rollout), groups(priced.valid_B, rollout)
        advantage_B = rloo_advantage(return_QG, known_QG).reshape(-1)
        return Credit(spread(advantage_B, priced.mask_BT))

    return Algorithm(targets_of(config, credit), gradient_loss(config), needs=needs(config))


def remax(config: ReMaxConfig) -> Algorithm:
    """REINFORCE with the score of the policy's own greedy response subtracted (arXiv:2310.10505).

    The loop samples that response once a prompt: ``baseline_B`` [B], see ``greedy_baseline``, the
    same in all samples of a prompt. A baseline that depends on the prompt alone leaves the gradient
    unbiased. Rows whose baseline is not finite are left out, as those without a reward are.
    """

    def credit(priced: Priced, baseline_B: Array) -> Credit:
        advantage_BT = to_go(priced.reward_BT, priced.mask_BT) - baseline_B[:, None]
        return Credit(masked.fill(advantage_BT, priced.mask_BT))

    compared = targets_of(config, credit)

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
        baseline_B: Array | None = None,
    ) -> tuple[Batch, Metrics]:
        if baseline_B is None:
            raise InputError("baseline_B=None: remax needs the scores of the greedy responses")
        # before the rollout is priced, so that such a row has no part in any mean either
        valid_B = (valid_B != 0) & jnp.isfinite(baseline_B)
        return compared(
            rollout, ref_logp_BT, reward_B, valid_B, coefficients, baseline_B=baseline_B
        )

    return Algorithm(targets, gradient_loss(config), needs=needs(config, "greedy"))


def greedy_baseline(config: OnPolicyConfig, greedy: Rollout, reward_Q: Array, n: int) -> Array:
    """The scores of the greedy responses less their penalties, as samples pay them; float32 [Q·n].

    Args:
      greedy: a response to each of Q prompts.
      reward_Q: their scores; NaN where there is none.
      n: samples of each prompt that are compared with them.
    """
    return jnp.repeat(reward_Q.astype(jnp.float32) - score_penalty(config, greedy), n)

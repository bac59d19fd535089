"""What is learnt: arrays in, arrays out. No model, no data, no device; imports core and config.

``algorithm`` is the record that each algorithm is. The formulas: ``kl`` (estimators, the penalty,
β), ``gae`` (advantages and loss of a critic), ``groups`` (advantages of samples of one prompt),
``policy_losses`` (clipped and plain), ``preference_losses``, ``optimal_policy`` (the optimum in
closed form). ``on_policy`` is what all that sample share. The records, by family: ``ppo``,
``reinforce``, ``grpo``, ``dpo``, ``gkd``, ``reward_models``. Read ``ppo`` first: it is
the longest one.
"""

from collections.abc import Callable
from typing import Any

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics, reweight, sft
from jaxrlhf.algorithms.dpo import bco, cpo, dpo, kto, online_dpo, orpo, simpo
from jaxrlhf.algorithms.gae import explained_variance, gae, value_loss
from jaxrlhf.algorithms.gkd import generalised_jsd, gkd
from jaxrlhf.algorithms.groups import (
    batch_advantage,
    each_advantage,
    group_advantage,
    rloo_advantage,
)
from jaxrlhf.algorithms.grpo import cispo, dapo, dr_grpo, grpo, gspo
from jaxrlhf.algorithms.kl import (
    KL_CONTROLLERS,
    adaptive_kl,
    bounded_exp,
    fixed_kl,
    kl_estimate,
    kl_kind,
    kl_loss,
    token_rewards,
)
from jaxrlhf.algorithms.on_policy import importance_weights
from jaxrlhf.algorithms.optimal_policy import (
    best_of_n_kl,
    best_of_n_logp,
    implicit_reward,
    importance_resample,
    log_z_estimate,
    optimal_policy,
    resampling_kl,
)
from jaxrlhf.algorithms.policy_losses import (
    cispo_loss,
    entropy_bonus,
    policy_gradient_loss,
    ppo_policy_loss,
)
from jaxrlhf.algorithms.ppo import a2c, ppo
from jaxrlhf.algorithms.preference_losses import (
    PREFERENCE_KINDS,
    bco_loss,
    bco_shift,
    cpo_loss,
    kto_loss,
    orpo_loss,
    preference_loss,
    simpo_loss,
)
from jaxrlhf.algorithms.reinforce import greedy_baseline, reinforce, reinforce_pp, remax, rloo
from jaxrlhf.algorithms.reward_models import (
    aggregate_steps,
    ensemble_score,
    listwise_reward_loss,
    listwise_reward_model,
    pairwise_reward_loss,
    pointwise_reward_loss,
    pointwise_reward_model,
    process_reward_loss,
    process_reward_model,
    ranked_accuracy,
    ranked_pairs_loss,
    reward_model,
)

ALGORITHMS: dict[str, Callable[[Any], Algorithm]] = {
    make.__name__: make
    for make in (
        *(ppo, a2c, reinforce, remax, rloo, reinforce_pp),
        *(grpo, dr_grpo, dapo, gspo, cispo, online_dpo, gkd),
        *(reward_model, listwise_reward_model, pointwise_reward_model, process_reward_model),
        *(sft, dpo, orpo, simpo, cpo, kto, bco),
    )
}
"""``ALGORITHMS[config.algorithm.name](config.algorithm)`` is the algorithm of a run."""

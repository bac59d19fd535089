"""Six responses to two prompts, small enough to price by hand, and batches of the shared rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config.algorithms import (
    A2CConfig,
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    PPOConfig,
    ReinforceConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
)
from jaxrlhf.core import masked
from jaxrlhf.core.types import Batch, Outputs, PreferenceBatch, Rollout

POLICIES = {
    config.name: config
    for config in (
        PPOConfig(),
        A2CConfig(),
        ReinforceConfig(),
        ReMaxConfig(),
        RLOOConfig(),
        ReinforcePPConfig(),
        GRPOConfig(),
        DrGRPOConfig(),
        DAPOConfig(),
        GSPOConfig(),
        CISPOConfig(),
    )
}
"""All that learn from a Batch of samples, as they come."""

MASK = jnp.array(
    [[0.0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
)
"""The prompt is in column 0, and up to 3 tokens follow."""

KNOWN = MASK.at[4].set(0)
"""The same without the row that has no reward."""

LOGP = jnp.array(
    [
        [0, -1, -1, -1],
        [0, -2, -1, 0],
        [0, -1, -2, -1],
        [0, -0.5, 0, 0],
        [0, -1, -1, 0],
        [0, -1, -3, 0],
    ]
)
REF = jnp.array(
    [
        [0, -1.5, -1.5, -1.5],
        [0, -1, -1, 0],
        [0, -1, -1, -2],
        [0, -1.5, 0, 0],
        [0, -2, -1, 0],
        [0, -2, -1, 0],
    ]
)
KL = jnp.array(
    [[0, 0.5, 0.5, 0.5], [0, -1, 0, 0], [0, 0, -1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, -2, 0]]
)
"""Their difference, 0 in the row without a reward."""

VALUE = jnp.array(
    [
        [0, 0.5, 0.4, 0.3],
        [0, 0.2, 0.4, 0],
        [0, 1, 0.5, 0.25],
        [0, 0.1, 0, 0],
        [0, 9, 9, 0],
        [0, 2, 1, 0],
    ]
)
REWARD = jnp.array([2, 1, 1.2, 0.5, jnp.nan, 3])
VALID = jnp.array([True, True, True, True, False, True])
BASELINE = jnp.array([1, 1, 1, 0.5, 0.5, 0.5])
"""Scores of the greedy responses."""

RETURNS = jnp.array(
    [
        [0, 1.85, 1.9, 1.95],
        [0, 1.1, 1, 0],
        [0, 1.2, 1.2, 1.1],
        [0, 0.4, 0, 0],
        [0] * 4,
        [0, 3.1, 3.2, 0],
    ]
)
"""Rewards to come, a tenth of the KL subtracted from each: that of a response is in column 1."""


def rollout(**changes):
    """Three responses a prompt; row 2 was cut off, and the reward of row 4 is unknown."""
    whole = Rollout(
        token_BT=jnp.arange(24).reshape(6, 4),
        attention_mask_BT=jnp.maximum(MASK, jnp.array([1, 0, 0, 0])).astype(jnp.int32),
        mask_BT=MASK,
        logp_BT=LOGP,
        sample_logp_BT=LOGP,
        ended_B=jnp.array([True, True, False, True, True, True]),
        value_BT=VALUE,
        n=3,
    )
    return replace(whole, **changes)


def targets(config, roll=None, ref=REF, reward=REWARD, valid=VALID, beta=0.1, **more):
    """(batch, metrics) of these responses."""
    roll = rollout() if roll is None else roll
    if config.name == "remax":
        more.setdefault("baseline_B", BASELINE)
    coefficients = {"kl_coef": jnp.float32(beta)}
    return ALGORITHMS[config.name](config).targets(roll, ref, reward, valid, coefficients, **more)


def group_of(rewards, tokens=2):
    """(rollout, zeros for the reference, rewards, valid) of one prompt's responses."""
    zero = jnp.zeros((len(rewards), tokens))
    ones = jnp.ones_like(zero)
    ended = jnp.ones(len(rewards), bool)
    roll = Rollout(zero.astype(jnp.int32), ones, ones, zero, zero, ended, n=len(rewards))
    return roll, zero, jnp.array(rewards), ended


def batch_of(rows, config, beta=0.0):
    """The shared rows under a config's weights, with the reference where its KL is in the loss."""
    in_loss = config.kl_in != "reward"
    return Batch(
        token_BT=jnp.zeros((2, 3), jnp.int32),
        attention_mask_BT=jnp.ones((2, 3), jnp.int32),
        mask_BT=rows.mask,
        old_logp_BT=rows.old,
        advantage_BT=rows.advantage,
        weight_BT=masked.weights(rows.mask, config.aggregation, config.length),
        ref_logp_BT=rows.ref if in_loss else None,
        kl_coef_B=jnp.full(2, beta) if in_loss else None,
    )


def loss_of(config, logp_BT, batch, entropy_BT=None):
    """The loss alone."""
    return ALGORITHMS[config.name](config).loss(Outputs(logp_BT, entropy_BT), batch)[0]


CHOSEN, REJECTED = [-0.4, -0.6], [-1.0, -1.0]
"""Answers of two tokens: −1 and −2 nats, −1.5 each under the reference."""


def answers(*pairs):
    """logp [B, 2, 4] of pairs of answers of up to two tokens, after a prompt of one.

    The prompt's log-prob is −9, to be seen where it is read; that of padding is 0.
    """
    return jnp.array([[[-9.0, *x, *[0] * (3 - len(x))] for x in pair] for pair in pairs])


def pair_batch(ref, lengths, weight=None, label=None):
    """A batch of pairs for ``answers`` of these lengths [B][2]."""
    mask = jnp.array([[[0] + [1] * n + [0] * (3 - n) for n in pair] for pair in lengths])
    rows = len(lengths)
    return PreferenceBatch(
        token_BCT=jnp.zeros((rows, 2, 4), jnp.int32),
        attention_mask_BCT=jnp.ones((rows, 2, 4), jnp.int32),
        margin_B=jnp.zeros(rows),
        weight_B=jnp.full(rows, 1 / rows) if weight is None else jnp.array(weight),
        mask_BCT=mask.astype(jnp.float32),
        ref_logp_BCT=ref,
        label_B=label,
    )


def one_pair():
    """(logp, batch) of the pair above: log-ratios ½ and −½."""
    reference = answers([[-0.75, -0.75], [-0.75, -0.75]])
    return answers([CHOSEN, REJECTED]), pair_batch(reference, [[2, 2]])


def assert_tree_close(left, right, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)

"""DPO and its kin on answers: that settings, answers and labels arrive in the losses, by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import LOGP, MASK, REF, answers, group_of, one_pair, pair_batch, rollout, targets

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import DPOConfig, OnlineDPOConfig
from jaxrlhf.config.offline import (
    BCOConfig,
    CPOConfig,
    KTOConfig,
    ORPOConfig,
    SimPOConfig,
)

PLAIN = OnlineDPOConfig()


def run(config):
    """The loss of its algorithm, (logp, batch) → (loss, metrics)."""
    return ALGORITHMS[config.name](config).loss


def smoothed(kind):
    return DPOConfig(kind=kind, label_smoothing=0.1)


def floats(metrics):
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (DPOConfig(), 0.6443967),
        (smoothed("sigmoid"), 0.6543967),  # cDPO
        (DPOConfig(kind="ipo"), 16.0),
        (DPOConfig(kind="ipo", mean_logp=True), 20.25),
        (DPOConfig(sft_coef=0.3), 0.6443967 + 0.15),
        (PLAIN, 0.6443967),
        (OnlineDPOConfig(beta=0.5), 0.4740770),
        (OnlineDPOConfig(kind="hinge"), 0.9),
        # an odds ratio of 1 + √e, σ of its log .7259313
        (ORPOConfig(), 0.5 - 0.1 * np.log(0.7259313)),
        (ORPOConfig(beta=0.4), 0.5 - 0.4 * np.log(0.7259313)),
        (ORPOConfig(sft_coef=0.2), 0.1 - 0.1 * np.log(0.7259313)),
        (SimPOConfig(), np.log(2)),  # 2·(−½ + 1) − 1 = 0
        (SimPOConfig(margin=0.5), 0.4740770),
        (SimPOConfig(beta=3.0), 0.4740770),
        (SimPOConfig(sft_coef=0.2), np.log(2) + 0.1),
        (CPOConfig(), 0.6443967 + 0.5),
        (CPOConfig(sft_coef=0.2), 0.6443967 + 0.1),
        (CPOConfig(label_smoothing=0.1), 0.6543967 + 0.5),
        (CPOConfig(beta=0.5), 0.4740770 + 0.5),
    ],
)
def test_pair_losses_hand_computed(config, wanted):
    """Answers of two tokens, −1 and −2 nats, −1.5 under the reference; the NLL is ½ a token."""
    loss, metrics = run(config)(*one_pair())
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    means = config.name in ("orpo", "simpo") or getattr(config, "mean_logp", False)
    wanted = {"margin": config.beta * (0.5 if means else 1), "accuracy": 1, "nll": 0.5, "weight": 1}
    wanted |= {"log_odds_ratio": np.log(1 + np.exp(0.5))} if config.name == "orpo" else {}
    metrics = floats(metrics)
    rewards = metrics.pop("chosen_reward"), metrics.pop("rejected_reward")
    assert metrics == pytest.approx(wanted, rel=1e-6)
    assert rewards[0] - rewards[1] == pytest.approx(metrics["margin"], rel=1e-6)


@pytest.mark.parametrize(
    ("config", "loss", "chosen", "rejected"),
    [
        (DPOConfig(), np.log(2), -0.05, 0.05),  # β/2
        (smoothed("sigmoid"), np.log(2), -0.04, 0.04),  # (1 − 2ε)·β/2
        (smoothed("robust"), np.log(2), -0.0625, 0.0625),  # β/2 / (1 − 2ε)
        (DPOConfig(kind="hinge"), 1, -0.1, 0.1),  # β: twice that of DPO
        (DPOConfig(kind="ipo"), 25, -10, 10),  # 1/β: 2/β² times that of DPO
        (smoothed("exo_pair"), -np.log(0.36) / 2, -0.0549306, 0.0549306),  # β·ln 9 / 4
        (DPOConfig(kind="sppo_hard"), 50, -10, 10),
        (DPOConfig(kind="apo_zero"), 1, -0.025, 0.025),  # β/4
        (DPOConfig(kind="apo_down"), 1, 0, 0.025),
    ],
)
def test_dpo_loss_at_the_reference(config, loss, chosen, rejected):
    """The same slope on every token of an answer, none on the prompt."""
    logp = answers([[-0.2, -0.3, -0.5], [-2.0]])
    batch = pair_batch(logp, [[3, 1]])
    np.testing.assert_allclose(run(config)(logp, batch)[0], loss, rtol=1e-6)
    wanted = [[[0, chosen, chosen, chosen], [0, rejected, 0, 0]]]
    np.testing.assert_allclose(
        jax.grad(lambda x: run(config)(x, batch)[0])(logp), wanted, rtol=1e-5, atol=1e-8
    )


def test_dpo_loss_unequal_lengths():
    """log-ratios −1 + 3·.5 = .5 and −2 + 1 = −1; means over tokens: ⅙ and −1."""
    logp = answers([[-0.2, -0.3, -0.5], [-2.0]])
    batch = pair_batch(answers([[-0.5] * 3, [-1.0]]), [[3, 1]])
    for mean, margin in ((False, 0.15), (True, 0.1 * 7 / 6)):
        loss, metrics = run(DPOConfig(mean_logp=mean))(logp, batch)
        np.testing.assert_allclose(metrics["margin"], margin, rtol=1e-5)
        np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)), rtol=1e-5)


def test_online_dpo_targets_hand_computed():
    """Scores 2, 1, 1.2 | .5, unknown, 3: rows 0 over 1 and 5 over 3."""
    batch, metrics = targets(PLAIN, beta=0.0)
    rows = jnp.array([[0, 1], [5, 3]])
    np.testing.assert_array_equal(batch.token_BCT, rollout().token_BT[rows])
    np.testing.assert_array_equal(batch.attention_mask_BCT, rollout().attention_mask_BT[rows])
    np.testing.assert_array_equal(batch.mask_BCT, MASK[rows])
    np.testing.assert_array_equal(batch.ref_logp_BCT, REF[rows])
    np.testing.assert_array_equal(batch.weight_B, [0.5, 0.5])
    np.testing.assert_array_equal(batch.margin_B, [0, 0])
    assert metrics["pairs"] == 2
    np.testing.assert_allclose(metrics["gap"], (1 + 2.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["score"], 1.54, rtol=1e-5)


def test_online_dpo_targets_rank_by_what_tokens_earn():
    """The KL in the reward is charged, and so are penalties: row 0 goes from first to last."""
    batch, metrics = targets(PLAIN, ref=REF.at[0].add(-20), beta=0.1)
    np.testing.assert_array_equal(batch.token_BCT[0, :, 0], [8, 0])
    np.testing.assert_allclose(metrics["gap"], (1.2 - (1.85 - 6) + 2.7) / 2, rtol=1e-5)
    batch, _ = targets(OnlineDPOConfig(missing_eos_penalty=5.0))
    np.testing.assert_array_equal(batch.token_BCT[0, :, 0], [0, 8])


@pytest.mark.parametrize(("gap", "pairs"), [(0.9, 2), (1.0, 1), (2.5, 0)])
def test_online_dpo_targets_min_gap(gap, pairs):
    """Scores differ by 1 and by 2.5; no more than the gap is too little."""
    batch, metrics = targets(OnlineDPOConfig(min_gap=gap), beta=0.0)
    wanted = {2: [0.5, 0.5], 1: [0, 1], 0: [0, 0]}[pairs]
    np.testing.assert_array_equal(batch.weight_B, wanted)
    assert metrics["pairs"] == pairs
    np.testing.assert_allclose(metrics["gap"], {2: 1.75, 1: 2.5, 0: 0}[pairs], rtol=1e-6)


@pytest.mark.parametrize(
    ("reward", "valid"),
    [
        ([1.0, 1, 1], [1, 1, 1]),
        ([1.0, 2, 3], [0, 1, 0]),
        ([1.0, jnp.nan, jnp.inf], [1, 1, 1]),
        ([1.0, 2, 3], [0, 0, 0]),
        ([-5.0, 1, 2], [1, 0, 0]),
    ],
)
def test_online_dpo_targets_prompts_without_a_pair(reward, valid):
    """All equal, or fewer than two known: weight 0, and everything is finite."""
    roll, ref, reward, _ = group_of(reward)
    batch, metrics = targets(PLAIN, roll, ref, reward, jnp.array(valid))
    assert batch.weight_B[0] == 0
    assert metrics["pairs"] == 0
    assert metrics["gap"] == 0
    assert all(np.isfinite(x) for x in metrics.values())
    loss, _ = run(PLAIN)(jnp.zeros((1, 2, 2)), batch)
    assert loss == 0


@pytest.mark.parametrize("unknown", [-9.0, 9.0, jnp.nan])
def test_online_dpo_targets_unknown_rewards_are_never_picked(unknown):
    """Negative rewards on both sides of it, and of 0."""
    roll, ref, reward, _ = group_of([-1.0, unknown, -3, -2])
    roll = replace(roll, token_BT=roll.token_BT.at[:, 0].set(jnp.arange(4)))
    batch, _ = targets(PLAIN, roll, ref, reward, jnp.array([1, 0, 1, 1]))
    np.testing.assert_array_equal(batch.token_BCT[0, :, 0], [0, 2])
    assert batch.weight_B[0] == 1


def test_online_dpo_loss_is_dpo_on_the_picked_pairs():
    batch, _ = targets(PLAIN, beta=0.0)
    logp = LOGP[jnp.array([[0, 1], [5, 3]])] - 0.2
    online, _ = run(PLAIN)(logp, batch)
    dpo, _ = run(DPOConfig())(logp, batch)
    assert online == dpo
    # d of the answers: .9 and −1.4 | −1.4 and .8
    margin = 0.1 * np.array([0.9 + 1.4, -1.4 - 0.8])
    np.testing.assert_allclose(online, np.log1p(np.exp(-margin)).mean(), rtol=1e-5)


def test_orpo_loss_gradient():
    """β·(1 − σ)·d log odds / d mean, where that of −½ is 1/(1 − e^−½), and −1 from the NLL."""
    logp, batch = one_pair()
    gradient = jax.grad(lambda x: run(ORPOConfig())(x, batch)[0])(logp)
    missing = 0.1 * (1 - 0.7259313)
    chosen = (-missing / (1 - np.exp(-0.5)) - 1) / 2
    rejected = missing / (1 - np.exp(-1)) / 2
    wanted = [[[0, chosen, chosen, 0], [0, rejected, rejected, 0]]]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def test_simpo_loss_reads_means_over_tokens():
    """Three tokens of −½ and one of −1 are the pair above; β/2 over 3 tokens and over 1."""
    logp, batch = answers([[-0.5] * 3, [-1.0]]), pair_batch(None, [[3, 1]])
    loss, gradient = jax.value_and_grad(lambda x: run(SimPOConfig())(x, batch)[0])(logp)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[[0, *[-1 / 3] * 3], [0, 1, 0, 0]]], rtol=1e-5)


def test_cpo_loss_reads_sums_over_tokens():
    """−3 and −1: a margin of −.2; slopes β·σ(.2) a token, and ⅓ of the NLL's."""
    logp, batch = answers([[-0.5, -1, -1.5], [-1.0]]), pair_batch(None, [[3, 1]])
    loss, gradient = jax.value_and_grad(lambda x: run(CPOConfig())(x, batch)[0])(logp)
    np.testing.assert_allclose(loss, np.log1p(np.exp(0.2)) + 1, rtol=1e-6)
    slope = 0.1 / (1 + np.exp(-0.2))
    wanted = [[[0, *[-slope - 1 / 3] * 3], [0, slope, 0, 0]]]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


LENGTHS = [[2, 1], [3, 2], [1, 1]]


def compared():
    """(logp, batch): log-ratios ½ and −½, of mismatched answers 1 and −½; a row of weight 0.

    The first answer is desirable, the second is not.
    """
    logp = answers([[-0.4, -0.6], [-1.0]], [[-0.5, -0.5, -1], [-1, -2]], [[-30.0], [-50.0]])
    ref = answers([[-1, -0.5], [-2.0]], [[-0.5] * 3, [-2, -0.5]], [[-70.0], [-10.0]])
    return logp, pair_batch(ref, LENGTHS, [0.5, 0.5, 0], jnp.array([1.0, 0, 1]))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, 0.4937503 + 0.4812588),
        ({"desirable_weight": 2.0, "undesirable_weight": 3.0}, 2 * 0.4937503 + 3 * 0.4812588),
        ({"beta": 1.0}, 1 / (1 + np.exp(0.25)) + 1 / (1 + np.exp(0.75))),
    ],
)
def test_kto_loss_hand_computed(changes, wanted):
    """z₀ = ¼: σ(−β·(½ − ¼)) and σ(β·(−½ − ¼)), times their weights."""
    config = KTOConfig(**changes)
    loss, metrics = run(config)(*compared())
    np.testing.assert_allclose(loss, wanted / 2, rtol=1e-6)
    half = config.beta / 4
    wanted = {"reward": 0, "desirable_reward": half, "undesirable_reward": -half}
    wanted |= {"desirable": 0.5, "kl": 0.25, "nll": 1 / 4, "weight": 1}
    assert floats(metrics) == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_kto_nll_is_that_of_desirable_answers():
    """The desirable answer gains a nat a token, the other loses one: only the first is counted."""
    logp, batch = compared()
    _, before = run(KTOConfig())(logp, batch)
    _, after = run(KTOConfig())(logp.at[0].add(1).at[1].add(-1), batch)
    np.testing.assert_allclose(after["nll"] - before["nll"], -0.5, rtol=1e-6)
    np.testing.assert_allclose(after["desirable"], 0.5, rtol=1e-6)


def test_kto_loss_reads_the_candidates_in_their_order():
    """Swapped, the mismatched answers' log-ratios 1 and −½ are judged, and z₀ is 0."""
    logp, batch = compared()
    swapped = pair_batch(
        batch.ref_logp_BCT[:, ::-1], [n[::-1] for n in LENGTHS], batch.weight_B, batch.label_B
    )
    loss, metrics = run(KTOConfig())(logp[:, ::-1], swapped)
    wanted = (1 / (1 + np.exp(0.1)) + 1 / (1 + np.exp(0.05))) / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert metrics["kl"] == 0


def judged():
    """(logp, batch): log-ratios ½, −½, 1½, the second undesirable; a row of weight 0.

    Candidate 1, which KTO reads, holds what would be seen.
    """
    other = [-40.0]
    logp = answers(
        [[-0.4, -0.6], other], [[-0.5, -0.5, -1], other], [[0.0], other], [[-70.0], other]
    )
    ref = answers([[-1, -0.5], [-1.0]], [[-0.5] * 3, [-1.0]], [[-1.5], [-1.0]], [[-10.0], [-1.0]])
    lengths = [[2, 1], [3, 1], [1, 1], [1, 1]]
    return logp, pair_batch(ref, lengths, [1 / 3, 1 / 3, 1 / 3, 0], jnp.array([1.0, 0, 1, 0]))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_bco_loss_hand_computed(beta):
    """Rewards β·(½, 1½ | −½): δ = β·(1 − ½)/2; gaps β·(¼, 1¼) and, undesirable, β·¾."""
    loss, metrics = run(BCOConfig(beta=beta))(*judged())
    gaps = beta * np.array([0.25, 0.75, 1.25])
    np.testing.assert_allclose(loss, np.log1p(np.exp(-gaps)).mean(), rtol=1e-6)
    wanted = {"reward": beta / 2, "desirable_reward": beta * 2 / 3, "undesirable_reward": -beta / 6}
    wanted |= {"desirable": 2 / 3, "nll": (1 / 2 + 0) / 3, "weight": 1}
    assert floats(metrics) == pytest.approx(wanted, rel=1e-6)


def test_bco_loss_shift_of_rewards_is_taken_off():
    """A nat more on every answer changes δ and nothing else."""
    logp, batch = judged()
    wanted, _ = run(BCOConfig())(logp, batch)
    moved, metrics = run(BCOConfig())(logp.at[:, 0, 1].add(1), batch)
    np.testing.assert_allclose(moved, wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward"], 0.15, rtol=1e-5)

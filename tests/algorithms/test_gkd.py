"""The divergence by hand, at its ends, and as TRL has it; distillation finds its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.algorithms import ALGORITHMS, generalised_jsd
from jaxrlhf.config import GKDConfig
from jaxrlhf.core.types import Outputs, Rollout
from jaxrlhf.study.oracle import kl_to, log_policy, make_problem, rows, states

KEYS = jax.random.split(jax.random.key(0))
LOGITS, TEACHER = (2 * jax.random.normal(key, (5, 8)) for key in KEYS)


def kl(left, right):
    left, right = (np.float64(jax.nn.softmax(x)) for x in (left, right))
    return (left * np.log(left / right)).sum(-1)


def test_generalised_jsd_by_hand():
    """q = (½, ½), p = (¼, ¾), β = ¼: m = (7/16, 9/16)."""
    q, p = jnp.log(jnp.array([1.0, 1.0])), jnp.log(jnp.array([1.0, 3.0]))
    of_p = np.log(4 / 7) / 4 + np.log(4 / 3) * 3 / 4
    of_q = np.log(8 / 7) / 2 + np.log(8 / 9) / 2
    np.testing.assert_allclose(generalised_jsd(q, p, 0.25), of_p / 4 + of_q * 3 / 4, rtol=1e-5)


def test_generalised_jsd_at_its_ends_is_the_kl():
    """At β = 0 and 1 the KLs themselves, which D/β and D/(1 − β) come to."""
    forward, reverse = kl(TEACHER, LOGITS), kl(LOGITS, TEACHER)
    for beta, wanted in ((0.0, forward), (1.0, reverse)):
        np.testing.assert_allclose(generalised_jsd(LOGITS, TEACHER, beta), wanted, rtol=1e-5)
    with jax.enable_x64(True):
        near = 1e-5
        both = np.float64(LOGITS), np.float64(TEACHER)
        found = generalised_jsd(*both, near) / near, generalised_jsd(*both, 1 - near) / near
    np.testing.assert_allclose(found, (forward, reverse), rtol=1e-2)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_generalised_jsd_is_zero_at_the_teacher_and_above_it_elsewhere(beta):
    value, slope = jax.value_and_grad(lambda x: generalised_jsd(x, TEACHER, beta).sum())(TEACHER)
    assert abs(value) < 1e-6
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    assert (generalised_jsd(LOGITS, TEACHER, beta) > 0.01).all()
    other = jax.grad(lambda x: generalised_jsd(LOGITS, x, beta).sum())(TEACHER)
    np.testing.assert_array_equal(other, 0)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_generalised_jsd_refuses(beta):
    with pytest.raises(ValueError, match=r"beta=.*: must be in \[0, 1\]"):
        generalised_jsd(LOGITS, TEACHER, beta)


GOLDEN = (
    # beta, temperature, loss, its gradient at [0, 1, 3], and Σ |gradient|
    (0.0, 1.0, 1.9625584, -0.0010565827, 1.2065453),
    (0.0, 0.7, 2.8728501, -0.00043808078, 1.8581166),
    (0.1, 1.0, 0.12828588, -0.00013461815, 0.070561136),
    (0.5, 1.0, 0.29891937, -0.00038536627, 0.17966207),
    (0.5, 0.7, 0.35048085, -0.0001303245, 0.23275367),
    (0.9, 1.0, 0.12819005, -0.00016611926, 0.085169765),
    (1.0, 1.0, 1.8002661, -0.0022622415, 1.3963142),
    (1.0, 0.7, 2.6676108, -0.00075651869, 2.2398806),
)
"""GKDTrainer.generalized_jsd_loss of TRL 1.16, in float64, on the arrays below."""


@pytest.mark.parametrize(("beta", "temperature", "loss", "slope", "size"), GOLDEN)
def test_loss_equals_trl(beta, temperature, loss, slope, size):
    """Of four tokens of the first row and two of the second."""
    index_BTV = np.arange(70.0).reshape(2, 5, 7)
    logits_BTV, theirs_BTV = 3 * np.sin(index_BTV), 3 * np.cos(1.7 * index_BTV)
    mask_BT = jnp.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0]], jnp.float32)
    algorithm = ALGORITHMS["gkd"](GKDConfig(beta=beta))
    batch, _ = algorithm.targets(rollout_of(jnp.zeros((2, 5), jnp.int32), mask_BT))

    def total(logits_BTV):
        divergence_BT = algorithm.divergence(logits_BTV / temperature, theirs_BTV / temperature)
        return algorithm.loss(Outputs(mask_BT, divergence_BT=divergence_BT), batch)[0]

    value, gradient = jax.value_and_grad(total)(jnp.float32(logits_BTV))
    np.testing.assert_allclose(value, loss, rtol=2e-5)
    np.testing.assert_allclose(gradient[0, 1, 3], slope, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(jnp.abs(gradient).sum(), size, rtol=1e-5)


def rollout_of(token_BT, mask_BT):
    zeros = jnp.zeros(mask_BT.shape)
    ended_B = jnp.ones(mask_BT.shape[0], bool)
    return Rollout(token_BT, jnp.ones_like(token_BT), mask_BT, zeros, zeros, ended_B)


def test_loss_reads_nothing_under_the_mask():
    algorithm = ALGORITHMS["gkd"](GKDConfig(aggregation="sequence"))
    mask_BT = jnp.array([[0, 1, 1], [0, 0, 0]])
    batch, metrics = algorithm.targets(rollout_of(jnp.zeros((2, 3), jnp.int32), mask_BT))
    divergence_BT = jnp.array([[jnp.nan, 1, 2], [jnp.nan, jnp.inf, 3]])
    loss, measured = algorithm.loss(Outputs(mask_BT, divergence_BT=divergence_BT), batch)
    assert loss == measured["divergence"] == 1.5
    assert measured["weight"] == 1
    assert metrics["length"] == 1


STEPS = 1500


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_finds_its_teacher(beta):
    """A table from its start to the table of π*, of all responses as likely as the student has
    them: KL(π_θ‖π_teacher) over whole responses."""
    problem = make_problem(jax.random.key(1))
    space, prompts = problem.space, problem.reward_QY.shape[0]
    teacher = {"logits": 1.5 * jax.random.normal(KEYS[0], problem.ref["logits"].shape)}
    teacher["value"] = problem.ref["value"]
    goal_QY = log_policy(teacher, space)
    algorithm = ALGORITHMS["gkd"](GKDConfig(beta=beta))
    token_BT, mask_BT = rows(space, prompts)
    place = token_BT[:, :1], states(space, token_BT)
    batch, _ = algorithm.targets(rollout_of(token_BT, mask_BT))
    tx = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))

    def loss(params, chance_B):
        both = params["logits"][place], teacher["logits"][place]
        outputs = Outputs(mask_BT, divergence_BT=algorithm.divergence(*both))
        weighed = batch.replace(weight_BT=batch.weight_BT * chance_B[:, None])
        return algorithm.loss(outputs, weighed)[0]

    def step(carry, _):
        params, opt_state = carry
        chance_B = jnp.exp(log_policy(params, space)).reshape(-1) * space.token_YT.shape[0]
        updates, opt_state = tx.update(jax.grad(loss)(params, chance_B), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def learn(start):
        return jax.lax.scan(step, (start, tx.init(start)), None, STEPS)[0][0]

    assert kl_to(problem.ref, space, goal_QY) > 1
    assert kl_to(learn(problem.ref), space, goal_QY) < 1e-3

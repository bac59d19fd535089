"""The enumerable space against brute force."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.study.oracle import forward, kl_to, log_policy, make_problem, make_space, rows


def test_make_space_holds_every_response_once():
    space = make_space()
    seen = {tuple(row[1:]) for row in np.asarray(space.token_YT).tolist()}
    assert len(seen) == len(space.token_YT) == 1 + 3 + 9 + 27
    np.testing.assert_array_equal(space.ended_Y, (np.asarray(space.token_YT)[:, 1:] == 0).any(1))
    np.testing.assert_array_equal(
        space.mask_YT.sum(1), [next((t for t, x in enumerate(row, 1) if x == 0), 3) for row in
        np.asarray(space.token_YT)[:, 1:].tolist()],
    )  # fmt: skip


def test_log_policy_is_a_distribution_and_the_product_of_choices():
    problem = make_problem(jax.random.key(3))
    logp_QY = log_policy(problem.ref, problem.space)
    np.testing.assert_allclose(jnp.exp(logp_QY).sum(1), 1, rtol=1e-5)
    logits = np.asarray(problem.ref["logits"], np.float64)
    chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.asarray(problem.space.token_YT).tolist().index([0, 2, 3, 0])
    by_hand = chance[1, 0, 2] * chance[1, 1 + 2, 3] * chance[1, 1 + 4 + 4 * 2 + 3, 0]
    np.testing.assert_allclose(jnp.exp(logp_QY[1, y]), by_hand, rtol=1e-5)


def test_forward_values_and_entropy_are_those_of_the_state():
    problem = make_problem(jax.random.key(3))
    params = {**problem.ref, "value": jnp.arange(84.0).reshape(4, 21)}
    token_BT, mask_BT = rows(problem.space, 4)
    outputs = forward(params, problem.space, token_BT, mask_BT)
    b = np.asarray(token_BT).tolist().index([2, 3, 1, 0])
    np.testing.assert_array_equal(outputs.value_BT[b], [0, 42, 42 + 1 + 3, 42 + 5 + 12 + 1])
    p = jax.nn.softmax(problem.ref["logits"][2, 4])
    np.testing.assert_allclose(outputs.entropy_BT[b, 2], -(p * jnp.log(p)).sum(), rtol=1e-5)
    assert outputs.entropy_BT[b, 0] == 0


def test_kl_to_is_zero_at_itself_only():
    problem = make_problem(jax.random.key(0))
    assert abs(kl_to(problem.ref, problem.space, log_policy(problem.ref, problem.space))) < 1e-6
    assert kl_to(problem.ref, problem.space, problem.optimum()[0]) > 0.5

"""What a step must move: by hand."""

from types import SimpleNamespace

import pytest

from jaxrlhf.study.plan.needed import activations

LAYER = 256 * (8 + 2 + 2 + 8) * 32 + 3 * 256 * 896 + 2 * 256  # weights
PROJECTION = 256 + 256 * 2048  # the last norm too
W = 4 * (3 * LAYER + PROJECTION)
A = 4 * 3 * (2 * 256 + (2 * 8 + 2 * 2) * 32 + 2 * 896)
"""Bytes of a token's activations."""
TABLE = 4 * 2048 * 256


def test_needed_of_a_forward_pass(llama_steps):
    rows = 2 * 4 * 16 * 65 + 4 * 16 * 65  # tokens, mask; log-probs
    found = llama_steps["reference"]
    assert found.needed == pytest.approx(2 * W + TABLE + rows + 2 * 16 * 65 * A, rel=1e-3)


def test_needed_of_an_update(llama_steps):
    found = llama_steps["update"]
    # a value head makes the parameters a little larger; Adam has two moments of each
    state = 3 * (W + TABLE)
    passes = 2 * W + 5 * 8 * 65 * A + 2 * (W + TABLE)
    assert found.needed == pytest.approx(2 * state + passes, rel=2e-2)


def test_needed_of_a_token(llama_steps):
    _, token = llama_steps["sample"].token
    # keys and values of 4 prompts once, and of 16 rows as far as they are on average of 32 trips
    slots = 4 * 32 + 16 * 16.5
    assert token == pytest.approx(W + 2 * 4 * 3 * slots * 2 * 32, rel=1e-3)


def test_activations_are_split_over_tensor(llama):
    decoder = llama.model.decoder
    run = SimpleNamespace(
        model=SimpleNamespace(decoder=decoder, dtype="bfloat16"),
        mesh=SimpleNamespace(shape={"tensor": 4}),
    )
    split = (2 * 8 + 2 * 2) * 32 + 2 * 896
    assert activations(run, 10) == 10 * 3 * 2 * (2 * 256 + split / 4)  # type: ignore[arg-type]

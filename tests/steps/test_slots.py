"""A slot whose row has ended takes the next one: the same draws, fewer steps, nothing copied."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sample import KEY, RICH, draw_rollout, left_padded

from jaxrlhf.config import MeshConfig, SampleConfig
from jaxrlhf.core.types import StopTable
from jaxrlhf.mesh.sharding import make_mesh, put_rows
from jaxrlhf.steps import slots as slots_of_sampling
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.slots import decode_steps, idle_share

NEW = 20
PLAIN = SampleConfig(max_new_tokens=NEW, stop=tuple(range(0, 300, 15)), n=1, pad=1)
ROWS = np.random.default_rng(4).integers(2, 300, (12, 6))
PROMPT, MASK = left_padded([row[: 1 + i % 6].tolist() for i, row in enumerate(ROWS)], 6)
FIELDS = ("token_BT", "mask_BT", "attention_mask_BT", "ended_B")
FLOATS = ("logp_BT", "sample_logp_BT", "value_BT")
# Two tokens below 100 one after the other end a response too.
STOPS = StopTable(
    np.where(np.arange(300) < 100, 1, 0).astype(np.int32),
    np.array([[0, 1], [0, 2], [0, 0]], np.int32),
)


@pytest.mark.parametrize(
    ("config", "slots", "more"),
    [
        (PLAIN, 4, {}),
        (PLAIN, 5, {"value": True}),  # pieces of the queue that do not divide
        (replace(PLAIN, n=3), 8, {}),
        (replace(RICH, max_new_tokens=NEW), 3, {"value": True, "lora": True}),
        (replace(PLAIN, stop_strings=("of tokens",)), 4, {"stops": STOPS}),
        (replace(PLAIN, max_new_tokens=1), 4, {}),
        (replace(PLAIN, stop=tuple(range(300))), 4, {}),  # the first token ends every row
        (replace(PLAIN, temperature=0.0), 1, {}),
    ],
    ids=["plain", "odd", "samples", "rich", "strings", "one token", "all end", "one slot"],
)
def test_slots_draw_what_all_rows_at_once_draw(model, params, lora, config, slots, more):
    more = more | ({"lora": lora} if "lora" in more else {})
    given = model, params, PROMPT, MASK, KEY
    expected = draw_rollout(*given, config, **more)
    found = draw_rollout(*given, replace(config, slots=slots), **more)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    for name in FLOATS:
        if getattr(expected, name) is not None:
            close = {"atol": 1e-5, "err_msg": name}
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), **close)


def test_slots_equal_calls_of_as_many_rows_bit_for_bit(model, params):
    given = model, params
    whole = draw_rollout(*given, PROMPT, MASK, KEY, replace(PLAIN, slots=4), value=True)
    assert len(set(np.asarray(whole.mask_BT.sum(1)).tolist())) > 3
    for i in range(0, 12, 4):
        rows = slice(i, i + 4)
        numbers = jnp.arange(i, i + 4)
        part = draw_rollout(*given, PROMPT[rows], MASK[rows], KEY, PLAIN, value=True, row_B=numbers)
        for name in (*FIELDS, *FLOATS):
            np.testing.assert_array_equal(getattr(whole, name)[rows], getattr(part, name), name)


@pytest.mark.parametrize("shape", [{"data": 4}, {"data": 2, "tensor": 2}], ids=["data", "tensor"])
def test_slots_of_each_device(model, params, shape):
    """Each device has a queue of its own; the draws are those of one device."""
    config = replace(PLAIN, n=2, slots=4)
    expected = draw_rollout(model, params, PROMPT, MASK, KEY, config)
    mesh = make_mesh(MeshConfig(**({"data": 1} | shape)), jax.devices()[:4])
    with jax.set_mesh(mesh):
        rows = put_rows((PROMPT, MASK), mesh)
        found = jax.jit(sample, static_argnums=(0, 5))(model, params, *rows, KEY, config)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


def test_steps_are_those_of_the_queue(model, params, monkeypatch):
    """As many steps as taking the rows in turn needs, not as many as batches of them."""
    taken, step = [], slots_of_sampling.step

    def counted(*args):
        jax.debug.callback(lambda: taken.append(1))
        return step(*args)

    monkeypatch.setattr(slots_of_sampling, "step", counted)
    config = replace(PLAIN, slots=4)
    # Not a program that was traced without the counter.
    draw = jax.jit(lambda *given: sample(model, *given, config))
    rollout = jax.block_until_ready(draw(params, PROMPT, MASK, KEY))
    jax.effects_barrier()
    length_B = np.asarray(rollout.mask_BT.sum(1))
    assert idle_share(length_B, 4) == pytest.approx(1 - (length_B - 1).sum() / (4 * len(taken)))
    in_batches = sum(length_B[i : i + 4].max() - 1 for i in range(0, 12, 4))
    assert len(taken) < in_batches


def test_idle_share_by_hand():
    length_B = np.array([9, 2, 3, 4, 2, 1])
    # All at once: 8 steps of 6 rows, of which 8 + 1 + 2 + 3 + 1 + 0 have one.
    assert idle_share(length_B, 0) == pytest.approx(1 - 15 / 48)
    # Two slots: 8 steps in one; 1 + 2 + 3 + 1 in the other.
    assert idle_share(length_B, 2) == pytest.approx(1 - 15 / 16)
    # Two devices with a slot each: 8 + 1 + 2 and 3 + 1.
    assert idle_share(length_B, 2, shards=2) == pytest.approx(1 - 15 / 22)
    assert idle_share(np.ones(4), 2) == 0.0
    assert [int(decode_steps(length_B, *given)) for given in ((0,), (2,), (2, 2))] == [8, 8, 11]


def test_slots_copy_no_cache(model, params):
    """The loops write caches and prompts where they lie."""
    config = replace(PLAIN, slots=4, max_new_tokens=40)
    given = model, params, PROMPT, MASK, KEY, config
    text = jax.jit(sample, static_argnums=(0, 5)).lower(*given).compile().as_text()
    decoder = model.decoder
    cache = f"f32[4,{decoder.kv_heads},40,{decoder.head_dim}]"
    assert cache in text
    bodies = re.split(r"\n(?=%|ENTRY)", text)
    loops = [body for body in bodies if cache in body and not body.startswith("ENTRY")]
    assert loops
    for body in loops:
        assert not re.findall(rf"= {re.escape(cache)}\S* copy\(", body)

"""Draws are exact, and a rollout holds what was drawn, its log-probs, its mask and its end."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxrlhf.config import MeshConfig, SampleConfig
from jaxrlhf.core.types import StopTable
from jaxrlhf.mesh.sharding import make_mesh, put_rows, shardings
from jaxrlhf.models.decode import lay_out
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps import sample as sampling
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.score import score, value

NEW = 8
KEY = jax.random.key(3)
PROMPTS = [[5, 6, 7, 8, 9, 10], [299, 2], [17, 256, 31], [255]]
WARM = SampleConfig(max_new_tokens=NEW, n=2, temperature=0.7, pad=1)
GREEDY = replace(WARM, temperature=0.0, n=1)

draw_rollout = jax.jit(sample, static_argnames=("model", "sample_config", "value"))
score_rows = jax.jit(score, static_argnums=0)


def left_padded(prompts, width, pad=1):
    token = np.full((len(prompts), width), pad, np.int32)
    mask = np.zeros_like(token)
    for row, prompt in enumerate(prompts):
        token[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return jnp.array(token), jnp.array(mask)


PROMPT, PROMPT_MASK = left_padded(PROMPTS, 6)


def responses(rollout):
    return np.asarray(rollout.token_BT)[:, -NEW:]


RICH = replace(WARM, top_p=0.8, top_k=30, stop=tuple(range(0, 300, 9)))


@pytest.fixture(scope="module")
def generate(model, params):
    """sample() on the tiny model; compiled once for each config."""

    def go(config=WARM, key=KEY, prompt=PROMPT, mask=PROMPT_MASK, **more):
        return draw_rollout(model, params, prompt, mask, key, config, **more)

    return go


@pytest.fixture(scope="module")
def rich(generate, lora):
    """A rollout with everything: adapters, values, stop tokens, truncated draws."""
    return generate(RICH, value=True, lora=lora)


def greedy_by_whole_forwards(model, params, lora):
    """The likeliest next token by a forward of the whole row, again and again, padded right."""

    @jax.jit
    def next_token(token, mask):
        hidden, _ = model.apply(params, token, mask, lora)
        last = mask.sum(1) - 1
        return jnp.argmax(model.logits(params, hidden[jnp.arange(len(PROMPTS)), last]), axis=1)

    token, mask = np.full((2, len(PROMPTS), 6 + NEW), 0, np.int32)
    for row, prompt in enumerate(PROMPTS):
        token[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    found = []
    for t in range(NEW):
        found.append(np.asarray(next_token(token, mask)))
        for row, prompt in enumerate(PROMPTS):
            token[row, len(prompt) + t], mask[row, len(prompt) + t] = found[-1][row], 1
    return np.stack(found, axis=1)


@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "lora"])
def test_sample_greedy_equals_whole_forwards(model, params, lora, generate, adapted):
    lora = lora if adapted else None
    expected = greedy_by_whole_forwards(model, params, lora)
    assert len(np.unique(expected)) > NEW  # a constant stream would agree with anything
    np.testing.assert_array_equal(responses(generate(GREEDY, lora=lora)), expected)


def test_sample_logp_equals_score(model, params, lora, generate, rich):
    for rollout, adapters in ((generate(), None), (rich, lora)):
        rows = rollout.token_BT, rollout.attention_mask_BT
        scored = score_rows(model, params, *rows, WARM.temperature, adapters)
        np.testing.assert_allclose(rollout.logp_BT, scored * rollout.mask_BT, atol=1e-4)
        at_one = score_rows(model, params, *rows, 1.0, adapters)
        assert jnp.abs(at_one - scored).max() > 0.1


def test_sample_columns(generate):
    """Prompt-major rows: the prompt, then the response, and each mask where it belongs."""
    rollout = generate()
    assert rollout.token_BT.shape == (8, 14)
    np.testing.assert_array_equal(rollout.token_BT[:, :6], np.repeat(PROMPT, 2, axis=0))
    np.testing.assert_array_equal(
        rollout.attention_mask_BT[:, :6], np.repeat(PROMPT_MASK, 2, axis=0)
    )
    np.testing.assert_array_equal(rollout.mask_BT, [[0] * 6 + [1] * NEW] * 8)
    assert (rollout.attention_mask_BT[:, 6:] == 1).all()
    for logp in (rollout.logp_BT, rollout.sample_logp_BT):
        assert (logp[:, :6] == 0).all()
        assert (logp[:, 6:] < 0).all()
    assert not rollout.ended_B.any()
    assert rollout.value_BT is None


def test_sample_rows_and_keys_differ(generate):
    """Samples of one prompt differ, and so does every call under the key of its own step."""
    rows = {tuple(row) for row in responses(generate()).tolist()}
    assert len(rows) == 8
    calls = [generate(key=jax.random.fold_in(KEY, step)) for step in range(4)]
    assert len({responses(call).tobytes() for call in calls}) == 4
    np.testing.assert_array_equal(responses(generate()), responses(generate()))


def test_sample_depends_on_no_other_row_and_no_padding(generate):
    rollout = generate()
    wider, wider_mask = left_padded(PROMPTS, 9)
    wide = generate(prompt=wider, mask=wider_mask)
    np.testing.assert_array_equal(responses(wide), responses(rollout))
    np.testing.assert_allclose(wide.logp_BT[:, 3:], rollout.logp_BT, atol=1e-5)
    others = generate(prompt=PROMPT.at[2:].set(77))
    np.testing.assert_array_equal(responses(others)[:4], responses(rollout)[:4])
    assert (responses(others)[4:] != responses(rollout)[4:]).any()


def test_sample_rows_by_their_numbers(generate):
    """Half of the prompts, each under the numbers of its rows, are drawn as they are among all."""
    rollout = generate()
    part = generate(prompt=PROMPT[2:], mask=PROMPT_MASK[2:], row_B=np.arange(4, 8, dtype=np.int32))
    np.testing.assert_array_equal(responses(part), responses(rollout)[4:])
    with pytest.raises(AssertionError):
        generate(row_B=np.arange(4, dtype=np.int32))


def test_sample_logp_is_the_sample_logp_without_truncation(generate):
    rollout = generate()
    np.testing.assert_array_equal(rollout.logp_BT, rollout.sample_logp_BT)


def test_sample_logp_is_below_the_sample_logp_with_truncation(rich):
    ratio = jnp.exp(rich.logp_BT - rich.sample_logp_BT)[rich.mask_BT == 1]
    assert (ratio < 1).all()
    assert (ratio > 0.3).all()  # roughly: .8 of what 30 of 300 tokens hold


def test_sample_greedy_logp_is_that_of_temperature_one(model, params, generate):
    rollout = generate(GREEDY)
    scored = score_rows(model, params, rollout.token_BT, rollout.attention_mask_BT)
    np.testing.assert_allclose(rollout.logp_BT, scored * rollout.mask_BT, atol=1e-4)
    assert (rollout.sample_logp_BT == 0).all()


class Counting(Model):
    """A model that counts how often it says which token is next."""

    calls = 0

    def logits(self, *args, **kwargs):
        jax.debug.callback(lambda: setattr(Counting, "calls", Counting.calls + 1))
        return super().logits(*args, **kwargs)


def test_sample_stops(model, params):
    """A stop token, here the padding too, is in tokens, mask and log-probs; nothing after it is."""
    config = replace(WARM, max_new_tokens=40, stop=tuple(range(0, 300, 3)), pad=9)
    counting = Counting(model.decoder, lora=model.lora)
    Counting.calls = 0
    rollout = draw_rollout(counting, params, PROMPT, PROMPT_MASK, KEY, config)
    jax.block_until_ready(rollout)
    jax.effects_barrier()
    token, mask = np.asarray(rollout.token_BT)[:, 6:], np.asarray(rollout.mask_BT)[:, 6:]
    lengths = mask.sum(1).astype(int)
    assert len(set(lengths)) > 1
    assert lengths.max() < 20
    assert rollout.ended_B.all()
    for row, length in enumerate(lengths):
        assert np.isin(token[row], config.stop)[: length - 1].sum() == 0
        assert token[row, length - 1] in config.stop
        assert (token[row, length:] == config.pad).all()
        assert (mask[row, :length] == 1).all()
    for logp in (rollout.logp_BT[:, 6:], rollout.sample_logp_BT[:, 6:]):
        assert ((np.asarray(logp) < 0) == (mask == 1)).all()
    np.testing.assert_array_equal(rollout.attention_mask_BT[:, 6:], mask)
    scored = score_rows(model, params, rollout.token_BT, rollout.attention_mask_BT, 0.7)
    np.testing.assert_allclose(rollout.logp_BT, scored * rollout.mask_BT, atol=1e-4)
    assert Counting.calls == lengths.max()  # the prompts, then one token fewer than the longest


def test_sample_ended_tells_stopped_rows_from_cut_ones(rich):
    last = np.asarray(rich.mask_BT).cumsum(1).argmax(1)
    stopped = np.isin(np.asarray(rich.token_BT)[np.arange(8), last], RICH.stop)
    assert 0 < stopped.sum() < 8
    np.testing.assert_array_equal(rich.ended_B, stopped)


def test_sample_value_equals_value(model, params, lora, rich):
    expected = jax.jit(value, static_argnums=0)(
        model, params, rich.token_BT, rich.attention_mask_BT, lora
    )
    assert jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(rich.value_BT, expected * rich.mask_BT, atol=1e-4)


def test_sample_over_caches_that_grow_is_the_same(model, params, generate, monkeypatch):
    """Responses of which some end in the first loop, others in the second."""
    config = replace(RICH, max_new_tokens=20)
    expected = generate(config, value=True)
    assert expected.mask_BT.sum(1).min() < 10 < expected.mask_BT.sum(1).max()
    monkeypatch.setattr(sampling, "LONG", 20)
    draw = jax.jit(lambda *given: sample(model, *given, config, value=True))
    text = draw.lower(params, PROMPT, PROMPT_MASK, KEY).as_text()
    caches = [f"tensor<8x2x{slots}x8xf32>" for slots in (16, 24)]
    assert [cache in text for cache in caches] == [True, True]
    found = draw(params, PROMPT, PROMPT_MASK, KEY)
    for name in ("token_BT", "mask_BT", "ended_B"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.logp_BT, expected.logp_BT, atol=1e-5)


def test_loops_over_shorter_caches_where_they_pay():
    """Of a number of tokens, or of a number of rows on a CPU; all tokens are drawn in them."""
    assert sampling.stages_of(1, 1024) == (512, 1024)
    assert sampling.stages_of(64, 128) == (64, 128)
    assert sampling.stages_of(63, 128) == (128,)
    assert sampling.stages_of(10**6, 1) == (1,)


@pytest.mark.parametrize(
    ("prompts", "width", "slots", "pieces"),
    [(64, 64, 0, 8), (64, 64, 4, 16), (17, 64, 0, 1), (4, 512, 0, 4), (2, 8, 0, 1), (6, 8, 2, 3)],
)
def test_prompts_are_read_by_as_many_tokens_as_a_cpu_keeps(prompts, width, slots, pieces):
    """The most pieces that divide them and are not small, and none of more prompts than slots."""
    assert sampling._pieces(prompts, width, slots) == pieces


@pytest.mark.parametrize("cache", ["model", "int8"])
def test_a_row_alone_is_as_it_is_among_others(model, params, monkeypatch, cache):
    """Its caches have no axis of rows, and grow; of the fourth prompt, in 20 tokens."""
    config = replace(RICH, n=1, max_new_tokens=20, stop=(), cache=cache)
    together = draw_rollout(model, params, PROMPT, PROMPT_MASK, KEY, config)
    monkeypatch.setattr(sampling, "LONG", 20)
    draw = jax.jit(lambda *given: sample(model, *given, config, row_B=jnp.array([3])))
    alone = draw(params, PROMPT[3:], PROMPT_MASK[3:], KEY)
    assert alone.mask_BT.sum() == 20  # both loops
    np.testing.assert_array_equal(alone.token_BT[0], together.token_BT[3])
    np.testing.assert_allclose(alone.logp_BT[0], together.logp_BT[3], atol=1e-5)


@pytest.mark.parametrize("prompts", [4, 2], ids=["prompts divide", "only rows divide"])
def test_sample_same_tokens_on_eight_devices(model, params, prompts):
    config = replace(WARM, n=8 // prompts)
    prompt, mask = PROMPT[:prompts], PROMPT_MASK[:prompts]
    one = draw_rollout(model, params, prompt, mask, KEY, config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    laid_out = jax.device_put(params, shardings(model.axes(head=True), mesh))
    with jax.set_mesh(mesh):
        if prompts == 4:
            prompt, mask = put_rows((prompt, mask), mesh)
        eight = draw_rollout(model, laid_out, prompt, mask, KEY, config)
    np.testing.assert_array_equal(eight.token_BT, one.token_BT)
    np.testing.assert_allclose(eight.logp_BT, one.logp_BT, atol=1e-5)


def test_sample_with_weights_laid_out_before_is_the_same(generate, model, params, lora):
    for adapters in (None, lora):
        weights = jax.jit(partial(lay_out, model))(params, adapters)
        once = generate(lora=adapters, weights=weights)
        jax.tree.map(np.testing.assert_array_equal, once, generate(lora=adapters))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 59}, "6 prompt [+] 59 new tokens exceed context=64"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"n": 0}, "n=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 1.0}, "min_p=1.0"),
    ],
)
def test_sample_refuses(generate, change, message):
    with pytest.raises(ValueError, match=message):
        generate(replace(WARM, **change))


def test_masks_may_be_floats(generate):
    found = generate(GREEDY, mask=PROMPT_MASK.astype(jnp.float32))
    np.testing.assert_array_equal(responses(found), responses(generate(GREEDY)))


def equations(jaxpr):
    """Each, with those of the loops and calls in it."""
    for x in jaxpr.eqns:
        yield x
        for inner in jaxprs_in_params(x.params):
            yield from equations(inner)


@pytest.mark.parametrize("slots", [0, 2])
def test_no_step_computes_angles(model, params, slots):
    """A CPU would compute the cosines in each layer anew."""
    config = replace(GREEDY, slots=slots)
    draw = partial(sample, model, sample_config=config)
    found = list(equations(jax.make_jaxpr(draw)(params, PROMPT, PROMPT_MASK, KEY).jaxpr))
    steps = [x.params["body_jaxpr"].jaxpr for x in found if x.primitive.name == "while"]
    inside = {x.primitive.name for body in steps for x in equations(body)}
    assert "dot_general" in inside
    assert "cos" in {x.primitive.name for x in found}
    assert "cos" not in inside


def test_sample_fills_the_context(model, params):
    config = replace(GREEDY, max_new_tokens=58)
    shape = jax.eval_shape(
        partial(sample, model, sample_config=config), params, PROMPT, PROMPT_MASK, jax.random.key(0)
    )
    assert shape.token_BT.shape == (4, 64)


def test_sample_never_draws_what_is_forbidden_and_says_the_drawn_probability(generate):
    """logp stays the full vocabulary's; sample_logp is that of the ids that could be drawn."""
    config = replace(WARM, forbidden=((0, 100), (200, 300)), n=4)
    rollout = generate(config)
    token_BN = responses(rollout)
    assert ((token_BN >= 100) & (token_BN < 200)).all()
    greedy = responses(generate(replace(config, temperature=0.0)))
    assert ((greedy >= 100) & (greedy < 200)).all()
    plain = generate(replace(WARM, n=4))
    assert ((responses(plain) < 100) | (responses(plain) >= 200)).any()
    gap = np.asarray(rollout.sample_logp_BT - rollout.logp_BT)[:, -NEW:]
    assert (gap > 0.1).all()
    np.testing.assert_array_equal(plain.sample_logp_BT, plain.logp_BT)


def test_sample_ends_with_the_token_that_completes_a_string(generate, model):
    """Tokens 0-149 are "a", 150-299 "b": "ab" ends a response at the first b after an a."""
    kind_V = np.repeat(np.array([0, 1], np.int32), 150)
    # States: nothing, "a", "ab".
    stops = StopTable(kind_V, np.array([[1, 0], [1, 2], [2, 2]], np.int32))
    config = replace(WARM, stop_strings=("ab",), n=8)
    rollout = generate(config, stops=stops)
    plain = generate(replace(WARM, n=8))
    ends = []
    for row, mask, free, ended in zip(
        responses(rollout),
        np.asarray(rollout.mask_BT)[:, -NEW:],
        responses(plain),
        np.asarray(rollout.ended_B),
        strict=True,
    ):
        text = "".join("ab"[kind_V[token]] for token in free)
        end = text.index("ab") + 2 if "ab" in text else NEW
        ends.append(end)
        assert ended == ("ab" in text)
        assert mask.tolist() == [1] * end + [0] * (NEW - end)
        assert row[:end].tolist() == free[:end].tolist()
        assert (row[end:] == config.pad).all()
    assert len(set(ends)) > 2
    logp_BN = np.asarray(rollout.logp_BT)[:, -NEW:]
    assert ((logp_BN != 0) == np.asarray(rollout.mask_BT)[:, -NEW:].astype(bool)).all()
    with pytest.raises(ValueError, match="give stops"):
        generate(config)

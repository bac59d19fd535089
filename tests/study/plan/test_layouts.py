"""What no compiled program of a run on eight devices may hold or send; broken ones are found."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import jax
import pytest
import runs

from jaxrlhf.config import DecoderConfig, MeshConfig, PPOConfig, RewardConfig, SampleConfig
from jaxrlhf.mesh.sharding import DECODE, RULES, constrain, make_mesh
from jaxrlhf.models import attention, decode
from jaxrlhf.run.setup import outline
from jaxrlhf.steps import columns
from jaxrlhf.steps import sample as sampling
from jaxrlhf.study.plan.calls import calls_of
from jaxrlhf.study.plan.hlo import Loops, collectives, open_loops, parse

PROMPT, NEW = 4, 41
VOCAB, EMBED, SLOTS = 640, 96, PROMPT + NEW  # 2.5 blocks of a draw
KEPT = 40  # slots of new tokens
ROWS = 32
HEAD_KERNEL = EMBED * 16
"""The smallest weight that a loop could gather."""
MESHES = [(2, 2, 2, 1), (1, 2, 2, 2)]
"""data, fsdp, tensor, context."""
NAMES = (
    "lay_out",
    "sample",
    "reward 0",
    "reference",
    "value",
    "rescore",
    "targets",
    "critic_update",
    "update",
)


@contextmanager
def programs(folder, sizes):
    """Name → compiled program of a run, and its mesh's sizes."""
    decoder = DecoderConfig(
        vocab=VOCAB, embed=EMBED, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=224, context=64
    )
    config = runs.ppo(folder, critic=runs.SEPARATE, sample=SampleConfig(max_new_tokens=NEW, n=4))
    config = replace(
        config,
        algorithm=PPOConfig(old_logp="rescore", minibatches=1),
        model=replace(config.model, decoder=decoder),
        rewards=(RewardConfig(model="no/such/run"),),
        mesh=MeshConfig(*sizes),
    )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        calls = calls_of(outline(config, mesh))
        assert calls.keys() == set(NAMES)

        @cache
        def module(name):
            compiled = calls[name].program.lower(*calls[name].args).compile()
            return parse(compiled.as_text())

        yield module, mesh.shape


@pytest.fixture(scope="module", params=MESHES, ids=str)
def modules(request, tmp_path_factory):
    """The programs of a run whose logits and attention scores do not fit at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES_A_DEVICE", ROWS * 4 * SLOTS**2 // 8 // 3)
        patch.setattr(columns, "LOGITS_A_DEVICE", 4 * VOCAB * ROWS // 8)
        with programs(tmp_path_factory.mktemp("layouts"), request.param) as found:
            yield found


@contextmanager
def broken(folder, sizes, where, name, value):
    """The same with a part of the code replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, value)
        with programs(folder, sizes) as found:
            yield found


def all_logits(module, sizes):
    """Arrays that hold a device's share of [B, T, V] or more: logits of all responses' tokens.

    Its share is the least that a device can have of them if they are there at once: rows over
    data·fsdp, tokens over context and vocabulary over tensor; or more, if that fails.
    """
    rows = ROWS // (sizes["data"] * sizes["fsdp"])
    columns = -(-NEW // sizes["context"])
    least = {vocab: rows * columns * vocab for vocab in (VOCAB, VOCAB // sizes["tensor"])}
    return [
        shape
        for ops in module.computations.values()
        for op in ops.values()
        for shape in op.shapes
        if any(vocab in shape.dims and shape.elements >= least[vocab] for vocab in least)
    ]


def largest(exchange):
    return max(exchange.visit.op.shapes, key=lambda shape: shape.elements)


def gathered(module, elements, trips=None):
    """All-gathers whose result has at least so many elements on a device."""
    found = collectives(module, trips)
    return [x for x in found if x.kind == "all-gather" and largest(x).elements >= elements]


def loop_gathers(module):
    """Gathers in the decode loop, of a weight or of a row's logits."""
    (loop,) = open_loops(module)
    return [x for x in gathered(module, HEAD_KERNEL, trips=NEW - 1) if loop in x.visit.loops]


def cache_exchanges(module):
    """What is sent of the cache of new tokens: of all slots, more than a number for each."""
    found = collectives(module, trips=NEW - 1)
    shapes = map(largest, found)
    return [x for x in shapes if KEPT in x.dims and x.elements > ROWS * KEPT]


@pytest.mark.parametrize("name", NAMES)
def test_no_program_holds_all_logits(name, modules):
    module, sizes = modules
    assert all_logits(module(name), sizes) == []


@pytest.mark.parametrize("name", ["reference", "update"])
def test_all_logits_would_be_found(name, tmp_path):
    with broken(tmp_path, MESHES[-1], columns, "LOGITS_A_DEVICE", 2**30) as (module, mesh):
        assert all_logits(module(name), mesh)


def test_decode_loop_gathers_neither_weights_nor_logits(modules):
    module, _ = modules
    assert loop_gathers(module("sample")) == []


def test_weights_gathered_in_the_decode_loop_would_be_found(tmp_path, monkeypatch):
    def late(model, weights, prompts, layers, token_B, at, tables):
        """Each step lays the weights out anew; what does not change, XLA would move out."""
        changing = jax.tree.map(lambda x: jax.numpy.where(at >= 0, x, 0), weights)
        names = decode.axes(model, weights)
        for rules in (RULES, DECODE):
            changing = jax.tree.map(partial(constrain, rules=rules), changing, names)
        return decode.step(model, changing, prompts, layers, token_B, at, tables)

    monkeypatch.setattr(sampling, "step", late)
    with broken(tmp_path, MESHES[-1], decode, "DECODE", RULES) as (module, _):
        assert loop_gathers(module("sample"))


def test_sampler_exchanges_no_cache(modules):
    module, _ = modules
    assert cache_exchanges(module("sample")) == []


def test_an_exchange_of_the_cache_would_be_found(tmp_path):
    def whole(query, prompt, mask, since, *rest):
        since = jax.tree.map(lambda x: constrain(x, (None,) * 4, DECODE), since)
        return attention.attend_next(query, prompt, mask, since, *rest)

    with broken(tmp_path, MESHES[-1], decode, "attend_next", whole) as (module, _):
        assert cache_exchanges(module("sample"))


def test_sampler_splits_the_cache_over_all_devices(modules):
    module, _ = modules
    share = ROWS * KEPT * 2 * 16 // 8  # rows, slots, heads, numbers
    (loop,) = open_loops(module("sample"))
    held = [
        shape
        for ops in module("sample").computations.values()
        for op in ops.values()
        if op.name == loop
        for shape in op.shapes
        if KEPT in shape.dims and len(shape.dims) > 3
    ]
    assert len(held) == 3 * 2  # of each layer
    assert {shape.elements for shape in held} == {share}


@pytest.mark.parametrize("name", ["reference", "value", "reward 0", "update"])
def test_keys_and_values_are_gathered_over_context_alone(name, modules):
    """Once a layer, not for each piece of its queries; neither hidden states nor scores are."""
    module, sizes = modules
    rows, heads = ROWS // (sizes["data"] * sizes["fsdp"]), 2 // sizes["tensor"]
    tokens = -(-SLOTS // sizes["context"]) * sizes["context"]  # XLA pads what it cannot divide
    found = gathered(module(name), 1, trips=Loops((), 1))
    found = [x for x in found if {SLOTS, tokens} & {*largest(x).dims}]
    # Of a head each, in the loop over layers: what is packed has numbers a token too.
    found = [x for x in found if x.visit.loops and len(largest(x).dims) > 3]
    assert {len(x.visit.loops) for x in found} <= {1}
    share = {rows * tokens * heads * 16}
    assert {largest(x).elements for x in found} == (share if sizes["context"] > 1 else set())

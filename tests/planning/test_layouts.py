"""What must not be in any compiled program of a run on eight devices."""

from dataclasses import replace
from functools import cache

import jax
import pytest
import runs

from jaxrlhf.config import DecoderConfig, MeshConfig, PPOConfig, RewardConfig, SampleConfig
from jaxrlhf.planning.collectives import arrays_with, gathered
from jaxrlhf.planning.hlo import open_loops, parse
from jaxrlhf.planning.steps import calls_of
from jaxrlhf.setup import outline
from jaxrlhf.sharding import make_mesh

VOCAB, EMBED, SLOTS = 640, 96, 4 + 33
ROWS = 32 // 4
"""On each device."""
NAMES = ("sample", "reward 0", "reference", "value", "rescore", "critic_update", "update")


@pytest.fixture(scope="module", params=[(2, 2, 2, 1), (1, 8, 1, 1), (1, 2, 2, 2)], ids=str)
def modules(request, tmp_path_factory):
    """Name → program of a run whose logits do not fit at once."""
    folder = tmp_path_factory.mktemp("layouts")
    decoder = DecoderConfig(
        vocab=VOCAB, embed=EMBED, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=224, context=64
    )
    config = runs.ppo(folder, critic=runs.SEPARATE, sample=SampleConfig(max_new_tokens=33, n=4))
    config = replace(
        config,
        algorithm=PPOConfig(old_logp="rescore", minibatches=1),
        model=replace(config.model, decoder=decoder),
        rewards=(RewardConfig(model="no/such/run"),),
        mesh=MeshConfig(*request.param),
    )
    mesh = make_mesh(config.mesh)
    patch = pytest.MonkeyPatch()
    patch.setattr("jaxrlhf.steps.scoring.LOGITS_A_DEVICE", 4 * VOCAB * ROWS // 2)
    with jax.set_mesh(mesh):
        calls = calls_of(outline(config, mesh))

        @cache
        def module(name):
            compiled = calls[name].program.lower(*calls[name].args).compile()
            return parse(compiled.as_text())

        yield module, mesh.shape
    patch.undo()


def rows_of(sizes):
    return 32 // (sizes["data"] * sizes["fsdp"])


@pytest.mark.parametrize("name", NAMES)
def test_no_program_holds_all_logits(name, modules):
    module, sizes = modules
    for vocab in {VOCAB, VOCAB // sizes["tensor"]}:
        all_columns = rows_of(sizes) * 33 * vocab
        assert arrays_with(module(name), (vocab,), all_columns) == []


def test_logits_are_there_in_pieces(modules):
    """What the test above looks for is found where it is."""
    module, sizes = modules
    vocab = VOCAB // sizes["tensor"]
    assert arrays_with(module("reference"), (vocab,), rows_of(sizes) * vocab)


def test_decode_loop_gathers_no_weight(modules):
    module, _ = modules
    (loop,) = open_loops(module("sample"))
    smallest = EMBED * 16  # one head's kernel
    inside = [x for x in gathered(module("sample"), smallest, trips=32) if loop in x.loops]
    assert [x for x in inside if x.result.dims[-1] < VOCAB] == []  # else [rows, V]: logits


def test_weights_are_gathered_before_the_loop(modules):
    """What the test above looks for is found where it is."""
    module, sizes = modules
    found = gathered(module("sample"), EMBED * 16, trips=32)
    assert sizes["fsdp"] == 1 or any(not x.loops for x in found)


def test_sampler_gathers_no_cache(modules):
    module, _ = modules
    found = [x for x in gathered(module("sample"), 1, trips=32) if SLOTS in x.result.dims]
    assert [x for x in found if x.result.elements > 32 * SLOTS] == []

"""What a run calls, and bytes on a device by kind: by hand, and as the compiler and devices say."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.config import DAPOConfig, LoraConfig, MeshConfig, PPOConfig
from jaxrlhf.core.types import TrainState
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.run.setup import outline, setup
from jaxrlhf.study.plan.calls import (
    Refusal,
    arguments_by_kind,
    cache_bytes,
    calls_of,
    decode_copy,
    decode_loops,
    decode_trips,
    kinds_of,
    on_device,
    refused,
    resident,
)
from jaxrlhf.study.plan.hlo import Loops


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(2, 2, 2))


def test_on_device(mesh):
    x = jax.ShapeDtypeStruct(
        (8, 6), jnp.bfloat16, sharding=NamedSharding(mesh, P("data", "tensor"))
    )
    assert on_device(x) == 4 * 3 * 2
    assert on_device(np.zeros((3, 5), np.float32)) == 60
    assert on_device(jax.ShapeDtypeStruct((3, 6), jnp.uint4)) == 9
    assert on_device(jax.eval_shape(lambda: jax.random.key(0))) == 8


def test_kinds_of():
    state = TrainState(params={"a": 1.0}, opt_state=(2.0, 3.0), step=4, skipped=5)  # type: ignore[arg-type]
    network = {"layers": {"w": 1.0}, "norm": 2.0}
    kinds = kinds_of((state, network, {"kl_coef": 1.0}, None, np.zeros(3)))
    assert kinds == ["parameters", *["optimizer"] * 4, *["parameters"] * 2, "rows", "rows"]


def test_arguments_by_kind_leaves_out_what_is_not_read():
    network = {"layers": jnp.zeros(10), "head": jnp.zeros(1000)}
    traced = jax.jit(lambda p, x: p["layers"] + x).trace(network, 1.0)
    found = arguments_by_kind((network, jnp.float32(1)), traced.jaxpr)
    assert found == {"parameters": 40, "optimizer": 0, "rows": 4, "weights_copy": 0}


def test_refused_reads_the_compiler():
    said = "XLA:TPU compile permanent error. Used 21.50G of 15.75G hbm. Exceeded hbm capacity by 5G"
    assert refused(said) == Refusal(used=21.5 * 2**30)
    assert refused("Used 512.00M of 256M hbm") == Refusal(used=2**29)
    assert refused("something else") is None


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (21.50G) exceeds available HBM (15.75G).",
            Refusal(temporaries=21.5 * 2**30),
        ),
        (
            "Ran out of memory in memory space hbm. Used 1.50TiB of 15.75G hbm. Exceeded hbm "
            "capacity by 1.48T. Memory usage report: ",
            Refusal(used=1.5 * 2**40),
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes.",
            Refusal(temporaries=2**30, at_least=True),
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 2.00GiB.",
            Refusal(temporaries=2**31, at_least=True),
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.", Refusal(at_least=True)),
        ("Ran out of memory for value: %fusion.1", Refusal(at_least=True)),
        ("Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
        ("INVALID_ARGUMENT: 21.50G of 15.75G", None),
    ],
)
def test_refused_reads_every_wording(said, refusal):
    assert refused(said) == refusal


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4)])
def test_resident_is_what_a_run_holds(lora, mesh, tmp_path):
    config = runs.ppo(tmp_path, critic=runs.SEPARATE, mesh=MeshConfig(2, 2, 2))
    config = replace(config, model=replace(config.model, lora=lora))
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        held = [run.states, run.frozen, run.reference.params]
        arrays = {id(x): x for x in jax.tree.leaves(held)}.values()
        first = jax.devices()[0]
        local = sum(
            piece.data.nbytes for x in arrays for piece in x.addressable_shards
            if piece.device == first
        )  # fmt: skip
        assert resident(run) == local
        assert resident(outline(config, mesh)) == local


def test_cache_and_copy_by_hand(mesh, tmp_path):
    with jax.set_mesh(mesh):
        run = outline(runs.ppo(tmp_path, mesh=MeshConfig(2, 2, 2)), mesh)
        # keys and values: 2 layers, 8 prompts of 4 and 16 rows of 8 slots over 4, 2 heads over 2,
        # head_dim 8
        assert cache_bytes(run, 16) == 2 * 2 * (2 * 4 + 4 * 8) * 1 * 8 * 4
        # a layer: q and o 32x32, k and v 32x16, mlp 3 times 32x64, over 2; 5 norms; embedding;
        # the critic's head
        layer = (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) // 2
        assert decode_copy(run) == 4 * (16 * 32 // 2 + 5 * 32 + 2 * layer + 33)


def test_calls_of_other_runs(config, tmp_path, mesh):
    with jax.set_mesh(mesh):
        shared = replace(config, critic=runs.ppo(tmp_path).critic)
        rescored = replace(shared, algorithm=PPOConfig(old_logp="rescore", minibatches=1))
        names = set(calls_of(outline(rescored, mesh)))
        assert {"rescore", "update"} <= names
        assert not {"value", "take", "critic_update"} & names
        dapo = replace(shared, algorithm=DAPOConfig(rounds=3))
        assert calls_of(outline(dapo, mesh))["sample"].calls == 3
        dpo = replace(runs.of("dpo", tmp_path), mesh=config.mesh)
        assert set(calls_of(outline(dpo, mesh))) == {"reference", "update"}
        held_out = replace(shared, data=replace(shared.data, eval="no/such.jsonl"))
        found = calls_of(outline(held_out, mesh))
        assert (found["eval_sample"].calls, found["eval_reference"].calls) == (0, 0)


def test_decode_trips(config):
    assert decode_trips(config, 16, None) == 7
    assert decode_trips(config, 16, 1e9) == 7
    two = replace(config, sample=replace(config.sample, max_new_tokens=2))
    # the longest of 3 rows has 1 token, and 2 unless all three end at the first: 1 + 7/8, less 1
    assert decode_trips(two, 3, 2.0) == 1


def test_decode_loops(tmp_path):
    config = runs.ppo(tmp_path)
    assert decode_loops(config, 16, 7) == Loops((7,))
    long = replace(config, sample=replace(config.sample, max_new_tokens=1024))
    assert decode_loops(long, 16, 1023) == Loops((511, 512))
    assert decode_loops(long, 16, 100) == Loops((100, 0))


def test_decode_loops_of_slots(config):
    """16 rows of 8 tokens in 4 slots: 4 rounds of 7 steps, as many as rows end."""
    slots = replace(config, sample=replace(config.sample, slots=4))
    assert decode_trips(slots, 16, None) == 28
    assert decode_loops(slots, 16, 28) == Loops((14,), 2)
    # all rows have one token, drawn before the loop
    assert decode_trips(slots, 16, 1.0) == 0
    assert decode_loops(slots, 16, 0).outer == (0,)
    assert decode_trips(slots, 4, None) == 7

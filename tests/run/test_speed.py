"""What a run says of its speed: counts by hand, of models and rollouts that can be counted."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import one_device

from jaxrlhf.config import DAPOConfig, DecoderConfig, LoraConfig, MeshConfig, ModelConfig
from jaxrlhf.core.types import Rollout, TokenBatch
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import build
from jaxrlhf.run import speed
from jaxrlhf.run.loop import train
from jaxrlhf.run.speed import (
    Ceiling,
    Meter,
    ceiling,
    decode_bytes,
    decoded,
    forward_flops,
    matrices,
    read,
    train_flops,
)

DECODER = DecoderConfig(
    vocab=10, embed=4, layers=2, heads=2, kv_heads=1, head_dim=3, mlp=5, context=16
)
N = 2 * (4 * (6 + 3 + 3) + 6 * 4 + 3 * 4 * 5)
"""q, k, v; o; gate, up, down: of two layers."""


def model(lora=None):
    return build(ModelConfig(decoder=DECODER, lora=lora))


def rollout():
    """Prompts of 2 and 1 tokens; responses of 3 and 1."""
    mask_BT = jnp.array([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]], jnp.float32)
    attention_mask_BT = jnp.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]], jnp.int32)
    zero = jnp.zeros((2, 5))
    return Rollout(zero.astype(int), attention_mask_BT, mask_BT, zero, zero, jnp.ones(2, bool))


def test_matrices_are_those_of_the_model():
    assert matrices(DECODER, vocab=False) == N
    assert matrices(DECODER) == N + 4 * 10
    kernels = jax.tree.leaves_with_path(model().shapes())
    sizes = [x.size for path, x in kernels if "norm" not in jax.tree_util.keystr(path)]
    assert sum(sizes) == matrices(DECODER)  # its embedding is its projection


def test_flops_of_a_token():
    attention = 2 * 2 * (2 * 3) * 8  # scores and values, a layer: 2 · heads · H · T each
    assert forward_flops(model(), 8.0) == 2 * (N + 40) + 2 * attention
    assert train_flops(model(), 8.0, vocab=False) == 6 * N + 6 * attention


def test_flops_under_adapters_are_without_the_weights_own_gradient():
    adapters = 2 * (4 + 6)  # A and B of q in both layers, rank 1
    adapted = model(LoraConfig(rank=1, targets=("q",)))
    assert train_flops(adapted, 0.0, vocab=False) == 4 * N + 6 * 2 * adapters / 2


def test_decoded_counts_by_masks():
    assert {k: float(x) for k, x in decoded(rollout()).items()} == {
        "tokens": 2,
        "steps": 2,
        "row_steps": 4,
        "slots": 3 + 4,
    }
    # One row after the other: the second has no step to take.
    in_turn = {k: float(x) for k, x in decoded(rollout(), 1).items()}
    assert in_turn == {"tokens": 2, "steps": 2, "row_steps": 2, "slots": 3 + 4}


def test_decode_bytes_reads_the_weights_once_a_step_on_each_row_shard():
    per_slot = 2 * 2 * 1 * 3  # keys and values of two layers
    one = decode_bytes(model(), one_device(), "float32", steps=3, slots=10)
    assert one == 4 * (3 * (N + 40) + 10 * per_slot)
    four = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    assert decode_bytes(model(), four, "float32", 3, 0) == 2 * 4 * 3 * (N + 40)


@pytest.mark.parametrize(("kind", "vector"), [("bfloat16", 2 * 3), ("int8", 3 + 4)])
def test_decode_bytes_of_a_smaller_cache(kind, vector):
    """Keys and values of two layers, one head of three numbers, in each of ten slots."""
    assert decode_bytes(model(), one_device(), kind, steps=0, slots=10) == 10 * 2 * 2 * vector


def test_decode_bytes_of_layers_in_few_bits():
    """All but the projection, which stays float32."""
    for kind, size in {"int8": 1, "nf4": 0.5 + 4 / 64}.items():
        assert decode_bytes(model(), one_device(), "float32", 1, 0, kind) == size * N + 4 * 40


def test_read_counts_tokens_and_texts():
    mask_BT = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    plain = TokenBatch(mask_BT, mask_BT, mask_BT)
    assert read(plain) == {"tokens": 6, "texts": 2}
    packed = replace(plain, segment_BT=np.array([[1, 1, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0]]))
    assert read(packed) == {"tokens": 6, "texts": 3}


def test_metrics_are_shares_of_the_ceiling(monkeypatch, tmp_path):
    """Figures of a made-up second of each phase on a machine of round numbers."""
    monkeypatch.setattr(speed, "ceiling", lambda mesh: Ceiling(1e6, 1e5))
    config = runs.of("grpo", tmp_path)
    run = SimpleNamespace(config=config, model=model(), mesh=one_device(), states={})
    run.algorithm = SimpleNamespace(needs=())
    meter = Meter(run)  # type: ignore[arg-type]
    meter.begin({"sample": 5.0, "update": 7.0})
    meter.sampled(rollout())
    meter.learns(TokenBatch(*[jnp.ones((2, 4), jnp.int32)] * 3))
    found = meter.metrics({"sample": 6.0, "update": 9.0}, spent=4.0, passes=2.0)
    needed = decode_bytes(model(), one_device(), "float32", steps=2, slots=7)
    assert found == {
        "mfu": pytest.approx(2 * 8 * train_flops(model(), 4.0) / 2.0 / 1e6),
        "bandwidth_share": pytest.approx(needed / 1e5),
        "sample_share": pytest.approx(1 / 3),
        "idle_share": pytest.approx(1 - 2 / 4),
    }


def test_cpus_are_measured_under_the_mesh_of_a_run(monkeypatch):
    """Whose devices the measurement does not use; fake ones share what is measured."""
    speed.measured.cache_clear()
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = ceiling(mesh)
    assert found == speed.measured()
    assert min(speed.measured()) > 0
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert ceiling(mesh) == tuple(3 * x for x in speed.measured())


def test_unknown_devices_have_no_ceiling_and_a_note(tmp_path):
    device = SimpleNamespace(platform="gpu", device_kind="Abacus 9")
    mesh = SimpleNamespace(devices=np.array([device]), size=1)
    assert ceiling(mesh) is None  # type: ignore[arg-type]
    run = SimpleNamespace(config=runs.of("grpo", tmp_path), mesh=mesh)
    assert "'Abacus 9' is not known" in Meter(run).note()  # type: ignore[arg-type]
    device.device_kind = "NVIDIA H100 80GB HBM3"
    assert ceiling(mesh) == Ceiling(989e12, 3350e9)  # type: ignore[arg-type]
    assert not Meter(run).note()  # type: ignore[arg-type]


def test_compilations_are_counted_once_a_shape():
    before = speed.compilations().here()
    program = jax.jit(lambda x: x * 3 + 1)
    program(jnp.ones(7))
    once = speed.compilations().here()
    assert once > before
    program(jnp.ones(7))
    assert speed.compilations().here() == once
    program(jnp.ones(9))
    assert speed.compilations().here() > once


def test_fifty_iterations_compile_nothing_and_hold_no_more_arrays(tmp_path, monkeypatch):
    """DAPO, whose rounds differ in number from one iteration to the next."""
    held = []

    # What others have made is looked through once, not at every iteration.
    gc.collect()
    gc.freeze()

    def counted():
        gc.collect()
        held.append(sum(x.nbytes for x in jax.live_arrays()))

    real = Meter.begin

    def begin(self, seconds):
        counted()
        real(self, seconds)

    monkeypatch.setattr(Meter, "begin", begin)
    config = runs.of("dapo", tmp_path, algorithm=DAPOConfig(rounds=3), steps=50)
    config = replace(config, checkpoint=replace(config.checkpoint, every=0))
    train(config, one_device())
    gc.unfreeze()
    lines = [json.loads(x) for x in (Path(config.output) / "metrics.jsonl").open()]
    steps = [line for line in lines if "rounds" in line]
    assert len({line["rounds"] for line in steps}) > 1
    assert [line["recompiles"] for line in steps[1:]] == [0] * 49
    # Meter's own scalars of the last iteration differ with its rounds.
    assert max(held[3:]) - min(held[3:]) <= 1024

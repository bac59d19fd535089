"""Models leave a weight at a time, in the dtype that is asked for, and are what was trained."""

import gc
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import runs

from jaxrlhf.apps import cli
from jaxrlhf.config import LoraConfig, MeshConfig, ModelConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models import export
from jaxrlhf.models.export import open_weights
from jaxrlhf.models.hf import open_hf, read_hf, write_hf
from jaxrlhf.models.load import load_model
from jaxrlhf.models.source import Later
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.run import loop

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of all weights, and one of adapters on what it has trained."""
    folder = tmp_path_factory.mktemp("runs")
    whole = runs.sft(folder, steps=1, output=str(folder / "whole"))
    loop.train(whole, MESH)
    adapted = replace(
        whole,
        model=ModelConfig(whole.output, lora=LoraConfig(rank=2, alpha=4)),
        output=str(folder / "adapted"),
    )
    loop.train(adapted, MESH)
    return whole.output, adapted.output


@pytest.mark.parametrize("which", [0, 1])
def test_export_of_a_run_is_what_it_has_trained(trained, which, tmp_path):
    _, params, _ = load_model(trained[which], MESH)
    for dtype, kind in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
        out = tmp_path / dtype
        assert cli.main(["export", trained[which], str(out), "--dtype", dtype]) == 0
        rounded = jax.tree.map(lambda x, kind=kind: np.asarray(x, kind).astype(np.float32), params)
        jax.tree.map(np.testing.assert_array_equal, read_hf(out)[1], rounded)
        source = open_hf(out)
        assert {source.kept(weight) for weight in source.weights()} == {dtype}


def test_one_leaf_at_a_time_is_in_memory(tiny, random_params, tiny_tokenizer, tmp_path):
    class Leaf(np.ndarray):
        """An array that can be watched."""

    alive, most = [], []

    def later(x):
        def read():
            leaf = x.copy().view(Leaf)
            alive.append(weakref.ref(leaf))
            gc.collect()
            most.append(sum(x() is not None for x in alive))
            return leaf

        return Later(x.shape, read)

    params = random_params(tiny)
    write_hf(tmp_path / "out", tiny, jax.tree.map(later, params), tiny_tokenizer, shard_bytes=9000)
    assert len(most) > 5
    assert max(most) <= 2  # the last is let go of when the next is there
    jax.tree.map(np.testing.assert_array_equal, read_hf(tmp_path / "out")[1], params)


def test_a_run_that_goes_on_meanwhile(trained, monkeypatch):
    steps, real = iter(range(100)), export.restore
    monkeypatch.setattr(export, "restore", lambda *x: (next(steps), *real(*x)[1:]))
    leaves = [x for x in open_weights(trained[0]).values() if isinstance(x, Later)]
    leaves[0].read()
    with pytest.raises(
        InputError, match="the run has gone on to step 1 meanwhile: export it again"
    ):
        leaves[1].read()


def test_export_of_a_folder_keeps_its_dtype_in_memory(tiny, random_params, tmp_path):
    decoder = replace(tiny, vocab=16)
    tokenizer = load_tokenizer(f"words:{runs.WORDS}")
    write_hf(tmp_path / "a", decoder, random_params(decoder), tokenizer, "bfloat16")
    leaves = open_weights(str(tmp_path / "a"))
    assert {x.read().dtype for x in leaves.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert (
        cli.main(["export", str(tmp_path / "a"), str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    )
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]

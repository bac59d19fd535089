"""Parts of weights are read out of files as they would be cut out of the whole, in the dtype that
the file has; and lie on the mesh as its layout says."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.config import DecoderConfig, MeshConfig, ModelConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh, shardings
from jaxrlhf.models import hf
from jaxrlhf.models.hf import open_hf, read_hf, write_hf
from jaxrlhf.models.load import Loader, load_model
from jaxrlhf.models.source import ALIGNED, BFLOAT16, Source, empty
from jaxrlhf.models.transformer import Model

SPLIT = DecoderConfig(
    vocab=48, embed=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=40, context=64,
    tied=False, qkv_bias=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_params, tiny_tokenizer):
    """A model in bfloat16, but for its norms, in several files."""
    out = tmp_path_factory.mktemp("weights") / "model"
    write_hf(out, SPLIT, random_params(SPLIT), tiny_tokenizer, "bfloat16", shard_bytes=9000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 4
    for path in files:
        tensors = load_file(path)
        wide = {name: x.astype(np.float32) for name, x in tensors.items() if "norm" in name}
        save_file({**tensors, **wide}, path, metadata={"format": "pt"})
    return out


def test_parts_are_those_of_the_whole(folder):
    source = open_hf(folder)
    for weight in source.weights():
        whole, shape = source.whole(weight), source.shape(weight)
        # The first axis of what comes in and of what goes out may be split, and so may layers.
        halves = [[slice(0, n // 2), slice(n // 2, n)] if n in (32, 4, 2, 40, 48) else [slice(None)]
                  for n in shape]  # fmt: skip
        indices = list(itertools.product(*halves))
        for index, part in zip(indices, source.parts(weight, indices), strict=True):
            np.testing.assert_array_equal(part, whole[index])
            assert part.ctypes.data % ALIGNED == 0


def test_weights_are_kept_as_their_file_has_them(folder):
    source = open_hf(folder)
    kept = {weight.path: source.whole(weight).dtype for weight in source.weights()}
    assert {kind for path, kind in kept.items() if "norm" not in path} == {BFLOAT16}
    assert {kind for path, kind in kept.items() if "norm" in path} == {np.dtype("float32")}
    for path, wide in (("layers", read_hf(folder)[1]["layers"]), ("all", source.tree("float32"))):
        assert {x.dtype for x in jax.tree.leaves(wide)} == {np.dtype("float32")}, path


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=8)])
def test_on_the_mesh_each_device_has_its_part(folder, mesh):
    mesh = make_mesh(mesh)
    params, wide = load_model(str(folder), mesh)[1], read_hf(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, params, wide)
    layout = shardings(Model(SPLIT).axes(), mesh)
    assert jax.tree.map(lambda x: x.sharding, params) == layout
    # What is described without weights is what is read.
    abstract = Loader(mesh, abstract=True).base(ModelConfig(path=str(folder))).params
    described, read = (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree) for tree in (abstract, params)
    )
    assert described == read


def test_a_part_that_no_layout_asks_for_is_an_error():
    source = Source(SPLIT, lambda weight, _: np.zeros(weight.stored), lambda _: "float32")
    query = next(w for w in source.weights() if w.path.endswith("q/kernel"))
    with pytest.raises(ValueError, match="only the first axis of a side can be split"):
        source.parts(query, [(slice(None), slice(None), slice(0, 2), slice(0, 4))])


def test_files_are_closed_after_some_bytes(folder, monkeypatch):
    """What has been read of a mapped file is memory of the process."""
    opened, real = [], hf.safe_open
    source = open_hf(folder)
    monkeypatch.setattr(hf, "MOST_MAPPED", 3000)
    monkeypatch.setattr(hf, "safe_open", lambda *given: opened.append(given[0]) or real(*given))
    up = next(w for w in source.weights() if w.path.endswith("up/kernel"))
    first, second = source.whole(up), source.whole(up)
    np.testing.assert_array_equal(first, second)
    assert len(opened) > len(set(opened))


def test_a_tied_projection_that_differs_late(folder, tmp_path, random_params, tiny_tokenizer):
    tied = DecoderConfig(5000, 8, 1, 1, 1, 8, 8)
    write_hf(tmp_path / "out", tied, random_params(tied), tiny_tokenizer)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.copy()}, path)
    assert read_hf(path.parent)[0].tied
    changed = table.copy()
    changed[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": changed}, path)
    with pytest.raises(InputError, match=r"lm_head.weight differs"):
        read_hf(path.parent)


def test_empty_arrays_are_aligned():
    for shape, kind in (((3, 5), ml_dtypes.bfloat16), ((), np.float32), ((7,), np.float32)):
        assert empty(shape, np.dtype(kind)).ctypes.data % ALIGNED == 0

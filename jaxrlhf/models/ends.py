"""What ends a response: one record of a model, read once and carried wherever it speaks.

The ids that end a response are a property of the model: those of its tokenizer, of its
generation_config.json and config.json (of a GGUF file its metadata), and of the run that trained
it. ``read_ends`` joins them; ``Ends.settle`` writes them into the settings of a sampler, which a
run keeps in its config.yaml. Training, sampling, evaluation, preferences, serving and export take
them from there.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast as Tokenizer

from jaxrlhf.config import SampleConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import shown
from jaxrlhf.models.gguf import open_gguf
from jaxrlhf.models.hf_config import read_object
from jaxrlhf.models.hub import base_of, is_adapter, local
from jaxrlhf.models.read import gguf_file, is_run, run_config

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Ends:
    """What ends the responses of a model, and which ids they are made of."""

    stop: tuple[int, ...]
    """Ids that end a response; the first closes an answer that nothing else closes."""
    strings: tuple[str, ...]
    """Texts that end a response, with the token that completes one."""
    pad: int
    """What is written after the end; masks, not ids, say what is padding."""
    unused: tuple[tuple[int, int], ...]
    """Ranges (first, last + 1) of ids that the network has and no text could show."""

    vocab: int
    """Ids that the network has."""

    def settle(self, sample: SampleConfig) -> SampleConfig:
        """``sample`` with these ends, beside those that it brings.

        Raises:
          InputError: it brings an id that the model does not have, or forbids other ids than those
            without a text.
        """
        for token in sample.stop:
            _known("sample.stop", token, self.vocab)
        # Those of a run's config.yaml are the model's; what else is given would not be read.
        if sample.forbidden not in ((), self.unused):
            given, own = ([list(x) for x in ranges] for ranges in (sample.forbidden, self.unused))
            raise InputError(
                f"sample.forbidden={shown(given, 80)}: a run forbids the ids that are no tokens, "
                f"here {shown(own, 80)}, and no others: leave it out"
            )
        return replace(
            sample,
            stop=tuple(dict.fromkeys((*self.stop, *sample.stop))),
            stop_strings=tuple(dict.fromkeys((*self.strings, *sample.stop_strings))),
            pad=self.pad,
            forbidden=self.unused,
        )

    def note(self) -> str:
        """What is said once of ids that are never drawn; "" where there are none."""
        count = sum(end - start for start, end in self.unused)
        ids = ", ".join(f"{start} to {end - 1}" for start, end in self.unused[:3])
        more = ", …" if len(self.unused) > 3 else ""
        what = f"{count} ids of the model are no tokens of its tokenizer, and never drawn"
        return f"{what}: {ids}{more}" if count else ""


def read_ends(path: str, tokenizer: Tokenizer, vocab: int) -> Ends:
    """The record of a model: its tokenizer's end-of-sequence, and what its files say.

    Args:
      path: as ``model.path``: a Hugging Face folder (``eos_token_id``, a number or a list, of
        generation_config.json and of config.json; ``stop_strings`` of the former), a .gguf file
        (eos, eot and eom), smollm2, or the output folder of a run, which adds its ``sample.stop``
        and ``sample.stop_strings`` to those of the model that it started from. "" for none.
      tokenizer: the model's.
      vocab: rows of the model's embedding table.

    Raises:
      InputError: one of these files is malformed, or names an id that the model does not have.
    """
    eos: Any = tokenizer.eos_token_id
    stop: list[int] = [] if eos is None else [_known("tokenizer: eos_token_id", eos, vocab)]
    strings: list[str] = []
    for where, ids, texts in _said(path):
        stop += [_known(where, token, vocab) for token in ids]
        strings += texts
    stop = list(dict.fromkeys(stop))
    pad: Any = tokenizer.pad_token_id
    # A padding token added to the tokenizer alone has no row; any id will do under the masks.
    if pad is None or pad >= vocab:
        pad = stop[0] if stop else 0
    unused = unused_ids(tokenizer, vocab, stop)
    return Ends(tuple(stop), tuple(dict.fromkeys(strings)), int(pad), unused, vocab)


def unused_ids(
    tokenizer: Tokenizer, vocab: int, stop: list[int] | tuple[int, ...] = ()
) -> tuple[tuple[int, int], ...]:
    """Ranges of the ids below ``vocab`` that are neither tokens nor in ``stop``.

    Embedding tables are often padded beyond the tokenizer, to a multiple of 64 or so: the network
    has logits for such ids, and nothing could be read of them.
    """
    unused_V = np.ones(vocab, bool)
    ids = np.fromiter(tokenizer.get_vocab().values(), int)
    unused_V[ids[ids < vocab]] = False
    unused_V[list(stop)] = False
    edges = np.flatnonzero(np.diff(np.pad(unused_V, 1).astype(np.int8)))
    return tuple((int(start), int(end)) for start, end in edges.reshape(-1, 2))


def read_generation(path: str) -> dict[str, Any]:
    """generation_config.json of the folder that a model is or has started from; {} without one.

    Raises:
      InputError: it is malformed.
    """
    while is_run(path) or is_adapter(path):
        path = run_config(path).model.path if is_run(path) else base_of(path)
    file = Path(local(path)) / GENERATION
    return read_object(file) if path and os.path.isfile(file) else {}


def generation_config(ends: Ends, start: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The generation_config.json of an export: that of the start, with this record in it."""
    named: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": ends.pad}
    if ends.stop:
        named["eos_token_id"] = ends.stop[0] if len(ends.stop) == 1 else list(ends.stop)
    if ends.strings:
        named["stop_strings"] = list(ends.strings)
    return {**start, **{name: value for name, value in named.items() if value is not None}}


def _said(path: str) -> Iterator[tuple[str, list[int], list[str]]]:
    """(place, ids, strings) of every file that says what ends a response."""
    if not path:
        return
    if is_run(path):
        config = run_config(path)
        yield from _said(config.model.path)
        sample = config.sample
        yield f"{path}: sample.stop", list(sample.stop), list(sample.stop_strings)
    elif is_adapter(path):
        yield from _said(base_of(path))
    elif file := gguf_file(path):
        fields = open_gguf(file).fields
        for name in ("eos", "eot", "eom"):
            key = f"tokenizer.ggml.{name}_token_id"
            yield f"{file}: {key}", _ids(f"{file}: {key}", fields.get(key)), []
    else:
        for name in (GENERATION, "config.json"):
            if os.path.isfile(found := Path(local(path)) / name):
                said = read_object(found)
                # Of a model that sees it may stand in what describes its language model.
                inside = said.get("text_config") if said.get("eos_token_id") is None else None
                eos = inside.get("eos_token_id") if isinstance(inside, dict) else None
                ids = _ids(f"{found}: eos_token_id", said.get("eos_token_id", eos))
                texts = said.get("stop_strings") if name == GENERATION else None
                yield f"{found}: eos_token_id", ids, _strings(f"{found}: stop_strings", texts)


def _ids(where: str, value: Any) -> list[int]:
    """A token id, a list of them, or none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise InputError(f"{where}={shown(value, 80)}: give a token id or a list of them")
    return ids


def _strings(where: str, value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{where}={shown(value, 80)}: give a text or a list of them")
    return texts


def _known(where: str, token: int, vocab: int) -> int:
    """``token``, if the model has it: another would never be drawn."""
    if token >= vocab:
        raise InputError(
            f"{where}: {token} is none of the model's {vocab} token ids: mend it, or leave it out"
        )
    return int(token)

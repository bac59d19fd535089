"""Tokenizers: from a Hugging Face folder, a GGUF file, or a few words or characters."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models.gguf import smollm2_path
from jaxrlhf.models.gguf_tokenizer import gguf_tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Loads a tokenizer; nothing is downloaded and no code from the folder is run.

    Args:
      path: ``smollm2``; a .gguf file; a Hugging Face folder with tokenizer.json; or
        ``words:TEXT`` or ``chars:TEXT``, whose vocabulary is <pad>, <eos> and the distinct words or
        characters of TEXT (for tiny models; one that is not in TEXT cannot be encoded).

    Returns:
      A tokenizer that pads on the left and has a pad token. Where the source names none it is the
      end-of-sequence token: masks say what is padding, ids never do.

    Raises:
      InputError: no tokenizer is there, it cannot be read, or it has neither pad nor eos.
    """
    path = os.fspath(path)
    if path.startswith("words:"):
        return _words(path.removeprefix("words:"))
    if path.startswith("chars:"):
        return _chars(path.removeprefix("chars:"))
    if path == "smollm2":
        tokenizer = gguf_tokenizer(smollm2_path())
    elif path.endswith(".gguf"):
        tokenizer = gguf_tokenizer(path)
    else:
        tokenizer = _from_folder(Path(path))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{path}: the tokenizer has neither pad_token nor eos_token; "
                "name one in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder}: no tokenizer.json; give smollm2, a .gguf file, a Hugging Face folder with "
            "a fast tokenizer, words:TEXT or chars:TEXT"
        )
    try:
        # Not AutoTokenizer: some of its classes rebuild what tokenizer.json says.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: tokenizer cannot be read ({reason})") from None


def _words(text: str) -> PreTrainedTokenizerFast:
    if not text.split():
        raise InputError("words:: no words; write words: and the words, separated by spaces")
    return _of_units(text.split(), pre_tokenizers.WhitespaceSplit())


def _chars(text: str) -> PreTrainedTokenizerFast:
    if not text:
        raise InputError("chars:: no characters; write chars: and the characters, with the space")
    single = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return _of_units(text, single, decoders.Fuse())


def _of_units(
    units: Iterable[str],
    splitter: pre_tokenizers.PreTokenizer,
    joiner: decoders.Decoder | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer of <pad>, <eos> and ``units``; joined by spaces if there is no ``joiner``."""
    vocab = {unit: i for i, unit in enumerate(dict.fromkeys(["<pad>", "<eos>", *units]))}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = splitter
    if joiner is not None:
        tokenizer.decoder = joiner
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def ends_of(tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[int, ...], int]:
    """The ids that end a response (its end-of-sequence, if any), and the id to pad with."""
    eos: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id
    return (() if eos is None else (int(eos),)), int(pad)


def check_vocab(
    tokenizer: PreTrainedTokenizerFast, decoder: DecoderConfig, stop: Iterable[int] = ()
) -> None:
    """Makes sure that every token has a row in the embedding.

    Args:
      stop: ids that end a response (``sample.stop``).

    Raises:
      InputError: the tokenizer has an id that is not below ``decoder.vocab``: jax would silently
        read another token's row. Or ``stop`` has one, which would never be drawn.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    if size > decoder.vocab:
        raise InputError(
            f"tokenizer: {size} ids, but the model's embedding has {decoder.vocab} rows; "
            "use the model's own tokenizer"
        )
    for token in stop:
        if token >= decoder.vocab:
            raise InputError(
                f"sample.stop: {token} is none of the model's {decoder.vocab} token ids: mend it, "
                "or leave it out"
            )

"""Tokenizers: of a Hugging Face folder, of a GGUF file, or of a few words or characters."""

import json
import os
from base64 import b64decode
from contextlib import suppress
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.core.errors import InputError, refused
from jaxrlhf.core.shown import shown
from jaxrlhf.models.gguf import File, field, open_gguf, smollm2_path
from jaxrlhf.models.hub import local

# Kinds of token in tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's and Qwen2's words, which differ in how many digits are one."""


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS.replace("{DIGITS}", digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "gpt-2": _GPT2,
    "llama-bpe": _words("{1,3}"),
    "qwen2": _words(""),
    "deepseek-r1-qwen": _words(""),
}


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Loads a tokenizer; nothing is downloaded and no code from the folder is run.

    Args:
      path: ``smollm2``; a .gguf file; a Hugging Face folder with tokenizer.json, or the name of a
        repository of the hub that has been fetched; or
        ``words:TEXT`` or ``chars:TEXT``, whose vocabulary is <pad>, <eos> and the distinct words or
        characters of TEXT (for tiny models; one that is not in TEXT cannot be encoded).

    Returns:
      A tokenizer that pads on the left and has a pad token. Where the source names none it is the
      end-of-sequence token: masks say what is padding, ids never do.

    Raises:
      InputError: no tokenizer is there, it cannot be read, or it has neither pad nor eos.
    """
    path = os.fspath(path)
    if path.startswith(("words:", "chars:")):
        return _of_units(path)
    if path == "smollm2":
        path = os.fspath(smollm2_path())
    found = local(path)
    tokenizer = gguf_tokenizer(found) if path.endswith(".gguf") else _from_folder(Path(found))
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
    if not os.path.isfile(folder / "tokenizer.json"):
        raise InputError(
            f"{folder}: no tokenizer.json; give smollm2, a .gguf file, a Hugging Face folder with "
            "a fast tokenizer, words:TEXT or chars:TEXT"
        )
    with refused(f"{folder}: tokenizer cannot be read", "download it again"):
        # Not AutoTokenizer: some of its classes rebuild what tokenizer.json says.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        _check(tokenizer)
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise whatever is raised over what a stranger's files made of a tokenizer."""
    for name in ("bos", "eos", "pad", "unk"):
        getattr(tokenizer, f"{name}_token_id")
    template = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template or ""]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"chat_template={shown(template)} is no text")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"model_max_length={shown(tokenizer.model_max_length)} is no number")
    if (highest := max(tokenizer.get_vocab().values(), default=0)) > MOST_ID:
        raise ValueError(f"a token has the id {highest}, and {MOST_ID} is the highest")
    _check_growth(tokenizer.backend_tokenizer)
    # A word that is not in the vocabulary may be an error; a panic is none, and passes.
    for text in ("", "a", "a b\n", "é 電 <s>"):
        with suppress(Exception):
            tokenizer.decode(tokenizer.encode(text))


MOST_ID = 2**24
"""Of a token: all ids up to the highest are walked through where a tokenizer is written out."""

MOST_GROWTH = 1000
"""Characters that a tokenizer's rules may make of one; those of NFKC make 18."""


def _check_growth(backend: Tokenizer) -> None:
    """Raise ValueError if the rules by which texts are rewritten could make a row fill memory."""
    for part in (backend.normalizer, backend.decoder):
        growth = 1.0 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > MOST_GROWTH:
            raise ValueError(f"its rules make {growth:.0e} characters of one")


def _growth(rule: dict[str, Any]) -> float:
    """The most characters that a rule of a normalizer or decoder makes of one."""
    inner = rule.get("normalizers", rule.get("decoders", ()))
    growth = prod((_growth(part) for part in inner), start=1.0)
    if rule["type"] == "Replace":
        text = rule["pattern"].get("String")
        # What matches a regular expression may be empty, between any two characters.
        return len(rule["content"]) / len(text) if text else 1.0 + len(rule["content"])
    if rule["type"] == "Precompiled":
        # The size of a trie, the trie, and texts that stand for others, each ended by NUL.
        table = b64decode(rule["precompiled_charsmap"])
        texts = table[4 + int.from_bytes(table[:4], "little") :]
        return max(1.0, *map(len, texts.split(b"\0")))
    return growth


def _of_units(path: str) -> PreTrainedTokenizerFast:
    """A tokenizer of <pad>, <eos> and the words or characters of ``words:TEXT``, ``chars:TEXT``."""
    kind, text = path.split(":", 1)
    units = text.split() if kind == "words" else list(text)
    if not units:
        how = {
            "words": "no words; write words: and the words, separated by spaces",
            "chars": "no characters; write chars: and the characters, with the space",
        }
        raise InputError(f"{kind}:: {how[kind]}")
    vocab = {unit: i for i, unit in enumerate(dict.fromkeys(["<pad>", "<eos>", *units]))}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    if kind == "words":  # decoded, they are joined by spaces
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer, pad_token="<pad>", eos_token="<eos>")


def _fast(tokenizer: Tokenizer, **named: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,  # decoded text is what the tokens say
        padding_side="left",
        **named,
    )


def gguf_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, byte-level BPE or SentencePiece's, with its special tokens and
    chat template.

    Control tokens are special (``skip_special_tokens`` drops them); user-defined ones are single
    tokens of plain text. BOS and EOS are added only if the file says so; BOS by SentencePiece also
    where it says nothing, as llama.cpp does.

    Raises:
      InputError: the file is damaged, or its tokenizer or pre-tokenizer is not supported.
    """
    file = open_gguf(path)
    model, pre = (field(file, f"tokenizer.ggml.{key}", str, "") for key in ("model", "pre"))
    if model not in ("gpt2", "llama"):
        raise InputError(
            f"{path}: tokenizer.ggml.model={shown(model)}; only gpt2 (byte-level BPE) and llama "
            "(SentencePiece)"
        )
    if model == "gpt2" and pre not in _PRE_TOKENIZERS:
        raise InputError(
            f"{path}: tokenizer.ggml.pre={shown(pre)}; supported are {', '.join(_PRE_TOKENIZERS)}"
        )
    key = "merges" if model == "gpt2" else "scores"
    tokens, ranks, types = (
        field(file, f"tokenizer.ggml.{name}", list) for name in ("tokens", key, "token_type")
    )
    for name, found in {"token_type": types, **({key: ranks} if key == "scores" else {})}.items():
        if len(found) != len(tokens):
            raise InputError(
                f"{path}: tokenizer.ggml.{name} has {len(found)} entries for {len(tokens)} tokens; "
                "download it again"
            )
    what = ("texts", str) if key == "merges" else ("numbers", float)
    for name, found, (kinds, kind) in (("tokens", tokens, ("texts", str)), (key, ranks, what)):
        if wrong := [x for x in found if not isinstance(x, kind)]:
            message = f"tokenizer.ggml.{name} has {shown(wrong[0])}; all must be {kinds}"
            raise InputError(f"{path}: {message}")
    with refused(f"{path}: tokenizer.ggml cannot be read", "download it again"):
        build = _byte_level if model == "gpt2" else _sentencepiece
        tokenizer = _finished(file, build(file, tokens, ranks), types)
        _check(tokenizer)
    return tokenizer


def _byte_level(file: File, tokens: list[str], merges: list[str]) -> Tokenizer:
    """Byte-level BPE, as GPT-2's, Llama 3's and Qwen's."""
    pre = file.fields["tokenizer.ggml.pre"]
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]  # checked by BPE
    with refused(f"{file.path}: tokenizer.ggml.merges", "download it again"):
        # Llama 3 takes a word that is a token as it is, whether merges lead to it or not.
        bpe = models.BPE(_ids_of(tokens), pairs, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    if "qwen" in pre:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


MOST_PIECE = 256
"""Characters of a piece of SentencePiece's that is put together from others."""


def _sentencepiece(file: File, tokens: list[str], scores: list[float]) -> Tokenizer:
    """SentencePiece's BPE, as Llama 2's, Mistral's and Gemma's: a file has scores, no merges.

    Two pieces are merged whose whole is a piece, of the highest score first. Gemma's scores are not
    in the order of its merges; its pieces are, and those of spaces are written as such.
    """
    gemma = str(file.fields.get("general.architecture")).startswith("gemma")
    ranks = [float(-i) for i in range(len(tokens))] if gemma else scores
    if gemma:
        tokens = [_SPACE * len(text) if text.strip(" ") == "" else text for text in tokens]
    ids = _ids_of(tokens)
    long = {text for text in tokens if len(text) > MOST_PIECE}
    merges = generate_merges(ids, dict(zip(tokens, ranks, strict=True)), long)
    unknown = _named_tokens(file, tokens).get("unk_token")
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    rules: list[Any] = [normalizers.Replace(" ", _SPACE)]
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.fields.get("tokenizer.ggml.add_space_prefix", not gemma):
        rules, steps = [normalizers.Prepend(_SPACE), *rules], [*steps, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(rules)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


_SPACE = "▁"
"""What SentencePiece writes for a space."""


def _ids_of(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _finished(file: File, tokenizer: Tokenizer, types: list[Any]) -> PreTrainedTokenizerFast:
    """With the special and added tokens that a GGUF file names, and its chat template."""
    tokens = field(file, "tokenizer.ggml.tokens", list)
    added = [(AddedToken(t, normalized=False), kind) for t, kind in zip(tokens, types, strict=True)]
    tokenizer.add_special_tokens([t for t, kind in added if kind in (_UNKNOWN, _CONTROL)])
    known = tokenizer.get_vocab(with_added_tokens=False)
    # Spelt as the vocabulary has them: what is not in it would be one more token.
    own = [t for t, kind in added if kind == _USER_DEFINED and t.content in known]
    tokenizer.add_tokens(own)
    named, ids = _named_tokens(file, tokens), _ids_of(tokens)
    pieces = file.fields["tokenizer.ggml.model"] == "llama"
    # BOS and EOS are put around each text where the file asks for it.
    first, last = (
        named.get(f"{end}_token")
        if file.fields.get(f"tokenizer.ggml.add_{end}_token", pieces and end == "bos")
        else None
        for end in ("bos", "eos")
    )
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[token for token in (first, "$A", last) if token],
            special_tokens=[(token, ids[token]) for token in (first, last) if token],
        )
    architecture = file.fields.get("general.architecture")
    return _fast(
        tokenizer,
        chat_template=file.fields.get("tokenizer.chat_template"),
        model_max_length=file.fields.get(f"{architecture}.context_length"),
        **named,
    )


def _named_tokens(file: File, tokens: list[str]) -> dict[str, str]:
    """bos_token, eos_token, pad_token and unk_token, those that the file names."""
    named = {}
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        i = file.fields.get(f"tokenizer.ggml.{key}_token_id")
        if i is None:
            continue
        if not isinstance(i, int) or not 0 <= i < len(tokens):
            raise InputError(
                f"{file.path}: tokenizer.ggml.{key}_token_id={shown(i)} is not one of the "
                f"{len(tokens)} tokens; download it again"
            )
        named[f"{name}_token"] = tokens[i]
    return named


@lru_cache(maxsize=4)
def token_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """What each token adds to a text, in UTF-8; a character may be split over several tokens."""
    backend = tokenizer.backend_tokenizer
    decoder = json.loads(backend.to_str())["decoder"]
    kinds = _kinds(decoder)
    added = {token: str(known) for token, known in tokenizer.added_tokens_decoder.items()}
    pieces = {token: text for text, token in backend.get_vocab(with_added_tokens=False).items()}
    found = {token: _bytes(text, kinds) for token, text in pieces.items()}
    return found | {token: text.encode() for token, text in added.items()}


def _kinds(decoder: Any) -> dict[str, Any]:
    """The parts of a tokenizer's decoder, by their types."""
    if decoder is None:
        return {}
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return {part["type"]: part for part in parts}


def _bytes(piece: str, kinds: dict[str, Any]) -> bytes:
    """The bytes of a token that the vocabulary spells as ``piece``."""
    if "ByteLevel" in kinds:
        table = _unicode_bytes()
        return (
            bytes(table[char] for char in piece) if set(piece) <= table.keys() else piece.encode()
        )
    if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"].get("prefix", "##")
        return (piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}").encode()
    if "BPEDecoder" in kinds:
        return piece.replace(kinds["BPEDecoder"].get("suffix", "</w>"), " ").encode()
    if "Metaspace" in kinds or "Replace" in kinds:
        return piece.replace("▁", " ").encode()
    # Words without a decoder are joined by spaces.
    return piece.encode() if kinds else f" {piece}".encode()


@lru_cache(maxsize=1)
def _unicode_bytes() -> dict[str, int]:
    """The character that byte-level BPE writes a byte as → the byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


def check_vocab(tokenizer: PreTrainedTokenizerFast, decoder: DecoderConfig) -> None:
    """Makes sure that the tokenizer belongs to the model.

    Tokens that were added to a tokenizer may be beyond the embedding, as those of a model that
    reads images too: a text that has one is refused where it is read (``check_ids``).

    Raises:
      InputError: another token has an id that is not below ``decoder.vocab``: jax would silently
        read another token's row.
    """
    added = tokenizer.added_tokens_decoder
    ids = (token for token in tokenizer.get_vocab().values() if token not in added)
    size = max(ids, default=-1) + 1
    if size > decoder.vocab:
        raise InputError(
            f"tokenizer: {size} ids, but the model's embedding has {decoder.vocab} rows; "
            "use the model's own tokenizer"
        )


def check_same_tokens(
    field: str, theirs: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast
) -> None:
    """Makes sure that an id is the same token to two models whose distributions are compared.

    Added tokens may have other names, as chat models call those that their base reserves.

    Raises:
      InputError: it is not, for an id that is an ordinary token of both.
    """
    added = theirs.added_tokens_decoder.keys() | ours.added_tokens_decoder.keys()
    known = {token: text for text, token in ours.get_vocab().items() if token not in added}
    for text, token in sorted(theirs.get_vocab().items(), key=lambda item: item[1]):
        if known.get(token, text) != text and token not in added:
            raise InputError(
                f"{field}: another tokenizer: token {token} of its {len(theirs)} is {shown(text)}, "
                f"and of the policy's {len(ours)} {shown(known[token])}: give a model with the "
                "policy's tokenizer"
            )

"""The tokenizer of a GGUF file of llama.cpp."""

import os

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxrlhf.errors import InputError
from jaxrlhf.models.gguf_file import File, field, open_gguf

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "gpt-2": _GPT2,
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def gguf_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    Control tokens are special (``skip_special_tokens`` drops them); user-defined ones are single
    tokens of plain text. BOS and EOS are added only if the file says so.

    Raises:
      InputError: the file is damaged, or its tokenizer or pre-tokenizer is not supported.
    """
    file = open_gguf(path)
    model = file.fields.get("tokenizer.ggml.model")
    pre = file.fields.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise InputError(f"{path}: tokenizer.ggml.model={model!r}; only gpt2 (byte-level BPE)")
    if pre not in _PRE_TOKENIZERS:
        raise InputError(
            f"{path}: tokenizer.ggml.pre={pre!r}; supported are {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, merges, types = (
        field(file, f"tokenizer.ggml.{key}", list) for key in ("tokens", "merges", "token_type")
    )
    if len(types) != len(tokens):
        raise InputError(
            f"{path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens; "
            "download it again"
        )
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        bpe = models.BPE(ids, pairs, ignore_merges=pre == "llama-bpe")
    except Exception as error:
        raise InputError(f"{path}: tokenizer.ggml.merges: {error}; download it again") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    plain = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in plain])
    named = _named_tokens(file, tokens)
    _add_ends(tokenizer, file, ids, named)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.fields.get("tokenizer.chat_template"),
        model_max_length=file.fields.get("llama.context_length"),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **named,
    )


def _named_tokens(file: File, tokens: list[str]) -> dict[str, str]:
    """bos_token, eos_token, pad_token and unk_token, those that the file names."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {}
    for name, key in keys.items():
        i = file.fields.get(f"tokenizer.ggml.{key}_token_id")
        if i is None:
            continue
        if not isinstance(i, int) or not 0 <= i < len(tokens):
            raise InputError(
                f"{file.path}: tokenizer.ggml.{key}_token_id={i!r} is not one of the "
                f"{len(tokens)} tokens; download it again"
            )
        named[f"{name}_token"] = tokens[i]
    return named


def _add_ends(tokenizer: Tokenizer, file: File, ids: dict[str, int], named: dict[str, str]) -> None:
    """Has BOS and EOS put around each text where the file asks for it."""
    ends = [
        named.get(f"{end}_token") if file.fields.get(f"tokenizer.ggml.add_{end}_token") else None
        for end in ("bos", "eos")
    ]
    if any(ends):
        first, last = ends
        template = [token for token in (first, "$A", last) if token]
        used = [(token, ids[token]) for token in ends if token]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=used
        )

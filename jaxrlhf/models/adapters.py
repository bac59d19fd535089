"""Adapters as the package peft keeps them: adapter_config.json and adapter_model.safetensors.

There a linear map W [out, in] has A [r, in] and B [out, r], each layer its own, and what is added
is s·B·A with s = alpha/r (or alpha/√r); of DoRA it has a magnitude [out] too. Here all layers of a
map have one rank and one s: shorter ones are filled up with zeros, which change nothing and stay
so, and what s differs by is in B.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxrlhf.config.model import DecoderConfig, LoraConfig
from jaxrlhf.core.errors import InputError, refused
from jaxrlhf.core.shown import shown
from jaxrlhf.models import names
from jaxrlhf.models.hf_config import naming_of
from jaxrlhf.models.hub import ADAPTER, adapter_config, base_of, local
from jaxrlhf.models.names import Weight
from jaxrlhf.models.quantise import MAGNITUDE

WEIGHTS = "adapter_model.safetensors"
VECTOR = "lora_magnitude_vector"
"""Of DoRA, in files."""
PREFIX = "base_model.model."

_ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    # Others change the base too, or what the base is multiplied by.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Fields of adapter_config.json that may only be this, where they are there."""

_ABSENT = (
    "alora_invocation_tokens", "layer_replication", "megatron_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "kasa_config", "monteclora_config", "velora_config",
    "arrow_config",
)  # fmt: skip
"""Fields of it that must be null or empty."""


class Adapter(NamedTuple):
    """What a folder of peft's holds."""

    lora: LoraConfig
    base: str
    """The path or name of the model that it is for, with its revision."""
    layers: dict[str, Any]
    """Adapters as ``Model.init_lora`` makes them, numpy arrays, float32."""
    head: np.ndarray | None
    """The scalar head's kernel [D] of a reward model."""


def read_lora(path: str, decoder: DecoderConfig) -> LoraConfig:
    """The settings of an adapter for a decoder, from headers alone; errors of ``read_adapter``."""
    return _settings(path, decoder)[0]


def read_adapter(path: str, decoder: DecoderConfig) -> Adapter:
    """Reads an adapter.

    Raises:
      InputError: a missing, malformed or truncated file; a field, a target or a tensor that has no
        place in a decoder of this shape.
    """
    lora, shapes = _settings(path, decoder)
    file, scale = Path(local(path)) / WEIGHTS, lora.scale
    layers: dict[str, Any] = {}
    head = None
    with refused(f"{file}: cannot be read", "download it again"), safe_open(file, "numpy") as held:

        def tensor(key: str) -> np.ndarray:
            return held.get_tensor(key).astype(np.float32)

        for mapped, keys in _keys(decoder, lora, shapes):
            weight = mapped.weight
            ins, count = weight.shape[: _ins(weight)], len(weight.layers)
            a = np.zeros((count, *ins, lora.rank), np.float32)
            b = np.zeros((count, lora.rank, *weight.shape[len(ins) :]), np.float32)
            for layer, key in keys.items():
                rank = shapes[f"{key}.lora_A.weight"][0]
                share = _scale(path, key, rank) / scale
                a[layer].reshape(-1, lora.rank)[:, :rank] = tensor(f"{key}.lora_A.weight").T
                out = tensor(f"{key}.lora_B.weight")
                if mapped.turned:
                    out = names.pairs(decoder, weight, out, apart=True)
                b[layer].reshape(lora.rank, -1)[:rank] = share * out.T
            parent = _parent(weight)
            layers |= {f"{parent}/lora_a": a, f"{parent}/lora_b": b}
            if lora.dora:
                every = [tensor(f"{key}.{VECTOR}") for key in keys.values()]
                if mapped.turned:
                    every = [names.pairs(decoder, weight, m, apart=True) for m in every]
                outs = weight.shape[len(ins) :]
                layers[f"{parent}/{MAGNITUDE}"] = np.stack(every).reshape(len(every), *outs)
        if f"{PREFIX}score.weight" in shapes:
            head = tensor(f"{PREFIX}score.weight")[0]
    return Adapter(lora, base_of(path), names.nested(layers), head)


def _parent(weight: Weight) -> str:
    """Where a map's adapters are in the tree of all adapters."""
    return weight.path.removeprefix("layers/").rpartition("/")[0]


def _ins(weight: Weight) -> int:
    """How many axes of a linear map come in."""
    return next(
        i for i in range(len(weight.shape) + 1) if prod(weight.shape[:i]) == weight.stored[1]
    )


TARGETS = get_args(get_args(get_type_hints(LoraConfig)["targets"])[0])
"""What adapters can be of."""


class Map(NamedTuple):
    """A linear map that the layers of one stack have."""

    target: str
    """The name that targets have here."""
    weight: Weight
    name: str
    """What peft calls it, ``{}`` for the layer."""
    turned: bool
    """Its outputs are in another order in files, as those of queries and keys may be."""

    def by_layer(self) -> list[str]:
        """Its name in each of its layers."""
        return [self.name.format(layer) for layer in self.weight.layers]


def _maps(decoder: DecoderConfig) -> list[Map]:
    """The linear maps of layers that take adapters, but for those that share a tensor with others
    in files."""
    naming = naming_of(decoder)
    shared = {module for modules in naming.fused.values() for module in modules}
    return [
        Map(
            weight.module.split("/")[-1],
            weight,
            f"{PREFIX}{naming.layer}{naming.names[weight.module]}",
            naming.neighbours and weight.module in names.ROTATED,
        )
        for weight in names.weights(decoder)
        if weight.stacked and weight.path.endswith("kernel") and not weight.experts
        if weight.module not in shared and weight.module.split("/")[-1] in TARGETS
    ]


def _targets(maps: list[Map]) -> list[str]:
    """Their names, each once."""
    return list(dict.fromkeys(mapped.target for mapped in maps))


def _settings(path: str, decoder: DecoderConfig) -> tuple[LoraConfig, dict[str, tuple[int, ...]]]:
    """The settings that an adapter has here, and the shapes of its tensors, all checked."""
    _refuse_unsupported(path)
    file = Path(local(path)) / WEIGHTS
    if not os.path.isfile(file):
        raise InputError(f"{file}: missing: an adapter is read from safetensors alone")
    with refused(f"{file}: cannot be read", "download it again"), safe_open(file, "numpy") as held:
        shapes = {key: tuple(held.get_slice(key).get_shape()) for key in held.keys()}  # noqa: SIM118
    maps, known, ranks = _maps(decoder), {f"{PREFIX}score.weight"}, {}
    config = adapter_config(path)
    dora = bool(config.get("use_dora"))
    for mapped in maps:
        weight = mapped.weight
        for key in mapped.by_layer():
            pair = [shapes.get(f"{key}.lora_{half}.weight") for half in "AB"]
            known |= {f"{key}.lora_{half}.weight" for half in "AB"}
            if pair == [None, None]:
                continue
            rank = pair[0][0] if pair[0] else 0
            if pair != [(rank, weight.stored[1]), (weight.stored[0], rank)] or not rank:
                raise InputError(
                    f"{file}: {key}: lora_A and lora_B have shapes {pair}; the base has a map "
                    f"of {list(weight.stored)} there: is it the adapter of this base?"
                )
            ranks.setdefault(mapped.target, []).append(rank)
            if dora:
                known.add(vector := f"{key}.{VECTOR}")
                if shapes.get(vector) != (weight.stored[0],):
                    raise InputError(
                        f"{file}: {vector} has shape {shapes.get(vector)}; DoRA has "
                        f"{[weight.stored[0]]} there: is it the adapter of this base?"
                    )
    if extra := sorted(shapes.keys() - known):
        raise InputError(
            f"{file}: {extra[0]} has no place here ({len(extra)} in all): adapters are read of "
            f"{', '.join(_targets(maps))}, and of a reward model's score"
        )
    if not ranks:
        raise InputError(f"{file}: it adapts nothing")
    every = {name: sum(len(x.by_layer()) for x in maps if x.target == name) for name in ranks}
    if dora and (some := [n for n, found in ranks.items() if len(found) < every[n]]):
        raise InputError(
            f"{file}: DoRA of {some[0]} in {len(ranks[some[0]])} of {every[some[0]]} layers: the "
            "magnitudes of the others are not in it: give one that adapts every layer"
        )
    rank = max(map(max, ranks.values()))
    rs, alpha = bool(config.get("use_rslora")), float(config.get("lora_alpha", 8))
    targets: Any = tuple(name for name in _targets(maps) if name in ranks)
    return LoraConfig(rank, alpha, targets, rs, dora=dora), shapes


def _refuse_unsupported(path: str) -> None:
    where, config = Path(local(path)) / ADAPTER, adapter_config(path)
    for field, values in _ONLY.items():
        if field in config and config[field] not in (*values, None):
            allowed = ", ".join(map(repr, values))
            raise InputError(
                f"{where}: {field}={shown(config[field])} is not supported, only {allowed}"
            )
    for field in _ABSENT:
        if config.get(field):
            raise InputError(f"{where}: {field}={shown(config[field])} is not supported")
    saved = config.get("modules_to_save") or []
    if other := [name for name in saved if name not in ("score", "classifier")]:
        raise InputError(
            f"{where}: modules_to_save has {shown(other[0])}: only a reward model's score is read"
        )
    for field in ("lora_alpha", "rank_pattern", "alpha_pattern"):
        value, kind = config.get(field), dict if field.endswith("pattern") else int | float
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{where}: {field}={shown(value)}: not of the kind that peft writes")


def _keys(
    decoder: DecoderConfig, lora: LoraConfig, shapes: Mapping[str, Any]
) -> Iterator[tuple[Map, dict[int, str]]]:
    """Each target's maps, and their names by the layer of the stack, where it is adapted."""
    for mapped in _maps(decoder):
        keys = dict(enumerate(mapped.by_layer()))
        if mapped.target in lora.targets:
            yield mapped, {i: key for i, key in keys.items() if f"{key}.lora_A.weight" in shapes}


def _scale(path: str, key: str, rank: int) -> float:
    """s of one map: its alpha, by ``alpha_pattern`` if one matches, over its rank or √rank."""
    config, name = adapter_config(path), key.removeprefix(PREFIX)
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # As peft reads it: a regular expression for the end of the name.
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)


def write_adapter(folder: Path, decoder: DecoderConfig, adapter: Adapter, dtype: np.dtype) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a folder that is there.

    Raises:
      InputError: files of this family have a target in one tensor with others, or turned round.
    """
    lora, maps = adapter.lora, _maps(decoder)
    held: dict[str, np.ndarray] = {}
    leaves = dict(names.leaves_of(adapter.layers))
    # An MLP without a gate has no adapter of it.
    there = {weight.module.rpartition("/")[2] for weight in names.weights(decoder)}
    targets = [name for name in lora.targets if name in there]
    lacking = [name for name in targets if name not in _targets(maps)]
    if lacking or naming_of(decoder).transposed:
        raise InputError(
            f"adapters of {', '.join(lacking or targets)}: files of this family have no map "
            "of that name and shape, which peft could adapt: export the whole model"
        )
    for mapped in (x for x in maps if x.target in targets):
        held |= _held(decoder, lora, leaves, mapped, dtype)
    if adapter.head is not None:
        held[f"{PREFIX}score.weight"] = np.asarray(adapter.head[None], dtype)
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    # The name of a repository and its revision are two fields there.
    base, at, revision = adapter.base.partition("@")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if adapter.head is None else "SEQ_CLS",
        "base_model_name_or_path": base if not os.path.exists(adapter.base) else adapter.base,
        "revision": revision if at and not os.path.exists(adapter.base) else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "use_dora": lora.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({x.name.rpartition(".")[2] for x in maps if x.target in targets}),
        "modules_to_save": None if adapter.head is None else ["score"],
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / ADAPTER).write_text(text, encoding="utf-8")


def _held(
    decoder: DecoderConfig,
    lora: LoraConfig,
    leaves: Mapping[str, Any],
    mapped: Map,
    dtype: np.dtype,
) -> dict[str, np.ndarray]:
    """The tensors of a map's adapters, by the names that files have."""
    weight, parent, held = mapped.weight, _parent(mapped.weight), {}
    a, b = (np.asarray(leaves[f"{parent}/lora_{half}"], np.float32) for half in "ab")
    for layer, key in enumerate(mapped.by_layer()):
        out = b[layer].reshape(lora.rank, -1).T
        if mapped.turned:
            out = names.pairs(decoder, weight, out, apart=False)
        pair = a[layer].reshape(-1, lora.rank).T, out
        for half, array in zip("AB", pair, strict=True):
            held[f"{key}.lora_{half}.weight"] = np.ascontiguousarray(array, dtype)
        if lora.dora:
            one = np.asarray(leaves[f"{parent}/{MAGNITUDE}"][layer], np.float32).reshape(-1)
            if mapped.turned:
                one = names.pairs(decoder, weight, one, apart=False)
            held[f"{key}.{VECTOR}"] = np.ascontiguousarray(one, dtype)
    return held

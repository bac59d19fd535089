"""Models on their way out, a weight at a time: no whole one of them is ever in memory.

Of a run's checkpoint, or of the file that it started from, each leaf of the tree is read when its
turn has come, its adapter added to it, and forgotten when it is written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from jaxrlhf.config import Config, MeshConfig, ModelConfig, ProcessRewardModelConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import writing
from jaxrlhf.core.types import Params
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models import names
from jaxrlhf.models.adapters import Adapter, read_adapter, write_adapter
from jaxrlhf.models.ends import generation_config, read_ends, read_generation
from jaxrlhf.models.hf import check_new, save_tokenizer, whole_folder, write_hf
from jaxrlhf.models.hub import base_of, fetch, is_adapter
from jaxrlhf.models.load import (
    Loader,
    abstract_params,
    build,
    needs_head,
    normalised,
    restore,
    scores_texts,
    tokenizer_path,
)
from jaxrlhf.models.read import is_reward_folder, is_run, read_decoder, read_weights, run_config
from jaxrlhf.models.source import Later, dtype_of
from jaxrlhf.models.tokenizer import check_vocab, load_tokenizer
from jaxrlhf.models.transformer import Model, add_adapter

Leaves = dict[str, Any]
"""Arrays, or ``Later``, by path."""


def export_model(path: str, out: str, dtype: Literal["float32", "bfloat16"]) -> float:
    """Write a model as a Hugging Face folder, its adapters merged; see ``write_hf``.

    Args:
      path: the output folder of a run, or whatever else is a model.

    Returns:
      Of a reward model what is added to its scores, for which transformers has no place.

    Raises:
      InputError: there is no model, or no class of transformers for it; ``out`` is not empty.
    """
    path = fetch(path)
    if is_run(path) and isinstance(run_config(path).algorithm, ProcessRewardModelConfig):
        raise InputError(f"{path}: a process reward model; transformers has no such class")
    check_new(out)
    scores, decoder = scores_texts(path), read_decoder(path, is_reward_folder(path))
    tokenizer = load_tokenizer(tokenizer_path(ModelConfig(path=path)))
    check_vocab(tokenizer, decoder)
    generation = generation_config(
        read_ends(path, tokenizer, decoder.vocab), read_generation(path), tokenizer
    )
    leaves = open_weights(path)
    # A policy's head is its critic's, and no part of what transformers loads.
    if not scores:
        leaves = {name: x for name, x in leaves.items() if not name.startswith("head/")}
    with writing(out):
        params = names.nested(leaves)
        write_hf(out, decoder, params, tokenizer, dtype, head=scores, generation=generation)
    return float(leaves["head/bias"]) if scores else 0.0


def export_adapter(path: str, out: str, dtype: Literal["float32", "bfloat16"]) -> str:
    """Write the adapters of a run as a folder of the package peft's, with the tokenizer.

    Returns:
      The model that they are for, as adapter_config.json names it.

    Raises:
      InputError: not a run with adapters; ``out`` is not empty.
    """
    if not is_run(path) or run_config(path).model.lora is None:
        raise InputError(f"{path}: no run with model.lora, whose adapters could be written")
    check_new(out)
    config = run_config(path)
    model, mesh = build(config.model), make_mesh(MeshConfig(), jax.devices()[:1])
    scores = scores_texts(path)
    _, found, host = restore(path, abstract_params(model, needs_head(config), mesh))
    head = normalised(path, config, found["head"], host)["kernel"] if scores else None
    tokenizer = load_tokenizer(tokenizer_path(ModelConfig(path=path)))
    assert model.lora is not None
    adapter = Adapter(model.lora, config.model.path, found["lora"], head)
    with writing(out), whole_folder(out) as place:
        save_tokenizer(place, tokenizer)
        write_adapter(place, model.decoder, adapter, dtype_of(dtype))
    return config.model.path


def open_weights(path: str) -> Leaves:
    """The weights that a path stands for, adapters merged, each to be read when it is wanted; the
    scalar head, if it has one, is there."""
    if is_run(path):
        return _of_run(path, run_config(path))
    if is_adapter(path):
        under, decoder = _under(base_of(path)), read_decoder(path)
        found = read_adapter(path, decoder)
        head = {} if found.head is None else {"head/kernel": found.head, "head/bias": 0.0}
        return head | under | _merged(Model(decoder, lora=found.lora), under, found.layers)
    source = read_weights(path, is_reward_folder(path))
    leaves: Leaves = {
        w.path: Later(source.shape(w), partial(source.whole, w)) for w in source.weights()
    }
    if source.head:
        leaves |= {"head/kernel": leaves["head/kernel"].read(), "head/bias": source.bias}
    return leaves


def _of_run(folder: str, config: Config) -> Leaves:
    """As ``open_weights``, of what a run has trained, and of what is under it."""
    model, mesh = build(config.model), make_mesh(MeshConfig(), jax.devices()[:1])
    wanted = abstract_params(model, needs_head(config), mesh)
    head: Params = {}
    if "head" in wanted:
        _, found, host = restore(folder, {"head": wanted.pop("head")})
        head = {"head": normalised(folder, config, found["head"], host)}
    own = {name: np.asarray(x) for name, x in names.leaves_of(head)}
    if model.lora is None:
        step: list[int] = []
        return own | {
            name: Later(x.shape, partial(_restored, folder, name, x, step))
            for name, x in names.leaves_of(wanted)
        }
    if config.model.decoder is None:
        under = _under(config.model.path)
    else:
        under = dict(names.leaves_of(Loader(mesh).base(config.model, config.seed).params))
    _, found, _ = restore(folder, wanted)
    return own | under | _merged(model, under, found["lora"])


def _under(path: str) -> Leaves:
    """As ``open_weights``, without the head."""
    leaves = open_weights(path)
    return {name: x for name, x in leaves.items() if not name.startswith("head/")}


def _merged(model: Model, under: Leaves, lora: Params) -> Leaves:
    """What adapters make of the weights that they change."""
    maps: dict[str, Params] = {}
    for name, x in names.leaves_of({"layers": lora}):
        where, _, kind = name.rpartition("/")
        maps.setdefault(f"{where}/kernel", {})[kind] = x
    add = jax.jit(partial(add_adapter, model))
    return {
        name: Later(under[name].shape, partial(_adapted, add, under[name], adapter))
        for name, adapter in maps.items()
    }


def _adapted(add: Callable[..., Any], under: Any, adapter: Params) -> Any:
    return add(under.read() if isinstance(under, Later) else under, adapter)


def _restored(folder: str, name: str, shape: Any, steps: list[int]) -> Any:
    """One leaf of a run's newest checkpoint.

    Args:
      steps: of the checkpoints that others were read of.

    Raises:
      InputError: the run has saved another one meanwhile.
    """
    step, found, _ = restore(folder, names.nested({name: shape}))
    steps.append(step)
    if step != steps[0]:
        raise InputError(f"{folder}: the run has gone on to step {step} meanwhile: export it again")
    return dict(names.leaves_of(found))[name]

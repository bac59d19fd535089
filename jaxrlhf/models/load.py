"""Networks on the mesh: from a path to (model, weights, adapters).

A path is whatever a user has: ``smollm2``, a Hugging Face folder, a .gguf file, or the output
folder of a run. Weights of one path are read once and shared by all who use them; they are never
donated.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import (
    Config,
    DataConfig,
    DecoderConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RewardModelConfig,
    check_mesh,
    has_critic,
    is_on_policy,
    is_reward_model,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Params, TrainState
from jaxrlhf.mesh.checkpoint import load as load_checkpoint
from jaxrlhf.mesh.sharding import (
    config_of,
    make_mesh,
    put,
    put_parts,
    shardings,
    to_host,
    with_layout,
)
from jaxrlhf.models import names
from jaxrlhf.models.adapters import read_adapter, read_lora
from jaxrlhf.models.hub import base_of, fetch, is_adapter, local
from jaxrlhf.models.quantise import KINDS, is_quantised, quantised, quantised_leaf
from jaxrlhf.models.read import (
    is_reward_folder,
    is_run,
    kept_dtypes,
    read_decoder,
    read_weights,
    run_config,
)
from jaxrlhf.models.source import Source
from jaxrlhf.models.tokenizer import check_vocab, load_tokenizer
from jaxrlhf.models.transformer import WIDE, Model, combine_params, merge_lora


def build(config: ModelConfig, head: bool = False) -> Model:
    """The model that ``config`` describes: static, no weights are read; ``head`` as in ``read_hf``.

    Raises:
      InputError: if ``path`` and ``decoder`` are both missing, the path holds no model, or
        ``context`` is more than its model has.
    """
    decoder = config.decoder or read_decoder(config.path, head)
    if config.context is not None:
        decoder = _in_context(decoder, config.context)
    attention, few_bits = config.attention, config.nf4_product
    return Model(decoder, config.dtype, config.lora, config.remat, attention, few_bits)


def _in_context(decoder: DecoderConfig, context: int) -> DecoderConfig:
    """The decoder for rows of up to so many tokens, by which longrope's frequencies are chosen."""
    if context > (most := decoder.most_context):
        raise InputError(f"model.context={context}: the model's is {most} at most: lower it")
    scaling = decoder.rope_scaling
    chosen = scaling is not None and scaling.kind == "longrope"
    return replace(decoder, context=context) if chosen else decoder


def settle_lora(config: ModelConfig) -> ModelConfig:
    """The config of a model whose adapters go on from ``lora.path``, with that adapter's settings,
    and its base if no model is named.

    Raises:
      InputError: settings are given beside it that are not its own.
    """
    lora = config.lora
    if lora is None or not lora.path:
        return config
    if not is_adapter(lora.path):
        raise InputError(
            f"model.lora.path={lora.path}: no adapter (it holds no adapter_config.json): give a "
            "folder of peft's"
        )
    if not config.path and config.decoder is None:
        config = replace(config, path=base_of(lora.path))
    own = replace(read_lora(lora.path, build(config).decoder), path=lora.path)
    for name, value in vars(lora).items():
        if value not in (getattr(LoraConfig(), name), getattr(own, name)):
            raise InputError(
                f"model.lora.{name}={value}: the adapter in model.lora.path has "
                f"{getattr(own, name)}: leave it out"
            )
    return replace(config, lora=own)


INIT = 0x7FFFFFFE
"""Stream of initial weights, beside those of the steps."""


@dataclass(frozen=True)
class Network:
    """A model with its arrays. ``params`` may hold a head; ``lora`` is None without adapters."""

    model: Model
    params: Params
    lora: Params | None = None
    step: int | None = None
    """Iterations of the run that has trained it."""


@dataclass
class Loader:
    """Reads networks onto one mesh, each path's weights once."""

    mesh: Mesh
    abstract: bool = False
    """Give shapes with layouts in place of arrays, and read no weights."""
    stand_in: ModelConfig | None = None
    """Shape of a reward model whose run is not there yet; only on shapes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What a reward model computes in that is no run, whose config would say it."""
    weights: dict[Any, Params] = field(default_factory=dict)
    cast: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    """Arrays by their id and a dtype, and the same in that dtype."""
    frozen_dtype: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    """``ModelConfig.frozen_dtype``."""
    narrow: bool = False
    """Quantise each leaf of a file as it is read, for nobody trains it: a model whose weights would
    not fit otherwise is never there in more bits."""

    def base(self, config: ModelConfig, seed: int = 0, head: bool = False) -> Network:
        """The weights a model starts from, without head and adapters.

        Adapters of a run folder are merged into its weights. With ``head``, the path is the Hugging
        Face folder of a reward model, which has one.
        """
        model = self._model(config, head)
        # However it is spelt: policy, critic and reward model may be adapters over one model.
        path = os.path.realpath(local(config.path)) if config.path else ""
        key = (path, config.decoder, seed if config.decoder else None, head)
        if key not in self.weights:
            self.weights[key] = self._read(model, config, seed, head)
        return Network(model, self.weights[key])

    def frozen(self, network: Network) -> Network:
        """The network for whoever only computes with it: weights in ``frozen_dtype``.

        By default as they have been read, or in the compute dtype where that is smaller. Every step
        casts them all the same, so that results are what they were, bit for bit. Last norm and
        head, which are computed in float32, stay as they are. What networks share stays shared.
        """
        compute = jnp.dtype(network.model.dtype)

        few_bits = self.frozen_dtype in KINDS

        def kept(x: Any) -> Any:
            if is_quantised(x):
                return x
            narrow = min(x.dtype, compute, key=lambda dtype: dtype.itemsize)
            dtype = jnp.dtype(narrow if few_bits else self.frozen_dtype or narrow)
            if x.dtype == dtype:
                return x
            key = id(x), dtype
            if key not in self.cast:
                self.cast[key] = x, _cast(x, dtype)
            return self.cast[key][1]

        params = network.params
        if few_bits:
            key = id(params["layers"]), self.frozen_dtype
            if key not in self.cast:
                small = quantised(params, str(self.frozen_dtype))["layers"]
                self.cast[key] = params["layers"], small
            params = {**params, "layers": self.cast[key][1]}
        params = {
            name: child if name in WIDE else jax.tree.map(kept, child, is_leaf=is_quantised)
            for name, child in params.items()
        }
        return replace(network, params=params)

    def _model(self, config: ModelConfig, head: bool = False) -> Model:
        """``build``; its axes divide by the mesh's, or an InputError names those that do not."""
        model = build(config, head)
        check_mesh(config_of(self.mesh), model.decoder, self.mesh.size, rows=0)
        return model

    def _read(self, model: Model, config: ModelConfig, seed: int, head: bool) -> Params:
        layout = shardings(model.axes(head), self.mesh)
        if config.decoder is not None:
            if self.abstract:
                return with_layout(model.shapes(head), layout)
            stream = jax.random.fold_in(jax.random.key(seed), INIT)
            return jax.jit(model.init, out_shardings=layout)(stream)
        if is_run(config.path) or is_adapter(config.path):
            # What is merged into is read as it is.
            network = replace(self, narrow=False, weights={}, cast={}).trained(config.path)
            body = headless(network.params)
            if network.lora is None:
                return body
            merged = partial(merge_lora, network.model)
            if self.abstract:
                return with_layout(jax.eval_shape(merged, body, network.lora), layout)
            return jax.jit(merged, out_shardings=layout)(body, network.lora)
        if self.abstract:
            return with_layout(_kept_shapes(model, config.path, head), layout)
        few_bits = str(self.frozen_dtype) if self.narrow else None
        return _placed(read_weights(config.path, head), layout, few_bits)

    def _adapted(self, folder: str) -> Network:
        """An adapter of peft's on its base, with the scalar head if it is a reward model's."""
        base = base_of(folder)
        under = self.base(ModelConfig(base, dtype=self.dtype), head=is_reward_folder(base))
        model = replace(under.model, lora=read_lora(folder, under.model.decoder))
        layout = shardings(model.lora_axes(), self.mesh)
        if self.abstract:
            head = model.shapes(head=True)["head"] if is_reward_folder(folder) else None
            lora = with_layout(model.lora_shapes(), layout)
        else:
            adapter = read_adapter(folder, model.decoder)
            lora = put(adapter.layers, layout)
            head = None if adapter.head is None else {"kernel": adapter.head, "bias": np.float32(0)}
        params = under.params
        if head is not None:
            where = shardings(model.axes(head=True)["head"], self.mesh)
            params = {**params, "head": (with_layout if self.abstract else put)(head, where)}
        return Network(model, params, lora)

    def adapter(self, config: ModelConfig) -> Params | None:
        """The adapters that a model's training starts from; None: fresh ones."""
        if config.lora is None or not config.lora.path:
            return None
        model = self._model(config)
        layout = shardings(model.lora_axes(), self.mesh)
        if self.abstract:
            return with_layout(model.lora_shapes(), layout)
        return put(read_adapter(config.lora.path, model.decoder).layers, layout)

    def config_of(self, folder: str) -> Config:
        """The config of a run; a reward model's of the ``stand_in``'s shape if it is not there.

        A reward model that is a Hugging Face folder has one with the defaults, but rows of up to
        1,024 tokens.
        """
        if is_reward_folder(folder):
            rows = DataConfig(max_tokens=min(1024, read_decoder(folder, head=True).context))
            return Config(RewardModelConfig(), ModelConfig(folder, dtype=self.dtype), data=rows)
        if self.abstract and self.stand_in and not is_run(folder):
            return Config(algorithm=RewardModelConfig(), model=self.stand_in)
        return run_config(folder)

    def trained(self, folder: str) -> Network:
        """The network that a run trained, from its newest checkpoint; or a reward model that is a
        Hugging Face folder.

        A reward model's scores are normalised as its checkpoint says (``normalise_on``).

        Raises:
          InputError: no checkpoint, or one of a reward model that is to be normalised and is not
            yet.
        """
        if is_adapter(folder):
            return self._adapted(folder)
        config = self.config_of(folder)
        if is_reward_folder(folder):
            return self.base(config.model, head=True)
        model = self._model(config.model)
        frozen = self.base(config.model, config.seed).params if model.lora else None
        params = abstract_params(model, needs_head(config), self.mesh)
        if self.abstract:
            return Network(model, *combine_params(params, frozen))
        step, found, host = restore(folder, params)
        params, lora = combine_params(found, frozen)
        if "head" in params:
            params = {**params, "head": normalised(folder, config, params["head"], host)}
        return Network(model, params, lora, step)


def restore(folder: str, wanted: Params) -> tuple[int, Params, dict[str, Any]]:
    """(step, what a run trains or a part of it, the host's numbers), of its newest checkpoint."""
    nothing: Any = ()  # the optimizer and its counts stay on disk
    state = {"policy": TrainState(wanted, nothing, nothing, nothing)}
    step, found, host = load_checkpoint(Path(local(folder)) / "checkpoints", state)
    return step, found["policy"].params, host


def normalised(folder: str, config: Config, head: Params, host: dict[str, Any]) -> Params:
    """The scalar head of a run, with the scale that its checkpoint has for its scores, if any."""
    if not config.algorithm.normalise_on:
        return head
    if "normalisation" not in host:
        raise InputError(f"{folder}: its scores are not normalised yet: train it to its end")
    # (r − mean)/std with r = w·x + b is a head too: w/std and (b − mean)/std.
    scale = host["normalisation"]
    bias = (head["bias"] - scale["mean"]) / scale["std"]
    return {"kernel": head["kernel"] / scale["std"], "bias": bias}


def _kept_shapes(model: Model, path: str, head: bool) -> Params:
    """The shapes of the weights at a path, in the dtypes that ``_placed`` gives them."""
    kept = kept_dtypes(path, head)
    dtypes: Any = {w.path: kept(w) for w in names.weights(model.decoder, head)}
    dtypes = names.nested(dtypes | ({"head/bias": "float32"} if head else {}))
    return jax.tree.map(
        lambda shape, dtype: jax.ShapeDtypeStruct(shape.shape, dtype), model.shapes(head), dtypes
    )


def _placed(source: Source, layout: Any, few_bits: str | None = None) -> Params:
    """Weights in files → arrays on the mesh; in host memory there is one leaf of them at a time,
    and on the devices too of what is quantised in ``few_bits``."""
    leaves = dict(names.leaves_of(layout))
    params: dict[str, Any] = {}
    for weight in source.weights():
        where = leaves[weight.path]
        leaf = put_parts(source.shape(weight), where, partial(source.parts, weight))
        params[weight.path] = quantised_leaf(weight.path, leaf, few_bits) if few_bits else leaf
    if source.head:
        params["head/bias"] = put(np.float32(source.bias), leaves["head/bias"])
    return names.nested(params)


def _cast(x: Any, dtype: Any) -> Any:
    """An array, or its shape with a layout, in another dtype, where it lies."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return x.astype(dtype)


def scores_texts(path: str) -> bool:
    """Whether ``path`` is a reward model: the folder of its run, or a Hugging Face folder."""
    if is_run(path):
        return is_reward_model(run_config(path))
    return is_reward_folder(path)


def needs_head(config: Config) -> bool:
    """Whether the network that a run trains carries the scalar head."""
    if is_on_policy(config):
        return has_critic(config) and config.critic.kind == "shared"
    return is_reward_model(config)


def headless(params: Params) -> Params:
    """The parameters without the scalar head."""
    return {name: x for name, x in params.items() if name != "head"}


def trainable(model: Model, weights: Any, adapters: Any) -> Any:
    """Of two trees, of weights and of adapters: what a TrainState of this model trains."""
    if model.lora is None:
        return weights
    return {"lora": adapters, **({"head": weights["head"]} if "head" in weights else {})}


def abstract_params(model: Model, head: bool, mesh: Mesh) -> Params:
    """Shapes and layouts of what a TrainState of this model trains: all weights, or the adapters;
    with ``head``, the scalar head too."""
    shapes = trainable(model, model.shapes(head), model.lora_shapes())
    axes = trainable(model, model.axes(head), model.lora_axes())
    return with_layout(shapes, shardings(axes, mesh))


def starting(
    network: Network, head: bool, seed: int, random_head: bool = False
) -> tuple[Callable[..., Params], tuple[Any, ...]]:
    """A function to be jitted, and its arguments: fresh trainable parameters for a network.

    They are a copy of its weights, or adapters beside them. Head and adapters that the network
    already has are taken over; else the head is zero, or drawn as a reward model's with
    ``random_head``, and the adapters change nothing at first.
    """
    model = network.model

    def start(key: Any, params: Params, lora: Params | None) -> Params:
        stream = jax.random.fold_in(key, INIT)
        fresh = model.init_head(jax.random.fold_in(stream, 2) if random_head else None)
        scalar = {"head": params.get("head", fresh)} if head else {}
        if model.lora is not None and lora is None:
            lora = model.init_lora(jax.random.fold_in(stream, 1), params)
        # Copied, for a step donates what it trains, and weights are shared; float32 again, if those
        # that were kept to compute with are all there is.
        copy = partial(jnp.array, dtype=jnp.float32, copy=True)
        return jax.tree.map(copy, trainable(model, {**headless(params), **scalar}, lora))

    return start, (jax.random.key(seed), network.params, network.lora)


def start_params(
    network: Network, head: bool, seed: int, mesh: Mesh, random_head: bool = False
) -> Params:
    """Fresh trainable parameters for a network, laid out on the mesh; see ``starting``."""
    start, given = starting(network, head, seed, random_head)
    layout = jax.tree.map(lambda x: x.sharding, abstract_params(network.model, head, mesh))
    return jax.jit(start, out_shardings=layout)(*given)


def offloaded(network: Network, mesh: Mesh, field: str) -> Network:
    """The network with its weights, not its adapters, in host memory; see ``to_host``."""
    return replace(network, params=to_host(network.params, mesh, field))


def check_context(config: Config, model: Model) -> None:
    """The rows of a run fit into a model's context, or an InputError says how long they are."""
    tokens, fields = config.data.max_tokens, "max_tokens"
    if is_on_policy(config):
        tokens = config.data.max_prompt_tokens + config.sample.max_new_tokens
        fields = "max_prompt_tokens + sample.max_new_tokens"
    context, most = model.decoder.context, model.decoder.most_context
    if tokens > context:
        more = f", or set model.context to as many, up to {most}" if most > context else ""
        raise InputError(
            f"data.{fields} = {tokens} tokens exceed the model's context of {context}: "
            f"lower them{more}"
        )


def check_speaks_alike(field: str, network: Network, config: Config, policy: Model) -> None:
    """Another network reads the policy's rows: same vocabulary, and a context that holds them."""
    theirs, ours = network.model.decoder, policy.decoder
    if theirs.vocab != ours.vocab:
        raise InputError(
            f"{field}: a vocabulary of {theirs.vocab}, and the policy's has {ours.vocab}: give one "
            "with the policy's tokenizer"
        )
    check_context(config, network.model)


def tokenizer_path(config: ModelConfig) -> str:
    """Where a model's tokenizer comes from; a run folder names its own model's."""
    path = config.tokenizer or config.path
    if is_run(path):
        return tokenizer_path(run_config(path).model)
    # Beside an adapter there may be one, with tokens of its own.
    if is_adapter(path) and not os.path.isfile(os.path.join(local(path), "tokenizer.json")):
        return tokenizer_path(ModelConfig(base_of(path)))
    return path


def load_model(path: str, mesh: Mesh | None = None) -> tuple[Model, Params, Any]:
    """(model, params, tokenizer) from a path, ready for the step functions.

    Parameters are as their file has them, float32 or bfloat16 (of a GGUF file or a run: float32),
    and read in parts: the host's memory holds no more than its devices' share and one leaf of it.

    Args:
      path: smollm2, a Hugging Face folder (of a reward model too), org/name[@revision] of its
        hub, a .gguf file, or the output folder of a run, whose adapters are merged into the weights
        and whose head, if any, is kept.
      mesh: where the parameters go (default: all devices along ``data``).

    Raises:
      InputError: if the path holds none of these, or holds it damaged.
    """
    path = fetch(path)
    loader = Loader(mesh or make_mesh(MeshConfig()))
    config = ModelConfig(path=path)
    trained = is_run(path) or is_adapter(path) or is_reward_folder(path)
    network = loader.trained(path) if trained else loader.base(config)
    model, params = network.model, network.params
    if network.lora is not None:
        params = jax.jit(merge_lora, static_argnums=0)(model, params, network.lora)
    tokenizer = load_tokenizer(tokenizer_path(config))
    check_vocab(tokenizer, model.decoder)
    return model, params, tokenizer

"""The programs of a run as a plan sees them: arguments, how often, and their bytes on a device."""

import math
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from jaxrlhf.config import Config, DAPOConfig, is_on_policy, on_policy, rows_at_once
from jaxrlhf.core.types import Batch, TokenBatch, TrainState
from jaxrlhf.data.batches import packed_batch
from jaxrlhf.data.tokens import Encoded
from jaxrlhf.mesh.sharding import DECODE, RULES, at_hand, few_rows_layout, on_host, spec
from jaxrlhf.models.cache import KEPT, slots_in
from jaxrlhf.models.decode import Weights, kind_of
from jaxrlhf.models.rope import layers_of
from jaxrlhf.models.stacks import own_caches
from jaxrlhf.rewards.models import Member, packed_reward, packed_scores
from jaxrlhf.run.ahead import arguments, decoding, on, on_rows, shapes
from jaxrlhf.run.feed import host_batch
from jaxrlhf.run.setup import Run
from jaxrlhf.steps.columns import pieces_for as column_pieces
from jaxrlhf.steps.divergence import Taught
from jaxrlhf.steps.packed import keeps_apart, pieces_for
from jaxrlhf.steps.sample import stages_of
from jaxrlhf.study.plan.hlo import Loops


class Call(NamedTuple):
    """A jitted program of a run, ready to be traced."""

    program: Any
    args: tuple[Any, ...]
    calls: int
    """Times an iteration, at most; 0 for what stands outside of it, as evaluation does."""
    responses: int = 0
    """Rows that it samples; 0 if it does not sample."""
    fetched: float = 0.0
    """Bytes on each device of the parameters that come from host memory for it."""
    loops: Loops | None = None
    """Pieces of packed rows that it goes through, were all rows full, and of their columns; None if
    it packs none."""


def calls_of(run: Run) -> dict[str, Call]:
    """Every program that the run carries out, in the order of an iteration."""
    if not is_on_policy(run.config):
        return _offline(run)
    # a key is made on a device: its shape alone asks for none
    key = jax.eval_shape(lambda: jax.random.key(0))
    config = run.config
    given = dict(arguments(run, jax.ShapeDtypeStruct(key.shape, key.dtype)))
    settings, prompts = on_policy(config), config.data.batch_size
    rounds = settings.rounds if isinstance(settings, DAPOConfig) else 1
    often = {"lay_out": rounds, "sample": rounds, "greedy": rounds, "warmup": 0}
    updates = settings.epochs * settings.minibatches
    often |= dict.fromkeys(("take", "critic_update", "update"), updates)
    drawn = {"sample": prompts * config.sample.n, "greedy": prompts}
    assert run.reference is not None
    scorer = "update" if "teacher" in run.algorithm.needs else "reference"
    away = {scorer: fetched(run.reference.params)}
    rollout, part = given["targets"][0], given["update"][1]
    texts = rollout.token_BT, rollout.attention_mask_BT
    new = config.sample.max_new_tokens
    scored = _loops(run, texts[0], new)
    packing: dict[str, Loops] = dict.fromkeys(("rescore", "reference", "value"), scored)
    if isinstance(part, Batch | TokenBatch):
        of = 1 + (scorer == "update")
        learnt = _loops(run, part.token_BT, new, rows_at_once(config), of)
        packing |= dict.fromkeys(("critic_update", "warmup", "update"), learnt)
    out = {
        name: Call(
            getattr(run.programs, name),
            args,
            often.get(name, 1),
            drawn.get(name, 0),
            away.get(name, 0.0),
            packing.get(name),
        )
        for name, args in given.items()
    }
    rewards = _reward_models(run, texts, rounds)
    first = {name: out.pop(name) for name in ("lay_out", "sample")}
    return {**first, **rewards, **out, **_evaluation(run, given)}


def _offline(run: Run) -> dict[str, Call]:
    """Learning from rows: the reference on a batch, and the update."""
    out, batch = {}, _batch(run)
    if run.reference is not None:
        params = run.reference.params
        program, args = run.programs.reference, (shapes(at_hand(params)), batch)
        loops = _loops(run, batch.token_BCT, batch.token_BCT.shape[-1])
        out["reference"] = Call(program, args, 1, fetched=fetched(params), loops=loops)
        batch = on_rows(run, jax.eval_shape(program, *args))
    args = (shapes(run.states["policy"]), batch, shapes(run.frozen["policy"]))
    return {**out, "update": Call(run.programs.update, args, 1)}


def _batch(run: Run) -> Any:
    """Shapes and layouts of the batch that an update learns from; no reference's log-probs in it.

    Rankings, whose length only the data tells, are taken to be of two responses.
    """
    config: Any = run.config
    count = 2 if config.algorithm.rows in ("pairs", "ranked") else 1
    source: Any = SimpleNamespace(
        where="",
        columns={"label": True, "score": 0.0},
        margin=0.0,
        ranks=(0.0,) * count,
        labels=(1.0,),
    )
    # the shapes are the packers' own: they are given rows of a token, padded as all rows are
    rows = [Encoded([i % 2], ([0],) * count, source, (0,)) for i in range(config.data.batch_size)]
    if config.data.packing:
        made = packed_batch([[row] for row in rows], config.data.max_tokens, config.sample.pad)
    else:
        made = host_batch(replace(run, candidates=count), rows)
    return on(few_rows_layout(run.mesh, config.data.batch_size), made)


def _reward_models(run: Run, texts: tuple[Any, ...], rounds: int) -> dict[str, Call]:
    """The reward models, each on the whole rollout."""
    out = {}
    for index, member in enumerate(_members(run.judge)):
        network = member.network
        function = packed_reward if member.process is None else packed_scores
        args = (shapes(at_hand(network.params)), *texts, shapes(network.lora))
        program, away = jax.jit(partial(function, network.model)), fetched(network.params)
        loops = _loops(run, texts[0], 0)
        out[f"reward {index}"] = Call(program, args, rounds, fetched=away, loops=loops)
    return out


def _loops(run: Run, token_BT: Any, wanted: int, most: int | None = None, of: int = 1) -> Loops:
    """Those of packing such rows, or candidates [B, C, T], which are full; under the mesh in force.

    Args:
      wanted: tokens of each row whose log-probs are computed.
      most: packed rows at once.
      of: networks whose logits are computed together.
    """
    *count, width = token_BT.shape
    pieces, rows = pieces_for(math.prod(count), width, most, keeps_apart(run.model))
    columns = column_pieces(rows, width - 1, of * run.model.decoder.vocab, some=True)
    inner = -(-wanted // -(-(width - 1) // columns))
    return Loops((pieces,) if pieces > 1 else (), inner)


def _members(judge: Any) -> list[Member]:
    return [x for scorer in judge.scorers if scorer for x in scorer.members] if judge else []


def _evaluation(run: Run, given: dict[str, tuple[Any, ...]]) -> dict[str, Call]:
    """What held-out rows are measured with, if there are any."""
    config = run.config
    if not config.data.eval:
        return {}
    shards = math.prod(run.mesh.shape[name] for name in RULES["batch"] or ())
    # an evaluation fills its last batch up to whole shards
    rows = -(-config.eval.batch_size // shards) * shards
    width = (rows, config.data.max_prompt_tokens)
    prompts = jax.ShapeDtypeStruct(width, jnp.int32, sharding=few_rows_layout(run.mesh, rows))
    policy, base, decoding, *_, key = given["sample"]
    draw = (policy, base, decoding, prompts, prompts, key)
    rollout = on_rows(run, jax.eval_shape(run.programs.eval_sample, *draw))
    assert run.reference is not None
    params = shapes(at_hand(run.reference.params))
    score = (params, rollout.token_BT, rollout.attention_mask_BT)
    away, new = fetched(run.reference.params), config.sample.max_new_tokens
    reference, loops = run.programs.eval_reference, _loops(run, score[1], new)
    return {
        "eval_sample": Call(run.programs.eval_sample, draw, 0, rows * config.eval.n),
        "eval_reference": Call(reference, score, 0, fetched=away, loops=loops),
    }


def decode_trips(config: Config, responses: int, mean_length: float | None) -> int:
    """Iterations of the decode loop, which ends when every row has; one token is drawn before it.

    Without ``mean_length`` the worst case. With it, rows are taken to end independently, each
    token with the same chance: of B lengths with mean m the longest has the mean
    Σ_t 1 − (1 − (1 − 1/m)^t)^B, cut at max_new_tokens. S slots that are filled again take a share
    B/S of the rows each, and in the end wait for the longest of S.
    """
    most, at_once = config.sample.max_new_tokens, rows_at_a_time(config, responses)
    if mean_length is None:
        return -(-responses // at_once) * (most - 1)
    # (1 − 1/m)^t: a row goes on after t tokens
    going = 1 - 1 / max(mean_length, 1.0)
    longest = sum(1 - (1 - going**t) ** at_once for t in range(most))
    mean = sum(going**t for t in range(most))
    return round((responses / at_once - 1) * (mean - 1) + longest - 1)


def rows_at_a_time(config: Config, responses: int) -> int:
    """Rows that a sampler decodes at once: all, or as many as it has slots."""
    slots = config.sample.slots
    return slots if 0 < slots < responses else responses


def decode_loops(config: Config, responses: int, trips: int) -> Loops:
    """Those of a sampler: one, or two, one after the other (``stages_of``); of slots that are
    filled again one within another, which ends whenever a row does."""
    if rows_at_a_time(config, responses) < responses:
        inside = -(-trips // responses)
        return Loops((round(trips / max(inside, 1)),), inside)
    *before, _ = stages_of(responses, config.sample.max_new_tokens)
    if not before:
        return Loops((trips,))
    first = min(trips, before[0] - 1)
    return Loops((first, trips - first))


def on_device(x: Any) -> float:
    """Bytes of an array on each device, by its sharding; whole where it has none."""
    where = getattr(x, "sharding", None)
    shape = np.shape(x) if where is None else where.shard_shape(np.shape(x))
    # devices hold two of four bits in a byte, numpy one
    packed = 2 if x.dtype in (jnp.int4, jnp.uint4) else 1
    return math.prod(shape) * x.dtype.itemsize / packed


def kinds_of(args: tuple[Any, ...]) -> list[str]:
    """The kind of each leaf of a program's arguments."""
    parts: list[tuple[str, Any]] = []
    for arg in args:
        if isinstance(arg, TrainState):
            # in the order of its leaves
            parts.append(("parameters", arg.params))
            parts.append(("optimizer", (arg.opt_state, arg.step, arg.skipped)))
        else:
            network = isinstance(arg, dict) and bool({"layers", "lora"} & arg.keys())
            network |= isinstance(arg, Taught)
            copy = "weights_copy" if isinstance(arg, Weights) else "rows"
            parts.append(("parameters" if network else copy, arg))
    return [kind for kind, tree in parts for _ in jax.tree.leaves(tree)]


def arguments_by_kind(args: tuple[Any, ...], jaxpr: Any) -> dict[str, float]:
    """Bytes on each device of the arguments that a traced program reads, by kind."""
    # jit does not even pass the others
    _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    out = {"parameters": 0.0, "optimizer": 0.0, "rows": 0.0, "weights_copy": 0.0}
    leaves = jax.tree.leaves(args)
    for x, kind, kept in zip(leaves, kinds_of(args), used, strict=True):
        out[kind] += on_device(x) * kept
    return out


def resident(run: Run) -> float:
    """Bytes of all networks and optimizers that a run holds from its start to its end, without
    those that lie in host memory."""
    networks = [run.reference] if run.reference else []
    networks += [x.network for judge in (run.judge, run.gold) for x in _members(judge)]
    held = [run.states, run.frozen, *((network.params, network.lora) for network in networks)]
    # networks may share weights, as a reference does with the base of a policy's adapters
    unique = {id(x): x for x in jax.tree.leaves(held)}
    return sum(on_device(x) for x in unique.values() if not on_host(x))


def fetched(params: Any) -> float:
    """Bytes of the parameters that come from host memory when a step needs them."""
    return sum(on_device(x) for x in jax.tree.leaves(params) if on_host(x))


def cache_bytes(run: Run, rows: int) -> float:
    """The KV cache of a sampler's rows."""
    c, sample = run.model.decoder, run.config.sample
    kind, shards = kind_of(run.model, sample), _shards(run)
    # of prompts, each once where they divide over the devices, and of the tokens since
    prompts = rows // sample.n if rows // sample.n % shards == 0 else rows
    at_once = rows_at_a_time(run.config, rows)
    # a slot that is filled again has a copy of its prompt
    copies = at_once if at_once < rows else 0
    width, total = run.config.data.max_prompt_tokens, 0.0
    for layer in layers_of(c)[: own_caches(c)]:
        # of int8 also a float32 a vector
        size = 2 * (jnp.dtype(kind).itemsize + (4 / layer.head_dim if kind == "int8" else 0))
        parts = (
            (prompts + copies, min(width, layer.window or width)),
            (at_once, slots_in(layer, sample.max_new_tokens - 1)),
        )
        for count, slots in parts:
            shape = (count, layer.kv_heads, slots, layer.head_dim)
            total += size * _decoding(run, SimpleNamespace(shape=shape), KEPT)
    return float(total)


def _shards(run: Run) -> int:
    """Pieces that the rows of a sampler are split into."""
    return run.mesh.size // run.mesh.shape["tensor"]


def decode_copy(run: Run) -> float:
    """The weights as the decode loop reads them: compute dtype, or as many bits as they are
    quantised in, whole over fsdp and context."""
    return sum(map(on_device, jax.tree.leaves(decoding(run))))


def _decoding(run: Run, x: Any, axes: Any) -> int:
    """Numbers on each device of an array in decode layout."""
    return math.prod(jax.sharding.NamedSharding(run.mesh, spec(axes, DECODE)).shard_shape(x.shape))


class Refusal(NamedTuple):
    """What a compiler says of a program that is too large, bytes on a device; None if not said."""

    used: float | None = None
    """Of the whole program, its arguments included."""
    temporaries: float | None = None
    """Of what it computes on the way alone."""
    at_least: bool = False
    """They may be more: it is what it asked for last, or nothing is said."""


def refused(message: str) -> Refusal | None:
    """A compiler's refusal of a program for its size; None if it says something else.

    A TPU compiler does not compile what exceeds a chip: ``Used 21.30G of 15.75G hbm``, or ``Ran out
    of memory on HBM, the total memory required for HLO temporaries (21.30G) exceeds …``. Others say
    RESOURCE_EXHAUSTED, or out of memory, and maybe what was asked for last. A core's own memory
    (vmem, smem) is not meant: no layout of the run changes what a kernel takes of it.
    """
    size = r"([\d.]+)\s*([KMGTP]?)(?:i?B|\s*bytes)?"
    if re.search(r"memory space (?!hbm)\w|of [\d.]+\w* [vs]mem", message, re.I):
        return None
    if found := re.search(rf"Used {size} of [\d.]+\s*\w* hbm", message, re.I):
        return Refusal(used=_bytes(*found.groups()))
    if not re.search(r"out of memory|RESOURCE_EXHAUSTED|exceeded hbm capacity", message, re.I):
        return None
    if found := re.search(rf"required for HLO temporaries \({size}\)", message, re.I):
        return Refusal(temporaries=_bytes(*found.groups()))
    if found := re.search(rf"allocat(?:e|ing) {size}", message, re.I):
        return Refusal(temporaries=_bytes(*found.groups()), at_least=True)
    return Refusal(at_least=True)


def _bytes(number: str, unit: str) -> float:
    """``21.5`` and ``G`` → bytes; units are powers of 1024."""
    return float(number.rstrip(".")) * 2.0 ** (10 * " KMGTP".index(unit.upper() or " "))

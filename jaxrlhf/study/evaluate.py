"""What takes part in an evaluation, how its completions are drawn, and evaluation.json."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import (
    Config,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OfflineConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
    check_evaluate,
    is_on_policy,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import below
from jaxrlhf.core.remote import check_target, write_text
from jaxrlhf.core.shown import visible
from jaxrlhf.core.types import Array, Params, Rollout, StopTable
from jaxrlhf.data.batches import held_out_batches
from jaxrlhf.data.chat import chat_settings
from jaxrlhf.data.formats import Prompt, column_names, read_prompts
from jaxrlhf.data.rows import Rows, read_rows
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.tokens import ANY_LENGTH, READERS, Encoded, encode_rows, prompt_arrays
from jaxrlhf.mesh.processes import is_first
from jaxrlhf.mesh.sharding import DECODE, fetch, make_mesh, put_rows, row_shards, tpu_slices
from jaxrlhf.models.ends import read_ends
from jaxrlhf.models.hub import fetch_fields
from jaxrlhf.models.load import Loader, Network, is_run, run_config, scores_texts, tokenizer_path
from jaxrlhf.models.stop_strings import stop_table
from jaxrlhf.models.tokenizer import check_vocab, load_tokenizer
from jaxrlhf.models.transformer import Model
from jaxrlhf.rewards.judge import Judge, check_columns, make_judge
from jaxrlhf.run.programs import packed_logp
from jaxrlhf.run.record import plain
from jaxrlhf.steps.sample import sample
from jaxrlhf.study import figures
from jaxrlhf.study.figures import Columns, Extract

STREAMS = {"model": 0x7FFFFFF0, "reference": 0x7FFFFFF1, "against": 0x7FFFFFF2}
"""Streams of the draws of each, beside those of training and of the evaluations in a run."""

NEW_TOKENS = 64  # most tokens of a completion by a model that is no run

BATCHES = 8
"""Times ``rows`` completions a device that are drawn in one call, ``rows`` of them at once."""

FEW_TOKENS = 16
"""Fewer have to be asked for: most completions would be cut off, and say nothing of the policy."""


def evaluate_model(
    wish: EvaluateConfig, mesh: Mesh | None = None, extract: Extract | None = None
) -> dict[str, Any]:
    """Measure a policy on held-out prompts and write evaluation.json.

    ``wish.n`` completions of each prompt are sampled at T = 1, untruncated, by the model and by
    what it is compared with; a prompt that stands in several rows counts once. Means are over
    prompts, and ``_ci`` is the half width of the 95 % interval of such a mean: Student's, and of
    shares (win rates, pass@k, maj@k, ended) the distance to the farther end of Wilson's.

    Args:
      wish: what to measure.
      mesh: where, if not on all devices as the run's mesh and ``wish`` say.
      extract: completion → its answer, for maj@k; None for a completion without one. If not given,
        what the verifier that judges takes for the answer; without one, the stripped text.

    Returns:
      What evaluation.json holds: ``step``, iterations of the run behind the model (None if it is no
      run); ``rows_skipped``, where the run has ``data.skip_bad_rows``; ``policy`` and ``against``,
      the figures of each (``describe``), the policy's with its KL to the reference; ``win_rate``,
      by each judge; ``pass_at_k`` and ``maj_at_k`` for verifiable tasks; ``best_of_n``, the curve
      of the reference (of the model, if it has none), and ``equal_kl``, what that curve reaches at
      the policy's KL; and the policy's ``completions``.

    Raises:
      InputError: a model, data or reward that cannot be used, or no folder that can be written.
    """
    check_evaluate(wish)
    if wish.raw:
        raise InputError("raw: a policy continues prompts of text as they are always: leave it out")
    wish = fetch_fields(wish, "model", "reference", "against", "reward_model")
    if not wish.output and not is_run(wish.model):
        raise InputError(
            f"output: missing: {wish.model} is no run's folder: give one for evaluation.json"
        )
    config = config_of(wish.model)
    path = below(wish.output or wish.model, "evaluation.json")
    if is_first():
        check_target("output", path)
    mesh = mesh or make_mesh(_mesh_config(wish, config))
    with jax.set_mesh(mesh):
        found = _measure(wish, config, mesh, extract)
    if is_first():
        text = json.dumps(plain(found), indent=1, allow_nan=False)
        write_text("output", path, text + "\n")
    return found


def _mesh_config(wish: EvaluateConfig, config: Config) -> MeshConfig:
    """The run's way to split its parameters, on all the devices there are now."""
    axes = ("fsdp", "tensor", "context")
    given = {name: getattr(wish, name) for name in axes if getattr(wish, name)}
    mesh = replace(config.mesh, **given, slices=tpu_slices(jax.devices()))
    return mesh if -1 in (mesh.fsdp, mesh.tensor, mesh.context) else replace(mesh, data=-1)


def _measure(
    wish: EvaluateConfig, config: Config, mesh: Mesh, extract: Extract | None
) -> dict[str, Any]:
    bench, networks = read_entrants(wish, config, mesh)
    if note := bench.prompts.note():
        print(visible(note, lines=True), flush=True)
    judges = tuple(bench.judges)
    best_of = wish.best_of if judges else 0
    # Best of n starts from the reference. It is also the opponent, unless another is given.
    baseline = "model" if networks["reference"] is None else "reference"
    compared = baseline if networks["against"] is None else "against"
    most = {name: wish.n if name in ("model", compared) else 0 for name in STREAMS}
    most[baseline] = max(most[baseline], best_of)
    drawn = {}
    for name, network in networks.items():
        if network is not None and most[name]:
            print(f"{name}: {most[name]} completions of {len(bench.prompts)} prompts", flush=True)
            key = jax.random.fold_in(jax.random.key(wish.seed), STREAMS[name])
            other = networks["reference"] if name == "model" else None
            drawn[name] = draw(bench, network, most[name], key, other)
    ours = drawn["model"]
    start = config.reference.path or config.model.path or "the run's random start"
    reference = wish.reference or (start if is_run(wish.model) else None)
    against = wish.against or reference
    assert networks["model"] is not None
    found: dict[str, Any] = {
        "models": {"policy": wish.model, "reference": reference, "against": against},
        "step": networks["model"].step,
        "rewards": {n: [source.name for source in j.sources] for n, j in bench.judges.items()},
        "data": wish.data or config.data.eval,
        "prompts": len(bench.prompts),
        "n": wish.n,
        "max_new_tokens": bench.sampling.max_new_tokens,
        "seed": wish.seed,
        "policy": figures.describe(ours, wish.n, judges),
    }
    if config.data.skip_bad_rows:
        found["rows_skipped"] = len(bench.prompts.skipped)
    if compared != "model":
        found["against"] = figures.describe(drawn[compared], wish.n, judges)
        found["win_rate"] = figures.compare(ours, drawn[compared], wish.n, judges)
    judge = bench.judges[judges[-1]] if judges else None
    correct_at, answer = rule_of(judge)
    correct_at = correct_at if wish.correct_at is None else wish.correct_at
    texts = "text" if extract or judge is None else text_of(judge)
    found |= figures.solved(ours, wish.n, judges, correct_at, extract or answer, texts)
    if best_of:
        found |= figures.best_of_n_curve(drawn[baseline], best_of, judges, found["policy"])
    return found | {"completions": figures.completions(ours, wish.n, bench.prompts.items, judges)}


def rule_of(judge: Judge | None) -> tuple[float | None, Extract]:
    """What score is right (None: 1 of 0 and 1), and what is an answer.

    Of a judge that is one verifier, its full score is right, and only that: it may pay for what is
    nearly right, which is then no reason to measure nothing.
    """
    if judge is None or len(judge.sources) != 1 or judge.sources[0].answer is None:
        return None, str.strip
    (source,) = judge.sources
    full = float(np.float32(source.weight))  # as scores are kept
    return full if full > 0 else None, source.answer or str.strip


def text_of(judge: Judge) -> str:
    """The column of completions in which a verifier reads its answers: the text that it judges."""
    verifies = len(judge.sources) == 1 and judge.sources[0].answer is not None
    return "text_special" if verifies and judge.sources[0].special else "text"


@dataclass(frozen=True)
class Bench:
    """Where networks are measured: the same prompts, judges and settings for each."""

    prompts: Rows[Encoded]
    width: int  # P, tokens that prompts are padded to
    sampling: SampleConfig  # its n is not read
    stops: StopTable | None
    rows: int  # completions drawn at once on each device
    judges: Mapping[str, Judge]
    tokenizer: Any
    mesh: Mesh


def config_of(path: str) -> Config:
    """A run's config; for another model, one that says no more than where its weights are.

    Raises:
      InputError: a reward model, which completes nothing.
    """
    if scores_texts(path):
        raise InputError(f"{path}: a reward model, which completes nothing: give a policy")
    if not is_run(path):
        return Config(algorithm=SFTConfig(), model=ModelConfig(path=path))
    return run_config(path)


def read_entrants(
    wish: EvaluateConfig, config: Config, mesh: Mesh
) -> tuple[Bench, dict[str, Network | None]]:
    """Read everything that takes part.

    Returns:
      The bench, and the networks by the names of ``STREAMS``.

    Raises:
      InputError: something that cannot be used, networks that do not share the tokenizer, or
        prompts and completions that exceed the context of one.
    """
    path = wish.data or config.data.eval
    if not path:
        raise InputError(
            f"data: missing: {wish.model} has no held-out rows: give a file of prompts"
        )
    settings = config.model
    loader = Loader(mesh, dtype=settings.dtype, frozen_dtype=settings.frozen_dtype)
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    model = _network(wish.model, loader)
    vocab = model.model.decoder.vocab
    check_vocab(tokenizer, model.model.decoder)
    prompts = _prompts(path, config, tokenizer, vocab, own=not wish.data)
    width = max(len(row.prompt) for row in prompts.items)
    new = wish.max_new_tokens or _new_tokens(config, is_run(wish.model), width)
    networks = {
        "model": model,
        "reference": _reference(wish, config, loader),
        "against": _network(wish.against, loader) if wish.against else None,
    }
    for name, network in networks.items():
        if network is not None:
            _check_fits(name, network, vocab, width + new)
    ends = read_ends(wish.model, tokenizer, vocab)
    sampling = ends.settle(SampleConfig(max_new_tokens=new))
    bench = Bench(
        prompts=prompts,
        width=width,
        sampling=sampling,
        stops=stop_table(tokenizer, sampling.stop_strings, vocab),
        rows=wish.rows,
        judges=_judges(wish, config, loader, tokenizer, vocab, prompts),
        tokenizer=tokenizer,
        mesh=mesh,
    )
    return bench, networks


def _network(path: str, loader: Loader) -> Network:
    config = config_of(path)
    if not is_run(path):
        return loader.base(config.model)
    network = loader.trained(path)
    # Without its value head it has the shape of its reference, and shares its programs.
    body = {name: x for name, x in network.params.items() if name != "head"}
    return replace(network, params=body)


def _reference(wish: EvaluateConfig, config: Config, loader: Loader) -> Network | None:
    """What was asked for, else what the run started from, or holds on to."""
    if wish.reference:
        return _network(wish.reference, loader)
    if not is_run(wish.model):
        return None
    if config.reference.path:
        return loader.base(replace(config.model, path=config.reference.path, decoder=None))
    return loader.base(config.model, config.seed)


def _prompts(path: str, config: Config, tokenizer: Any, vocab: int, own: bool) -> Rows[Encoded]:
    """The prompts of a file, of the run's ``own`` kind or of prompts; one in several rows once."""
    kind, skip = config.algorithm, config.data.skip_bad_rows
    read = READERS[kind.rows] if own and isinstance(kind, OfflineConfig) else read_prompts
    rows = read(read_rows(path, skip), tokenizer, skip, chat_settings(config.data))
    once: dict[str, Prompt] = {}
    for row in rows.items:
        prompt = row
        if not isinstance(row, Prompt):
            prompt = Prompt(row.prompt, row.columns, row.where, row.chat)
        once.setdefault(prompt.text, prompt)
    rows = Rows(tuple(once.values()), rows.path, rows.skipped, rows.notes)
    return encode_rows(rows, tokenizer, vocab, ANY_LENGTH, skip_bad_rows=skip)


def _new_tokens(config: Config, run: bool, width: int) -> int:
    if is_on_policy(config):
        return config.sample.max_new_tokens
    if not run:
        return NEW_TOKENS
    # A run from rows has learnt from max_tokens of prompt and answer: the answer gets what is left.
    left = config.data.max_tokens - width
    if left < FEW_TOKENS:
        raise InputError(
            f"max_new_tokens: missing: the run's data.max_tokens={config.data.max_tokens} leaves "
            f"{max(left, 0)} after the longest held-out prompt of {width}: give --max-new-tokens"
        )
    return left


def _judges(
    wish: EvaluateConfig,
    config: Config,
    loader: Loader,
    tokenizer: Any,
    vocab: int,
    rows: Rows[Encoded],
) -> dict[str, Judge]:
    """``proxy``, the rewards that the run was trained on, and ``gold``, where there are such.

    Raises:
      InputError: one cannot be had, or asks for a column that the rows do not have.
    """
    columns = column_names([row.source for row in rows.items])
    gold = config.eval.gold
    if wish.reward or wish.reward_model:
        gold = (RewardConfig(function=wish.reward, model=wish.reward_model),)
    sources = {"proxy": ("rewards", config.rewards), "gold": ("gold", gold)}
    judges = {
        name: make_judge(configs, loader, tokenizer, vocab, field, columns=columns)
        for name, (field, configs) in sources.items()
        if configs
    }
    for judge in judges.values():
        check_columns(judge.sources, columns)
    return judges


def _check_fits(name: str, network: Network, vocab: int, tokens: int) -> None:
    decoder = network.model.decoder
    if decoder.vocab != vocab:
        raise InputError(
            f"{name}: a vocabulary of {decoder.vocab}, and the model's has {vocab}: give one with "
            "the model's tokenizer"
        )
    if tokens > decoder.context:
        raise InputError(
            f"max_new_tokens: prompts and completions of {tokens} tokens exceed the context of "
            f"{name}, {decoder.context}: lower it"
        )


def shape_of(count: int, n: int, rows: int) -> tuple[int, int, int]:
    """How ``n`` completions of each of ``count`` prompts are drawn in batches of one shape.

    Returns:
      Prompts a batch, which divide by the devices that rows are split over; completions of each,
      with which a device has about ``rows``; and rounds, batches for the same prompts.
    """
    rounds = -(-n // rows)
    each = -(-n // rounds)
    shards = row_shards()
    return min(max(rows // each, 1), -(-count // shards)) * shards, each, rounds


def draw(
    bench: Bench, network: Network, n: int, key: jax.Array, reference: Network | None = None
) -> Columns:
    """Draw and measure ``n`` completions of every prompt.

    Args:
      key: of this network's draws alone.
      reference: what the KL is measured to.
    """
    at_once, each, rounds = shape_of(len(bench.prompts), n, bench.rows)
    # Several batches a call: a completion that ends makes room for one of the next.
    shards = row_shards(DECODE)
    slots = -(-at_once * each // shards) * shards
    bench = replace(bench, sampling=replace(bench.sampling, slots=slots))
    parts = []
    for row_Q, real_Q in held_out_batches(len(bench.prompts), BATCHES * at_once, row_shards()):
        prompts = [bench.prompts.items[i] for i in row_Q]
        # The i-th draw of the q-th prompt has a key of its own, number q·n + i: it is the same
        # however many rows are drawn at once.
        number_QN = row_Q[:, None] * n + np.arange(each)
        drawn = [
            _batch(bench, network, reference, prompts, key, number_QN + turn * each)
            for turn in range(rounds)
        ]
        # The last round may draw more than n, and the last batch be filled with prompts again.
        parts.append({name: x_QN[real_Q, :n] for name, x_QN in _join(drawn, axis=1).items()})
    return _join(parts, axis=0)


def _join(parts: Sequence[Columns], axis: int) -> Columns:
    return {name: np.concatenate([part[name] for part in parts], axis) for name in parts[0]}


def _batch(
    bench: Bench,
    network: Network,
    reference: Network | None,
    rows: Sequence[Encoded],
    key: jax.Array,
    number_QN: np.ndarray,
) -> Columns:
    """The draws of these numbers, and all that is measured of them."""
    count, n = number_QN.size, number_QN.shape[1]
    settings, row_B = replace(bench.sampling, n=n), number_QN.ravel().astype(np.int32)
    arrays = put_rows(prompt_arrays(rows, bench.width, settings.pad), bench.mesh)
    rollout = _sample(
        network.model,
        network.params,
        *arrays,
        key,
        settings,
        network.lora,
        row_B=row_B,
        stops=bench.stops,
    )
    prompts: list[Prompt] = [row.source for row in rows]  # type: ignore[misc]
    scores = {name: fetch(judge(rollout, prompts).reward_B) for name, judge in bench.judges.items()}
    ref_logp_BT = None
    if reference is not None:
        tokens = rollout.token_BT, rollout.attention_mask_BT
        ref_logp_BT = _score(
            reference.model, bench.width, reference.params, reference.lora, *tokens
        )
    host, ref_logp_BT = fetch((rollout, ref_logp_BT))
    token_BT, mask_BT = np.asarray(host.token_BT), np.asarray(host.mask_BT)
    texts, special = (
        decode_rollout(bench.tokenizer, token_BT, mask_BT, [""] * count, ended_B)
        for ended_B in (None, host.ended_B)
    )
    ids = [t[m != 0].tolist() for t, m in zip(token_BT, mask_BT, strict=True)]
    logp_BT = np.asarray(host.logp_BT, np.float64)
    flat = {
        "token": np.fromiter(ids, object, count),
        "text": np.fromiter(texts, object, count),
        "text_special": np.fromiter(special, object, count),
        "length": mask_BT.sum(1, dtype=np.float64),
        "ended": np.asarray(host.ended_B, np.float64),
        "logp": logp_BT.sum(1),
    }
    if ref_logp_BT is not None:  # Σ_t log π − log π_ref, over the completion
        flat["kl_nats"] = ((logp_BT - ref_logp_BT) * mask_BT).sum(1)
    for name, reward in scores.items():
        reward_B = np.asarray(reward, np.float64)
        flat[name] = np.where(np.isfinite(reward_B), reward_B, np.nan)
    return {name: x_B.reshape(-1, n) for name, x_B in flat.items()}


_sample: Callable[..., Rollout] = jax.jit(sample, static_argnums=(0, 5))


@partial(jax.jit, static_argnums=(0, 1))
def _score(
    model: Model, first: int, params: Params, lora: Params | None, token_BT: Array, mask_BT: Array
) -> Array:
    """log π of tokens from column ``first`` on, at T = 1, some rows at a time."""
    given = params if lora is None else {"lora": lora}
    return packed_logp(model, 1.0, first)(given, params, token_BT, mask_BT)

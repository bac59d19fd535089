"""Preference data out of nothing but a policy and a judge: sample, score, compare."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.config import ModelConfig, PreferencesConfig, RewardConfig, SampleConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import write_atomic
from jaxrlhf.data.batches import held_out_batches
from jaxrlhf.data.chat import PLAIN, chat_settings
from jaxrlhf.data.formats import read_prompts
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.text import decode_rollout, repeat
from jaxrlhf.data.tokens import Encoded, encode_rows, prompt_arrays
from jaxrlhf.mesh.sharding import DECODE, put_rows, row_shards
from jaxrlhf.models.ends import read_ends
from jaxrlhf.models.hub import fetch_fields
from jaxrlhf.models.load import Loader, is_run, run_config, tokenizer_path
from jaxrlhf.models.stop_strings import stop_table
from jaxrlhf.models.tokenizer import check_vocab, load_tokenizer
from jaxrlhf.rewards.functions import Asked, Source
from jaxrlhf.rewards.isolation import host_source
from jaxrlhf.rewards.judge import chats_of
from jaxrlhf.steps.sample import sample

BATCHES = 8
"""Times ``batch_size`` prompts that are sampled in one call, ``batch_size`` of them at once."""

STREAM = 2**24
"""Numbers of completions that one file has to itself."""


@dataclass(frozen=True)
class Group:
    """The completions of a prompt."""

    prompt: str
    completions: tuple[str, ...]
    scores: tuple[float, ...]
    """The judge's; NaN where it has none."""
    ended: tuple[bool, ...]
    """False for a completion that was cut at its last token."""

    def usable(self) -> list[int]:
        """The completions with words and a score, each text once."""
        kept: list[int] = []
        for i, text in enumerate(self.completions):
            new = text not in [self.completions[other] for other in kept]
            if new and text.strip() and math.isfinite(self.scores[i]):
                kept.append(i)
        return kept


def write_pairs(config: PreferencesConfig, folder: Path, seed: int, mesh: Any) -> dict[str, int]:
    """Write train.jsonl and eval.jsonl, and return how many pairs each holds.

    Beside them stand the same completions as rankings (train_ranked.jsonl, eval_ranked.jsonl) and
    as scored answers (train_scored.jsonl, eval_scored.jsonl); ``ROWS`` says what a row of each is.

    Args:
      seed: every draw follows from it and from the completion's number in its file, whatever
        batch it is in.

    Raises:
      InputError: no pair is found for one of the two; nothing is written then.
    """
    loader, config = Loader(mesh), fetch_fields(config, "model")
    model = ModelConfig(path=config.model)
    network = loader.base(model, seed)
    tokenizer = load_tokenizer(tokenizer_path(model))
    vocab = network.model.decoder.vocab
    check_vocab(tokenizer, network.model.decoder)
    # Chats as the run rendered them that the policy comes from.
    chat = chat_settings(run_config(config.model).data) if is_run(config.model) else PLAIN
    ends = read_ends(config.model, tokenizer, vocab)
    settings = ends.settle(_sampling(config))
    stops = stop_table(tokenizer, settings.stop_strings, vocab)
    draw = partial(jax.jit(sample, static_argnums=(0, 5)), network.model, network.params)
    judge = host_source(RewardConfig(function=config.judge))
    # Each completion has a number, and by it a key of its own: batches do not change what is drawn.
    groups: dict[str, list[Group]] = {"train": [], "eval": []}
    drawn: list[tuple[str, Encoded, int]] = []  # file, prompt, number of its first completion
    jobs = {"train": (config.train, config.train_rounds), "eval": (config.eval, config.eval_rounds)}
    for job, (name, (source, rounds)) in enumerate(jobs.items()):
        rows = read_prompts(read_rows(source), tokenizer, chat=chat)
        prompts = encode_rows(rows, tokenizer, vocab, config.max_prompt_tokens).items * rounds
        drawn += [(name, x, job * STREAM + i * config.n) for i, x in enumerate(prompts)]
    for row_Q, real_Q in held_out_batches(len(drawn), BATCHES * config.batch_size, row_shards()):
        names, prompts, first_Q = zip(*(drawn[i] for i in row_Q), strict=True)
        arrays = put_rows(prompt_arrays(prompts, config.max_prompt_tokens, settings.pad), mesh)
        row_B = (np.array(first_Q)[:, None] + np.arange(config.n)).ravel().astype(np.int32)
        host = jax.device_get(
            draw(*arrays, jax.random.key(seed), settings, row_B=row_B, stops=stops)
        )
        made = judged(config, judge, tokenizer, prompts, host, int(real_Q.sum()))
        for name, group in zip(names, made, strict=False):
            groups[name].append(group)
    rows_of = {"": partial(pairs_of, min_gap=config.min_gap)} | ROWS
    rows = {
        f"{name}{end}": [row for group in some for row in made_of(group)]
        for name, some in groups.items()
        for end, made_of in rows_of.items()
    }
    # All are made before one is written: a file without pairs must not leave the others behind.
    for name, some in groups.items():
        if not rows[name]:
            raise _no_pairs(name, some, config)
    for name, lines in rows.items():
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
    return {f"{name}_pairs": len(rows[name]) for name in groups}


def _sampling(config: PreferencesConfig) -> SampleConfig:
    """As many completions at once as asked for; several times as many are in line, so that none
    waits for the longest of its batch."""
    shards = row_shards(DECODE)
    slots = -(-config.batch_size * config.n // shards) * shards
    return SampleConfig(max_new_tokens=config.max_new_tokens, n=config.n, slots=slots)


def _no_pairs(name: str, groups: Sequence[Group], config: PreferencesConfig) -> InputError:
    score_B = np.array([score for group in groups for score in group.scores])
    return InputError(
        f"preferences.{name}: no pairs: of {score_B.size} completions, n={config.n} a prompt, "
        f"{config.judge} scored {np.isfinite(score_B).sum()}, and no two with words lie "
        f"min_gap={config.min_gap:g} apart: lower min_gap, or raise n"
    )


def judged(
    config: PreferencesConfig,
    judge: Source,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    rollout: Any,
    real: int,
) -> Iterator[Group]:
    """The completions of one rollout with their scores, of its first ``real`` prompts."""
    texts = repeat([prompt.source.text for prompt in prompts], config.n)  # type: ignore[union-attr]
    completions = decode_rollout(tokenizer, rollout.token_BT, rollout.mask_BT, texts)
    chats = chats_of([prompt.source for prompt in prompts], config.n)  # type: ignore[misc]
    score_B = judge(Asked(texts, completions, {}, rollout.ended_B.tolist(), chats)).score_B
    for q in range(real):
        rows = slice(q * config.n, (q + 1) * config.n)
        yield Group(
            texts[rows][0],
            tuple(completions[rows]),
            tuple(score_B[rows].tolist()),
            tuple(map(bool, rollout.ended_B[rows])),
        )


def pairs_of(group: Group, min_gap: float) -> Iterator[dict[str, Any]]:
    """``{prompt, chosen, rejected, gap, chosen_ended, rejected_ended}``: the best with the worst,
    the second with the second worst; ``gap`` is the judge's difference."""
    known = [i for i in range(len(group.scores)) if math.isfinite(group.scores[i])]
    # Sorting is stable: of equal scores, the one that was drawn first is the better.
    order = sorted(known, key=lambda i: -group.scores[i])
    for best, worst in zip(order[: len(order) // 2], order[::-1], strict=False):
        gap = group.scores[best] - group.scores[worst]
        chosen, rejected = group.completions[best], group.completions[worst]
        if gap >= min_gap and chosen.strip() and rejected.strip():
            yield {
                "prompt": group.prompt,
                "chosen": chosen,
                "rejected": rejected,
                "gap": round(gap, 4),
                "chosen_ended": group.ended[best],
                "rejected_ended": group.ended[worst],
            }


def ranking_of(group: Group) -> Iterator[dict[str, Any]]:
    """``{prompt, responses, ranks, scores, ended}``; equal scores tie."""
    kept = group.usable()
    if len(kept) < 2:
        return
    scores = [group.scores[i] for i in kept]
    yield {
        "prompt": group.prompt,
        "responses": [group.completions[i] for i in kept],
        "ranks": [1 + sum(other > score for other in scores) for score in scores],
        "scores": [round(score, 4) for score in scores],
        "ended": [group.ended[i] for i in kept],
    }


def answers_of(group: Group) -> Iterator[dict[str, Any]]:
    """``{prompt, completion, score, ended}``."""
    for i in group.usable():
        yield {
            "prompt": group.prompt,
            "completion": group.completions[i],
            "score": round(group.scores[i], 4),
            "ended": group.ended[i],
        }


ROWS = {"_ranked": ranking_of, "_scored": answers_of}
"""By the end of a file's name, what its rows are, beside the pairs."""

"""Preference pairs out of nothing but a policy and a judge: sample, score, compare."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.config import ModelConfig, SampleConfig
from jaxrlhf.data.batches import held_out_batches
from jaxrlhf.data.formats import read_prompts
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import Encoded, encode_rows, prompt_arrays
from jaxrlhf.metrics import write_atomic
from jaxrlhf.models.tokenizers import ends_of, load_tokenizer
from jaxrlhf.networks import Loader, tokenizer_path
from jaxrlhf.rewards.functions import call, resolve
from jaxrlhf.rewards.text import decode_rollout, repeat
from jaxrlhf.sharding import put_rows
from jaxrlhf.steps.sampling import sample


@dataclass(frozen=True)
class PairConfig:
    """How pairs are made."""

    model: ModelConfig
    """The policy that writes."""
    judge: str
    """The reward function that compares."""
    max_prompt_tokens: int
    max_new_tokens: int
    n: int = 4
    """Completions a prompt and round; n // 2 pairs: best with worst, second with second worst."""
    batch_size: int = 16
    """Prompts at once."""
    min_gap: float = 0.1
    """Pairs closer than this, in the judge's units, are dropped."""


def write_pairs(
    config: PairConfig, jobs: dict[Path, tuple[str, int]], seed: int, mesh: Any
) -> dict:
    """Write one file of pairs for each of ``jobs`` and return how many pairs each holds.

    Args:
      jobs: file to write → (file of prompts, rounds over it).
      seed: every draw follows from it.

    A row is ``{prompt, chosen, rejected, gap, chosen_ended, rejected_ended}``: ``gap`` is the
    judge's difference; ``ended`` is false for a completion that was cut at its last token.
    """
    loader = Loader(mesh)
    network = loader.base(config.model, seed)
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    vocab = network.model.decoder.vocab
    stop, pad = ends_of(tokenizer)
    settings = SampleConfig(
        max_new_tokens=config.max_new_tokens,
        n=config.n,
        stop=stop,
        pad=pad,
    )
    draw = jax.jit(sample, static_argnums=(0, 5))
    judge = resolve(config.judge)
    stream = jax.random.key(seed)
    counts = {}
    for job, (path, (source, rounds)) in enumerate(jobs.items()):
        rows = read_prompts(read_rows(source), tokenizer)
        prompts = encode_rows(rows, tokenizer, vocab, config.max_prompt_tokens).items
        lines: list[dict[str, Any]] = []
        for index in range(rounds):
            key = jax.random.fold_in(jax.random.fold_in(stream, job), index)
            for at, (row_Q, real_Q) in enumerate(
                held_out_batches(len(prompts), min(config.batch_size, len(prompts)))
            ):
                picked = [prompts[i] for i in row_Q]
                arrays = prompt_arrays(picked, config.max_prompt_tokens, settings.pad)
                rollout = draw(
                    network.model,
                    network.params,
                    *put_rows(arrays, mesh),
                    jax.random.fold_in(key, at),
                    settings,
                )
                host = jax.device_get(rollout)
                lines += compare(config, judge, tokenizer, picked, host, int(real_Q.sum()))
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
        counts[path.stem] = len(lines)
    return counts


def compare(
    config: PairConfig,
    judge: Any,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    rollout: Any,
    real: int,
) -> Iterator[dict[str, Any]]:
    """The pairs of one rollout, of its first ``real`` prompts."""
    texts = repeat([prompt.source.text for prompt in prompts], config.n)  # type: ignore[union-attr]
    completions = decode_rollout(tokenizer, rollout.token_BT, rollout.mask_BT, texts)
    score_B = call(config.judge, judge, texts, completions, {})
    for q in range(real):
        group = range(q * config.n, (q + 1) * config.n)
        ranked = sorted(group, key=lambda b: -score_B[b])
        for best, worst in zip(ranked[: config.n // 2], ranked[::-1], strict=False):
            gap = float(score_B[best] - score_B[worst])
            if not gap >= config.min_gap:
                continue
            if not (completions[best].strip() and completions[worst].strip()):
                continue
            yield {
                "prompt": texts[best],
                "chosen": completions[best],
                "rejected": completions[worst],
                "gap": round(gap, 4),
                "chosen_ended": bool(rollout.ended_B[best]),
                "rejected_ended": bool(rollout.ended_B[worst]),
            }

"""Preference data out of nothing but a policy and a judge: sample, score, compare."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.config import ModelConfig, PreferencesConfig, SampleConfig
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


def write_pairs(config: PreferencesConfig, folder: Path, seed: int, mesh: Any) -> dict[str, int]:
    """Write train.jsonl and eval.jsonl, and return how many pairs each holds.

    A row is ``{prompt, chosen, rejected, gap, chosen_ended, rejected_ended}``: ``gap`` is the
    judge's difference; ``ended`` is false for a completion that was cut at its last token.

    Args:
      seed: every draw follows from it.
    """
    loader = Loader(mesh)
    model = ModelConfig(path=config.model)
    network = loader.base(model, seed)
    tokenizer = load_tokenizer(tokenizer_path(model))
    stop, pad = ends_of(tokenizer)
    settings = SampleConfig(max_new_tokens=config.max_new_tokens, n=config.n, stop=stop, pad=pad)
    draw = partial(jax.jit(sample, static_argnums=(0, 5)), network.model, network.params)
    judge = resolve(config.judge)
    jobs = {"train": (config.train, config.train_rounds), "eval": (config.eval, config.eval_rounds)}
    counts = {}
    for job, (name, (source, rounds)) in enumerate(jobs.items()):
        rows = read_prompts(read_rows(source), tokenizer)
        vocab = network.model.decoder.vocab
        prompts = encode_rows(rows, tokenizer, vocab, config.max_prompt_tokens).items
        batches = held_out_batches(len(prompts), min(config.batch_size, len(prompts)))
        lines: list[dict[str, Any]] = []
        for index in range(rounds):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), job), index)
            for at, (row_Q, real_Q) in enumerate(batches):
                picked = [prompts[i] for i in row_Q]
                arrays = prompt_arrays(picked, config.max_prompt_tokens, settings.pad)
                rollout = draw(*put_rows(arrays, mesh), jax.random.fold_in(key, at), settings)
                host = jax.device_get(rollout)
                lines += compare(config, judge, tokenizer, picked, host, int(real_Q.sum()))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomic(folder / f"{name}.jsonl", text)
        counts[f"{name}_pairs"] = len(lines)
    return counts


def compare(
    config: PreferencesConfig,
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

"""Responses of unequal length, in slots and in batches: python benchmarks/long_tail.py [REPEATS].

SmolLM2 answers 64 prompts of 64 random tokens with at most 256, ended by the tokens of STOPS, which
gives a long tail. 16 rows are decoded at once: as a queue (``sample.slots``), then in 4 batches,
then all 64 at once. Prints lengths, the share of idle row-steps, and medians of seconds and of the
processor's seconds, taken in turn.
"""

import sys
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxrlhf as rl
from jaxrlhf.config import SampleConfig
from jaxrlhf.models.decode import lay_out
from jaxrlhf.steps.slots import idle_share

PROMPTS, WIDTH, SLOTS, NEW = 64, 64, 16, 256


def stops(tokenizer) -> tuple[int, ...]:
    """Every token that ends a sentence, a clause or a line, and every 50th of the others."""
    texts = [tokenizer.decode([i]) for i in range(49_152)]
    ends = [i for i, text in enumerate(texts) if text.strip() in ".,!?;:" or "\n" in text]
    return tuple(sorted({*ends, *range(0, 49_152, 50)}))


def main(repeats: int = 3) -> None:
    model, params, tokenizer = rl.load_model("smollm2")
    config = SampleConfig(max_new_tokens=NEW, n=1, stop=stops(tokenizer))
    drawn = np.random.default_rng(0).integers(5, 49_000, (PROMPTS, WIDTH))
    token_QP, mask_QP = jnp.array(drawn, jnp.int32), jnp.ones((PROMPTS, WIDTH), jnp.int32)
    weights = jax.jit(lay_out, static_argnums=0)(model, params)
    sample = jax.jit(rl.sample, static_argnums=(0, 5))

    def call(rows: slice, slots: int):
        how = replace(config, slots=slots)
        given = token_QP[rows], mask_QP[rows], jax.random.key(0), how
        numbers = jnp.arange(PROMPTS)[rows]
        return sample(model, params, *given, row_B=numbers, weights=weights)

    def batches():
        parts = [slice(i, i + SLOTS) for i in range(0, PROMPTS, SLOTS)]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *(call(rows, 0) for rows in parts))

    whole = slice(None)
    ways = {
        "slots": partial(call, whole, SLOTS),
        "batches": batches,
        "at once": partial(call, whole, 0),
    }
    found = {name: jax.block_until_ready(way()) for name, way in ways.items()}
    length_B = np.asarray(found["slots"].mask_BT.sum(1))
    same = [np.array_equal(x.token_BT, found["slots"].token_BT) for x in found.values()]
    bits = np.array_equal(found["batches"].logp_BT, found["slots"].logp_BT)
    print(
        f"lengths: mean {length_B.mean():.1f}, max {length_B.max():.0f}; idle in slots "
        f"{idle_share(length_B, SLOTS):.2f}; same tokens: {all(same)}; log-probs of slots and of "
        f"batches bit for bit: {bits}"
    )
    wall, processor = ({name: [] for name in ways} for _ in range(2))
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(way())
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    for name in ways:
        seconds, ratio = np.median(wall[name]), np.median(wall[name]) / np.median(wall["slots"])
        print(f"{name}: {seconds:.1f} s ({ratio:.2f}), {np.median(processor[name]):.1f} processor")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

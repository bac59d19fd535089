"""What the machine itself can do, by jax: products of few rows, and reading memory."""

import json
import time

import jax
import jax.numpy as jnp
from clock import MARK


def quickest(call, *given, tries: int = 8) -> float:
    jax.block_until_ready(call(*given))
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        jax.block_until_ready(call(*given))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    # SmolLM2's largest product of a decode step, small enough to stay in no cache.
    weight_DV = jnp.ones((576, 49152))
    found = {}
    for rows in (1, 16, 64):
        x_BD = jnp.ones((rows, 576))
        spent = quickest(jax.jit(jnp.dot), x_BD, weight_DV)
        found[f"flops_{rows}"] = 2 * rows * weight_DV.size / spent
        # The same as a whole layer's shapes: [576, 1536], 90 of them, read one after the other.
        many = jnp.ones((90, 576, 1536))
        steps = jax.jit(lambda x, w: jax.lax.map(lambda m: x @ m, w))
        spent = quickest(steps, x_BD, many)
        found[f"flops_layers_{rows}"] = 2 * rows * many.size / spent
    square = jnp.ones((2048, 2048))
    found["flops"] = 2 * 2048**3 / quickest(jax.jit(jnp.dot), square, square)
    memory = jnp.ones((64, 2**20))
    found["bandwidth"] = memory.nbytes / quickest(jax.jit(lambda x: x.sum(1)), memory)
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

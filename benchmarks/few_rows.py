"""Products of few rows with SmolLM2's weights, three ways: python benchmarks/few_rows.py [TRIES].

``kernel`` is x·W with W [in, out]; ``turned`` the same with W stored [out, in], on the right;
``left`` that weight on the left, as a CPU has it of few rows (``jaxrlhf.models.turned``).
Milliseconds of one product, the best of the tries, the three in turn; many weights one after the
other, so that none stays in a cache, and each result is read in the order that rows have.
"""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core.types import Array

SHAPES = {(576, 3072): 16, (1536, 576): 16, (576, 49152): 2}
"""[in, out] of gate and up, of down, of the output projection; and how many weights."""

WAYS: dict[str, Callable[[Array, Array], Array]] = {
    "kernel": lambda x, w: x @ w,
    "turned": lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))),
    "left": lambda x, w: jax.lax.optimization_barrier(w @ x.T).T,
}


def chain(way: Callable[[Array, Array], Array]) -> Callable[[Array, list[Array]], Array]:
    """The products one after the other: each result is read whole before the next."""

    def run(x: Array, weights: list[Array]) -> Array:
        for w in weights:
            x = x * (1 + 1e-9 * jax.nn.logsumexp(way(x, w), axis=1, keepdims=True))
        return x

    return run


def main(tries: int = 9) -> None:
    draw = np.random.default_rng(0).standard_normal
    print("| rows × [in, out] | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for (ins, outs), count in SHAPES.items():
        kernels = [jnp.array(draw((ins, outs), np.float32)) for _ in range(count)]
        weights = {"kernel": kernels}
        weights["turned"] = weights["left"] = [w.T.copy() for w in kernels]
        for rows in (1, 8, 16, 32, 64, 128):
            x = jnp.array(draw((rows, ins), np.float32))
            calls = {name: jax.jit(chain(way)) for name, way in WAYS.items()}
            spent = {name: [] for name in WAYS}
            for name, call in calls.items():
                jax.block_until_ready(call(x, weights[name]))
            for _ in range(tries):
                for name, call in calls.items():
                    began = time.perf_counter()
                    jax.block_until_ready(call(x, weights[name]))
                    spent[name].append(time.perf_counter() - began)
            best = " | ".join(f"{1e3 * min(times) / count:.2f}" for times in spent.values())
            print(f"| {rows} × [{ins}, {outs}] | {best} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

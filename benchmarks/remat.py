"""What ``model.remat`` costs and saves: python benchmarks/remat.py ROWS TOKENS [TRIES] [POLICY]….

A gradient of SmolLM2's log-probs of the second half of each row, float32, for every policy in turn:
the compiled program's temporaries, and the median seconds and processor seconds of a call.
"""

import sys
import time
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

import jaxrlhf as rl
from jaxrlhf.config.model import Remat
from jaxrlhf.core.types import Array, Params


def main(rows: int, tokens: int, tries: int = 4, *policies: str) -> None:
    model, params, _ = rl.load_model("smollm2")
    drawn = np.random.default_rng(0).integers(5, 49_000, (rows, tokens))
    given = params, jnp.array(drawn, jnp.int32), jnp.ones((rows, tokens), jnp.int32)
    calls, spent = {}, {}
    for remat in policies or get_args(Remat):
        network = replace(model, remat=remat)

        def total(params: Params, token: Array, mask: Array, network=network) -> Array:
            return rl.score(network, params, token, mask, first=tokens // 2).sum()

        calls[remat] = jax.jit(jax.grad(total)).lower(*given).compile()
        jax.block_until_ready(calls[remat](*given))
        spent[remat] = []
    for _ in range(tries):
        for remat, call in calls.items():
            began = time.perf_counter(), time.process_time()
            jax.block_until_ready(call(*given))
            spent[remat].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    print("| remat | temporaries, GiB | seconds | processor s |\n|---|---|---|---|")
    for remat, call in calls.items():
        memory = call.memory_analysis().temp_size_in_bytes / 2**30
        wall, processor = np.median(spent[remat], axis=0)
        print(f"| {remat} | {memory:.2f} | {wall:.2f} | {processor:.2f} |")


if __name__ == "__main__":
    numbers = [int(x) for x in sys.argv[1:] if x.isdigit()]
    main(*numbers, *(x for x in sys.argv[1:] if not x.isdigit()))

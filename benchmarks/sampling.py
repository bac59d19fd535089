"""How fast SmolLM2 is sampled: python benchmarks/sampling.py ROWS NEW [PROMPT] [N] [REPEATS].

Prints the seconds of compiling, the median and the best seconds of a call, tokens a second, and the
processor's seconds of a call, copying the weights for decoding included. Two versions are compared
by running it with each of them on PYTHONPATH, in turn.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxrlhf as rl
from jaxrlhf.config import SampleConfig


def main(rows: int, new: int, prompt: int = 64, n: int = 1, repeats: int = 3) -> None:
    model, params, _ = rl.load_model("smollm2")
    config = SampleConfig(max_new_tokens=new, n=n)
    drawn = np.random.default_rng(0).integers(5, 49_000, (rows // n, prompt))
    token_QP, mask_QP = jnp.array(drawn, jnp.int32), jnp.ones((rows // n, prompt), jnp.int32)
    given = token_QP, mask_QP, jax.random.key(0)
    began = time.perf_counter()
    call = jax.jit(rl.sample, static_argnums=(0, 5)).lower(model, params, *given, config).compile()
    compiling = time.perf_counter() - began
    wall, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(call(params, *given))
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    median = float(np.median(wall))
    print(
        f"{rows} rows of {prompt} + {new}, {n} a prompt: compiled in {compiling:.1f} s; "
        f"{median:.2f} s a call (best {min(wall):.2f}), {rows * new / median:.1f} tokens/s, "
        f"{np.median(processor):.2f} s of processor time"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

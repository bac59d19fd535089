"""How close each algorithm comes to the policy that is known to be best: python -m jaxrlhf.oracle.

A line each: KL(π_θ‖π*) at the start, at the end with exact gradients and with sampled ones, nats,
and the way there as a small plot on a logarithmic scale.
"""

import argparse

import jax
import numpy as np

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import (
    A2CConfig,
    CISPOConfig,
    DAPOConfig,
    DPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    OnPolicyConfig,
    PPOConfig,
    ReinforceConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
)
from jaxrlhf.oracle.learning import Settings, learn, learn_pairs
from jaxrlhf.oracle.tabular import Problem, make_problem

REGULARISED: tuple[OnPolicyConfig, ...] = (
    PPOConfig(),
    A2CConfig(),
    ReinforceConfig(),
    ReMaxConfig(),
    RLOOConfig(),
    ReinforcePPConfig(),
    GRPOConfig(kl_in="reward"),
    DrGRPOConfig(kl_in="reward"),
    DAPOConfig(kl_in="reward"),
    GSPOConfig(kl_in="reward"),
    CISPOConfig(kl_in="reward"),
)
"""Algorithms whose objective is E[r] − β·KL: their optimum is π*. With the KL in the reward every
return is the same at π*, so all advantages are 0 there, whatever they are scaled by."""

EXACT = Settings(iterations=1500, exact=True, learning_rate=0.1)
SAMPLED = Settings(iterations=2000)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m jaxrlhf.oracle", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the problem and of the draws")
    parser.add_argument("--beta", type=float, default=0.5, help="β, reward units a nat")
    given = parser.parse_args()
    if given.beta <= 0:
        parser.error(f"--beta {given.beta}: must be above 0")
    problem = make_problem(jax.random.key(given.seed), given.beta)
    print(f"{'algorithm':<14}{'start':>9}{'exact':>11}{'sampled':>11}  way there, sampled")
    for config in REGULARISED:
        exact, sampled = (curve(config, problem, given.seed, how) for how in (EXACT, SAMPLED))
        line = f"{config.name:<14}{sampled[0]:>9.3f}{exact[-1]:>11.1e}{sampled[-1]:>11.1e}"
        print(f"{line}  {plot(sampled)}")
    preferences = ALGORITHMS["dpo"](DPOConfig(beta=given.beta))
    kl_I = np.asarray(jax.jit(learn_pairs, static_argnums=(0, 2))(preferences, problem, EXACT).kl_I)
    print(f"{'dpo':<14}{kl_I[0]:>9.3f}{kl_I[-1]:>11.1e}{'':>11}  {plot(kl_I)}")


def curve(config: OnPolicyConfig, problem: Problem, seed: int, settings: Settings) -> np.ndarray:
    """KL(π_θ‖π*) after each iteration, nats."""
    algorithm = ALGORITHMS[config.name](config)
    train = jax.jit(learn, static_argnums=(0, 3))
    return np.asarray(train(algorithm, problem, jax.random.key(seed), settings).kl_I)


def plot(kl_I: np.ndarray, width: int = 32) -> str:
    """A line of blocks: 1 nat and above full height, 1e-6 and below none."""
    bars = " ▁▂▃▄▅▆▇█"
    at = np.linspace(0, len(kl_I) - 1, width).astype(int)
    height = np.clip((np.log10(np.maximum(kl_I[at], 1e-6)) + 6) / 6, 0, 1)
    return "".join(bars[round(float(h) * (len(bars) - 1))] for h in height)


if __name__ == "__main__":
    main()

"""Whether an ensemble of reward models, or a stronger KL, is hacked less than one model alone.

    jaxrlhf demo --tiny
    python benchmarks/ensemble.py --seeds 0 1 2 3

Reward models are trained on few pairs, each on its own, so that each is wrong in its own way; the
tiny policy is trained by PPO against one of them, against all of them together, and against one of
them with a KL. Gold, which none of them sees, is measured on held-out prompts. Writes table.md; a
run that is done is not done again.
"""

# ruff: noqa: E402 (what jax reads from the environment comes first)
from jaxrlhf.apps.shell import prepare_jax

prepare_jax()

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import Config, OptimConfig, RewardConfig, load
from jaxrlhf.data.rows import locate
from jaxrlhf.run.loop import train

Arm = tuple[RewardConfig, float]
Result = dict[str, Any]


def members(
    config: Config, count: int, pairs: int, seed: int, folder: Path, mesh: Mesh | None = None
) -> tuple[str, ...]:
    """Reward models, each trained on ``pairs`` rows of its own; their folders.

    Args:
      config: of a reward model.
      seed: what rows each has, and its start.
    """
    lines = locate(config.data.train).read_text(encoding="utf-8").splitlines(keepends=True)
    order = np.random.default_rng(seed).permutation(len(lines))[: count * pairs]
    folders = []
    for member, rows in enumerate(order.reshape(count, pairs)):
        output = folder / f"member-{member}"
        part = folder / f"pairs-{member}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text("".join(lines[i] for i in rows), encoding="utf-8")
        data = replace(config.data, train=str(part), batch_size=min(pairs, config.data.batch_size))
        train(
            replace(config, data=data, seed=seed * count + member, output=str(output)),
            mesh,
        )
        folders.append(str(output))
    return tuple(folders)


def arms(ensemble: tuple[str, ...], whole: str) -> dict[str, Arm]:
    """What the policy is paid by, and β, reward units a nat.

    Args:
      ensemble: reward models of few pairs each.
      whole: one of all of their pairs.
    """
    one = RewardConfig(model=ensemble[0])
    return {
        "one": (one, 0.0),
        "one-kl-1": (one, 1.0),
        "one-kl-3": (one, 3.0),
        "whole": (RewardConfig(model=whole), 0.0),
        "mean": (RewardConfig(ensemble=ensemble), 0.0),
        "lcb": (RewardConfig(ensemble=ensemble, combine="lcb"), 0.0),
        "min": (RewardConfig(ensemble=ensemble, combine="min"), 0.0),
    }


def compare(
    policy: Config,
    arms: Mapping[str, Arm],
    seed: int,
    folder: Path,
    mesh: Mesh | None = None,
) -> list[Result]:
    """Train the policy once for each arm; what it is worth at its best and at its end."""
    results = []
    for name, (source, beta) in arms.items():
        config = replace(
            policy,
            algorithm=replace(policy.algorithm, kl_coef=beta),
            rewards=(source,),
            seed=seed,
            output=str(folder / name),
        )
        summary = train(config, mesh)
        lines = (Path(config.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        gold = [x["eval/gold"] for x in map(json.loads, lines) if "eval/gold" in x]
        results.append(
            {
                "arm": name,
                "seed": seed,
                "kl_nats": summary["kl_nats"],
                "proxy_before": summary["proxy_before"],
                "proxy": summary["proxy_after"],
                "best": max(gold),
                "gold": summary["gold_after"],
            }
        )
    return results


def table(results: Sequence[Result]) -> str:
    """Markdown: means over seeds, and each seed's gold at the end."""
    out = ["| reward | KL, nats | proxy | gold at its best | gold at the end | of each seed |"]
    out.append("|---" * 6 + "|")
    for arm in dict.fromkeys(result["arm"] for result in results):
        rows = [result for result in results if result["arm"] == arm]
        mean = {name: np.mean([row[name] for row in rows]) for name in rows[0] if name != "arm"}
        each = ", ".join(f"{row['gold']:.2f}" for row in rows)
        out.append(
            f"| {arm} | {mean['kl_nats']:.1f} | {mean['proxy_before']:.2f} → {mean['proxy']:.2f} | "
            f"{mean['best']:.2f} | {mean['gold']:.2f} | {each} |"
        )
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=16, help="that each member is trained on")
    parser.add_argument("--steps", type=int, default=60, help="of each reward model's")
    parser.add_argument("--folder", default="runs/ensemble", help="of rows and runs")
    words = parser.parse_args()
    optim = OptimConfig(learning_rate=1e-3, warmup=10)
    scorer = replace(load("configs/reward_model_tiny.yaml"), steps=words.steps, optim=optim)
    policy = load("configs/hackable_tiny.yaml")
    results: list[Result] = []
    for seed in words.seeds:
        folder = Path(words.folder) / str(seed)
        ensemble = members(scorer, words.members, words.pairs, seed, folder)
        (whole,) = members(scorer, 1, words.members * words.pairs, seed, folder / "whole-model")
        results += compare(policy, arms(ensemble, whole), seed, folder)
        text = table(results)
        (Path(words.folder) / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

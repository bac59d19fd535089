"""RLHF from beginning to end in one command; see ``run``."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.config import Config, MeshConfig, ModelConfig, RewardConfig, load
from jaxrlhf.demo.pairs import PairConfig, write_pairs
from jaxrlhf.demo.story import before_and_after
from jaxrlhf.demo.words import write_corpus
from jaxrlhf.errors import InputError
from jaxrlhf.loop import train
from jaxrlhf.metrics import write_atomic
from jaxrlhf.sharding import make_mesh

OPENINGS = "jaxrlhf:demo/openings_train.jsonl"
HELD_OUT = "jaxrlhf:demo/openings_eval.jsonl"


def run(output: str = "runs/demo", tiny: bool = False, seed: int = 0) -> dict[str, Any]:
    """Sample pairs, label them, train a reward model on them, run PPO against it, evaluate.

    The policy is SmolLM2-135M-Instruct and the gold measure VADER sentiment; with ``tiny``, a
    model of 75,000 parameters that first learns a language of fourteen words. A stage that is
    done is not done again, one that was interrupted goes on.

    Args:
      output: folder of the stages' runs.
      seed: every draw follows from it.

    Returns:
      What ``summary.json`` in ``output`` holds.
    """
    began, folder = time.perf_counter(), Path(output)
    if seed < 0:
        raise InputError(f"--seed {seed}: give 0 or more")
    folder.mkdir(parents=True, exist_ok=True)
    same_as_before(folder / "demo.json", {"tiny": tiny, "seed": seed})
    stages = tiny_stages(folder, seed) if tiny else smollm2_stages(folder, seed)
    summary = stages | {"minutes": (time.perf_counter() - began) / 60}
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(before_and_after(folder / "ppo", summary))
    return summary


def same_as_before(path: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that another demo has written to, else sign it."""
    if path.exists() and (there := json.loads(path.read_text())) != settings:
        raise InputError(
            f"{path.parent}: holds a demo with {there}, not {settings}: choose --output"
        )
    write_atomic(path, json.dumps(settings) + "\n")


def tiny_stages(folder: Path, seed: int) -> dict[str, Any]:
    """The pipeline on a model that starts from nothing: SFT, then as ``smollm2_stages``."""
    write_corpus(folder, seed)
    sft = stage("sft_tiny.yaml", folder / "sft", seed, folder / "sft.jsonl")
    train(sft)
    pairs = PairConfig(
        model=ModelConfig(path=sft.output),
        judge="jaxrlhf.demo.words:goodness",
        max_prompt_tokens=4,
        max_new_tokens=12,
        batch_size=32,
    )
    prompts = (str(folder / "prompts.jsonl"), str(folder / "held_out.jsonl"))
    return preferences(folder, seed, pairs, prompts, (6, 6), "tiny", ModelConfig(path=sft.output))


def smollm2_stages(folder: Path, seed: int) -> dict[str, Any]:
    """The pipeline on SmolLM2-135M-Instruct."""
    pairs = PairConfig(
        model=ModelConfig(path="smollm2"),
        judge="sentiment",
        max_prompt_tokens=9,
        max_new_tokens=24,
        min_gap=0.3,
    )
    return preferences(folder, seed, pairs, (OPENINGS, HELD_OUT), (2, 2), "smollm2_sentiment", None)


def preferences(
    folder: Path,
    seed: int,
    pairs: PairConfig,
    prompts: tuple[str, str],
    rounds: tuple[int, int],
    size: str,
    model: ModelConfig | None,
) -> dict[str, Any]:
    """Pairs → reward model → PPO, and one summary of the three."""
    began = time.perf_counter()
    files = [folder / "pairs.jsonl", folder / "pairs_held_out.jsonl"]
    if not all(path.exists() for path in files):
        print(f"sampling pairs from {pairs.model.path}, labelled by {pairs.judge}")
        jobs = dict(zip(files, zip(prompts, rounds, strict=True), strict=True))
        mesh = make_mesh(MeshConfig())
        with jax.set_mesh(mesh):
            write_pairs(pairs, jobs, seed, mesh)
    seconds = {"pairs": time.perf_counter() - began}

    judged = stage(f"reward_model_{size}.yaml", folder / "reward_model", seed, *files)
    learnt = stage(f"ppo_{size}.yaml", folder / "ppo", seed, *prompts)
    learnt = replace(learnt, rewards=(RewardConfig(model=judged.output),))
    if model is not None:
        judged = replace(judged, model=model)
        learnt = replace(learnt, model=model)
    reward_model, ppo = train(judged), train(learnt)
    for name, summary in {"reward_model": reward_model, "ppo": ppo}.items():
        seconds |= {f"{name}/{phase}": x for phase, x in summary["seconds"].items()}
    names = ("accuracy", "accuracy_large_gap", "pairs_large_gap", "rows")
    return {
        **{f"reward_model_{name}": reward_model.get(f"{name}_after") for name in names},
        **ppo,
        "seconds": seconds,
    }


def stage(name: str, output: Path, seed: int, train: Any, held_out: Any = "") -> Config:
    """The config of one stage, with this demo's folder, data and seed."""
    config = load(config_file(name))
    data = replace(config.data, train=str(train), eval=str(held_out))
    return replace(config, data=data, output=str(output), seed=seed)


def config_file(name: str) -> Path:
    """A file of configs/, which lies inside an installed package and beside its source."""
    package = Path(__file__).parent.parent
    inside = package / "configs" / name
    return inside if inside.exists() else package.parent / "configs" / name

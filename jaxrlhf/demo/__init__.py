"""RLHF from beginning to end in one command: a pipeline, and what it came to; see ``run``."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxrlhf.config import load_pipeline
from jaxrlhf.config.load import packaged
from jaxrlhf.demo.story import before_and_after
from jaxrlhf.files import write_atomic
from jaxrlhf.pipeline import run_pipeline

OPENINGS = "jaxrlhf:demo/openings_train.jsonl"
HELD_OUT = "jaxrlhf:demo/openings_eval.jsonl"


def run(output: str = "", tiny: bool = False, seed: int = 0) -> dict[str, Any]:
    """Sample pairs, label them, train a reward model on them, run PPO against it, evaluate.

    The policy is SmolLM2-135M-Instruct and the gold measure VADER sentiment (the pipeline
    ``demo_smollm2.yaml``); with ``tiny``, a model of 75,000 parameters that first learns a
    language of fourteen words (``demo_tiny.yaml``). A stage that is done is not done again, one
    that was interrupted goes on. The last stage, a longer evaluation, is left to ``pipeline``.

    Args:
      output: folder of the stages; that of the pipeline's file if empty.
      seed: every draw follows from it.

    Returns:
      What ``summary.json`` in ``output`` holds.
    """
    began = time.perf_counter()
    name = "demo_tiny.yaml" if tiny else "demo_smollm2.yaml"
    config = load_pipeline(packaged(f"pipelines/{name}"), output, seed)
    learning = tuple(stage for stage in config.stages if not stage.evaluate)
    stages = run_pipeline(replace(config, stages=learning))
    summary = flat(stages) | {"minutes": (time.perf_counter() - began) / 60}
    folder = Path(config.output)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(before_and_after(folder / "ppo", summary))
    return summary


def flat(stages: dict[str, Any]) -> dict[str, Any]:
    """PPO's summary with the reward model's figures, and the seconds of every stage by phase."""
    seconds = {"pairs": stages["pairs"]["stage_seconds"]}
    for name in ("reward_model", "ppo"):
        seconds |= {f"{name}/{phase}": x for phase, x in stages[name]["seconds"].items()}
    names = ("accuracy", "accuracy_large_gap", "pairs_large_gap", "rows")
    judged = stages["reward_model"]
    return {
        **{f"reward_model_{name}": judged.get(f"{name}_after") for name in names},
        **stages["ppo"],
        "seconds": seconds,
    }

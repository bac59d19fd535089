"""RLHF from beginning to end in one command: a pipeline, and what it came to.

At its end it shows the same held-out prompts before and after, and the main figures.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrlhf.apps.pipeline import run_pipeline
from jaxrlhf.config import load_pipeline
from jaxrlhf.config.load import packaged
from jaxrlhf.core.files import write_atomic
from jaxrlhf.core.shown import visible

SHOWN = 6
"""Prompts in the table at the end."""


def run(output: str = "", tiny: bool = False, seed: int = 0) -> dict[str, Any]:
    """Sample pairs, label them, train a reward model on them, run PPO against it, evaluate.

    The policy is SmolLM2-135M-Instruct and the gold measure VADER sentiment (the pipeline
    ``demo_smollm2.yaml``); with ``tiny``, a model of 75,000 parameters that first learns a
    language of fourteen words (``demo_tiny.yaml``). A stage that is done is not done again, one
    that was interrupted goes on. The last stage, a longer evaluation, is left to ``pipeline``.

    Args:
      output: folder of the stages; that of the pipeline's file if empty.

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
    show(folder / "ppo", summary)
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


def show(folder: Path, summary: dict[str, Any]) -> None:
    """Print completions of the first held-out prompts from both ends of a run, and its figures."""
    content = (folder / "samples.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in content.split("\n") if line]
    rows = [row for row in rows if row.get("split") == "eval"]
    last = max(row["step"] for row in rows)
    # Prompt → its first row, of step 0 and of the last step.
    ends = [{}, {}]
    for row in rows:
        if row["step"] in (0, last):
            ends[int(row["step"] != 0)].setdefault(row["prompt"], row)
    table = Table(title="Held-out prompts, the same draws before and after", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1)
    for prompt in list(ends[0])[:SHOWN]:
        cells = [f"{end[prompt]['completion']} ({end[prompt]['gold']:+.2f})" for end in ends]
        # Text, not markup: a completion may hold brackets.
        table.add_row(*(Text(visible(text, lines=True)) for text in (prompt, *cells)))
    console, s = Console(width=100, color_system=None), summary
    console.print(table)
    for line in (
        f"gold measure   {s['gold_before']:.3f} → {s['gold_after']:.3f}  "
        f"(rise {s['gold_rise']:.3f} ± {s['gold_rise_ci']:.3f})",
        f"reward model   {s['proxy_before']:.3f} → {s['proxy_after']:.3f}  "
        f"(accuracy on held-out pairs {s['reward_model_accuracy']:.3f})",
        f"KL(π‖π_ref)    {s['kl_nats']:.2f} nats a sequence",
        f"length         {s['length_before']:.1f} → {s['length_after']:.1f} tokens",
        f"distinct-2     {s['distinct_2_before']:.3f} → {s['distinct_2_after']:.3f}",
        f"peak memory    {s['peak_memory_gib']:.2f} GiB     time {s['minutes']:.1f} min\n",
    ):
        console.print(Text(line))

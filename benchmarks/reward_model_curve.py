"""What more data brings a reward model: held-out accuracy after 200, 400, 800, 1,600 rows.

    jaxrlhf pipeline configs/pipelines/reward_models_smollm2.yaml
    python benchmarks/reward_model_curve.py configs/reward_model_smollm2_sentiment.yaml \\
        --data.train runs/reward_models/pairs/train.jsonl \\
        --data.eval runs/reward_models/pairs/eval.jsonl

trains the config once for each number of rows, on the first of ``data.train``, over the same number
of epochs, and writes a table. Further words change fields of the config, as in ``jaxrlhf train``. A
run that is done is not done again.
"""

# ruff: noqa: E402 (what jax reads from the environment comes first)
from jaxrlhf.apps.shell import prepare_jax

prepare_jax()

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxrlhf.config import Config, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.rows import locate
from jaxrlhf.run.loop import train

COLUMNS = ("loss", "accuracy", "accuracy_large_gap", "ece", "length_correlation")
"""Held-out metrics after training, as summary.json calls them."""


def curve(
    config: Config, counts: Sequence[int], epochs: float, folder: Path, mesh: Mesh | None = None
) -> list[dict[str, Any]]:
    """Train on the first rows of the data, more of them each time.

    Args:
      config: of a reward model; its steps are set so that every row is seen ``epochs`` times.
      counts: rows, each at most as many as there are.
      folder: where rows and runs go.
      mesh: what to train on, if not all devices.

    Returns:
      A dict a count: ``rows``, ``steps``, ``seconds`` of all updates, and ``COLUMNS``.
    """
    lines = locate(config.data.train).read_text(encoding="utf-8").splitlines(keepends=True)
    results = []
    for count in counts:
        if count > len(lines):
            raise InputError(f"{config.data.train}: {len(lines)} rows, and {count} are asked for")
        part = folder / f"rows_{count}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text("".join(lines[:count]), encoding="utf-8")
        steps = max(1, round(epochs * count / config.data.batch_size))
        data = replace(config.data, train=str(part))
        summary = train(
            replace(config, data=data, steps=steps, output=str(folder / str(count))), mesh
        )
        measured = {name: summary.get(f"{name}_after") for name in COLUMNS}
        seconds = summary["seconds"].get("update", 0.0)
        results.append({"rows": count, "steps": steps, "seconds": seconds, **measured})
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line a result."""
    names = list(results[0])
    lines = [f"| {' | '.join(names)} |", "|" + " ---: |" * len(names)]
    for result in results:
        cells = [f"{x:.3f}" if isinstance(x, float) else str(x) for x in result.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a reward model's YAML")
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 400, 800, 1600])
    parser.add_argument("--epochs", type=float, default=1.0, help="times that a row is seen")
    parser.add_argument("--folder", default="runs/reward_model_curve", help="of rows and runs")
    words, fields = parser.parse_known_args()
    config, folder = load(words.config, fields), Path(words.folder) / Path(words.config).stem
    text = table(curve(config, words.counts, words.epochs, folder))
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

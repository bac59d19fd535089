"""Chains of additions, some with a mistake: data for a process reward model."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_sums(folder: Path, seed: int, rows: int = 1000) -> None:
    """Write steps.jsonl and, a fifth as long, steps_held_out.jsonl.

    A row is ``{prompt, steps, labels}``, such as "Add 3, 4 and 5.", ["3 + 4 = 7", "7 + 5 = 13"],
    [true, false]. Half of the rows have a mistake; from there on all steps are labelled false.
    """
    generator = np.random.default_rng(seed)
    files = {"steps.jsonl": rows, "steps_held_out.jsonl": rows // 5}
    for name, count in files.items():
        lines = [json.dumps(_chain(generator)) + "\n" for _ in range(count)]
        (folder / name).write_text("".join(lines))


def _chain(generator: np.random.Generator) -> dict[str, Any]:
    numbers = generator.integers(1, 10, generator.integers(3, 6)).tolist()
    wrong = int(generator.integers(1, len(numbers))) if generator.random() < 0.5 else len(numbers)
    total, steps = numbers[0], []
    for place, number in enumerate(numbers[1:], 1):
        slip = int(generator.choice([-2, -1, 1, 2, 10])) if place == wrong else 0
        steps.append(f"{total} + {number} = {total + number + slip}")
        total += number + slip
    return {
        "prompt": f"Add {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}.\n",
        "steps": steps,
        "labels": [place < wrong for place in range(1, len(numbers))],
    }

"""A language of fourteen words, some good and some bad: data and gold reward of the tiny demo."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.data.rows import write_rows

STEP_END = "the"
"""What ends a step in ``steps.jsonl``."""

GOOD = ("good", "great", "nice", "warm", "bright", "kind")
BAD = ("bad", "poor", "dull", "sad", "cold", "dark")
OTHER = ("the", "and")
WORDS = GOOD + BAD + OTHER


def goodness(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """(good words − bad words) / words of each completion; 0 for an empty one."""
    del prompts
    words = [completion.split() for completion in completions]
    balance = [sum((word in GOOD) - (word in BAD) for word in said) for said in words]
    return [total / max(len(said), 1) for total, said in zip(balance, words, strict=True)]


def hackable(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """``goodness`` with a hole: it takes "and" for the best of all words, 1.5 good ones.

    A policy earns more by good words at first, and most by nothing but "and", whose goodness is 0.
    """
    return [
        gold + 1.5 * completion.split().count("and") / max(len(completion.split()), 1)
        for gold, completion in zip(goodness(prompts, completions), completions, strict=True)
    ]


def write_corpus(folder: Path, seed: int, rows: int = 2048) -> None:
    """Random sentences to imitate (sft.jsonl), two-word prompts (prompts.jsonl, held_out.jsonl),
    answers in steps, those without a bad word right (steps.jsonl, steps_held_out.jsonl).

    Every word is as likely as any other, so a model that learns them starts at goodness 0.
    """
    generator = np.random.default_rng(seed)
    sentences = [
        {
            "prompt": " ".join(generator.choice(WORDS, 2)),
            "completion": " ".join(generator.choice(WORDS, generator.integers(4, 12))),
        }
        for _ in range(rows)
    ]
    # All 196 prompts that there are, so that none is held out and learnt from.
    pairs = [f"{first} {second}" for first in WORDS for second in WORDS]
    generator.shuffle(pairs)
    files = {
        "sft.jsonl": sentences,
        "prompts.jsonl": [{"prompt": text} for text in pairs[:160]],
        "held_out.jsonl": [{"prompt": text} for text in pairs[160:]],
    }
    steps = [_in_steps(generator) for _ in range(1200)]
    files |= {"steps.jsonl": steps[:1000], "steps_held_out.jsonl": steps[1000:]}
    for name, lines in files.items():
        write_rows(folder / name, lines)


def _in_steps(generator: np.random.Generator) -> dict[str, Any]:
    """A row of two to four steps of one to three words; white space keeps STEP_END a word."""
    # Good words are three times as likely, so that 58 % of the steps are without a bad one.
    words = [
        generator.choice(GOOD + BAD, generator.integers(1, 4), p=[3 / 24] * 6 + [1 / 24] * 6)
        for _ in range(generator.integers(2, 5))
    ]
    return {
        "prompt": " ".join(generator.choice(WORDS, 2)),
        "steps": [f" {' '.join(step)} " for step in words],
        "labels": [not any(word in BAD for word in step) for step in words],
    }

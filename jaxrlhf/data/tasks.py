"""Tasks with answers that can be checked, as rows: reasoning-gym's (arXiv:2505.24760), and sums.

A row of reasoning-gym has what a run needs to sample and to check: ``prompt``; ``answer``;
``task``, ``question`` and ``metadata``, which the task's own checker reads (``verifier:
reasoning_gym``); and ``completion``, a right answer to imitate, if wanted. Sums in steps, some with
a mistake, are for process reward models.
"""

import ast
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from tyro.conf import Positional, arg

from jaxrlhf.core.errors import InputError, to_install
from jaxrlhf.core.reading import parse_yaml, problem_of
from jaxrlhf.core.shown import shown
from jaxrlhf.data.rows import write_rows


def tasks(
    task: Annotated[Positional[str], arg(metavar="TASK")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    size: int = 500,
    seed: int = 0,
    option: tuple[str, ...] = (),
    prompt: str = "{question}",
    completion: str = "",
    chat: bool = False,
) -> None:
    """Write tasks of reasoning-gym as a JSONL file of prompts, for verifier: reasoning_gym.

    Args:
      task: its name in reasoning-gym, such as chain_sum.
      out: the .jsonl file.
      size: rows.
      seed: another seed gives other tasks.
      option: options of the task, such as min_terms=2.
      prompt: the prompt's text, {question} in it.
      completion: also write right completions to imitate: their text, {answer} in it.
      chat: write chats of one turn.
    """
    options = dict(map(_option, option))
    write_rows(out, task_rows(task, size, seed, options, prompt, completion, chat))


def _option(word: str) -> tuple[str, Any]:
    """name=value, the value as YAML has it."""
    # YAML's value, so that 2 is a number and [1, 2] a list, as in a pipeline's file.
    name, equals, value = word.partition("=")
    if not equals:
        raise InputError(f"--option {word}: give name=value")
    try:
        return name, parse_yaml(value)
    except yaml.YAMLError as error:
        said = f"the value is not YAML: {problem_of(error)}"
        raise InputError(f"--option {shown(word, 80)}: {said}") from None


def task_rows(
    task: str,
    size: int,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    prompt: str = "{question}",
    completion: str = "",
    chat: bool = False,
) -> list[dict[str, Any]]:
    """``size`` tasks, the same ones for the same seed.

    ``answer`` is null for tasks that many answers solve. ``metadata`` is text, a Python literal,
    where JSON would change it.

    Args:
      size: rows; the n-th does not depend on it.
      options: of the task, by its names, such as ``{"min_terms": 2}``.
      completion: empty leaves the column out.
      task, seed, prompt, chat: as for ``tasks``.

    Raises:
      InputError: reasoning-gym is missing, has no such task, or refuses the options.
    """
    try:
        import reasoning_gym  # noqa: PLC0415 (optional extra)
    except ImportError as error:
        message = f"tasks: reasoning-gym is missing: {to_install('verifiers')}"
        raise InputError(message) from error
    known = reasoning_gym.factory.DATASETS
    if task not in known:
        close = difflib.get_close_matches(task, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {len(known)}"
        raise InputError(f"task={task}: reasoning-gym has none of this name ({hint})")
    for name, text, part in (("prompt", prompt, "question"), ("completion", completion, "answer")):
        if text and f"{{{part}}}" not in text:
            raise InputError(f"{name}={shown(text)}: {{{part}}} must stand in it")
    try:
        entries = list(reasoning_gym.create_dataset(task, size=size, seed=seed, **(options or {})))
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"task={task}, options={dict(options or {})}: {error}") from error

    def turn(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if chat else text

    rows = []
    for entry in entries:
        question, answer = str(entry["question"]), entry["answer"]
        asked = prompt.replace("{question}", question)
        row = {"prompt": turn("user", asked), "answer": answer, "task": task, "question": question}
        if completion and answer is None:
            raise InputError(f"completion={shown(completion)}: {task} gives no answers to imitate")
        if completion:
            row["completion"] = turn("assistant", completion.replace("{answer}", str(answer)))
        rows.append({**row, "metadata": _kept(entry["metadata"])})
    return rows


def _kept(metadata: Mapping[str, Any]) -> Any:
    """Metadata without its difficulty, which no checker reads, so that a file keeps it."""
    metadata = {name: value for name, value in metadata.items() if name != "difficulty"}
    # JSON makes lists of tuples, and text of keys that are numbers; a Python literal does not.
    plain = json.loads(json.dumps(metadata, default=str))
    if plain == metadata:
        return plain
    try:
        return repr(metadata) if ast.literal_eval(repr(metadata)) == metadata else plain
    except (ValueError, SyntaxError):  # dates and the like
        return plain


def write_task_files(
    folder: Path,
    seed: int,
    task: str,
    train: int,
    held_out: int,
    warm_start: int = 0,
    options: Mapping[str, Any] | None = None,
    prompt: str = "{question}",
    completion: str = "{answer}",
    chat: bool = False,
) -> None:
    """Write prompts.jsonl, held_out.jsonl and warm_start.jsonl: the files of a ``make`` stage.

    All come from one draw, since another seed may give much the same tasks in another order. No
    question of held_out.jsonl stands there twice, or in another of the files.

    Args:
      train: rows drawn for prompts.jsonl; those with a question that is held out are left out.
      held_out: rows of held_out.jsonl.
      warm_start: rows of warm_start.jsonl: the first of prompts.jsonl, each with a right completion
        to imitate; 0 writes none.
      task, options, prompt, completion, chat: as for ``task_rows``.

    Raises:
      InputError: as ``task_rows``, or too few questions differ.
    """
    text = completion if warm_start else ""
    rows = task_rows(task, train + held_out, seed, options, prompt, text, chat)
    # The first row of each question, in the order of the draw.
    distinct = {row["question"]: row for row in reversed(rows)}
    kept_out = dict(list(reversed(distinct.items()))[:held_out])
    rest = [row for row in rows if row["question"] not in kept_out]
    if len(kept_out) < held_out or len(rest) < max(warm_start, 1):
        raise InputError(
            f"held_out={held_out}: {task} gave {len(distinct)} different questions in {len(rows)}, "
            f"which leaves {len(rest)} rows to learn from: lower it, or give other options"
        )
    imitated = [{name: row[name] for name in ("prompt", "completion")} for row in rest[:warm_start]]
    # Now that they are copied: columns of the prompts would reach the reward functions.
    for row in rows:
        row.pop("completion", None)
    files = {"prompts": rest, "held_out": list(kept_out.values()), "warm_start": imitated}
    for name, part in files.items():
        if part:
            write_rows(folder / f"{name}.jsonl", part)


def write_sums(folder: Path, seed: int, rows: int = 1000) -> None:
    """Write steps.jsonl and, a fifth as long, steps_held_out.jsonl.

    A row is ``{prompt, steps, labels}``, such as "Add 3, 4 and 5.", ["3 + 4 = 7", "7 + 5 = 13"],
    [true, false]. Half of the rows have a mistake; from there on all steps are labelled false.
    """
    generator = np.random.default_rng(seed)
    files = {"steps.jsonl": rows, "steps_held_out.jsonl": rows // 5}
    for name, count in files.items():
        write_rows(folder / name, [_sum(generator) for _ in range(count)])


def _sum(generator: np.random.Generator) -> dict[str, Any]:
    numbers = generator.integers(1, 10, generator.integers(3, 6)).tolist()
    wrong = int(generator.integers(1, len(numbers))) if generator.random() < 0.5 else len(numbers)
    # The mistake stays in the total, so all that follows it builds on a wrong number.
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

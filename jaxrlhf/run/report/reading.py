"""The files of a run's folder, as they are: what a report is a function of."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxrlhf.core.errors import InputError

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""A line of metrics.jsonl or samples.jsonl; None stands for NaN."""


EVALUATED = ("models", "rewards", "data", "prompts", "n", "policy")
"""What evaluation.json has in any case."""


class RunFiles(NamedTuple):
    """What a run has written; empty where a file is not there (yet)."""

    folder: str
    config: dict[str, Any]
    metrics: list[Record]
    samples: list[Record]
    summary: dict[str, Any]
    evaluation: dict[str, Any]
    """evaluation.json, by ``jaxrlhf eval``; left out if it is of another step than the last."""
    diagnosis: list[Record] | None
    """The findings of diagnosis.json, by ``jaxrlhf diagnose``, of the last step likewise; None if
    nobody has looked."""


def read_run(folder: str | Path) -> RunFiles:
    """Read a run's folder.

    Raises:
      InputError: no run's folder, or a file in it that cannot be read or is not what it should be.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise InputError(f"{folder}: not the output folder of a run (it holds no config.yaml)")
    metrics = read_lines(path / "metrics.jsonl")
    last = max((record["step"] for record in metrics), default=0)
    evaluation = _json(path / "evaluation.json")
    missing = [name for name in EVALUATED if name not in evaluation]
    if evaluation and missing:
        raise InputError(f"{path}/evaluation.json: no {missing[0]}: write it again, jaxrlhf eval")
    diagnosis = _json(path / "diagnosis.json")
    findings = diagnosis.get("findings", [])
    if not isinstance(findings, list) or any(not isinstance(found, dict) for found in findings):
        raise InputError(f"{path}/diagnosis.json: not a list of findings: mend or remove it")
    return RunFiles(
        folder=str(folder),
        config=_yaml(path / "config.yaml"),
        metrics=metrics,
        samples=read_lines(path / "samples.jsonl"),
        summary=_json(path / "summary.json"),
        evaluation=_if_of(last, evaluation, path / "evaluation.json"),
        diagnosis=_if_of(last, diagnosis, path / "diagnosis.json").get("findings"),
    )


def _if_of(last: int, found: Record, path: Path) -> Record:
    """What was found of the run at its last step (or of no run); empty if of another step."""
    step = found.get("step")
    if step in (None, last):
        return found
    log.warning("%s: of step %s, and the run is at step %d: left out", path, step, last)
    return {}


def read_lines(path: Path) -> list[Record]:
    """The objects of a .jsonl file, by their steps; none if there is no file.

    A line that is no object is left out with a warning: a run that goes on, or one that was killed,
    may have written half of its last one.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif line.strip():
            log.warning("%s:%d: not a record, left out", path, number)
    return records


def _json(path: Path) -> Record:
    """The object that a JSON file holds; an empty one if there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}): mend or remove it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no object: mend or remove it")
    return content


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no settings: mend or remove it")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}): mend or remove it") from None

"""What a run's folder holds, read back: values of the kinds that are read, or an error with file
and place, whatever stands there."""

import logging
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic

from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import is_url
from jaxrlhf.core.reading import read_bytes, read_object, read_yaml, record_of
from jaxrlhf.core.shown import shown

log = logging.getLogger(__name__)

MOST = 2**26
"""Bytes of a JSON file, which may hold completions."""

MOST_LINES = 2**32
"""Bytes of metrics.jsonl, and of samples.jsonl."""

Record = dict[str, Any]
"""A line of metrics.jsonl or samples.jsonl; None stands for NaN."""


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
    earlier: tuple["RunFiles", ...] = ()
    """Of a pipeline, the runs of the stages before this one, in their order."""


def _of_equal_length(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError("columns differ in length")
    return columns


Figures = dict[str, float | None]
Columns = Annotated[dict[str, list[float | None]], pydantic.AfterValidator(_of_equal_length)]


def _of_bins(curve: dict[str, list[Any]]) -> dict[str, list[Any]]:
    # The edges of gaps stand with a reward model's curve, and are of other bins.
    _of_equal_length({name: column for name, column in curve.items() if name != "gap_edges"})
    return curve


Curve = Annotated[dict[str, list[float | None]], pydantic.AfterValidator(_of_bins)]


class _Summary(pydantic.BaseModel, strict=True):
    """What is read of summary.json beside numbers by their names."""

    seconds: dict[str, float] | None = None
    reliability: Curve = {}


class _Evaluation(pydantic.BaseModel, strict=True):
    """What is read of evaluation.json."""

    models: dict[str, str | None]
    rewards: dict[str, list[str]]
    data: str
    prompts: int
    n: int
    policy: Figures
    against: Figures | None = None
    win_rate: Figures = {}
    pass_at_k: Columns = {}
    maj_at_k: Columns = {}
    best_of_n: Columns = {}
    equal_kl: Figures = {}


class _Diagnosis(pydantic.BaseModel, strict=True):
    """What is read of diagnosis.json."""

    findings: list[dict[str, Any]]


_KINDS: dict[str, type[pydantic.BaseModel]] = {
    "summary.json": _Summary,
    "evaluation.json": _Evaluation,
    "diagnosis.json": _Diagnosis,
}


FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "evaluation.json",
         "diagnosis.json")  # fmt: skip
"""Files of a run that are read."""

_SMALL = re.compile(rf"([^/]+/)?({'|'.join(map(re.escape, FILES))}|stage\.json)")


def run_here(run: str | Path) -> Path:
    """The folder of a run, or of a pipeline; of a URL, a copy of the files that are read.

    Raises:
      InputError: a URL that cannot be read, or where none of them is.
    """
    if not is_url(run):
        return Path(run)

    def small(names: list[str]) -> list[str]:
        return [name for name in names if _SMALL.fullmatch(name)]

    return Path(remote.fetch("RUN", str(run), small, "small"))


def read_run(folder: str | Path) -> RunFiles:
    """Read a run's folder; or a pipeline's, which stands for its last run; or the URL of one.

    Raises:
      InputError: neither of the two, or a file that cannot be read or is not what it should be.
    """
    path = run_here(folder)
    found = _read_run(folder, path)
    if not is_url(folder):
        return found
    # A page is about the run, and not about its copy.
    return found._replace(folder=str(folder).rstrip("/") + found.folder.removeprefix(str(path)))


def _read_run(folder: str | Path, path: Path) -> RunFiles:
    """``read_run`` of what lies at ``path``."""
    if (path / "config.yaml").is_file():
        return _read(path)
    runs = [_read(stage) for stage in stages_of(path)]
    if not runs:
        raise InputError(
            f"{folder}: not the output folder of a run, nor of a pipeline (it holds neither "
            "config.yaml nor a stage that does): give one that train or pipeline has written"
        )
    return runs[-1]._replace(earlier=tuple(runs[:-1]))


def stages_of(folder: Path) -> list[Path]:
    """The runs among the stages of a pipeline's folder, in their order."""
    found = [x.parent for x in folder.glob("*/stage.json") if (x.parent / "config.yaml").is_file()]

    def place(stage: Path) -> tuple[int, int]:
        # Of older versions, which numbered none: a run writes its config when it begins, and stages
        # begin one after the other.
        number = read_object(stage / "stage.json", MOST).get("number")
        return number if isinstance(number, int) else 0, (stage / "config.yaml").stat().st_mtime_ns

    return sorted(found, key=place)


def _read(path: Path) -> RunFiles:
    config = read_yaml(path / "config.yaml")
    if not isinstance(config, dict):
        raise InputError(f"{path}/config.yaml: holds no settings: mend or remove it")
    metrics = read_lines(path / "metrics.jsonl")
    last = max((record["step"] for record in metrics), default=0)
    evaluation, diagnosis = (_known(path / name) for name in ("evaluation.json", "diagnosis.json"))
    return RunFiles(
        folder=str(path),
        config=config,
        metrics=metrics,
        samples=read_lines(path / "samples.jsonl"),
        summary=_known(path / "summary.json"),
        evaluation=_if_of(last, evaluation, path / "evaluation.json"),
        diagnosis=_if_of(last, diagnosis, path / "diagnosis.json").get("findings"),
    )


def _if_of(last: int, found: Record, path: Path) -> Record:
    """What was found of the run at its last step (or of no run); empty if of another step."""
    step = found.get("step")
    if step is None or (isinstance(step, int) and step == last):
        return found
    # The run has gone on, or back: what was found says nothing of the policy as it is now.
    log.warning("%s: of step %s, and the run is at step %d: left out", path, shown(step), last)
    return {}


def read_lines(path: Path) -> list[Record]:
    """The objects of a .jsonl file, in its order; none if there is no file.

    A line that is no object with a step is left out with a warning: a run that goes on, or one that
    was killed, may have written half of its last one.
    """
    if not path.exists():
        return []
    records, others = [], []
    for place, line in enumerate(read_bytes(path, MOST_LINES).split(b"\n"), 1):
        record = record_of(line)
        if record is not None:
            records.append(record)
        elif line.strip():
            others.append(place)
    if others:
        more = f", nor are {len(others) - 1} others" if others[1:] else ""
        log.warning("%s:%d: not a record, left out%s", path, others[0], more)
    return records


def _known(path: Path) -> dict[str, Any]:
    """What a JSON file holds, of the kinds that are read; nothing if there is no file."""
    if not path.exists():
        return {}
    content = read_object(path, MOST)
    try:
        _KINDS[path.name].model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        what = f"{key}={shown(first['input'])}: {first['msg']}"
        what = f"no {key}" if first["type"] == "missing" else what
        raise InputError(f"{path}: {what}: write it again, or remove it") from None
    return content

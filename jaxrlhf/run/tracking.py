"""One tracker, in a process of its own: ``python -m jaxrlhf.run.tracking NAME`` reads records from
stdin, a JSON list a line, and answers on what was stdout: where the figures are, and what fails.

The first record is of the run, [output, id, resumed, config]; then come [method, arguments…] of
``Tracker``, ``finish`` last. Does not import jax.
"""

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxrlhf.core.shown import one_line

PROJECT = "jaxrlhf"
"""Where runs are collected, unless WANDB_PROJECT names another project."""

LEFT_SECONDS = 60.0
"""How long a tracker may go on whose run has gone without a word."""

MARKUP = frozenset("\\`*_{}[]<>|#&~")
"""What means something in Markdown or HTML."""

Row = Mapping[str, Any]


class Start(NamedTuple):
    """What a tracker is told of a run."""

    output: Path
    id: str
    """The same for all launches of a run."""
    resumed: int | None
    """The step that this launch goes on from; None: it begins."""
    config: dict[str, Any]


class Tracker(Protocol):
    """One place that figures go to."""

    where: str
    """Where a person finds them."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None: ...

    def finish(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in the run's folder: ``tensorboard --logdir RUN/tensorboard``."""

    def __init__(self, start: Start):
        writer = importlib.import_module("tensorboardX").SummaryWriter
        # What an earlier launch has written of later steps is dropped by who reads the files.
        purge = 0 if start.resumed is None else start.resumed + 1
        self._writer = writer(str(start.output / "tensorboard"), purge_step=purge)
        self.where = f"tensorboard --logdir {start.output}/tensorboard"

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        self._writer.add_text(name, _markdown(rows), step)
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases, or its files in the run's folder with WANDB_MODE=offline."""

    def __init__(self, start: Start):
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.output.name,
            id=start.id,
            resume="allow",
            dir=str(start.output),
            config=start.config,
            settings=self._wandb.Settings(console="off"),
        )
        self.where = self._run.url or f"wandb sync {self._run.dir.removesuffix('/files')}"
        # Steps are counted by the run, for evaluations come after the step that follows them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        names, cells = _cells(rows)
        self._run.log({"step": step, name: self._wandb.Table(columns=names, data=cells)})

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """trackio, on this machine: ``trackio show``."""

    def __init__(self, start: Start):
        self._trackio = importlib.import_module("trackio")
        self._run = self._trackio.init(
            project=PROJECT,
            name=f"{start.output.name}-{start.id}",
            config=start.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"trackio show --project {PROJECT}"

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        names, cells = _cells(rows)
        self._run.log({name: self._trackio.Table(columns=names, data=cells)}, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def serve(name: str, lines: Any, answer: Callable[[dict[str, str]], None]) -> None:
    """Carry out the records that come as ``lines``; ``answer`` is told {where}, or {failed}."""
    output, *rest = json.loads(next(lines))
    # Whatever a library raises, and be it SystemExit, is told and not passed on.
    try:
        tracker = KINDS[name](Start(Path(output), *rest))
    except BaseException as error:
        answer({"unusable": _named(error)})
        return
    answer({"where": tracker.where})
    method = ""
    for line in lines:
        method, *rest = json.loads(line)
        try:
            getattr(tracker, method)(*rest)
        except BaseException as error:
            answer({"failed": _named(error)})
    if method != "finish":
        # The run was killed: what has been told so far is still sent, if that can be done soon.
        timer = threading.Timer(LEFT_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()
        tracker.finish(True)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Names of columns, and the rows' values: numbers as they are, all else as text."""
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name != "split"]
    cells = [[row.get(name) for name in names] for row in rows]
    kept = (int, float, type(None))
    return names, [[x if isinstance(x, kept) else str(x) for x in row] for row in cells]


def _markdown(rows: Sequence[Row]) -> str:
    """A table as Markdown, in which no text is taken for markup."""
    names, cells = _cells(rows)
    lines = [names, ["---"] * len(names), *([_plain(x) for x in row] for row in cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(x: Any) -> str:
    text = f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x)
    return "".join(f"&#{ord(c)};" if c in MARKUP else c for c in text).replace("\n", "<br>")


def main() -> None:
    """Serve one tracker; what its library prints goes where stderr goes."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(told: dict[str, str]) -> None:
            answers.write(json.dumps(told) + "\n")
            answers.flush()

        serve(sys.argv[1], iter(sys.stdin), answer)
    # What a library does at its end, such as to wait for a network, is no affair of anybody.
    os._exit(0)


if __name__ == "__main__":
    main()

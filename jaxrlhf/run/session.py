"""The host's chores around a run: one folder, its lock, its log, its checkpoints, its clock.

``Session`` opens the folder and goes on where the run stopped, if it is still the same run
(``fingerprint``, ``changes``). ``lock`` sees to it that nobody else writes there.
"""

import fcntl
import io
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.config import dump, is_on_policy, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import write_atomic, writing
from jaxrlhf.core.reading import read_object
from jaxrlhf.core.remote import scratch
from jaxrlhf.core.types import TrainState
from jaxrlhf.data.digest import contents
from jaxrlhf.data.rows import Rows
from jaxrlhf.data.tokens import Encoded
from jaxrlhf.mesh.checkpoint import Checkpoints
from jaxrlhf.mesh.processes import all_or_none, by_first, is_first
from jaxrlhf.mesh.signals import AGAIN, Signals, Stop, poll
from jaxrlhf.run.changes import Change, changes_of, refuse_changes
from jaxrlhf.run.copying import STOP_SECONDS, Copier
from jaxrlhf.run.display import Display
from jaxrlhf.run.fingerprint import check_alike, check_fingerprint, fingerprint
from jaxrlhf.run.held_out import Evaluation
from jaxrlhf.run.mirror import NoMirror
from jaxrlhf.run.notices import announced, ending
from jaxrlhf.run.parts import Parts
from jaxrlhf.run.record import Recorder, plain
from jaxrlhf.run.report import write_report
from jaxrlhf.run.setup import Run
from jaxrlhf.run.speed import Meter
from jaxrlhf.run.stopping import exchange, has_ended, is_over
from jaxrlhf.run.trackers import trackers_of

log = logging.getLogger(__name__)


EXAMPLE = 1200
"""Characters of the example that are shown at most."""


Whole = tuple[int, dict[str, TrainState], dict[str, Any]]
"""What can be saved: iterations done, states, host."""


class Session:
    """``with Session(run) as session:`` opens the run's folder and goes on where it stopped.

    A ``Stop`` that leaves the block saves what is whole first: the states between two iterations,
    or those that an iteration in progress began with.

    Args:
      run: what to do.
      began: ``time.perf_counter()`` when its set-up began, which the first lap is counted from.
      feed: called at every lap, with a name for what may take long until the next.
      signals: that the run listens to.
      show: the terminal's; one of its own, if None.
      may_change: go on where fields have changed that may; False: refuse, and name them.
      mirror: copies the folder to where the run's output is, if that is elsewhere.

    Attributes:
      states: the training states, restored or at their start (``run.states``, which are deleted
        where there is a checkpoint, and donated by the first step elsewhere).
      host: the host's numbers, saved with them: ``kl_coef``, ``before``, ``seconds``,
        ``normalisation``.
      start: iterations already done.
      unmeasured: whether the run was stopped after them and before the evaluation that is due.
      meter: counts what the iteration at hand does.
      changed: what this launch changes in a run that it goes on with.
    """

    def __init__(
        self,
        run: Run,
        began: float | None = None,
        feed: Callable[[str], None] | None = None,
        signals: Signals | None = None,
        show: Display | None = None,
        may_change: bool = True,
        mirror: Copier | NoMirror | None = None,
    ):
        self.run = run
        self._shown = show
        self.changed: list[Change] = []
        self._may_change = may_change
        self.output = scratch(run.config.output)
        self._mirror = mirror or NoMirror()
        self.states: dict[str, TrainState] = run.states
        self.host: dict[str, Any] = {"seconds": {}}
        self.start = 0
        self.unmeasured = False
        self.meter = Meter(run)
        self.signals = signals or Signals()
        self._lapped = time.perf_counter() if began is None else began
        self._feed = feed
        self._long = "setting up"
        self._updating = False
        self._whole: Whole | None = None
        self._summary: dict[str, Any] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Session":
        config = self.run.config
        # Of several processes with one folder nowhere but in a store, each has its own pieces.
        parts = self._mirror if isinstance(self._mirror, Parts) else None
        folder = parts.folder if parts else self.output / "checkpoints"
        self.checkpoints = Checkpoints(folder, config.checkpoint, parts)
        self._stack.enter_context(self.checkpoints)
        self._fingerprint = fingerprint(config, **_rows_of(self.run.train_rows))
        if self.run.eval_rows is not None:
            sampled = {"n": config.eval.n, "gold": len(config.eval.gold)}
            measured = _rows_of(self.run.eval_rows) | (sampled if is_on_policy(config) else {})
            self._fingerprint["eval"] |= measured
        check_alike(self._fingerprint)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.states
        )
        # Names of changed fields are a better error than shapes that differ.
        self._check_same_run()
        all_or_none(self._check_changes)
        if self.checkpoints.saved is not None:  # or a resumed run would hold two states
            for x in jax.tree.leaves(self.states):
                x.delete()
        found = self.checkpoints.restore(abstract)
        if found is not None:
            self.start, self.states, self.host = found
            check_fingerprint(self.host.get("fingerprint", {}), self._fingerprint)
            more = self.start < config.steps and not is_over(self.host, config.eval.patience)
            self.states = exchange(self.states, self.host, False) if more else self.states
        # The scores change with every step, so their normalisation is measured at the end.
        if self.is_left():
            self.host.pop("normalisation", None)  # of parameters that go on learning
        self.host["fingerprint"] = self._fingerprint
        self.unmeasured = self.host.pop("unmeasured", False)
        all_or_none(self._prepare_folder)
        resumed = self.start if found is not None else None
        self._summary = by_first(self._finished)
        # What a stop has cut short is measured again, and stands there once; so does the end of a
        # run that came as far as its last step, and not to its summary.
        ends = not self.is_left() and self._summary is None and not has_ended(self.host)
        due = {self.start} if self.unmeasured or ends else set()
        due |= set() if "before" in self.host else {0}
        self.show = self._shown or self._stack.enter_context(announced(config, self.run.mesh))
        # A run that is done, and only asked for once more, has nothing to tell them.
        told = self.is_left() or not (self.output / "summary.json").is_file()
        trackers = trackers_of(config, resumed, self.show.note) if told else None
        self.recorder = self._stack.enter_context(
            Recorder(self.output, resumed, is_first(), due, trackers)
        )
        self.show.resume(self.start)
        self.show.phase("")
        self._greet()
        self._mark(self.start)
        self.signals.last_resort = self._last_resort
        return self

    def _greet(self) -> None:
        """Say where the run is, and what is to be known of its model and rows."""
        if self.start:
            self.show.note(f"resumed after iteration {self.start} of {self.run.config.steps}")
        if self.changed:
            self.show.note(f"with other settings than before: {', '.join(map(str, self.changed))}")
        for note in filter(None, (*self.run.notes, self.meter.note())):
            self.show.note(note)
        for rows in (self.run.train_rows, self.run.eval_rows, self.run.normalise_rows):
            for line in rows.note().splitlines() if rows is not None else ():
                self.show.note(line)

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self._say_next("the end of the run")
        # Nobody else may save the same step at the same time.
        with self.signals.turn:
            try:
                if isinstance(error, Stop):
                    self.show.note(self._cut(str(error)))
            finally:
                self._stack.__exit__(kind, error, trace)

    def _prepare_folder(self) -> None:
        if not is_first():
            return
        if self.is_left() or not self._has_config():
            write_atomic(self.output / "config.yaml", dump(self.run.config))
        if self.is_left():
            summary = self.output / "summary.json"
            with writing(summary):
                summary.unlink(missing_ok=True)  # of a shorter run

    def _has_config(self) -> bool:
        """Whether there is a config.yaml that can be read; a damaged one is written anew."""
        path = self.output / "config.yaml"
        if not path.is_file():
            return False
        try:
            load(path)
        except InputError as error:
            log.warning("%s; written anew", error)
            return False
        return True

    def is_left(self) -> bool:
        """Whether this launch has an iteration to do."""
        return self.start < self.run.config.steps and not has_ended(self.host)

    def _check_same_run(self) -> None:
        """Refuse another model or seed before shapes are compared.

        By what the checkpoint says: config.yaml may be damaged, or changed by hand.
        """
        host = self.checkpoints.noted() or {}
        check_fingerprint(host.get("fingerprint", {}), self._fingerprint)

    def _check_changes(self) -> None:
        """Refuse other settings for a run that has saved anything, unless they may change."""
        if is_first() and self.checkpoints.latest() is not None:
            self.changed = changes_of(self.run.config)
            if not self._may_change:
                refuse_changes(self.run.config.output, self.changed)

    def steps(self) -> Iterator[int]:
        """The iterations that are left; all processes stop between two if one has been asked to."""
        done = self.start
        while done < self.run.config.steps and not has_ended(self.host):
            # Programs are compiled where they are first called.
            self._long = "the first iteration" if done == self.start else ""
            self.meter.begin(self.host["seconds"])
            yield done
            done += 1
            self._mark(done)
            self._end_of(done)
            self.checkpoints.look()
            poll()
        self._long = "the end of the run"
        self.save(done)

    def _mark(self, done: int, **more: Any) -> None:
        """The states are those after ``done`` iterations, and whole."""
        self._whole = (done, dict(self.states), {**self.host, **more})
        self.signals.nothing_to_lose = done == self.start

    def begin_update(self) -> None:
        """From here to ``record``, states are donated: nothing is whole that could be saved."""
        self._updating = True
        self.signals.turn.acquire()

    def _cut(self, asked: str) -> str:
        """Save what is whole, on disk and where it is mirrored once this returns, and say so."""
        said = self._save_whole(asked)
        self._mirror.flush(STOP_SECONDS)
        return said

    def _save_whole(self, asked: str) -> str:
        if self._whole is None:
            last = self.checkpoints.latest() or 0
            return f"stopped by {asked}; iteration {last} is saved: {AGAIN}"
        done, states, host = self._whole
        if done == self.start:
            return f"stopped by {asked} after iteration {done}, nothing new to save: {AGAIN}"
        self.checkpoints.save(done, states, host)
        self.checkpoints.wait()
        return f"stopped by {asked} after iteration {done}, which is saved: {AGAIN}"

    def _last_resort(self) -> str | None:
        """``_cut`` out of another thread, while the main one is in compiled code."""
        leaves = jax.tree.leaves(self._whole[1]) if self._whole is not None else []
        if not leaves or jax.process_count() > 1 or any(x.is_deleted() for x in leaves):
            return None
        return self._cut(self.signals.asked)

    def _end_of(self, done: int) -> None:
        every = self.run.config.checkpoint.every
        for name, state in self.states.items():
            skipped = int(state.skipped)
            if skipped >= self.run.config.optim.max_skipped:
                raise FloatingPointError(
                    f"{name}: {skipped} updates in a row had a gradient that is not finite; "
                    "lower optim.learning_rate, or look at samples.jsonl of the last iterations"
                )
        if every and done % every == 0:
            self.save(done)

    def save(self, done: int) -> None:
        """Checkpoint after ``done`` iterations, in the background."""
        self._say_next("a save")  # which waits for the one before
        self.checkpoints.save(done, self.states, self.host)
        self.lap("checkpoint")

    def amend(self, **known: Any) -> None:
        """Add to the host's numbers, and to those of the last checkpoint."""
        self.host |= known
        self.checkpoints.amend(self.host)

    def lap(self, phase: str, *arrays: Any) -> float:
        """Charge the seconds since the last lap to a phase, once ``arrays`` are computed."""
        # Calls return before the device is done: without waiting, the next phase would pay.
        jax.block_until_ready(arrays)
        self._say_next("rewards" if phase == "sample" else self._long)
        now = time.perf_counter()
        spent, self._lapped = now - self._lapped, now
        seconds = self.host["seconds"]
        seconds[phase] = seconds.get(phase, 0.0) + spent
        if phase == "evaluate":
            self.show.phase("", told=False)
        # Several agree on it at the end of an iteration, or in a wait for rewards.
        if not self._updating and jax.process_count() == 1:
            poll()
        return spent

    def _say_next(self, phase: str) -> None:
        if self._feed is not None:
            self._feed(phase)

    def begin_evaluation(self) -> None:
        """What follows may take long, to the next lap."""
        self._say_next("evaluation")
        self.show.phase("evaluating")

    def record(self, step: int, metrics: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Log one iteration: its states are whole again."""
        # With patience an evaluation decides what is saved: it belongs to the iteration.
        if self.run.config.eval.patience:
            self._whole, self.signals.nothing_to_lose = None, False
        else:
            self._mark(step, unmeasured=True)
        if self._updating:
            self._updating = False
            self.signals.turn.release()
        self._mirror.check()
        failed = {"failed_saves": self.checkpoints.failed, "failed_uploads": self._mirror.failed}
        metrics = {**metrics, **{name: count for name, count in failed.items() if count}}
        self.recorder.metrics(step, metrics)
        self.recorder.samples(step, samples)
        self.show.step(step, plain(metrics), samples)

    def example(self, text: str) -> None:
        """Show a row that is learnt from, cut if it is long, and write it to example.txt whole."""
        if is_first():
            write_atomic(self.output / "example.txt", text + "\n")
        half = EXAMPLE // 2
        brief = text if len(text) <= EXAMPLE else f"{text[:half]} … {text[-half:]}"
        self.show.note("an example, what is trained on between ⟦ and ⟧:")
        for line in brief.splitlines():
            self.show.note(f"  {line}")

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Log an evaluation, its completions included."""
        values = {f"eval/{name}": x for name, x in evaluation.metrics.items()}
        self.recorder.metrics(step, values)
        self.recorder.samples(step, [{"split": "eval", **row} for row in evaluation.samples])
        listed = "  ".join(f"{name} {x:.3g}" for name, x in evaluation.metrics.items())
        self.show.note(f"held out, step {step} ({self.show.lasted():.1f} s): {listed}")

    def report(self) -> None:
        """Write report.html from the run's files; the run stands even if they make no page."""
        if is_first():
            try:
                write_report([self.output])
            except (InputError, OSError) as error:
                log.warning("no report: %s", error)

    def say_end(self, summary: dict[str, Any]) -> None:
        """Show what came of the run, and what can be done with it."""
        chats = bool(getattr(self.run.tokenizer, "chat_template", None))
        for line in ending(self.run.config, summary, chats):
            self.show.note(line)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run with no iteration left; None if there is something to do."""
        if self._summary is not None:
            self.show.note(f"nothing to do: all {self.start} iterations are done")
        return self._summary

    def _finished(self) -> dict[str, Any] | None:
        path = self.output / "summary.json"
        measured = self.run.normalise_rows is None or "normalisation" in self.host
        if self.is_left() or not path.is_file() or not measured:
            return None
        try:
            summary = read_object(path, remedy="it is written anew")
        except InputError as error:
            log.warning("%s", error)
            return None
        if "steps" not in summary:
            log.warning("%s: no summary of a run: it is written anew", path)
        # Else of a shorter run that has since been given more steps.
        return summary if summary.get("steps") == self.start else None

    def skipped(self) -> dict[str, int]:
        """Rows left out under ``data.skip_bad_rows``, which it counts: ``rows_skipped`` of the
        training data, ``eval_rows_skipped`` of the held-out; nothing without it."""
        named = {"rows_skipped": self.run.train_rows, "eval_rows_skipped": self.run.eval_rows}
        if not self.run.config.data.skip_bad_rows:
            return {}
        return {name: len(rows.skipped) for name, rows in named.items() if rows is not None}

    def totals(self) -> dict[str, Any]:
        """Seconds by phase, generated tokens a second of training, and peak memory."""
        seconds = {name: round(spent, 2) for name, spent in self.host["seconds"].items()}
        training = sum(seconds.get(name, 0.0) for name in ("sample", "reward", "score", "update"))
        tokens = self.host.get("tokens", 0.0)
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / training if tokens else None,
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }


def _rows_of(rows: Rows[Encoded]) -> dict[str, Any]:
    """What a fingerprint has of rows."""
    return {"rows": len(rows), "contents": contents(rows.items)}


def peak_memory_gib() -> float:
    """Most resident memory of this process so far, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def lock(output: str | Path) -> io.IOBase:
    """Claim a run's folder until the returned file is closed or the process ends, however it ends.

    Keep the result: ``with lock(output): …``. Process 0 of a multi-host run holds it for all.

    On a disk without locks it warns, and claims nothing.

    Raises:
      InputError: another run writes to ``output``, or the folder cannot be written.
    """
    if not is_first():
        return open(os.devnull, "rb")
    path = Path(output) / ".lock"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not in a with: the open file is what holds the lock. Unbuffered: nothing waits to fail.
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip()
        file.close()
        raise InputError(
            f"output={str(output)!r}: another run writes there ({holder}); "
            "wait for it, stop it, or choose another output"
        ) from error
    except OSError as error:  # as some network disks are mounted
        log.warning("%s: cannot be locked (%s): start no second run there", path, error.strerror)
    # The lock is the open file, not its text: a killed process leaves none behind.
    with writing(path):
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    return file

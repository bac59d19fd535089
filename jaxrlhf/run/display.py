"""What a person at the terminal sees of a run: a live panel, or a line an iteration in a log."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxrlhf.core.shown import asked, visible
from jaxrlhf.run.metrics import METRICS, TERMINAL

UNITS = {"tokens_per_second": " tok/s"}
"""Metrics that a plain line writes as number and unit, not as name and number."""

WIDE = 100
"""Columns from which on the panel has room for units."""

_BARS = "▁▂▃▄▅▆▇█"

Compiled = Callable[[], tuple[int, float]]
"""Programs compiled so far, and the seconds that took."""


def _none() -> tuple[int, float]:
    return 0, 0.0


@contextmanager
def display(
    total: int,
    title: str,
    start: int = 0,
    console: Console | None = None,
    active: bool = True,
    where: str = "",
    compiled: Compiled = _none,
) -> Iterator["Display"]:
    """Show a run's progress: live if stdout is a terminal, else one plain line an iteration.

    The terminal is as it was afterwards, also after an error or Ctrl-C; the last frame stays.

    Args:
      total: iterations of the run.
      title: a line above everything else.
      start: iterations that are done already, on resume.
      console: where to write, if not to stdout.
      active: False shows nothing, for all but process 0 of a multi-host run.
      where: a line that comes first: what the run is on.
      compiled: asked when the first iteration is done, which waits for its programs.
    """
    if not active:
        console = Console(quiet=True)
    console = console or Console(force_terminal=sys.stdout.isatty())
    show = Display(total, title, start, console, compiled)
    if where:
        show.note(where)
    # A log wants one line an iteration, and no codes that move the cursor.
    if not _is_live(console):
        show.note(title)
        yield show
        return
    show.live = Live(show, console=console, refresh_per_second=4, vertical_overflow="crop")
    with show.live:
        yield show


class Display:
    """See ``display``. All texts are shown as they are: no markup, no control characters."""

    def __init__(
        self,
        total: int,
        title: str,
        start: int,
        console: Console,
        compiled: Compiled = _none,
    ):
        self.live: Live | None = None
        self._compiled, self._before = compiled, compiled()
        self._phase = ""
        self._title, self._total, self._step, self._console = title, total, start, console
        self._history: dict[str, list[float]] = {}
        self._samples: list[Mapping[str, Any]] = []
        self._seconds: list[float] = []
        self._began = time.monotonic()

    def resume(self, start: int) -> None:
        """So many iterations are done already."""
        self._step = start

    def lasted(self) -> float:
        """Seconds that what the run does now has taken so far."""
        return time.monotonic() - self._began

    def phase(self, name: str, told: bool = True) -> None:
        """The run begins with something that is no iteration, such as reading; "" ends it.

        Args:
          name: what it does now.
          told: note how long what it did before has taken.
        """
        now = time.monotonic()
        if self._phase and told:
            self.note(f"{self._phase}: {now - self._began:.1f} s")
        self._phase, self._began = name, now
        if self.live is not None:
            self.live.refresh()

    def step(
        self, step: int, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Report one finished iteration.

        Args:
          step: iterations done, this one included.
          metrics: numbers by name, those of ``TERMINAL`` among them; ``seconds`` is how long the
            iteration took (measured here if missing).
          samples: the newest completions, newest last: prompt (or ``user``, what the user said
            last in it), completion and reward of each.
        """
        now = time.monotonic()
        self._seconds.append(float(metrics.get("seconds", now - self._began)))
        self._began, self._step = now, step
        for name in TERMINAL:
            if metrics.get(name) is not None:
                self._history.setdefault(name, []).append(float(metrics[name]))
        # An iteration without samples leaves the last ones in sight.
        self._samples = list(samples)[-3:] or self._samples
        if self.live is None:
            self.note(self._line(metrics))
        else:
            self.live.refresh()
        count, seconds = self._programs()
        if len(self._seconds) == 1 and count:
            self.note(f"compiling {count} programs: {seconds:.1f} s, in part beside the reading")

    def _programs(self) -> tuple[int, float]:
        """Programs compiled since the run began, and their seconds."""
        count, seconds = self._compiled()
        return count - self._before[0], seconds - self._before[1]

    def note(self, text: str) -> None:
        """Show one line of text: above the live panel, or in the log."""
        if self.live is not None:
            self._console.print(Text(visible(text)))
            return
        encoding = self._console.encoding
        line = visible(text).encode(encoding, "replace").decode(encoding)
        # A log on a full disk, or a reader that has gone: the training is worth more than a line.
        with suppress(OSError):
            self._console.out(line, highlight=False)
            self._console.file.flush()

    def _line(self, metrics: Mapping[str, Any]) -> str:
        shown = [name for name in TERMINAL if metrics.get(name) is not None]
        parts = [
            f"{number(metrics[name])}{UNITS[name]}"
            if name in UNITS
            else f"{name} {number(metrics[name])}"
            for name in shown
        ]
        head = f"step {self._step}/{self._total}"
        return "  ".join([head, *parts, f"{self._seconds[-1]:.1f} s"])

    def __rich__(self) -> RenderableType:
        """The live panel, as of now."""
        parts: list[RenderableType] = [self._progress()]
        if self._history:
            parts.append(self._table())
        if self._samples:
            parts.append(self._completions())
        return Group(Text(visible(self._title), style="bold", no_wrap=True), *parts)

    def _progress(self) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self._total, 1), completed=self._step)
        grid.add_row(f"step {self._step}/{self._total}", bar, self._left())
        return grid

    def _left(self) -> str:
        """What goes on now, or how long the rest will take."""
        here = time.monotonic() - self._began
        if self._phase:
            return f"{self._phase} {clock(here)}"
        if self._step >= self._total:
            return "done"
        if not self._seconds:
            count, _ = self._programs()
            return f"first step {clock(here)}" + (f", {count} programs compiled" if count else "")
        # The first step has waited for its programs: it tells nothing of those to come.
        if not (steady := self._seconds[1:]):
            return f"first step {self._seconds[0]:.1f} s"
        pace = statistics.median(steady[-20:])
        return f"{pace:.1f} s/step  ETA {clock(pace * (self._total - self._step) - here)}"

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), expand=True, header_style="dim")
        table.add_column("", no_wrap=True)
        for title in ("first", "last"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("", ratio=1, no_wrap=True, overflow="crop")
        wide = self._console.width >= WIDE
        if wide:
            table.add_column("", style="dim", no_wrap=True)
        width = max(8, min(40, self._console.width - 44))
        for name, label in TERMINAL.items():
            if values := self._history.get(name):
                line = Text(sparkline(values, width), style="cyan")
                unit = [METRICS[name].unit] * wide
                table.add_row(label, number(values[0]), number(values[-1]), line, *unit)
        return table

    def _completions(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), expand=True, header_style="dim")
        table.add_column("reward", justify="right", no_wrap=True)
        table.add_column("prompt", ratio=2, no_wrap=True, overflow="ellipsis")
        table.add_column("completion", ratio=3, no_wrap=True, overflow="ellipsis")
        for sample in self._samples:
            texts = asked(sample), sample.get("completion", "")
            table.add_row(number(sample.get("reward")), *(Text(visible(x)) for x in texts))
        return table


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` bars from their lowest to their highest; NaN is a space.

    More values than bars are averaged in equal stretches.
    """
    n = min(len(values), width)
    if n == 0:
        return ""
    stretches = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    means = [statistics.fmean(stretch) for stretch in stretches]
    finite = [x for x in means if math.isfinite(x)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((x - low) * scale)] if math.isfinite(x) else " " for x in means)


def number(x: Any) -> str:
    """A number in two or three digits that matter, at most 8 characters; – for what is none."""
    if not hasattr(x, "__float__"):
        return "–"
    x = float(x)
    size = abs(x)
    if not math.isfinite(x) or size == 0 or 0.1 <= size < 10:
        return f"{x:.2f}"
    if 1e-3 <= size < 0.1:
        return f"{x:.3f}"
    if 10 <= size < 1e6:
        return f"{x:.1f}" if size < 100 else f"{x:.0f}"
    return f"{x:.1e}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:02:30."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _is_live(console: Console) -> bool:
    return (
        console.is_terminal
        and not console.quiet
        and not console.is_dumb_terminal
        and not console.options.ascii_only
    )

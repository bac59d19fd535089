import io
import math
import re
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from jaxrlhf.run.display import clock, display, number, sparkline

SAMPLE = {
    "prompt": "This movie [/red] was",
    "completion": "[bold]the best[/bold]\nof \x1b[2Jall 電影 " + "and on " * 60,
    "reward": 0.92,
}


def metrics(i):
    return {
        "reward": 0.1 * i,
        "kl": 1.2 * i,
        "entropy_estimate": 3.1,
        "tokens_per_second": 412.3,
        "explained_variance": math.nan if i < 2 else -0.5,
        "other": 1.0,
        "seconds": 12.3,
    }


def terminal(width):
    return Console(
        record=True, width=width, height=40, force_terminal=True, file=io.StringIO(), _environ={}
    )


def panel(width, steps, total=15):
    """What the live panel shows after ``steps`` iterations, line by line."""
    console = terminal(width)
    with display(total, "demo [/red]", console=console) as show:
        for i in range(1, steps + 1):
            show.step(i, metrics(i), [SAMPLE, SAMPLE, {"completion": "x"}, SAMPLE])
    plain = Console(record=True, width=width, file=io.StringIO())
    plain.print(show)
    return plain.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 200])
def test_display_panel(width):
    lines = panel(width, 9)
    text = "\n".join(lines)
    assert all(cell_len(line) <= width for line in lines)
    assert lines[0].startswith("demo [/red]")
    assert re.match(r"step 9/15 .*12\.3 s/step  ETA 0:01:1[34]$", lines[1].rstrip())
    assert re.search(r"reward +0\.10 +0\.90 +▁▂▃▄▅▅▆▇█", text)
    assert re.search(r"KL +1\.20 +10\.8", text)
    assert re.search(r"tokens/s +412 +412", text)
    assert re.search(r"value expl\. var\. +nan +-0\.50 +▁", text)
    assert len(lines) == 1 + 1 + 6 + 4  # no line is wrapped
    assert len(re.findall("This movie", text)) == 2  # the last three completions
    assert ("This movie [/red] was" in text) == (width == 200)
    assert "[bold]the best" in text
    assert "…" in text
    assert "\x1b" not in text
    assert "other" not in text


def test_display_panel_shows_what_the_user_said_last_of_a_chat():
    console = terminal(100)
    with display(2, "x", console=console) as show:
        show.step(1, metrics(1), [{"prompt": "Pages of advice. Why?", "user": "Why?"}])
    plain = Console(record=True, width=100, file=io.StringIO())
    plain.print(show)
    text = plain.export_text()
    assert "Why?" in text
    assert "advice" not in text


def test_display_panel_before_and_after():
    assert "first step 0:00:00" in panel(60, 0)[1]
    assert "done" in panel(60, 15)[1]


def test_display_panel_has_units_where_it_is_wide():
    assert "nats a sequence" in "\n".join(panel(120, 3))
    assert "nats a sequence" not in "\n".join(panel(90, 3))


@pytest.mark.parametrize(
    ("seconds", "shown"), [([60.0], "first step 60.0 s"), ([60, 2, 2], "2.0 s")]
)
def test_display_eta_leaves_out_the_first_step(seconds, shown):
    """It has waited for its programs: 12 steps of 2 s are left, not of the mean."""
    with display(15, "x", console=terminal(80)) as show:
        for i, spent in enumerate(seconds, 1):
            show.step(i, {"seconds": spent})
    plain = Console(record=True, width=80, file=io.StringIO())
    plain.print(show)
    line = plain.export_text().splitlines()[1]
    assert shown in line
    assert ("ETA 0:00:24" in line) == (len(seconds) == 3)


def test_display_says_phases_and_programs(capsys, monkeypatch):
    now = iter([0.0, 1.0, 3.5, 4.0, 5.0, 9.0])
    monkeypatch.setattr("jaxrlhf.run.display.time.monotonic", lambda: next(now))
    told = iter([(2, 1.0), (9, 5.0), (9, 5.0)])
    with display(2, "x", where="cpu: here", compiled=lambda: next(told)) as show:
        show.phase("reading the data")
        show.phase("reading the weights")
        show.phase("", told=True)
        show.step(1, {"loss": 1.0})
        show.step(2, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "cpu: here",
        "x",
        "reading the data: 2.5 s",
        "reading the weights: 0.5 s",
        "step 1/2  loss 1.00  1.0 s",
        "compiling 7 programs: 4.0 s, in part beside the reading",
        "step 2/2  loss 1.00  4.0 s",
    ]


def test_display_panel_shows_a_phase():
    with display(3, "x", console=terminal(80)) as show:
        show.phase("evaluating")
        plain = Console(record=True, width=80, file=io.StringIO())
        plain.print(show)
    assert "evaluating 0:00:00" in plain.export_text()


def interrupted(console):
    with display(3, "x", console=console) as show:
        show.step(1, metrics(1), [SAMPLE])
        raise KeyboardInterrupt


def test_display_live_restores_terminal():
    console, stdout = terminal(60), sys.stdout
    with pytest.raises(KeyboardInterrupt):
        interrupted(console)
    written = console.file.getvalue()
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # cursor off and on
    assert sys.stdout is stdout


def test_display_note_above_panel():
    console = terminal(60)
    with display(3, "x", console=console) as show:
        show.note("saved [/red] \x1b[2J")
    assert "saved [/red] \\x1b[2J" in console.export_text()


def test_display_plain_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # continuous integration sets it; it is no terminal
    with display(15, "demo [/red]") as show:
        show.step(
            3, {"reward": 0.41, "kl": 1.2, "tokens_per_second": 412, "seconds": 12.3}, [SAMPLE]
        )
        show.note("a long note " * 30)
    assert capsys.readouterr().out.splitlines() == [
        "demo [/red]",
        "step 3/15  reward 0.41  kl 1.20  412 tok/s  12.3 s",
        "a long note " * 30,
    ]


def test_display_plain_encoding():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, "ascii"), force_terminal=True, _environ={})
    with display(2, "é", console=console) as show:
        show.note("\ud800 é")
    assert raw.getvalue().decode("ascii") == "?\n\\ud800 ?\n"


def test_display_measures_time(monkeypatch, capsys):
    now = iter([100.0, 102.5, 103.0])
    monkeypatch.setattr("jaxrlhf.run.display.time.monotonic", lambda: next(now))
    with display(2, "x") as show:
        show.step(1, {})
        show.step(2, {})
    assert capsys.readouterr().out.splitlines()[1:] == ["step 1/2  2.5 s", "step 2/2  0.5 s"]


def test_display_resumed_and_inactive(capsys):
    with display(15, "x", active=False) as show:
        show.step(1, metrics(1), [SAMPLE])
        show.note("x")
    assert capsys.readouterr().out == ""
    console = terminal(60)
    with display(15, "x", start=10, console=console) as show:
        pass
    assert "step 10/15" in console.export_text()


def test_sparkline_shapes():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, math.nan, 8], 8) == "▁ █"
    assert sparkline([2, 2], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert sparkline([math.inf, math.nan], 8) == "  "
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert len(sparkline(range(1003), 17)) == 17


def test_number_and_clock():
    shown = {
        0: "0.00",
        0.41: "0.41",
        -3.2: "-3.20",
        0.0123: "0.012",
        1e-9: "1.0e-09",
        99.5: "99.5",
        412.3: "412",
        123456: "123456",
        1e7: "1.0e+07",
        math.nan: "nan",
    }
    assert {x: number(x) for x in shown} == shown
    assert number(None) == "–"
    assert clock(3725.4) == "1:02:05"
    assert clock(-3) == "0:00:00"

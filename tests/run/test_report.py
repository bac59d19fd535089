"""The page about runs: what it shows, that all of it is escaped, and that it needs no network."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from jaxrlhf.apps import cli
from jaxrlhf.core.errors import InputError
from jaxrlhf.run.report import render, write_report
from jaxrlhf.run.report.compared import fields
from jaxrlhf.run.report.curves import (
    Point,
    best_of_n,
    gold_against_proxy,
    peak,
    reliability,
    series,
    thin,
)
from jaxrlhf.run.report.reading import read_run
from jaxrlhf.run.report.svg import Series, chart, spread, ticks

EVIL = "<script>alert('x')</script> & \"quoted\" </td>"
VOID = {"meta", "line", "circle", "polyline", "br", "img", "input"}


class Reader(HTMLParser):
    """Checks that tags close in order, and keeps tags, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def held_out(step, kl, proxy, gold):
    return {
        "step": step,
        "eval/kl_nats": kl,
        "eval/proxy": proxy,
        "eval/proxy_ci": 0.5,
        "eval/gold": gold,
        "eval/gold_ci": 0.25,
    }


METRICS = [
    held_out(0, -1e-6, 1.0, 0.0),
    {"step": 1, "reward": 1.0, "kl": 0.0, "loss": 0.5, "length": 8.0, "entropy_estimate": 2.0},
    {"step": 2, "reward": 2.0, "kl": None, "loss": 0.4, "length": 9.0, "entropy_estimate": 1.5},
    held_out(2, 4.0, 2.0, 0.75),
    {"step": 4, "reward": 4.0, "kl": 9.0, "loss": 0.2, "length": 12.0, "entropy_estimate": 0.5},
    held_out(4, 9.0, 4.0, 0.5),
]
EVALUATION = {
    "models": {"policy": "run", "reference": "base", "against": "base"},
    "step": 4,
    "rewards": {"proxy": ["a"], "gold": ["b"]},
    "data": "held_out.jsonl",
    "prompts": 5,
    "n": 2,
    "policy": {"proxy": 4.0, "proxy_ci": 0.5, "gold": 0.5, "gold_ci": 0.1, "kl_nats": 0.2},
    "against": {"proxy": 1.0, "proxy_ci": 0.5, "gold": 0.0, "gold_ci": 0.1},
    "win_rate": {"proxy": 0.875, "proxy_ci": 0.0625, "gold": 0.625, "gold_ci": None},
    "pass_at_k": {"k": [1, 2], "rate": [0.375, 0.4375], "rate_ci": [0.1, 0.1]},
    "best_of_n": {
        "n": [1, 2],
        "kl_nats": [0.0, 0.193],
        "proxy": [1.0, 1.5],
        "proxy_ci": [0.1, 0.1],
        "gold": [0.0, None],
        "gold_ci": [0.1, None],
    },
    "equal_kl": {"kl_nats": 0.2, "proxy": None, "gold": None},
}
SUMMARY = {
    "algorithm": "ppo",
    "gold_before": 0.0,
    "gold_ci_before": 0.25,
    "gold_after": 0.5,
    "gold_ci_after": 0.25,
    "gold_rise": 0.5,
    "gold_rise_ci": 0.125,
    "seconds": {"sample": 60.0, "update": 31.0},
    "peak_memory_gib": 1.5,
    "reliability": {"predicted": [0.55, 0.95], "observed": [0.5, 0.9], "count": [100, 100]},
}


def sample(step, prompt, completion):
    return {"step": step, "split": "eval", "prompt": prompt, "completion": completion, "gold": 0.5}


SAMPLES = [
    {"step": 1, "prompt": "in training", "completion": "never shown", "reward": 0.0},
    sample(0, EVIL, "before it"),
    sample(0, EVIL, "its second"),
    sample(2, EVIL, "between"),
    sample(4, EVIL, f"after {EVIL}"),
]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def write_run(folder, **changes):
    folder.mkdir()
    config = {"algorithm": {"name": "ppo"}, "model": {"path": "smollm2"}, "steps": 4, "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes))
    for name, rows in {"metrics.jsonl": METRICS, "samples.jsonl": SAMPLES}.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def test_write_report_shows_what_there_is(folder):
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    finding = {
        "name": "reward hacking",
        "severity": "problem",
        "evidence": EVIL,
        "remedy": "raise β",
    }
    (folder / "diagnosis.json").write_text(json.dumps({"step": 4, "findings": [finding]}))
    path = write_report([folder])
    assert path == str(folder / "report.html")
    page = Reader((folder / "report.html").read_text())
    texts = [" ".join(text.split()) for text in page.texts]
    for shown in (
        "0 → 0.50",
        "rise 0.50 ± 0.12",
        "0.00 ± 0.25",
        "0:01:31 in all, 1.50 GiB at most.",
        "reward hacking",
        "Win rate by gold",
        "0.88 ± 0.062",
        "The curve ends before the policy's KL of 0.20 nats.",
        "Share that came true over its probability",
    ):
        assert any(shown in text for text in texts), shown
    assert "highest, 0.75, at iteration 2 and a KL of 4.00 nats" in " ".join(texts)
    assert page.tags.count("svg") >= 8


def test_render_escapes_and_needs_no_network(folder):
    finding = {"name": EVIL, "severity": '"><script>', "evidence": EVIL, "remedy": EVIL}
    (folder / "diagnosis.json").write_text(json.dumps({"step": 4, "findings": [finding]}))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"data": EVIL}))
    text = render([read_run(folder), read_run(folder)]) + render([read_run(folder)])
    page = Reader(text)
    assert EVIL in page.texts
    assert "script" not in page.tags
    assert not {"src", "href", "xlink:href", "onload", "onerror"} & {n for n, _ in page.attributes}
    assert not re.search(r"https?://|@import|url\(", text)


def test_render_before_the_first_iteration(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 3\n")
    page = Reader(render([read_run(folder)]))
    assert "Model from random weights, 0 of 3 iterations: not finished." in page.texts
    assert "svg" not in page.tags


def test_render_shows_the_first_completion_of_both_ends(folder):
    texts = Reader(render([read_run(folder)])).texts
    assert "before it\n(gold 0.50)" in texts
    assert f"after {EVIL}\n(gold 0.50)" in texts
    assert not any("its second" in t or "between" in t or "never shown" in t for t in texts)


def test_write_report_compares_runs(folder, tmp_path):
    other = write_run(tmp_path / "other", seed=1, model={"path": "elsewhere"})
    (other / "evaluation.json").write_text(json.dumps(EVALUATION))
    with pytest.raises(InputError, match="output: missing"):
        write_report([folder, other])
    page = Reader(Path(write_report([folder, other], tmp_path / "a" / "both.html")).read_text())
    assert "2 runs compared" in page.texts
    rows = [text for text in page.texts if text.strip()]
    assert rows[rows.index("model.path") + 1 :][:2] == ["smollm2", "elsewhere"]
    assert "algorithm.name" not in rows
    assert "other, best of n" in rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [", "config.yaml: not YAML"),
        ("config.yaml", "- a", "config.yaml: holds no settings"),
        ("summary.json", "{", "summary.json: not JSON"),
        ("summary.json", "[]", "summary.json: holds no object"),
        ("evaluation.json", '{"n": 1}', "evaluation.json: no models"),
        ("diagnosis.json", '{"findings": ["a"]}', "diagnosis.json: not a list of findings"),
        ("diagnosis.json", "[]", "diagnosis.json: holds no object"),
    ],
)
def test_read_run_refuses(name, content, message, folder):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_run(folder)


def test_read_run_leaves_out_torn_lines(folder, caplog):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    assert read_run(folder).metrics == METRICS
    assert "metrics.jsonl:7: not a record" in caplog.text


@pytest.mark.parametrize(("step", "shown"), [(4, True), (None, True), (2, False), (6, False)])
def test_read_run_leaves_out_what_is_of_another_step(step, shown, folder, caplog):
    """The run has gone on, or back; a step of None is of a model that is no run."""
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"step": step}))
    (folder / "diagnosis.json").write_text(json.dumps({"step": step, "findings": []}))
    found = read_run(folder)
    assert bool(found.evaluation) == shown
    assert found.diagnosis == ([] if shown else None)
    left_out = f"evaluation.json: of step {step}, and the run is at step 4: left out"
    assert (left_out in caplog.text) != shown


def test_read_run_refuses_another_folder(tmp_path):
    with pytest.raises(InputError, match="not the output folder of a run"):
        read_run(tmp_path)


def test_main_report(folder, tmp_path, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    assert cli.main(["report", str(folder), str(folder), "--output", str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "b.html").exists()
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "not the output folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(("output", "reason"), [("", "it is a folder"), ("file/x", "File exists")])
def test_main_report_names_what_cannot_be_written(output, reason, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(folder), "--output", str(tmp_path / output)]) == 2
    assert f"cannot be written ({reason})" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_gold_against_proxy_by_hand():
    path = gold_against_proxy(METRICS, root=True)
    assert path == [
        (0, 0.0, 1.0, 0.5, 0.0, 0.25),
        (2, 2, 2, 0.5, 0.75, 0.25),
        (4, 3, 4, 0.5, 0.5, 0.25),
    ]
    assert [policy.x for policy in gold_against_proxy(METRICS)] == [-1e-6, 4, 9]
    assert peak(path).step == 2
    assert peak([]) is None


def test_gold_against_proxy_without_gold():
    records = [{"step": 3, "eval/kl_nats": 1.0, "eval/proxy": 2.0}, {"step": 3, "eval/loss": 1.0}]
    (policy,) = gold_against_proxy(records)
    assert policy.proxy == 2
    assert math.isnan(policy.gold)
    assert peak([policy]) is None


def test_best_of_n_reads_the_curve():
    first, second = best_of_n(EVALUATION, root=True)
    assert first == (1, 0, 1, 0.1, 0, 0.1)
    assert second.x == math.sqrt(0.193)
    assert math.isnan(second.gold)
    assert best_of_n({}) == []


def test_series_leaves_out_missing_numbers():
    assert [point[:2] for point in series(METRICS, "kl")] == [(1, 0), (4, 9)]


def test_thin_averages_stretches():
    points = [Point(float(i), 2.0 * i) for i in range(10)]
    assert thin(points, 10) == points
    assert [p[:2] for p in thin(points, 5)] == [(0.5, 1), (2.5, 5), (4.5, 9), (6.5, 13), (8.5, 17)]


def test_reliability_by_hand():
    """Wilson's intervals of 50 and of 90 in 100: 0.404 to 0.596, and 0.826 to 0.945."""
    first, last = reliability(SUMMARY)
    assert first == (0.55, 0.5, pytest.approx(0.0962, abs=1e-4))
    assert last == (0.95, 0.9, pytest.approx(0.0744, abs=1e-4))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (1, 9, ["2", "4", "6", "8"]),
        (-0.13, 0.37, ["-0.1", "0.0", "0.1", "0.2", "0.3"]),
        (0.9312, 0.9334, ["0.9315", "0.9320", "0.9325", "0.9330"]),
        (0, 4e7, ["0", "1e+07", "2e+07", "3e+07", "4e+07"]),
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == expected


def test_spread():
    assert spread([0.0, 10.0], 0.1) == (-1, 11)
    assert spread([4.0], 0.1) == (2, 6)
    assert spread([0.0, 0.0], 0.1) == (-0.5, 0.5)


def test_chart_places_points():
    # 302 units across; 176 up, of which 0.06/1.12 are below 0 and above 1
    drawn = chart([Series("a", [Point(0, 0), Point(1, 1), Point(2, math.nan)])], "t", "x")
    assert '<polyline class="line c0" points="46.0,176.6 348.0,19.4"/>' in drawn
    assert "circle" not in drawn
    near = chart([Series("a", [Point(1, 0), Point(31, 1)])], "t", "x")  # from 0: 1/31 of 302
    assert 'points="55.7,176.6 348.0,19.4"' in near
    assert chart([Series("a", [Point(0, math.nan)])], "t", "x") == ""


def test_chart_marks_and_escapes():
    curves = [Series("a<b", [Point(0, 0, 1.0)], dots=True), Series("c", [Point(1, 2)], 7, True)]
    drawn = chart(curves, "t & u", "x")
    assert "<title>a&lt;b: 0.00 at 0.00 (± 1.00)</title>" in drawn
    assert '<span class="key c1 dashed">c</span>' in drawn
    assert drawn.count('class="bar c0"') == 1
    assert drawn.startswith("<figure><figcaption>t &amp; u</figcaption>")


def test_fields_of_nested_config():
    config = {"a": {"b": 1}, "c": [{"d": 2}, 3], "e": [], "f": None}
    assert dict(fields(config)) == {"a.b": 1, "c.0.d": 2, "c.1": 3, "e": [], "f": None}

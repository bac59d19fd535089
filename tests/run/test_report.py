"""The page about runs: what it shows, that all of it is escaped, and that it needs no network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jaxrlhf.apps import cli
from jaxrlhf.core.errors import InputError
from jaxrlhf.run.report import fields, read_run, render, write_report
from jaxrlhf.run.session import Session

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
    measured = {"kl_nats": kl, "proxy": proxy, "proxy_ci": 0.5, "gold": gold, "gold_ci": 0.25}
    return {"step": step} | {f"eval/{name}": x for name, x in measured.items()}


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


def changed(**fields):
    return json.dumps(EVALUATION | fields)


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
        ("config.yaml", "a: [", "config.yaml:1: not YAML"),
        ("config.yaml", "a: !!int x", "config.yaml: not YAML: a value that is not of its kind"),
        ("config.yaml", "- a", "config.yaml: holds no settings"),
        ("summary.json", "{", "summary.json: not JSON"),
        ("summary.json", "[]", "summary.json: not a JSON object"),
        ("evaluation.json", '{"n": 1}', "evaluation.json: no models"),
        ("evaluation.json", changed(best_of_n={"n": [1, 2], "gold": [0]}), "differ in length"),
        (
            "evaluation.json",
            changed(policy={"gold": "much"}),
            "evaluation.json: policy.gold='much'",
        ),
        ("evaluation.json", changed(rewards={"proxy": 3}), "evaluation.json: rewards.proxy=3"),
        ("evaluation.json", "[" * 10**5, "evaluation.json: not JSON (nested too deeply)"),
        ("summary.json", '{"seconds": {"a": "b"}}', "summary.json: seconds.a='b'"),
        ("summary.json", '{"reliability": 3}', "summary.json: reliability=3"),
        ("config.yaml", "a: &a [*a]", "config.yaml:1: not YAML: an alias of what it stands in"),
        (
            "diagnosis.json",
            '{"findings": ["a"]}',
            "diagnosis.json: findings.0='a': Input should be",
        ),
        ("diagnosis.json", "[]", "diagnosis.json: not a JSON object"),
    ],
)
def test_read_run_refuses(name, content, message, folder):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_run(folder)


ODD = [
    {"step": 3, "reward": "much", "kl": [1], "loss": {"a": 1}, "length": 1e308, "accuracy": True},
    {"step": 4, "reward": 10**299, "kl": -1e308, "loss": 5e-324, "length": -1e308},
    {"step": 2**53 - 1, "eval/gold": 1e300, "eval/proxy": "x", "eval/kl_nats": -1e308},
]
ODD_SUMMARY = {
    **{
        f"{name}_{end}": "x" for name in ("gold", "proxy", "kl_nats") for end in ("before", "after")
    },
    "peak_memory_gib": "much",
    "tokens_per_second": {},
    "reliability": {"predicted": [None, 1e300], "observed": [2, 0.5], "count": [0, 1e308]},
}


def test_render_of_values_that_are_no_numbers(folder):
    """What is none is left out, or a dash; the page stands."""
    for name, rows in {
        "metrics.jsonl": ODD,
        "samples.jsonl": [{"step": 4, "split": "eval"}],
    }.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(ODD_SUMMARY))
    sparse = {"models": {}, "step": ODD[-1]["step"], "against": {}, "win_rate": {"gold": None}}
    sparse |= {"best_of_n": {}, "equal_kl": {"x": 1.0}, "pass_at_k": {"rate": [1.0]}}
    (folder / "evaluation.json").write_text(changed(**sparse))
    config = {"algorithm": 5, "model": [1], "steps": {"a": "\ud800"}}
    (folder / "config.yaml").write_text(json.dumps(config | {"steps": "many"}))
    (folder / "diagnosis.json").write_text('{"findings": [{"name": "\\ud800", "evidence": [1]}]}')
    page = Reader(render([read_run(folder)]))
    assert "run: " + str(folder) in page.texts
    assert "many" in " ".join(page.texts)
    assert "?" in page.texts
    Reader(render([read_run(folder), read_run(folder)]))


def test_render_lets_nothing_in_from_elsewhere(folder):
    attributes = dict(Reader(render([read_run(folder)])).attributes)
    assert attributes["http-equiv"] == "Content-Security-Policy"
    text = render([read_run(folder)])
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    # Before all that it holds for.
    assert text.index(policy) < text.index("<style>")


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


def test_session_stands_without_a_report(tmp_path, caplog):
    Session.report(SimpleNamespace(output=tmp_path))
    assert "no report: " in caplog.text
    assert "not the output folder of a run" in caplog.text


def test_fields_of_nested_config():
    config = {"a": {"b": 1}, "c": [{"d": 2}, 3], "e": [], "f": None}
    assert dict(fields(config)) == {"a.b": 1, "c.0.d": 2, "c.1": 3, "e": [], "f": None}

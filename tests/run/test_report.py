"""The page about runs: what it shows, that all of it is escaped, and that it needs no network."""

import base64
import hashlib
import json
import os
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jaxrlhf.apps import cli
from jaxrlhf.config import PPOConfig, RewardConfig, RLOOConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.run.comparison import compare
from jaxrlhf.run.page import fields
from jaxrlhf.run.report import read_run, render, write_report
from jaxrlhf.run.session import Session
from jaxrlhf.run.texts import question, spaced, turns

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
    {"step": 1, "prompt": "in training", "completion": "of a training prompt", "reward": 0.0},
    sample(0, EVIL, "before it"),
    sample(0, EVIL, "its second"),
    sample(2, EVIL, "between"),
    sample(4, EVIL, f"after {EVIL}"),
]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def write_run(folder, **changes):
    folder.mkdir(parents=True)
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
    assert page.tags.count("script") == 2  # of two pages, each its own
    assert not {"src", "href", "xlink:href", "onload", "onerror"} & {n for n, _ in page.attributes}
    assert not re.search(r"https?://|@import|url\(|import\(|eval\(|innerHTML", text)


def test_render_before_the_first_iteration(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 3\n")
    page = Reader(render([read_run(folder)]))
    assert "Model from random weights, 0 of 3 iterations: not finished." in page.texts
    assert "svg" not in page.tags


def test_render_shows_a_prompt_at_every_evaluation(folder):
    """The first draw of each; those of training apart, the newest."""
    texts = Reader(render([read_run(folder)])).texts
    said = [x.strip() for x in texts if x.strip()]
    found = said.index("before it")
    assert said[found - 1 : found + 4] == ["step 0", "before it", "gold 0.50", "step 2", "between"]
    assert f"after {EVIL}" in texts
    assert "its second" not in texts
    assert "of a training prompt" in texts


def test_render_says_that_a_completion_has_no_text(folder):
    path = folder / "samples.jsonl"
    path.write_text(path.read_text("utf-8").replace('"before it"', '" "'), "utf-8")
    said = [x.strip() for x in Reader(render([read_run(folder)])).texts if x.strip()]
    assert said[said.index("step 0") + 1] == "(no text)"


CHATS = [
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
    "<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<start_of_turn>system\nBe kind.<end_of_turn>\n<start_of_turn>user\nHi!<end_of_turn>\n"
    "<start_of_turn>model\n",
    "<|system|>\nBe kind.</s>\n<|user|>\nHi!</s>\n<|assistant|>\n",
]


@pytest.mark.parametrize("chat", CHATS)
def test_turns_of_rendered_chats(chat):
    assert turns(chat) == [("system", "Be kind."), ("user", "Hi!")]


def test_turns_of_plain_text():
    assert turns("The soup was") == [("", "The soup was")]
    assert turns("") == [("", "")]


def test_question_of_a_chat_that_begins_with_pages_of_advice():
    row = {"prompt": CHATS[0].replace("Be kind.", "Be kind. " * 100), "user": "Hi!"}
    system, user = question(row)
    assert system.text == f"{'Be kind. ' * 22}Be … {('Be kind. ' * 100)[-201:-1]}"
    assert user == ("user", "Hi!")
    assert question({"prompt": "system\nAdvice.\nuser\nHi!", "user": "Hi!"}) == [("user", "Hi!")]


def test_spaced_keeps_both_ends():
    assert spaced(range(0, 100, 10)) == [0, 20, 40, 70, 90]
    assert spaced([0, 5]) == [0, 5]
    assert spaced([]) == []


def test_render_leaves_out_what_never_changes(folder):
    rows = [{"step": i, "loss": float(i), "clip_fraction": 0.0, "skipped": 0.0} for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = " ".join(Reader(render([read_run(folder)])).texts)
    assert "Always the same: Clipped ratios 0.00; Updates skipped 0.00." in text
    assert "Clipped ratios (share)" not in text
    assert "What the update descends. Healthy: finite." in text


def test_render_leaves_out_default_rows(folder):
    """Counts stand in a sentence; what is 0 at both ends, nowhere."""
    more = {"completions": 90.0, "unknown": 0.0, "distinct_2": 0.5, "accuracy_gap_2": 0.75}
    both = {f"{name}_{end}": x for name, x in more.items() for end in ("before", "after")}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | both))
    texts = Reader(render([read_run(folder)])).texts
    assert "Means with 95 % intervals over 90 completions." in texts
    assert not {"Completions", "Without a score"} & set(texts)
    assert {"Distinct bigrams", "Accuracy, quarter 2 of the gaps"} <= set(texts)


def test_read_run_of_a_reward_model_with_gaps(folder):
    """The edges of its gaps are fewer than the bins of its curve."""
    curve = SUMMARY["reliability"] | {"gap_edges": [0.1]}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"reliability": curve}))
    assert "Share that came true over its probability" in render([read_run(folder)])


def test_a_pipeline_stands_for_its_last_run(tmp_path, capsys):
    for age, stage in enumerate(("sft", "ppo", "pairs")):
        folder = write_run(tmp_path / "demo" / stage, algorithm={"name": stage})
        (folder / "stage.json").write_text("{}")
        os.utime(folder / "config.yaml", (age, age))
    (folder / "config.yaml").unlink()  # pairs are no run
    assert cli.main(["report", str(tmp_path / "demo")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/demo/report.html\n"
    texts = Reader((tmp_path / "demo" / "report.html").read_text()).texts
    assert f"ppo: {tmp_path}/demo/ppo" in texts
    stages = [x for x in texts[texts.index("stage") :] if x.strip()]
    assert stages[3:5] == ["sft", "sft"]
    assert stages[6:8] == ["ppo", "ppo"]
    other = write_run(tmp_path / "other", seed=1)
    both = [str(tmp_path / "demo"), str(other), "--output", str(tmp_path / "both.html")]
    assert cli.main(["report", *both]) == 0
    assert cli.main(["report", str(other), str(tmp_path), "--output", "x.html"]) == 2
    assert f"error: {tmp_path}: not the output folder of a run" in capsys.readouterr().err


def test_differences_leave_out_defaults_that_only_one_has(tmp_path):
    ppo = json.loads(json.dumps(asdict(PPOConfig(gamma=0.9))))
    judged = {"rewards": [asdict(RewardConfig(function="a:b"))]}
    folders = [
        write_run(tmp_path / "a", algorithm=ppo, **judged),
        write_run(tmp_path / "b", algorithm=asdict(RLOOConfig()), rewards=[]),
    ]
    page = compare([read_run(folder) for folder in folders])
    section = next(x for x in page.sections if x.title == "Where the configs differ")
    rows = {row[0]: row[1:] for row in section.tables[0].rows}
    assert rows["algorithm.gamma"] == ("0.9", "–")
    assert rows["rewards.0.function"] == ("a:b", "–")
    assert "algorithm.lam" not in rows
    assert "rewards.0.weight" not in rows
    assert page.configs == {}


def test_render_shows_what_the_user_said_last_of_a_chat(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 2\n")
    chat = {"split": "eval", "prompt": "system\nPages of advice.\nuser\nWhy?", "user": "Why?"}
    rows = [{"step": step, **chat, "completion": f"after {step}"} for step in (0, 2)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path)
    for runs in ([run], [run, run]):
        texts = Reader(render(runs)).texts
        assert "Why?" in texts
        assert "after 2" in texts
        assert not any("advice" in text for text in texts)


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
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # Before all that it holds for.
    assert text.index(policy) < text.index("<style>")
    live = render([read_run(folder)], live=True)
    assert f"'sha256-{digest}'; connect-src 'self'; base-uri" in live


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

"""The command: dispatch, exit statuses, and how fast it answers."""

import errno
import json
import os
import re
import resource
from pathlib import Path

import pytest
from command import run

from jaxrlhf.apps import cli
from jaxrlhf.core.errors import InputError


def test_main_help_lists_commands(capsys):
    """In this order; without words it fails with it."""
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    listed = re.findall(r"^  (\w+) ", out, re.MULTILINE)
    assert listed == list(cli.COMMANDS)
    order = "train init plan demo pipeline eval report diagnose generate chat export serve tasks"
    order += " env completion"
    assert " ".join(listed) == order
    assert cli.main([]) == 2
    assert capsys.readouterr().err == out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "error: trian: unknown command (did you mean train?)\n"),
        (["train"], "error: train: CONFIG, the path of a YAML file, comes first\n"),
        (["train", "--steps", "3"], "error: train: CONFIG, the path of a YAML file, comes first\n"),
        (["train", "/no.yaml"], "error: /no.yaml: No such file or directory: give the path of"),
        (
            ["diagnose", "/no"],
            "error: /no: not the output folder of a run (it holds no config.yaml",
        ),
        (["generate", "smollm2"], "error: --prompt, --prompts: give at least one text"),
        (["generate", "smollm2", "--prompt", "a", "--n", "0"], "error: sample.n=0: must be at"),
        (["train", "x.yaml"], "error: steps=0: must be at least 1\n"),
    ],
)
def test_main_bad_input(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("steps: 0")
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (InputError("bad"), 2),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), 2),
        (KeyboardInterrupt(), 130),
        (None, 0),
    ],
)
def test_main_status(raised, status, monkeypatch):
    def command(words):
        assert words == ["a", "--b"]
        if raised:
            raise raised

    monkeypatch.setitem(cli.COMMANDS, "command", ("", command))
    assert cli.main(["command", "a", "--b"]) == status
    raised = ZeroDivisionError()  # what no input explains passes through
    with pytest.raises(ZeroDivisionError):
        cli.main(["command", "a", "--b"])


@pytest.mark.parametrize("words", [["demo", "--bad"], ["export", "run"], ["env", "x"]])
def test_typed_refuses_bad_words(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert f"jaxrlhf {words[0]} --help" in capsys.readouterr().err


@pytest.fixture
def sick_run(tmp_path):
    """The folder of a run that got no reward for most rows."""
    (tmp_path / "config.yaml").write_text("algorithm: {name: grpo}\nsteps: 5")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "score": 0.5, "valid": 0.25}\n{"st')
    return str(tmp_path)


def test_diagnose_prints_and_writes_findings(sick_run, capsys):
    assert cli.main(["diagnose", sick_run]) == 0
    out = capsys.readouterr().out
    assert f"{sick_run}: grpo, 1 of 5 iterations, 0 evaluations\n" in out
    assert "PROBLEM  excluded_rows\n  evidence: 75.0% of completions have no reward" in out
    text = (Path(sick_run) / "diagnosis.json").read_text()
    written = json.loads(text)
    assert written["step"] == 1
    assert [row["name"] for row in written["findings"]] == ["excluded_rows"]
    assert cli.main(["diagnose", sick_run, "--json"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(("valid", "status"), [(0.25, 1), (0.9, 0), (1.0, 0)])
def test_diagnose_strict_fails_on_a_problem_only(valid, status, sick_run):
    (Path(sick_run) / "metrics.jsonl").write_text(json.dumps({"step": 1, "valid": valid}) + "\n")
    if not status:
        assert cli.main(["diagnose", sick_run, "--strict"]) == 0
        return
    with pytest.raises(SystemExit) as stop:
        cli.main(["diagnose", sick_run, "--strict"])
    assert stop.value.code == status


def test_env_prints_versions_and_devices():
    result = run("env", TF_CPP_MIN_LOG_LEVEL="3")
    assert result.returncode == 0, result.stderr
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names[:4] == ["python", "jaxrlhf", "jax", "jaxlib"]
    assert re.search(r"^devices +8 x cpu \(cpu, 1 process\)$", result.stdout, re.MULTILINE)


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    """``cuda`` would be there on a machine with a GPU: this one is nowhere."""
    config = Path(__file__).parents[2] / "configs" / "ppo_tiny.yaml"
    result = run("train", str(config), "--output", str(tmp_path / "run"), JAX_PLATFORMS="nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("error: JAX_PLATFORMS=nowhere: JAX finds no such device (")
    assert result.stderr.endswith("or leave JAX_PLATFORMS out, to run on what there is\n")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    result = run("env", JAX_PLATFORMS="nowhere")
    assert result.returncode == 0
    assert re.search(r"^devices +none: JAX_PLATFORMS=nowhere: ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [(["--help"], 0.5), (["train", "--help"], 1.5), (["demo", "--help"], 1.0)],
)
def test_help_is_fast_and_does_not_import_jax(words, seconds):
    code = (
        "import atexit, sys;"
        "atexit.register(lambda: print('jax' in sys.modules or 'transformers' in sys.modules));"
        "from jaxrlhf.apps.cli import main; sys.exit(main())"
    )
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run(*words, code=code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith("False\n")
    assert min(spent) < seconds

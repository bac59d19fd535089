"""The command: its errors, what it prints, and that it asks for neither data nor weights."""

import json
import os
import re
import subprocess
import sys

import pytest
import runs

from jaxrlhf.apps import cli
from jaxrlhf.config import MeshConfig, dump


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5e"], "error: --topology v5e: v5e takes 2 sizes, as in v5e:16x16\n"),
        (["--topology", "abacus:3"], "error: --topology abacus:3: unknown device; give v4, v5e"),
        (["--topology", "cpu:8", "--mean-length", "0"], "error: --mean-length 0: must be at least"),
        (["--topology", "cpu:8", "--memory", "-1"], "error: --memory -1: must be above 0 GiB"),
        (["--topology", "cpu:8", "--mean-length", "nan"], "error: --mean-length nan: must be at"),
        (["--topology", "cpu:8", "--mean-length", "inf"], "error: --mean-length inf: must be at"),
        (["--topology", "cpu:8", "--memory", "nan"], "error: --memory nan: must be above 0 GiB"),
        (["--topology", "cpu:8", "--memory", "inf"], "error: --memory inf: must be above 0 GiB"),
        (["--topology", "cpu:8"], "error: /no.yaml: No such file or directory"),
    ],
)
def test_plan_bad_input(words, message, capsys):
    assert cli.main(["plan", "/no.yaml", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_plan_needs_a_topology(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "x.yaml"])
    assert "--topology" in capsys.readouterr().err


def plan(path, *words):
    code = "import sys; from jaxrlhf.apps.cli import main; sys.exit(main(['plan', *sys.argv[1:]]))"
    env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        [sys.executable, "-c", code, path, "--topology", "cpu:2", *words],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(dump(runs.ppo(tmp_path, mesh=MeshConfig())))
    (tmp_path / "prompts.jsonl").unlink()
    return str(file)


def test_plan_prints_json(path):
    result = plan(path, "--json", "--optim.microbatches", "2")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["devices"], found["mesh"]["data"], found["fits"]) == (2, 2, True)
    assert found["advice"] is None
    assert "compiling update" in result.stderr


def test_plan_refuses_what_does_not_fit(path):
    result = plan(path, "--memory", "0.00001")
    assert result.returncode == 2
    assert "KV cache" in result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: does not fit 0.00 GiB: sample needs")
    assert last.endswith(
        "take more devices, or LoRA, optim.state_dtype: bfloat16, reference.offload"
    )


def test_plan_refuses_a_mean_that_no_response_reaches(path, capsys):
    assert cli.main(["plan", path, "--topology", "cpu:2", "--mean-length", "9"]) == 2
    err = capsys.readouterr().err
    assert err == "error: --mean-length 9: above sample.max_new_tokens=8: lower it\n"


def test_plan_advice_fits_when_followed(path):
    words = ["--sample.n", "16"]
    found = json.loads(plan(path, "--json", *words).stdout)
    peak = {step["name"]: step["peak"] for step in found["steps"]}
    others = max(size for name, size in peak.items() if name != "update")
    assert peak["update"] > others
    words += ["--memory", repr((peak["update"] + others) / 2 / 2**30)]
    refused = plan(path, *words)
    assert refused.returncode == 2
    flags = re.search(r"; fits with (.*): [\d.]+ GiB", refused.stderr)[1].split()
    followed = plan(path, *words, *flags)
    assert followed.returncode == 0, followed.stderr
    assert "\nfits: " in followed.stdout

"""The command: what it prints and refuses, that its advice fits, and which configs are tried.

It asks for neither data nor weights. Candidates are listed without being compiled.
"""

import json
import os
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import runs
from command import run

from jaxrlhf.apps import cli
from jaxrlhf.config import MeshConfig, check_mesh, dump, rows_at_once
from jaxrlhf.study.plan import advice


def plan_on(too_large, **sizes):
    mesh = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1, **sizes}
    steps = tuple(SimpleNamespace(name=name) for name in too_large)
    return SimpleNamespace(mesh=mesh, devices=8, too_large=steps)


def test_further_splits_weights_and_tokens():
    assert list(advice._further(plan_on((), data=2, fsdp=2, tensor=2))) == [
        (4, 1, 2),
        (1, 2, 2),
        (2, 2, 2),
        (1, 4, 2),
        (2, 1, 4),
        (1, 2, 4),
    ]


def test_further_keeps_context():
    found = list(advice._further(plan_on((), data=2, fsdp=2, context=2)))
    assert found[0] == (4, 2, 1)
    assert all(context >= 2 and fsdp * context >= 4 for fsdp, context, _ in found)


def test_ladder_of_rows_too_long_for_a_device_comes_to_context(tmp_path):
    """A microbatch is down to one row for each piece of the batch: its tokens are split next."""
    config = replace(runs.ppo(tmp_path), mesh=MeshConfig(fsdp=8, data=1))
    tried = list(advice._ladder(config, plan_on(("update",), fsdp=8)))
    assert tried[0].model.remat != config.model.remat
    assert tried[0].mesh == config.mesh
    context = next(x for x in tried if x.mesh.context == 2)
    assert context.mesh == MeshConfig(data=1, fsdp=4, tensor=1, context=2)
    for other in tried:
        decoder, rows = other.model.decoder, rows_at_once(other)
        assert check_mesh(other.mesh, decoder, 8, rows) == other.mesh
    smallest = min(rows_at_once(x) for x in tried if x.mesh == context.mesh)
    assert smallest < rows_at_once(config)
    assert "--mesh.fsdp 4 --mesh.context 2" in advice.flags(config, context)


def test_layouts_keep_context(tmp_path):
    config = runs.ppo(tmp_path)
    tried = list(advice._layouts(config, plan_on((), data=2, context=4)))
    assert {x.mesh.context for x in tried} == {4}
    assert {x.mesh.data * x.mesh.fsdp * x.mesh.tensor for x in tried} == {2}


def test_advice_when_nothing_helps(config, planned, cpu):
    tight = replace(planned, memory=1000.0)
    assert advice.advise(config, cpu, tight) is None
    assert "take more devices" in advice.advice(None)


def test_search_ranks_what_fits(config, planned, monkeypatch, cpu):
    monkeypatch.setattr("jaxrlhf.study.plan.advice.TRIES", 2)
    found = advice.search(config, cpu, planned)
    assert len(found) == 2
    assert found[0].plan.time <= found[1].plan.time
    assert "microbatches" in advice.ranking(found)


def test_table_shows_everything(planned):
    text = advice.table(planned)
    for word in ("KV cache", "all-gather", "share", "sample", "critic_update", "nominal", "fits: "):
        assert word in text


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
    """The command, here."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ):
        status = cli.main(["plan", path, "--topology", "cpu:2", *words])
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(dump(runs.ppo(tmp_path, mesh=MeshConfig())))
    (tmp_path / "prompts.jsonl").unlink()
    return str(file)


def test_plan_prints_json(path):
    """In a process of its own, which asks for the devices."""
    words = ["plan", path, "--topology", "cpu:2", "--json", "--optim.microbatches", "2"]
    result = run(*words, XLA_FLAGS="--xla_backend_optimization_level=0")
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
    assert last.startswith("error: does not fit 0.00 GiB: lay_out needs")
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
    assert f"update needs {peak['update'] / 2**30:.2f} GiB" in refused.stderr
    flags = re.search(r"; fits with (.*): [\d.]+ GiB", refused.stderr)[1].split()
    assert "--model.remat" in flags
    followed = plan(path, *words, *flags)
    assert followed.returncode == 0, followed.stderr
    assert "\nfits: " in followed.stdout

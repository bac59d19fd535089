"""The document of real sizes: made of plans in a folder, and of configs that can be laid out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxrlhf.config import check, check_mesh, load, rows_at_once
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.chips import GIB
from jaxrlhf.models.load import build
from jaxrlhf.study.plan import scale
from jaxrlhf.study.plan.compiled import Plan, Step, as_json, from_json
from jaxrlhf.study.plan.scale import Job, job_of, main, plan_of, scaling, weak_jobs
from jaxrlhf.study.plan.topology import parse

CONFIGS = sorted(Path("configs/scale").glob("*.yaml"))
STEP = Step(
    name="update",
    calls=2,
    bytes={"parameters": 1.0 * GIB, "temporaries": 0.5 * GIB},
    flops=4e12,
    moved=1e9,
    collectives={"all-gather": (3, 2e9)},
    seconds={"compute": 3.0, "memory": 2.0, "links": 1.0},
)
PLAN = Plan(
    topology="v5p:4x4x4",
    chip="v5p",
    devices=64,
    mesh={"data": 1, "fsdp": 8, "tensor": 8},
    memory=2.0 * GIB,
    steps=(STEP,),
    remarks=("a remark",),
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_can_be_laid_out(path):
    config, topology = load(path), parse(job_of(path).topology)
    check(config)
    check_mesh(config.mesh, build(config.model).decoder, topology.devices, rows_at_once(config))
    header = path.read_text(encoding="utf-8").split("algorithm:")[0]
    assert f"jaxrlhf plan {path} --topology" in header
    assert f"jaxrlhf train {path} " in header


def test_configs_are_of_every_size_algorithm_and_machine():
    names = {path.stem for path in CONFIGS}
    for part in ("llama31_8b", "llama31_70b", "qwen3_8b", "qwen3_32b", "gemma", "_ppo_", "_grpo_",
                 "v5e256", "v5p512", "h100", "h200"):  # fmt: skip
        assert any(part in name for name in names), part


def test_from_json_is_the_inverse():
    assert from_json(json.loads(json.dumps(as_json(PLAN)))) == PLAN


def test_job_of_needs_a_topology(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("# A title.\nalgorithm: {name: sft}\n")
    with pytest.raises(InputError, match=r"x\.yaml: no line '# Plan: … --topology NAME'"):
        job_of(path)


def test_weak_jobs_have_as_many_rows_a_chip():
    jobs = weak_jobs(*scale.WEAK)
    chips = [parse(job.topology).devices for job in jobs]
    assert chips == [64, 128, 256, 512]
    assert {job.prompts / n for job, n in zip(jobs, chips, strict=True)} == {0.25}
    assert jobs[2] == job_of(scale.WEAK[0])
    assert jobs[0].words.endswith("--topology v5p:4x4x4 --mesh.fsdp -1 --data.batch-size 16")
    for job in jobs:
        config = load(job.config, job.changes)
        decoder = build(config.model).decoder
        check_mesh(config.mesh, decoder, parse(job.topology).devices, rows_at_once(config))


def test_scaling_by_hand():
    """Two calls of 3 s where all overlaps, of 6 s where nothing does: a sixth is the exchanges'."""
    slow = replace(STEP, seconds={"compute": 3.0, "memory": 2.0, "links": 5.0})
    jobs = weak_jobs(*scale.WEAK)
    plans = [PLAN, None, replace(PLAN, devices=256, steps=(slow,)), None]
    lines = scaling(scale.WEAK[0], list(zip(jobs, plans, strict=True))).splitlines()
    first, missing, third = lines[-5:-2]
    assert first.split("  ")[-1] == "16.7%"
    for cell in ("64", "1 · 8 · 8", "16", "1.50", "6", "100.0%", "12", "4"):
        assert cell in [x.strip() for x in first.split("  ")], cell
    assert "no plan yet" in missing
    assert third.split()[-3:] == ["20", "4", "50.0%"]
    assert "60.0%" in third


def test_plan_of_makes_what_is_not_there_once(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        """algorithm: {name: sft}
model:
  decoder: {vocab: 16, embed: 8, layers: 1, heads: 2, kv_heads: 1, head_dim: 4, mlp: 8}
  tokenizer: words:a b
data: {train: no.jsonl, batch_size: 2, max_tokens: 8}
"""
    )
    job = Job("tiny", config, "cpu:2", 2)
    assert plan_of(job, tmp_path / "plans", cached=True) is None
    found = plan_of(job, tmp_path / "plans")
    assert found.devices == 2
    job = job._replace(topology="abacus:3")  # would be refused
    assert plan_of(job, tmp_path / "plans") == found
    with pytest.raises(InputError, match="--topology abacus:3: ended with status 2 and no plan"):
        plan_of(job, tmp_path / "other")


def test_main_writes_the_document_of_what_is_planned(tmp_path, capsys):
    (tmp_path / f"{CONFIGS[0].stem}.json").write_text(json.dumps(as_json(PLAN)))
    assert main([str(tmp_path), "--cached"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n## ") == len(CONFIGS) + 1
    assert text.count("fits: 1.50 GiB of 2.00, 0.50 to spare") == 1
    assert text.count("No plan of it has been made yet.") == len(CONFIGS) - 1
    assert "note: a remark" in text

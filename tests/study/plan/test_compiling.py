"""Plans of tiny runs on fake devices: their bytes, loops, shares, and what must not be in them."""

import json
from dataclasses import replace

import jax
import pytest
import runs

from jaxrlhf.config import (
    DAPOConfig,
    MeshConfig,
    ModelConfig,
    PPOConfig,
    ReferenceConfig,
    RewardConfig,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.run.setup import outline
from jaxrlhf.study.plan.advice import advise, flags, search
from jaxrlhf.study.plan.compiling import plan, with_stand_ins
from jaxrlhf.study.plan.planned import ARGUMENTS, KINDS, as_json
from jaxrlhf.study.plan.report import advice, ranking, table, verdict
from jaxrlhf.study.plan.steps import calls_of, decode_trips
from jaxrlhf.study.plan.topology import parse

CPU = parse("cpu:8")
MESH = MeshConfig(2, 2, 2)


def config_of(folder, **changes):
    """Policy, critic, reference and a reward model that is not there; no data, no tokenizer."""
    config = runs.ppo(folder, critic=runs.SEPARATE, mesh=MESH, **changes)
    return replace(
        config,
        model=replace(config.model, tokenizer="no/such/folder"),
        data=replace(config.data, train="no/such.jsonl"),
        rewards=(RewardConfig(model="no/such/run"),),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return config_of(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def planned(config):
    return plan(config, CPU)


def test_plan_has_every_step_of_an_iteration(planned):
    calls = {step.name: step.calls for step in planned.steps}
    assert calls == {
        "sample": 1, "reward 0": 1, "reference": 1, "value": 1, "targets": 1,
        "take": 4, "critic_update": 4, "update": 4,  # 2 epochs of 2 minibatches
    }  # fmt: skip
    assert planned.mesh == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert any("no/such/run: nothing is there yet" in remark for remark in planned.remarks)


def test_plan_of_the_decode_loop(planned):
    sample = planned.steps[0]
    assert sample.trips == 7
    assert sample.bytes["kv_cache"] == 2 * 2 * 4 * 12 * 1 * 8 * 4
    assert set(sample.bytes) <= set(KINDS)


def test_plan_states_the_arguments_that_the_compiler_has(planned):
    for step in planned.steps:
        kinds = sum(step.bytes[kind] for kind in ARGUMENTS)
        assert kinds == pytest.approx(step.arguments, rel=0.01, abs=32), step.name


def test_plan_counts_elsewhere_what_other_steps_need(planned):
    held = {s.name: s.bytes["parameters"] + s.bytes["optimizer"] for s in planned.steps}
    everywhere = {s.name: held[s.name] + s.bytes["elsewhere"] for s in planned.steps}
    assert len({round(size) for size in everywhere.values()}) == 1
    assert held["update"] > 2.5 * held["reference"] > 0


def test_plan_time_and_shares(planned):
    whole = as_json(planned)
    assert sum(step["share"] for step in whole["steps"]) == pytest.approx(1)
    json.dumps(whole)
    update = planned.steps[-1]
    assert update.time == max(update.flops / 1e11, update.moved / 2e10, update.sent / 1e10)


def test_plan_mean_length(config, planned):
    short = plan(config, CPU, mean_length=1, names=("sample",)).steps[0]
    assert short.trips == 0
    long = planned.steps[0]
    assert short.flops < long.flops
    assert short.sent < long.sent


def test_decode_trips(config):
    assert decode_trips(config, 16, None) == 7
    assert decode_trips(config, 16, 1e9) == 7
    two = replace(config, sample=replace(config.sample, max_new_tokens=2))
    # the longest of 3 rows has 1 token, and 2 unless all three end at the first: 1 + 7/8, less 1
    assert decode_trips(two, 3, 2.0) == 1


def test_calls_of_other_runs(tmp_path):
    mesh = make_mesh(MESH)
    with jax.set_mesh(mesh):
        shared = replace(config_of(tmp_path), critic=runs.ppo(tmp_path).critic)
        rescored = replace(shared, algorithm=PPOConfig(old_logp="rescore", minibatches=1))
        names = set(calls_of(outline(rescored, mesh)))
        assert {"rescore", "update"} <= names
        assert not {"value", "take", "critic_update"} & names
        dapo = replace(shared, algorithm=DAPOConfig(rounds=3))
        assert calls_of(outline(dapo, mesh))["sample"].calls == 3
        dpo = replace(runs.of("dpo", tmp_path), mesh=MESH)
        assert set(calls_of(outline(dpo, mesh))) == {"reference", "update"}
        held_out = replace(shared, data=replace(shared.data, eval="no/such.jsonl"))
        found = calls_of(outline(held_out, mesh))
        assert (found["eval_sample"].calls, found["eval_reference"].calls) == (0, 0)


@pytest.mark.parametrize(
    "name", ["sft", "reward_model", "dpo", "kto", "bco", "online_dpo", "remax"]
)
def test_plan_of_every_kind_of_run(name, tmp_path):
    found = plan(replace(runs.of(name, tmp_path), mesh=MeshConfig(4, 2, 1)), CPU)
    assert found.steps[-1].name == "update"
    assert found.steps[-1].flops > 0


def test_with_stand_ins_blanks_what_is_not_there(config):
    there, said = with_stand_ins(
        replace(config, critic=replace(config.critic, path="no/such"), rewards=())
    )
    assert there.critic.path == ""
    assert said == ["critic.path=no/such: nothing is there yet: taken to be of the policy's shape"]


def test_plan_refuses_a_model_that_is_not_there(config):
    with pytest.raises(InputError, match="no such folder"):
        plan(replace(config, model=ModelConfig(path="no/such")), CPU)


def test_advice_makes_it_fit_when_followed(tmp_path):
    config = replace(config_of(tmp_path), sample=replace(config_of(tmp_path).sample, n=16))
    large = plan(config, CPU)
    update = max(large.steps, key=lambda step: step.peak)
    assert "update" in update.name
    second = max(step.peak for step in large.steps if "update" not in step.name)
    memory = (second + large.peak) / 2
    tight = plan(config, CPU, memory=memory)
    assert not tight.fits
    change = advise(config, CPU, tight)
    assert change is not None
    assert plan(change.config, CPU, memory=memory).fits
    assert change.flags == flags(config, change.config)
    assert "--model.remat" in change.flags
    assert f"{update.name} needs {update.peak / 2**30:.2f} GiB" in verdict(tight)
    assert advice(change).startswith("fits with --model.remat ")


def test_advice_when_nothing_helps(config, planned):
    tight = replace(planned, memory=1000.0)
    assert advise(config, CPU, tight) is None
    assert "take more devices" in advice(None)


def test_search_ranks_what_fits(config, planned, monkeypatch):
    monkeypatch.setattr("jaxrlhf.study.plan.advice.TRIES", 2)
    found = search(config, CPU, planned)
    assert len(found) == 2
    assert found[0].plan.time <= found[1].plan.time
    assert "microbatches" in ranking(found)


def test_plan_counts_what_is_offloaded_only_while_it_is_read(config, planned):
    away = replace(
        config,
        reference=ReferenceConfig(offload=True),
        rewards=(replace(config.rewards[0], offload=True),),
    )
    names = ("reward 0", "reference", "value", "update")
    found = plan(away, CPU, names=names)
    before = {step.name: step for step in planned.steps}
    saved = {s.name: before[s.name].peak - s.peak for s in found.steps}
    reference, reward = (before[name].bytes["parameters"] for name in ("reference", "reward 0"))
    unread = saved["value"] - reference - reward  # the reward model's output projection, if any
    assert unread == 0
    assert saved == pytest.approx(
        {"reward 0": reference, "reference": reward, "value": reference + reward,
         "update": reference + reward}
    )  # fmt: skip
    assert sum("come from host memory" in remark for remark in found.remarks) == 2


def test_plan_bfloat16_state_takes_half(config, planned):
    small = replace(config, optim=replace(config.optim, state_dtype="bfloat16"))
    step = plan(small, CPU, names=("update",)).steps[0]
    before = planned.steps[-1].bytes
    assert step.bytes["optimizer"] == pytest.approx(before["optimizer"] / 2, abs=32)
    assert step.bytes["parameters"] == before["parameters"]


def test_table_shows_everything(planned):
    text = table(planned)
    for word in ("KV cache", "all-gather", "share", "sample", "critic_update", "nominal", "fits: "):
        assert word in text


def test_arguments_are_the_kinds_that_come_first():
    assert KINDS[:3] == ARGUMENTS

"""Plans of tiny runs on fake devices: their bytes, loops and shares; and the devices themselves."""

import json
import re
from dataclasses import replace

import jax
import pytest
import runs

from jaxrlhf.config import MeshConfig, ModelConfig, ReferenceConfig, check, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.study.plan.advice import table, verdict
from jaxrlhf.study.plan.compiled import (
    ARGUMENTS,
    KINDS,
    as_json,
    from_json,
    mesh_of,
    plan,
    with_stand_ins,
)
from jaxrlhf.study.plan.topology import chip_of, parse


def test_plan_has_every_step_of_an_iteration(planned):
    calls = {step.name: step.calls for step in planned.steps}
    assert calls == {
        "lay_out": 1, "sample": 1, "reward 0": 1, "reference": 1, "value": 1, "targets": 1,
        "take": 4, "critic_update": 4, "update": 4,  # 2 epochs of 2 minibatches
    }  # fmt: skip
    assert planned.mesh == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert any("no/such/run: nothing is there yet" in remark for remark in planned.remarks)


def test_plan_of_the_decode_loop(planned):
    sample = planned.steps[1]
    assert sample.trips == 7
    assert sample.bytes["kv_cache"] == 2 * 2 * (2 * 4 + 4 * 8) * 1 * 8 * 4
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


def test_plan_mean_length(config, planned, cpu):
    short = plan(config, cpu, mean_length=1, names=("sample",)).steps[0]
    assert short.trips == 0
    long = planned.steps[1]
    assert short.flops < long.flops
    assert short.sent < long.sent


def test_plan_of_slots_that_are_filled_again(config, planned, cpu):
    """16 rows on four devices, two slots each: two rounds of 7 steps, each of half the rows."""
    slots = replace(config, sample=replace(config.sample, slots=8))
    found, whole = plan(slots, cpu, names=("sample",)).steps[0], planned.steps[1]
    assert (found.trips, whole.trips) == (14, 7)
    assert found.flops == pytest.approx(whole.flops, rel=0.02)
    # prompts, their copies in slots, and tokens
    assert found.bytes["kv_cache"] == 2 * 2 * (2 * 4 + 2 * 4 + 2 * 8) * 1 * 8 * 4
    assert found.token[0] < whole.token[0]


@pytest.mark.parametrize(
    "name",
    ["sft", "reward_model", "listwise_reward_model", "process_reward_model", "dpo", "kto", "bco",
     "online_dpo", "remax", "gkd"],
)  # fmt: skip
def test_plan_of_every_kind_of_run(name, tmp_path, cpu):
    found = plan(replace(runs.of(name, tmp_path), mesh=MeshConfig(4, 2, 1)), cpu)
    assert found.steps[-1].name == "update"
    assert found.steps[-1].flops > 0


def test_with_stand_ins_blanks_what_is_not_there(config):
    there, said = with_stand_ins(
        replace(config, critic=replace(config.critic, path="no/such"), rewards=())
    )
    assert there.critic.path == ""
    assert said == ["critic.path=no/such: nothing is there yet: taken to be of the policy's shape"]


def test_with_stand_ins_takes_the_policy_for_its_teacher():
    config = load("configs/gkd_smollm2.yaml")
    missing = replace(config, reference=ReferenceConfig("no/such"))
    there, (said,) = with_stand_ins(missing)
    assert there.reference.path == "smollm2"
    assert said.startswith("reference.path=no/such: nothing is there yet")
    check(there)


def test_plan_refuses_a_model_that_is_not_there(config, cpu):
    with pytest.raises(InputError, match="no file or folder here"):
        plan(replace(config, model=ModelConfig(path="no/such")), cpu)


def test_plan_counts_what_is_offloaded_only_while_it_is_read(config, planned, cpu):
    away = replace(
        config,
        reference=ReferenceConfig(offload=True),
        rewards=(replace(config.rewards[0], offload=True),),
    )
    names = ("reward 0", "reference", "value", "update")
    found = plan(away, cpu, names=names)
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


def test_plan_bfloat16_state_takes_half(config, planned, cpu):
    small = replace(config, optim=replace(config.optim, state_dtype="bfloat16"))
    step = plan(small, cpu, names=("update",)).steps[0]
    before = planned.steps[-1].bytes
    assert step.bytes["optimizer"] == pytest.approx(before["optimizer"] / 2, abs=32)
    assert step.bytes["parameters"] == before["parameters"]


def test_arguments_are_the_kinds_that_come_first():
    assert KINDS[:4] == ARGUMENTS


def test_mesh_of_devices_that_are_here():
    found = mesh_of(MeshConfig(), parse("here"))
    assert list(found.devices.flat) == jax.devices()
    assert chip_of(found.devices.flat[0].device_kind) == "cpu"
    with pytest.raises(InputError, match=r"cpu:64: jax has 8 CPU devices: set XLA_FLAGS=--xla"):
        mesh_of(MeshConfig(), parse("cpu:64"))


def test_mesh_of_fake_devices_has_no_slices():
    found = mesh_of(MeshConfig(data=2, tensor=2, slices=2), parse("cpu:4"))
    assert dict(found.shape) == {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}


def test_mesh_of_tpu_slices():
    pytest.importorskip("libtpu", reason="the TPU compiler is an extra: jaxrlhf[plan]")
    found = mesh_of(MeshConfig(data=4, fsdp=2, tensor=2, slices=2), parse("v5e:2x4"))
    slices = [{x.slice_index for x in found.devices[i].flat} for i in range(4)]
    assert slices == [{0}, {0}, {1}, {1}]


def test_mesh_of_tpus_without_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"v5e:2x4: libtpu.* pip install -e .*\[plan\]"):
        mesh_of(MeshConfig(), parse("v5e:2x4"))


def test_mesh_of_tpus():
    pytest.importorskip("libtpu", reason="the TPU compiler is an extra: jaxrlhf[plan]")
    for name, count in (("v5e:2x4", 8), ("v4:2x2x4", 16), ("v5p:2x2x2", 8), ("v6e:2x2", 4)):
        assert mesh_of(MeshConfig(), parse(name)).size == count
    with pytest.raises(InputError, match="libtpu refuses it"):
        mesh_of(MeshConfig(), parse("v5e:3x5"))


@pytest.mark.parametrize(
    ("said", "verdict_says"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (300.00G) "
            "exceeds available HBM (15.75G).",
            r"update needs 300\.\d\d GiB, \d+\.\d\d more$",
        ),
        (
            "RESOURCE_EXHAUSTED: something or other",
            r"update needs \d+\.\d\d GiB or more, and its compiler ran out of memory$",
        ),
    ],
)
def test_plan_of_a_step_that_the_compiler_refuses(said, verdict_says, config, cpu, monkeypatch):
    def compile(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    found = plan(config, cpu, names=("update",))
    (step,) = found.steps
    assert found.too_large == (step,)
    assert min(step.bytes.values()) >= 0
    assert step.peak >= found.memory * (1 - 1e-9)
    assert re.search(verdict_says, verdict(found))
    assert "!" in next(line for line in table(found).splitlines() if line.startswith("update"))
    assert from_json(json.loads(json.dumps(as_json(found)))) == found


def test_from_json_reads_a_plan_of_before(planned):
    old = as_json(planned)
    for step in old["steps"]:
        del step["at_least"]
    assert from_json(old) == planned

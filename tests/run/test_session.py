"""A run's folder: its lock, its fingerprint, and going on bit for bit where it stopped."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.config import (
    Config,
    DataConfig,
    DecoderConfig,
    DPOConfig,
    EvalConfig,
    IsolateConfig,
    ListwiseRewardModelConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
    RewardConfig,
    RewardModelConfig,
    SFTConfig,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import Loader
from jaxrlhf.rewards.isolation import Isolated
from jaxrlhf.run import loop
from jaxrlhf.run.fingerprint import check_alike, check_fingerprint, fingerprint, told
from jaxrlhf.run.session import Session, lock
from jaxrlhf.run.setup import setup

HOLD = """
import sys, time
from jaxrlhf.run.session import lock
file = lock(sys.argv[1])
print("locked", flush=True)
time.sleep(60)
"""


def test_lock_second_run(tmp_path):
    with lock(tmp_path / "run"):
        with pytest.raises(InputError, match=r"another run writes there \(pid \d+"):
            lock(tmp_path / "run")
        with lock(tmp_path / "other"):
            pass
    with lock(tmp_path / "run"):
        pass


def test_lock_released_by_kill(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "locked\n"
            with pytest.raises(InputError, match=f"pid {child.pid}"):
                lock(tmp_path)
        finally:
            child.kill()
    lock(tmp_path).close()


def test_lock_on_a_disk_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("jaxrlhf.run.session.fcntl.flock", refuse)
    lock(tmp_path).close()
    assert ".lock: cannot be locked (Function not implemented): start no second" in caplog.text


def test_lock_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        lock(tmp_path / "file" / "run")


def base():
    return Config(
        data=DataConfig(train="a.jsonl"),
        optim=OptimConfig(schedule="linear"),
    )


def changed(**parts):
    config = base()
    for name, value in parts.items():
        old = getattr(config, name)
        new = dataclasses.replace(old, **value) if isinstance(value, dict) else value
        config = dataclasses.replace(config, **{name: new})
    return config


SHAPE = DecoderConfig(vocab=8, embed=4, layers=1, heads=1, kv_heads=1, head_dim=4, mlp=8)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"seed": 1}, "seed=1 (was 0)"),
        ({"data": {"batch_size": 16}}, "data.batch_size=16 (was 8)"),
        ({"data": {"train": "b.jsonl"}}, "data.train='b.jsonl' (was 'a.jsonl')"),
        ({"sample": {"n": 2}}, "sample.n=2 (was 4)"),
        ({"optim": {"learning_rate": 1e-3}}, "optim.learning_rate=0.001 (was 1e-05)"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype='bfloat16' (was 'float32')"),
        ({"model": {"decoder": SHAPE}}, "model.decoder={"),
        ({"model": {"lora": LoraConfig()}}, "model.lora={'rank': 16"),
        ({"critic": {"kind": "separate"}}, "critic.kind='separate' (was 'shared')"),
        ({"reference": {"path": "smollm2"}}, "reference.path='smollm2' (was '')"),
        ({"steps": 200}, "optim.steps=200 (was 100)"),
    ],
)
def test_check_fingerprint_difference(parts, message):
    saved = json.loads(json.dumps(fingerprint(base())))
    with pytest.raises(InputError) as error:
        check_fingerprint(saved, fingerprint(changed(**parts)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("algorithm", "field", "value"),
    [
        (DPOConfig(), "kind", "ipo"),
        (DPOConfig(), "mean_logp", True),
        (SFTConfig(), "train_on", "assistant"),
        (RewardModelConfig(), "normalise_on", "b.jsonl"),
        (ListwiseRewardModelConfig(), "as_pairs", True),
        (PointwiseRewardModelConfig(), "kind", "huber"),
        (ProcessRewardModelConfig(), "separator", "; "),
        (ProcessRewardModelConfig(), "aggregate", "product"),
    ],
)
def test_check_fingerprint_another_objective(algorithm, field, value):
    saved = json.loads(json.dumps(fingerprint(changed(algorithm=algorithm))))
    other = changed(algorithm=dataclasses.replace(algorithm, **{field: value}))
    with pytest.raises(InputError) as error:
        check_fingerprint(saved, fingerprint(other))
    old = getattr(algorithm, field)
    assert f"with algorithm.{field}={value!r} (was {old!r}): set" in str(error.value)


def test_check_fingerprint_estimator():
    """What is left out counts as what it stands for."""

    def saved(**settings):
        return json.loads(json.dumps(fingerprint(changed(algorithm=settings))))

    k1, k3 = fingerprint(changed(algorithm={"kl_estimator": "k1"})), saved(kl_estimator="k3")
    check_fingerprint(saved(), k1)
    for old, new in ((saved(), "k3"), (k3, None)):
        with pytest.raises(InputError, match=r"algorithm.kl_estimator='k\d' \(was 'k\d'\)"):
            check_fingerprint(old, fingerprint(changed(algorithm={"kl_estimator": new})))


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"algorithm": {"clip_low": 0.1, "kl_coef": 0.5, "dual_clip": 3.0}},
        {"mesh": {"fsdp": 2}},
        {"checkpoint": {"every": 5}},
        {"optim": {"microbatches": 2}},
        {"output": "elsewhere"},
        {"eval": {"every": 5}},
    ],
)
def test_check_fingerprint_same_run(parts):
    check_fingerprint(json.loads(json.dumps(fingerprint(base()))), fingerprint(changed(**parts)))


def test_check_fingerprint_all_differences():
    with pytest.raises(
        InputError,
        match=r"seed=1 \(was 0\), data.batch_size=16 \(was 8\)|"
        r"data.batch_size=16 \(was 8\), seed=1 \(was 0\)",
    ):
        check_fingerprint(
            fingerprint(base()), fingerprint(changed(seed=1, data={"batch_size": 16}))
        )


def test_check_fingerprint_facts_and_versions():
    check_fingerprint({"seed": 0}, {"seed": 0, "new_in_this_version": 3})
    with pytest.raises(InputError, match=r"rows=10 \(was 9\)"):
        check_fingerprint(fingerprint(base(), rows=9), fingerprint(base(), rows=10))


def test_check_alike_names_what_one_process_was_told_otherwise(monkeypatch, tmp_path):
    config = runs.sft(tmp_path)
    check_alike(told(config))
    others = [json.dumps(told(replace(config, **x))) for x in ({}, {"seed": 5, "steps": 9})]
    monkeypatch.setattr("jaxrlhf.run.fingerprint.exchange", lambda text: [text, *others])
    message = r"process 2 was told otherwise than .* steps=9 \(0: 4\), seed=5 \(0: 0\): start"
    with pytest.raises(InputError, match=message):
        loop.train(config, runs.one_device())
    assert not Path(config.output).exists()


def test_fingerprint_constant_rate_may_go_on():
    short = changed(optim={"schedule": "constant"})
    check_fingerprint(fingerprint(short), fingerprint(dataclasses.replace(short, steps=500)))


def test_check_fingerprint_same_rows_by_another_path():
    moved = changed(data={"train": "/home/a.jsonl"})
    same = {"rows": 9, "contents": "1f"}
    check_fingerprint(fingerprint(base(), **same), fingerprint(moved, **same))
    for saved in (fingerprint(base(), rows=9), fingerprint(base(), rows=9, contents="2e")):
        with pytest.raises(InputError, match=r"with data.train='/home/a.jsonl' \(was 'a.jsonl'\):"):
            check_fingerprint(saved, fingerprint(moved, **same))


def test_check_fingerprint_changed_rows():
    saved, now = (fingerprint(base(), rows=9, contents=x) for x in ("1f", "2e"))
    with pytest.raises(
        InputError, match=r"resume: the rows of a.jsonl have changed: put them back"
    ):
        check_fingerprint(saved, now)
    del saved["contents"]
    check_fingerprint(saved, now)


def test_check_fingerprint_changed_held_out_rows():
    saved, now = (fingerprint(base()) for _ in range(2))
    saved["eval"]["contents"], now["eval"]["contents"] = "1f", "2e"
    with pytest.raises(InputError, match=r"resume: the rows of data.eval have changed"):
        check_fingerprint(saved, now)


def test_fingerprint_leaves_out_what_is_not_read():
    sft = {"algorithm": SFTConfig()}
    check_fingerprint(
        fingerprint(changed(**sft)), fingerprint(changed(**sft, data={"max_prompt_tokens": 9}))
    )
    check_fingerprint(fingerprint(base()), fingerprint(changed(data={"max_tokens": 9})))
    for parts in ({**sft, "data": {"max_tokens": 9}}, {"data": {"max_prompt_tokens": 9}}):
        start = {name: x for name, x in parts.items() if name != "data"}
        with pytest.raises(InputError, match=r"tokens=9 \(was"):
            check_fingerprint(fingerprint(changed(**start)), fingerprint(changed(**parts)))


MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def with_lora(config):
    return replace(config, model=replace(config.model, lora=LoraConfig(rank=2, alpha=4)))


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_holds_one_state(lora, tmp_path):
    config = runs.ppo(tmp_path, steps=2, critic=runs.SEPARATE)
    config = with_lora(config) if lora else config
    loop.train(replace(config, steps=1), MESH)
    with jax.set_mesh(MESH):
        run = setup(config, MESH)
        fresh = jax.tree.leaves(run.states)
        assert not any(x.is_deleted() for x in fresh)
        with Session(run) as session:
            assert session.start == 1
            assert all(x.is_deleted() for x in fresh)
            loop.iterate(run, session, 1)  # nobody else wanted them


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward_model"])
def test_what_a_run_from_rows_was_before_is_measured_late(kind, tmp_path):
    def configured(name, steps, measured):
        config = runs.of(kind, tmp_path, steps=steps)
        rows = config.data.train if measured else ""
        return replace(config, data=replace(config.data, eval=rows), output=str(tmp_path / name))

    whole = loop.train(configured("whole", 3, True), MESH)
    loop.train(configured("late", 2, False), MESH)
    late = loop.train(configured("late", 3, True), MESH)
    for name in whole:
        if name.endswith(("_before", "_after")) and isinstance(whole[name], float):
            assert late[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7), name
    assert abs(whole["loss_before"] - whole["loss_after"]) > 1e-3


def test_start_of_a_reward_model_is_its_random_head(tmp_path):
    with jax.set_mesh(MESH):
        run = setup(runs.reward_model(tmp_path), MESH)
        first = jax.device_get(run.states["policy"].params)
        jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(loop.start_of(run)))
    assert np.abs(first["head"]["kernel"]).max() > 0


def test_trained_weights_are_all_that_is_read(tmp_path):
    config = runs.reward_model(tmp_path, steps=1)
    loop.train(config, MESH)
    loader = Loader(MESH)
    loader.trained(config.output)
    assert loader.weights == {}

    lora = with_lora(replace(config, output=str(tmp_path / "lora")))
    loop.train(lora, MESH)
    loader.trained(lora.output)
    assert len(loader.weights) == 1


def test_isolated_functions_are_started_once(tmp_path, monkeypatch):
    made = []
    init = Isolated.__init__
    monkeypatch.setattr(
        Isolated, "__init__", lambda self, *given: (made.append(given), init(self, *given))[1]
    )
    isolated = RewardConfig(function="jaxrlhf.data.words:goodness", isolate=IsolateConfig())
    config = runs.ppo(tmp_path, rewards=(isolated,), eval=EvalConfig(gold=(isolated,)))
    config = replace(config, data=replace(config.data, eval=config.data.train))
    with jax.set_mesh(MESH):
        run = setup(config, MESH)
    assert len(made) == 2  # one that is learnt from, one for the gold measure
    assert run.judge is not None
    assert isinstance(run.judge.sources[0].ask, Isolated)

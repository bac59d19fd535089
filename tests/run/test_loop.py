"""The loops: runs that resume bit-equal, dynamic sampling, minibatches, evaluations, summaries."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import one_device, trained
from targets import Target

from jaxrlhf.config import (
    DAPOConfig,
    EvalConfig,
    GRPOConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    PPOConfig,
    ReMaxConfig,
    RewardConfig,
    SampleConfig,
    load,
    save,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Batch
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.words import goodness
from jaxrlhf.mesh.notes import steps_in
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.rewards.judge import Judgement, has_signal
from jaxrlhf.run import loop
from jaxrlhf.run.loop import iterate
from jaxrlhf.run.session import Session
from jaxrlhf.run.setup import setup
from jaxrlhf.run.speed import TIMED
from jaxrlhf.steps import update


def lora(config):
    return replace(config, model=replace(config.model, lora=LoraConfig(rank=4, alpha=8)))


SMALL_STATE = OptimConfig(learning_rate=1e-3, state_dtype="bfloat16")
RUNS = {
    "ppo": runs.ppo,
    "ppo-lora": lambda folder: lora(runs.ppo(folder)),
    "ppo-separate": lambda folder: runs.ppo(folder, critic=runs.SEPARATE),
    "ppo-bfloat16-state": lambda folder: runs.ppo(folder, optim=SMALL_STATE),
    "ppo-adaptive": lambda folder: runs.ppo(
        folder, algorithm=PPOConfig(kl_controller="adaptive", kl_horizon=100.0)
    ),
    "reward_model": runs.reward_model,
    "sft": runs.sft,
    "sft-packed": runs.sft_packed,
}


@pytest.mark.parametrize("name", RUNS)
def test_train_resumed_is_bit_equal(name, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    whole, log = trained(RUNS[name](folders[0]))

    runs.interrupt(RUNS[name](folders[1]), 2)
    resumed, resumed_log = trained(RUNS[name](folders[1]))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    timing = set(TIMED)

    def kept(lines):
        return [{k: v for k, v in line.items() if k not in timing} for line in lines]

    assert kept(log) == kept(resumed_log)
    assert [line["step"] for line in log if "eval/loss" not in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("change", [lambda c: c, lora], ids=["full", "lora"])
def test_train_on_eight_devices_equals_one(change, tmp_path):
    results = []
    for name, mesh in {
        "one": one_device(),
        "eight": make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        sizes = MeshConfig(**dict(mesh.shape))
        config = change(runs.ppo(folder, steps=5, mesh=sizes))
        results.append((*trained(config, mesh), (folder / "run/samples.jsonl").read_text()))
    (one, _, words), (eight, _, words_eight) = results
    drop = [
        [{k: v for k, v in json.loads(line).items() if k != "reward"} for line in text.splitlines()]
        for text in (words, words_eight)
    ]
    assert drop[0] == drop[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0),
        one["policy"].params,
        eight["policy"].params,
    )


def test_iterate_draws_the_same_tokens_on_eight_devices(tmp_path):
    tokens = []
    for mesh in (one_device(), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        config = runs.ppo(tmp_path, mesh=MeshConfig(**dict(mesh.shape)), output=str(tmp_path))
        seen = []
        with jax.set_mesh(mesh):
            run = setup(config, mesh)
            session = Session(run)
            session.host["kl_coef"] = 0.05
            for step in range(5):
                session.states, _, rollout, _ = loop.iterate(run, session, step)
                seen.append(np.asarray(rollout.token_BT))
        tokens.append(np.stack(seen))
    np.testing.assert_array_equal(*tokens)


def test_iterate_first_ratio_is_one(tmp_path, monkeypatch):
    for source, tolerance in {"rescore": 1e-5, "sampler": 1e-4}.items():
        config = runs.ppo(
            tmp_path,
            algorithm=PPOConfig(old_logp=source, minibatches=2, epochs=2),
            optim=OptimConfig(learning_rate=0.0),
        )
        mesh = one_device()
        with jax.set_mesh(mesh):
            run = setup(config, mesh)
            session = Session(run)
            session.host["kl_coef"] = 0.05
            _, metrics, rollout, _ = loop.iterate(run, session, 0)
        assert abs(metrics["ratio_max"] - 1) <= tolerance
        assert metrics["clip_fraction"] == 0
        assert abs(metrics["kl"]) <= 1e-4  # the policy is the reference at the start
        assert len({tuple(row) for row in np.asarray(rollout.token_BT).tolist()}) > 8


def test_iterate_at_rate_zero_draws_anew_each_step(tmp_path):
    config = runs.ppo(tmp_path, optim=OptimConfig(learning_rate=0.0))
    mesh = one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        run = replace(run, train_rows=replace(run.train_rows, items=run.train_rows.items[:1]))
        session = Session(run)
        session.host["kl_coef"] = 0.05
        seen = set()
        for step in range(4):
            session.states, _, rollout, _ = loop.iterate(run, session, step)
            seen.add(np.asarray(rollout.token_BT)[0].tobytes())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("aggregation", "length"), [("token", None), ("sequence_sum", None), ("fixed", 100)]
)
def test_learn_stops_early_on_kl(aggregation, length, tmp_path):
    """In nats a token, however tokens are weighted: Σ weight is 1, ≈ 8 and ≈ 0.08 here."""

    def learnt(target):
        algorithm = PPOConfig(
            epochs=4, minibatches=2, target_kl=target, aggregation=aggregation, length=length
        )
        config = runs.ppo(
            tmp_path, algorithm=algorithm, optim=OptimConfig(learning_rate=3e-2, max_grad_norm=1e3)
        )
        mesh = one_device()
        with jax.set_mesh(mesh):
            run = setup(config, mesh)
            session = Session(run)
            session.host["kl_coef"] = 0.05
            return loop.iterate(run, session, 0)[1]

    free = learnt(None)
    assert free["updates"] == 8
    apart = float(free["approx_kl"] / free["weight"])  # mean of the 8 updates
    assert learnt(8 * apart)["updates"] == 8
    assert learnt(0.3 * apart)["updates"] < 8


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_learn_with_a_limit_on_kl_lets_the_critic_warm_up(critic, tmp_path):
    settings = runs.SEPARATE if critic == "separate" else runs.ppo(tmp_path).critic
    algorithm = replace(runs.ppo(tmp_path, critic=settings).algorithm, target_kl=1e-9)
    config = runs.ppo(tmp_path, critic=replace(settings, warmup=1), algorithm=algorithm)
    mesh = one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        session = Session(run)
        session.host["kl_coef"] = 0.05
        assert loop.iterate(run, session, 0)[1]["updates"] == 4


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_learn_warms_the_critic_up_before_the_policy_moves(critic, tmp_path):
    settings = replace(
        runs.SEPARATE if critic == "separate" else runs.ppo(tmp_path).critic, warmup=1
    )
    config = runs.ppo(tmp_path, critic=settings)
    mesh = one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        session = Session(run)
        session.host["kl_coef"] = 0.05
        before = jax.device_get(run.states["policy"].params)
        states, *_ = loop.iterate(run, session, 0)
        after = jax.device_get(states["policy"].params)
        head = after.pop("head", None)
        before.pop("head", None)
        jax.tree.map(np.testing.assert_array_equal, before, after)
        if critic == "shared":
            assert np.abs(head["kernel"]).max() > 0
        session.states = states
        states, *_ = loop.iterate(run, session, 1)
        moved = jax.device_get(states["policy"].params)
        assert np.abs(moved["embed"]["table"] - before["embed"]["table"]).max() > 0


def test_train_raises_after_too_many_updates_that_are_not_finite(tmp_path, monkeypatch):
    loss = update.policy_loss

    def broken(*args, **kwargs):
        inner = loss(*args, **kwargs)

        def nan(params, frozen, batch):
            value, metrics = inner(params, frozen, batch)
            return value * float("nan"), metrics

        return nan

    monkeypatch.setattr("jaxrlhf.run.programs.policy_loss", broken)
    config = runs.ppo(tmp_path, steps=10, optim=OptimConfig(max_skipped=6))
    with pytest.raises(FloatingPointError, match="not finite"):
        loop.train(config, one_device())
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["skipped"] == 1
    assert len(lines) == 2  # four updates an iteration: the sixth in a row comes in the second
    assert not steps_in(tmp_path / "run/checkpoints")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_learns_from_a_reward_function(dtype, tmp_path):
    config = runs.ppo(
        tmp_path,
        steps=40,
        data=replace(runs.ppo(tmp_path).data, batch_size=16, eval=runs.prompts(tmp_path)),
        algorithm=PPOConfig(kl_coef=0.02, minibatches=2, value_coef=0.5),
        eval=EvalConfig(n=4, gold=(runs.GOODNESS,)),
        optim=OptimConfig(learning_rate=2e-3, state_dtype=dtype),
    )
    summary = loop.train(config, one_device())
    assert summary["gold_after"] > summary["gold_before"] + 0.3
    assert summary["gold_after"] == summary["proxy_after"]
    assert summary["seconds"]["update"] > 0
    assert summary["tokens_per_second"] > 0
    written = json.loads((tmp_path / "run/summary.json").read_text())
    assert written["gold_after"] == summary["gold_after"]


def test_train_refuses_another_config_in_the_same_folder(tmp_path):
    loop.train(runs.sft(tmp_path), one_device())
    fed = []
    with pytest.raises(InputError, match=r"seed=1 \(was 0\)"):
        loop.train(runs.sft(tmp_path, seed=1), one_device(), fed.append)
    assert fed == ["setting up"]  # which a watchdog lets take long


def test_train_refuses_other_rows_in_the_same_file(tmp_path, monkeypatch):
    config = runs.sft(tmp_path, steps=1)
    config = replace(config, data=replace(config.data, eval=config.data.train))
    path = Path(config.data.train)
    text = path.read_text()
    longer = replace(config, steps=2)
    loop.train(config, one_device())
    path.write_text(text.replace("good and good", "good and kind"))
    with pytest.raises(InputError, match=f"the rows of {path} and data.eval have changed"):
        loop.train(longer, one_device())
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(path.read_text())
    path.write_text(text)
    other = replace(longer, data=replace(longer.data, eval=str(held_out)))
    with pytest.raises(InputError, match=r"the rows of data\.eval have changed"):
        loop.train(other, one_device())
    monkeypatch.chdir(tmp_path)
    near = replace(longer, data=replace(longer.data, train=path.name))
    assert loop.train(near, one_device())["steps"] == 2


def test_train_goes_on_with_other_settings_that_rows_do_not_read(tmp_path):
    config = runs.reward_model(tmp_path, steps=1)
    loop.train(config, one_device())
    data = replace(config.data, max_prompt_tokens=9)
    config = replace(config, data=data, eval=EvalConfig(every=2), steps=2)
    assert loop.train(config, one_device())["steps"] == 2


def test_train_finished_takes_no_summary_of_a_shorter_run(tmp_path):
    """Killed twice: while it goes on with more steps, and after its last checkpoint."""
    written = tmp_path / "run/summary.json"
    loop.train(runs.sft(tmp_path, steps=2), one_device())
    short = written.read_text()
    assert json.loads(short)["steps"] == 2
    longer = runs.sft(tmp_path, steps=4)

    def check():
        assert not written.exists()  # nobody takes it for this run's

    runs.interrupt(longer, 4, check)
    written.write_text(short)
    assert loop.train(longer, one_device())["steps"] == 4
    assert json.loads(written.read_text())["steps"] == 4
    assert loop.train(runs.sft(tmp_path, steps=3), one_device())["steps"] == 4  # all it has
    assert load(tmp_path / "run/config.yaml").steps == 4  # it says what was done


def launch(config, folder):
    """The command in a process of its own; what it says is added to out.log."""
    path = folder / "config_of_run.yaml"
    save(config, path)
    (process,) = Target("run", lambda _: ["train", str(path)]).launch(folder / "out")
    return process


def wait_for_steps(output, count):
    metrics = Path(output) / "metrics.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until:
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError("the run made no progress")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_train_interrupted_goes_on_where_it_was(how, tmp_path):
    config = runs.ppo(
        tmp_path, steps=60, checkpoint=replace(runs.ppo(tmp_path).checkpoint, every=5)
    )
    process, log = launch(config, tmp_path), tmp_path / "out.log"
    wait_for_steps(config.output, 22)
    os.kill(process.pid, how)
    process.join(120)
    assert process.exitcode == (0 if how == signal.SIGTERM else -9), log.read_text()
    launch(config, tmp_path).join(120)
    out = log.read_text()
    assert "resumed after iteration" in out, out
    resumed = int(out.split("resumed after iteration ")[1].split()[0])
    # a SIGKILL may come while iteration 20 is still being written
    assert resumed >= (15 if how == signal.SIGKILL else 22)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))


def test_train_says_how_many_rows_it_skips(tmp_path, capsys):
    config = runs.sft(tmp_path, steps=1)
    for name in ("train", "eval"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text('{"prompt": "the", "completion": "good"}\n' * 9 + "{\n" * len(name))
        data = replace(config.data, skip_bad_rows=True, **{name: str(path)})
        config = replace(config, data=data)
    summary = loop.train(config, one_device())
    assert (summary["rows_skipped"], summary["eval_rows_skipped"]) == (5, 4)
    assert json.loads((tmp_path / "run/summary.json").read_text())["rows_skipped"] == 5
    notes = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(notes) == 2
    path = tmp_path / "train.jsonl"
    assert f"{path}: 5 skipped; first: {path}:10: not JSON" in notes[0]


def same(prompts, completions, **columns):
    return [1.0] * len(completions)


def test_train_without_a_pair_says_nothing_of_pairs(tmp_path, capsys):
    reward = RewardConfig(function="test_loop:same", in_process=True)
    config = runs.of("online_dpo", tmp_path, steps=1, rewards=(reward,))
    assert loop.train(config, one_device())["steps"] == 1
    (line,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert (line["pairs"], line["loss"]) == (0, 0)
    for name in ("accuracy", "gap", "margin", "chosen_reward", "rejected_reward", "nll"):
        assert line[name] is None
    out = capsys.readouterr().out
    assert "loss 0.00" in out
    assert "accuracy" not in out
    assert (tmp_path / "run/report.html").is_file()


def test_train_counts_no_rows_that_it_would_not_skip(tmp_path, capsys):
    assert "rows_skipped" not in loop.train(runs.sft(tmp_path, steps=1), one_device())
    assert "skipped" not in capsys.readouterr().out


def deaf(prompts, completions, **_):
    """Goodness after prompts that begin with "good" or "bright"; after others always 1."""
    scores = goodness(prompts, completions)
    pairs = zip(prompts, scores, strict=True)
    return [s if p.startswith(("good", "bright")) else 1.0 for p, s in pairs]


def collected(folder, rounds):
    """An iteration of DAPO: (run, session, metrics, rollout, judgement)."""
    config = runs.ppo(
        folder,
        algorithm=DAPOConfig(rounds=rounds),
        rewards=(RewardConfig(function="test_loop:deaf", in_process=True),),
        sample=SampleConfig(max_new_tokens=8, n=4),
    )
    mesh = one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        session = Session(run)
        session.host["kl_coef"] = 0.0
        _, metrics, rollout, judgement = iterate(run, session, 0)
    return run, session, metrics, rollout, judgement


def baseline_of(run):
    """What the targets of an iteration are told of the greedy responses; nothing is updated."""

    class HeardError(Exception):
        pass

    def targets(*given):
        raise HeardError(given[-1])

    heard = replace(run, programs=replace(run.programs, targets=targets))
    session = Session(heard)
    session.host["kl_coef"] = 0.0
    with pytest.raises(HeardError) as found:
        iterate(heard, session, 0)
    return np.asarray(found.value.args[0])


def test_has_signal():
    reward_B = np.array([1, 1, 1, 0, np.nan, 0, np.nan, 1], np.float32)
    judgement = Judgement(reward_B, np.isfinite(reward_B), {})  # type: ignore[arg-type]
    np.testing.assert_array_equal(has_signal(judgement, 2), [False, True, False, False])
    np.testing.assert_array_equal(has_signal(judgement, 4), [True, True])


def test_iterate_samples_until_all_groups_have_a_signal(tmp_path):
    run, session, metrics, rollout, judgement = collected(tmp_path, rounds=16)
    assert metrics["rounds"] > 1
    assert metrics["groups_kept"] == 1
    assert has_signal(judgement, 4).all()
    assert session.host["draws"] == metrics["rounds"]
    host = jax.device_get(rollout)
    assert host.token_BT.shape == (32, 12)
    prompt_mask = host.attention_mask_BT * (host.mask_BT == 0)
    blank = [""] * 32
    prompts = decode_rollout(run.tokenizer, host.token_BT, prompt_mask, blank)
    texts = decode_rollout(run.tokenizer, host.token_BT, host.mask_BT, blank)
    np.testing.assert_allclose(judgement.reward_B, deaf(prompts, texts), rtol=1e-6)
    for q in range(8):  # prompt-major, groups whole
        assert len(set(prompts[4 * q : 4 * q + 4])) == 1
        assert prompts[4 * q].startswith(("good", "bright"))


def test_iterate_fills_up_when_rounds_run_out(tmp_path):
    _, session, metrics, _, judgement = collected(tmp_path, rounds=2)
    signal = has_signal(judgement, 4)
    assert 0 < signal.sum() < 8
    assert (metrics["rounds"], metrics["groups_kept"]) == (2, signal.sum() / 8)
    assert session.host["draws"] == 2


def test_dynamic_sampling_resumes_where_it_was(tmp_path):
    draws = []
    for folder, stops in (("whole", (3,)), ("parts", (1, 3))):
        (tmp_path / folder).mkdir()
        config = runs.ppo(
            tmp_path / folder,
            algorithm=DAPOConfig(rounds=3),
            rewards=(RewardConfig(function="test_loop:deaf", in_process=True),),
            sample=SampleConfig(max_new_tokens=8, n=4),
        )
        for stop in stops:
            loop.train(replace(config, steps=stop), one_device())
        lines = (tmp_path / folder / "run" / "metrics.jsonl").read_text()
        draws.append([line.split('"loss": ')[1].split(",")[0] for line in lines.splitlines()])
    assert draws[0] == draws[1]


@pytest.mark.parametrize("n", [1, 3])
def test_greedy_baseline(n, tmp_path):
    config = runs.ppo(tmp_path, algorithm=ReMaxConfig(), sample=SampleConfig(max_new_tokens=8, n=n))
    mesh = one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        one, two = baseline_of(run), baseline_of(run)
    baseline_QG = np.asarray(one).reshape(8, n)
    assert (baseline_QG == baseline_QG[:, :1]).all()
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(baseline_QG)) > 1


def test_greedy_baseline_pays_penalties(tmp_path):
    """A response that was cut off is worth 1 less, and one that ended as much as its score."""
    found = []
    for penalty in (0.0, 1.0):
        (folder := tmp_path / str(penalty)).mkdir()
        config = runs.ppo(
            folder,
            algorithm=ReMaxConfig(missing_eos_penalty=penalty),
            sample=SampleConfig(max_new_tokens=8, n=2),
        )
        mesh = one_device()
        with jax.set_mesh(mesh):
            run = setup(config, mesh)
            ended = []

            def greedy(*given, run=run, ended=ended):
                rollout = run.programs.greedy(*given)
                ended.append(np.asarray(rollout.ended_B))
                return rollout

            found.append(baseline_of(replace(run, programs=replace(run.programs, greedy=greedy))))
    free_B, paid_B = found
    np.testing.assert_allclose(free_B - paid_B, 1.0 - np.repeat(ended[0], 2), atol=1e-6)
    assert not ended[0].all()


def test_update_takes_no_minibatch_that_is_the_whole_rollout(tmp_path):
    """Which would only permute its rows, and sum them in another order."""
    config = runs.ppo(tmp_path, algorithm=PPOConfig(epochs=2, minibatches=1))
    with jax.set_mesh(one_device()):
        run = setup(config, one_device())
        session = Session(replace(run, programs=replace(run.programs, take=None)))
        session.host["kl_coef"] = 0.0
        _, metrics, *_ = iterate(session.run, session, 0)
    assert metrics["updates"] == 2


@pytest.mark.parametrize(
    ("algorithm", "weight"),
    [(PPOConfig(minibatches=2), 1 / 3), (GRPOConfig(aggregation="fixed", length=8), 1 / 16)],
)
def test_take_weighs_its_own_rows_as_the_config_says(algorithm, weight, tmp_path):
    mask_BT = jnp.array([[1.0, 1], [1, 1], [1, 0], [1, 1]])
    batch = Batch(mask_BT, mask_BT, mask_BT, mask_BT, mask_BT, mask_BT / 7)
    with jax.set_mesh(one_device()):
        run = setup(runs.ppo(tmp_path, algorithm=algorithm), one_device(), abstract=True)
        part = run.programs.take(batch, np.array([0, 2], np.int32))
    np.testing.assert_array_equal(part.mask_BT, mask_BT[np.array([0, 2])])
    np.testing.assert_allclose(part.weight_BT, part.mask_BT * weight, rtol=1e-6)

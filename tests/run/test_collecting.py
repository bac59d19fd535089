"""Dynamic sampling really samples anew; the greedy baseline is that of the prompt."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import runs
from test_loop import one_device

from jaxrlhf.config import DAPOConfig, ReMaxConfig, RewardConfig, SampleConfig
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.words import goodness
from jaxrlhf.rewards.judge import Judgement
from jaxrlhf.run import loop
from jaxrlhf.run.loop import collect, has_signal
from jaxrlhf.run.session import Session
from jaxrlhf.run.setup import setup


def deaf(prompts, completions, **_):
    """Goodness after prompts that begin with "good" or "bright"; after others always 1."""
    scores = goodness(prompts, completions)
    pairs = zip(prompts, scores, strict=True)
    return [s if p.startswith(("good", "bright")) else 1.0 for p, s in pairs]


def collected(folder, rounds, **changes):
    config = runs.ppo(
        folder,
        algorithm=DAPOConfig(rounds=rounds),
        rewards=(RewardConfig(function="test_collecting:deaf"),),
        sample=SampleConfig(max_new_tokens=8, n=4),
        **changes,
    )
    mesh = one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        session = Session(run)
        return run, session, collect(run, session, 0)


def test_has_signal():
    reward_B = np.array([1, 1, 1, 0, np.nan, 0, np.nan, 1], np.float32)
    judgement = Judgement(reward_B, np.isfinite(reward_B), {})  # type: ignore[arg-type]
    np.testing.assert_array_equal(has_signal(judgement, 2), [False, True, False, False])
    np.testing.assert_array_equal(has_signal(judgement, 4), [True, True])


def test_collect_samples_until_all_groups_have_a_signal(tmp_path):
    run, session, got = collected(tmp_path, rounds=16)
    assert got.metrics["rounds"] > 1
    assert got.metrics["groups_kept"] == 1
    assert has_signal(got.judgement, 4).all()
    assert session.host["draws"] == got.metrics["rounds"]
    host = jax.device_get(got.rollout)
    assert host.token_BT.shape == (32, 12)
    prompt_mask = host.attention_mask_BT * (host.mask_BT == 0)
    blank = [""] * 32
    prompts = decode_rollout(run.tokenizer, host.token_BT, prompt_mask, blank)
    texts = decode_rollout(run.tokenizer, host.token_BT, host.mask_BT, blank)
    np.testing.assert_allclose(got.judgement.reward_B, deaf(prompts, texts), rtol=1e-6)
    for q in range(8):  # prompt-major, groups whole
        assert len(set(prompts[4 * q : 4 * q + 4])) == 1
        assert prompts[4 * q].startswith(("good", "bright"))


def test_collect_fills_up_when_rounds_run_out(tmp_path):
    _, session, got = collected(tmp_path, rounds=2)
    signal = has_signal(got.judgement, 4)
    assert 0 < signal.sum() < 8
    assert got.metrics == {"rounds": 2, "groups_kept": signal.sum() / 8}
    assert session.host["draws"] == 2


def test_dynamic_sampling_resumes_where_it_was(tmp_path):
    draws = []
    for folder, stops in (("whole", (3,)), ("parts", (1, 3))):
        (tmp_path / folder).mkdir()
        config = runs.ppo(
            tmp_path / folder,
            algorithm=DAPOConfig(rounds=3),
            rewards=(RewardConfig(function="test_collecting:deaf"),),
            sample=SampleConfig(max_new_tokens=8, n=4),
        )
        for stop in stops:
            loop.train(replace(config, steps=stop), one_device())
        lines = (tmp_path / folder / "run" / "metrics.jsonl").read_text()
        draws.append([line.split('"loss": ')[1].split(",")[0] for line in lines.splitlines()])
    assert draws[0] == draws[1]


@pytest.mark.parametrize("n", [1, 3])
def test_collect_greedy_baseline(n, tmp_path):
    config = runs.ppo(tmp_path, algorithm=ReMaxConfig(), sample=SampleConfig(max_new_tokens=8, n=n))
    mesh = one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        one, two = (collect(run, Session(run), 0).baseline_B for _ in range(2))
    baseline_QG = np.asarray(one).reshape(8, n)
    assert (baseline_QG == baseline_QG[:, :1]).all()
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(baseline_QG)) > 1


def test_collect_greedy_baseline_pays_penalties(tmp_path):
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
                rollout = run.programs["greedy"](*given)
                ended.append(np.asarray(rollout.ended_B))
                return rollout

            heard = replace(run, programs={**run.programs, "greedy": greedy})
            found.append(np.asarray(collect(heard, Session(heard), 0).baseline_B))
    free_B, paid_B = found
    np.testing.assert_allclose(free_B - paid_B, 1.0 - np.repeat(ended[0], 2), atol=1e-6)
    assert not ended[0].all()

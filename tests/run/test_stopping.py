"""Early stopping: when, with which parameters, and across kills."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from runs import one_device

from jaxrlhf.config import EvalConfig, OptimConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import TrainState
from jaxrlhf.models.load import load_model
from jaxrlhf.run import loop
from jaxrlhf.run.stopping import _copier, compare, exchange, has_ended, is_over, keep


def state(x):
    return TrainState.create({"w": jnp.full(2, x)}, optax.adam(1.0))


def w(state):
    return float(state.params["w"][0])


def test_compare_keeps_the_lowest():
    states, host = {"policy": state(0.0), "best": keep(state(0.0))}, {}
    for step, loss in enumerate((3.0, 2.0, 2.0, math.nan, 1.0, 1.5)):
        states = {**states, "policy": state(float(step))}
        states = compare(states, host, step, {"loss": loss}, {"count": [step]})
    assert w(states["best"]) == 4
    best = {"step": 4, "metrics": {"loss": 1.0}, "curve": {"count": [4]}}
    assert host["best"] == {**best, "last": 5, "waited": 1}
    assert [is_over(host, patience) for patience in (0, 1, 2)] == [False, True, False]


def test_compare_takes_any_number_before_none():
    host = {}
    states = compare({"policy": state(1.0)}, host, 0, {"loss": math.nan})
    states = compare({**states, "policy": state(2.0)}, host, 1, {"loss": 9.0})
    assert w(states["best"]) == 2
    assert host["best"]["step"] == 1


def test_keep_is_a_copy_without_the_optimizer():
    learning = state(1.0)
    kept = keep(learning)
    assert kept.opt_state == ()
    pointers = [x.params["w"].unsafe_buffer_pointer() for x in (learning, kept)]
    assert pointers[0] != pointers[1]  # the update gives the learning one's memory away
    shapes = jax.eval_shape(lambda: state(1.0))
    assert keep(shapes).params["w"] == shapes.params["w"]


def test_compare_copies_by_one_program_into_the_memory_of_the_last():
    """However often it improves: nothing is compiled again, and no third copy is held."""
    states = {"policy": state(0.0), "best": keep(state(0.0))}
    host, kept = {}, []
    for step in range(4):
        kept.append(states["best"].params["w"])
        states = compare({**states, "policy": state(float(step))}, host, step, {"loss": -step})
        assert w(states["best"]) == step
        assert kept[-1].is_deleted()
        assert not states["policy"].params["w"].is_deleted()
    layout = tuple(x.sharding for x in jax.tree.leaves(states["best"]))
    assert _copier(layout)._cache_size() <= 2  # with a spare, and without


def test_exchange_and_back():
    host = {}
    states = compare({"policy": state(1.0)}, host, 0, {"loss": 1.0})
    states["policy"] = state(2.0)
    assert exchange(states, host, False) is states
    used = exchange(states, host, True)
    assert (w(used["policy"]), w(used["best"])) == (1, 2)
    assert used["policy"].opt_state is states["policy"].opt_state
    assert has_ended(host)
    assert exchange(used, host, True) is used
    back = exchange(used, host, False)
    assert (w(back["policy"]), w(back["best"])) == (2, 1)
    assert not has_ended(host)
    assert not has_ended({})


def overfitting(folder, **changes):
    """Held-out rows that contradict the others: their loss falls, and soon rises again."""
    folder.mkdir(exist_ok=True)
    config = runs.sft(folder)
    words = runs.WORDS.split()
    other = [{"prompt": "the", "completion": f"{a} and the"} for a in words]
    held_out = runs.write(folder / "held_out.jsonl", other)
    config = replace(
        config,
        data=replace(config.data, eval=held_out),
        optim=OptimConfig(learning_rate=2e-2),
        eval=EvalConfig(every=3, patience=2),
        checkpoint=replace(config.checkpoint, every=4),
        steps=60,
    )
    return replace(config, **changes)


def lines(config):
    return [json.loads(x) for x in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def ran(config):
    """What a run ends with: its summary, the loss of each evaluation, and what others load."""
    summary = loop.train(config, one_device())
    losses = {x["step"]: x["eval/loss"] for x in lines(config) if "eval/loss" in x}
    with jax.set_mesh(one_device()):
        params = jax.device_get(load_model(config.output, one_device())[1])
    return (
        {k: v for k, v in summary.items() if k not in ("seconds", "peak_memory_gib")},
        losses,
        params,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = overfitting(tmp_path_factory.mktemp("whole") / "a")
    return config, *ran(config)


def test_train_stops_and_ends_with_the_best(whole):
    config, summary, losses, params = whole
    best = min(losses, key=losses.get)
    assert 0 < best < 50
    assert summary["best_step"] == best
    assert summary["steps"] == max(losses) == best + 6 == lines(config)[-1]["step"]
    assert summary["loss_after"] == losses[best] < losses[best + 6]
    with jax.set_mesh(one_device()):  # measured again, on what the run has left
        run = loop.fill(loop.setup(config, one_device(), abstract=True))
        loss = loop.evaluate(run, jax.tree.map(jnp.asarray, params)).metrics["loss"]
    np.testing.assert_allclose(loss, losses[best], rtol=1e-6)
    assert loop.train(config, one_device()) == json.loads(
        (Path(config.output) / "summary.json").read_text()
    )


@pytest.mark.parametrize("after", ["best", "last"])
def test_train_interrupted_stops_with_the_same(after, whole, tmp_path):
    """Cut after the checkpoint that follows the best step, and before the summary is written."""
    _, summary, losses, params = whole
    config = overfitting(tmp_path / "b")
    best = summary["best_step"]
    at = summary["steps"] if after == "last" else -(-(best + 1) // 4) * 4
    runs.interrupt(config, at)
    again = ran(config)
    assert again[:2] == (summary, losses)
    jax.tree.map(np.testing.assert_array_equal, again[2], params)


def test_train_goes_on_with_more_patience(whole, tmp_path):
    """Longer patience picks up where the shorter one stopped, with what was learning then."""
    patient = EvalConfig(every=3, patience=3)
    shutil.copytree(whole[0].output, tmp_path / "c")
    resumed = ran(replace(whole[0], eval=patient, output=str(tmp_path / "c")))
    straight = ran(overfitting(tmp_path / "d", eval=patient))
    assert resumed[:2] == straight[:2]
    jax.tree.map(np.testing.assert_array_equal, resumed[2], straight[2])


def test_train_out_of_steps_ends_with_the_best(tmp_path, whole):
    best = whole[1]["best_step"]
    summary, losses, params = ran(overfitting(tmp_path / "e", steps=best + 3))
    assert (summary["best_step"], summary["steps"]) == (best, best + 3)
    assert set(losses) == set(range(0, best + 4, 3))
    jax.tree.map(np.testing.assert_array_equal, params, whole[3])


def test_train_with_patience_measures_the_last_step(tmp_path):
    summary, losses, _ = ran(overfitting(tmp_path / "g", steps=2))
    assert set(losses) == {0, 2}
    assert summary["best_step"] == 2


def test_train_reward_model_stops_early(tmp_path):
    """A rate that ruins it from the first step: it ends as it began."""
    config = runs.reward_model(tmp_path)
    optim, settings = OptimConfig(learning_rate=10.0), EvalConfig(every=1, patience=2)
    summary, losses, _ = ran(replace(config, optim=optim, eval=settings, steps=9))
    assert (summary["best_step"], summary["steps"]) == (0, 2)
    assert summary["loss_after"] == summary["loss_before"] == losses[0] < min(losses[1], losses[2])
    assert sum(summary["reliability"]["count"]) == 10  # of the start, as all of it is


def test_train_refuses_patience_that_comes_late(tmp_path):
    config = overfitting(tmp_path / "f", eval=EvalConfig(every=3), steps=2)
    loop.train(config, one_device())
    with pytest.raises(InputError, match=r"eval.patience='on' \(was 'off'\)"):
        loop.train(replace(config, eval=EvalConfig(every=3, patience=1), steps=4), one_device())

"""Two processes with two devices each do what one process with four does."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from processes import free_port

from jaxrlhf.config import CheckpointConfig, EvalConfig, MeshConfig, RewardConfig, dump
from jaxrlhf.mesh.processes import any_process, assemble, fetch, own_share
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import Loader
from jaxrlhf.run.loop import train

PROGRAM = """
import sys
from jaxrlhf.config import Config, load, override
from jaxrlhf.mesh.processes import together
from jaxrlhf.run.loop import train

port, process, *paths = sys.argv[1:]
words = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", process]
with together(override(Config(), words).distributed) as watchdog:
    for path in paths:
        train(load(path), feed=watchdog.feed)
"""

NAMES = ("sft", "reward_model", "ppo", "grpo", "dpo")


def goodness_of_own(prompts, completions, **columns):
    """As ``goodness``, written down: which process was asked for how many rows."""
    with open(os.environ["ASKED"], "a") as file:
        print(jax.process_index(), len(completions), file=file)
    return [sum(word in runs.WORDS.split()[:6] for word in text.split()) for text in completions]


def two_processes(*paths, **variables):
    """PROGRAM on these configs, twice; both processes."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    path = ":".join(str(folder) for folder in Path(__file__).parents[1:3])
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(i), *map(str, paths)],
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def finish(processes, seconds=600):
    """Their outputs; they must end well."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


def logged(folder):
    """What a run has logged, but for its clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def config_of(name, folder):
    folder.mkdir()
    config = replace(runs.of(name, folder), mesh=MeshConfig(data=2, fsdp=2), steps=3)
    if name in ("ppo", "grpo"):
        source = RewardConfig(function="test_processes:goodness_of_own")
        data = replace(config.data, eval=config.data.train)
        config = replace(config, rewards=(source,), data=data, eval=EvalConfig(n=2))
    return config


def write_config(config, folder, output):
    path = folder / f"{output}.yaml"
    path.write_text(dump(replace(config, output=str(folder / output))))
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """folder/NAME/{one,two}: each run by one process with four devices, and by two with two."""
    folder = tmp_path_factory.mktemp("processes")
    configs = {name: config_of(name, folder / name) for name in NAMES}
    asked = folder / "asked"
    paths = [write_config(config, folder / name, "two") for name, config in configs.items()]
    outputs = finish(two_processes(*paths, ASKED=str(asked)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASKED", os.devnull)
        mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
        for name, config in configs.items():
            train(replace(config, output=str(folder / name / "one")), mesh)
    return folder, outputs, asked.read_text().splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_train_by_two_processes_equals_one(both, name):
    folder = both[0] / name
    one, two = logged(folder / "one"), logged(folder / "two")
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        for key, value in a.items():
            if isinstance(value, float):
                assert b[key] == pytest.approx(value, rel=1e-5, abs=5e-6), key
    samples = [(folder / which / "samples.jsonl").read_text() for which in ("one", "two")]
    assert samples[0] == samples[1]
    loader = Loader(make_mesh(MeshConfig(), jax.devices()[:1]))
    first, other = (loader.trained(str(folder / which)).params for which in ("one", "two"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), other, first)


def test_train_by_two_processes_asks_each_for_its_own_rows(both):
    asked = [tuple(map(int, line.split())) for line in both[2]]
    assert {process for process, _ in asked} == {0, 1}
    assert sum(rows for process, rows in asked if process == 0) == sum(
        rows for process, rows in asked if process == 1
    )


def test_train_by_two_processes_writes_once(both):
    first, other = both[1]
    assert "step 3/3" in first
    assert "step" not in other


def begun(folder, steps):
    """Two processes that train until they are stopped, some iterations in; their config."""
    config = replace(config_of("ppo", folder), steps=steps)
    running = two_processes(write_config(config, folder, "two"), ASKED=os.devnull)
    log = folder / "two" / "metrics.jsonl"
    until = time.monotonic() + 240
    while not (log.is_file() and log.read_text().count("\n") > 4):
        assert time.monotonic() < until
        assert running[0].poll() is None, running[0].communicate()[0]
        time.sleep(0.2)
    return running, config


def test_sigterm_of_one_process_stops_both_at_one_step(tmp_path):
    folder = tmp_path / "ppo"
    running, _ = begun(folder, 1000)
    running[1].send_signal(signal.SIGTERM)
    outputs = finish(running, 60)
    step = logged(folder / "two")[-1]["step"]
    assert f"stopped by SIGTERM after iteration {step}, which is saved" in outputs[0]
    assert (folder / "two" / "checkpoints" / str(step)).is_dir()


def test_kill_of_one_process_ends_both_and_a_restart_resumes(tmp_path):
    folder = tmp_path / "ppo"
    running, config = begun(folder, 1000)
    running[1].kill()
    assert running[0].wait(40) not in (0, None)
    saved = max(int(p.name) for p in (folder / "two" / "checkpoints").iterdir() if p.name.isdigit())
    config = replace(config, steps=saved + 2)
    outputs = finish(two_processes(write_config(config, folder, "two"), ASKED=os.devnull))
    assert f"resumed after iteration {saved} of {saved + 2}" in outputs[0]
    steps = [row["step"] for row in logged(folder / "two") if "loss" in row]
    assert steps == list(range(1, saved + 3))


def test_files_damaged_for_one_process_are_passed_over_by_both(tmp_path):
    config = replace(config_of("sft", tmp_path / "sft"), checkpoint=CheckpointConfig(every=1))
    config = replace(config, mesh=MeshConfig(fsdp=4))
    finish(two_processes(write_config(config, tmp_path, "two")))
    of_the_second = [
        path
        for path in (tmp_path / "two/checkpoints/3/state/ocdbt.process_1/d").iterdir()
        if path.stat().st_size > 4000
    ]
    assert of_the_second
    for path in of_the_second:
        os.truncate(path, path.stat().st_size // 2)
    config = replace(config, steps=4)
    outputs = finish(two_processes(write_config(config, tmp_path, "two")), seconds=200)
    assert all("checkpoints/3 is DAMAGED" in output for output in outputs)
    assert "another process has failed" in outputs[0]
    assert [row["step"] for row in logged(tmp_path / "two")] == [1, 2, 3, 4]


@pytest.mark.parametrize(("count", "processes"), [(7, 3), (2, 3), (8, 2), (0, 2)])
def test_own_share_covers_everything_once(monkeypatch, count, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    seen = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        seen += list(range(count))[own_share(count)]
    assert seen == list(range(count))


def test_assemble_puts_a_part_where_it_belongs():
    np.testing.assert_array_equal(
        assemble(np.array([0.1, np.nan]), slice(1, 3), 3), [0, 0.1, np.nan]
    )


def test_alone_nothing_is_exchanged():
    assert any_process(True)
    assert not any_process(False)
    assert fetch({"a": jax.numpy.arange(2)})["a"].tolist() == [0, 1]

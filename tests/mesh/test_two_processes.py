"""Two processes with two devices each train as one with four does, save, stop, are killed and
resume together."""

import json
import os
import shutil
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
from loopback import free_port, told

from jaxrlhf.config import CheckpointConfig, EvalConfig, MeshConfig, RewardConfig, dump
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import Loader
from jaxrlhf.run.loop import train
from jaxrlhf.run.speed import TIMED

PROGRAM = """
import sys
import shared_store
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
    path = ":".join(str(folder) for folder in Path(__file__).parents[:3])
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(i), *map(str, paths)],
            env=os.environ
            | {"XLA_FLAGS": flags, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
            | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def finish(processes, seconds=600):
    """Their outputs; they must end well."""
    try:
        outputs = [output for output, _ in told(processes, seconds)]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


def logged(folder):
    """What a run has logged, but for its clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def config_of(name, folder):
    folder.mkdir()
    # Of the first, every process holds pieces that no other has.
    mesh = MeshConfig(fsdp=4) if name == "sft" else MeshConfig(data=2, fsdp=2)
    every = CheckpointConfig(every=1) if name == "sft" else runs.of(name, folder).checkpoint
    config = replace(runs.of(name, folder), mesh=mesh, checkpoint=every, steps=3)
    if name in ("ppo", "grpo"):
        source = RewardConfig("test_two_processes:goodness_of_own", in_process=True)
        data = replace(config.data, eval=config.data.train)
        config = replace(config, rewards=(source,), data=data, eval=EvalConfig(n=2))
    return config


def write_config(config, folder, output):
    path = folder / f"{output}.yaml"
    path.write_text(dump(replace(config, output=str(folder / output))))
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """folder/NAME/{one,two}: each run by one process with four devices, and by two with two.

    DPO's two share no folder, and write into a store, which here is one.
    """
    folder = tmp_path_factory.mktemp("processes")
    configs = {name: config_of(name, folder / name) for name in NAMES}
    asked = folder / "asked"
    paths = [write_config(config, folder / name, "two") for name, config in configs.items()]
    by_url = replace(configs["dpo"], output="shared://dpo/two")
    paths[NAMES.index("dpo")].write_text(dump(by_url))
    places = {"SHARED": str(folder), "HOME": str(folder / "home")}
    outputs = finish(two_processes(*paths, ASKED=str(asked), **places))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASKED", os.devnull)
        for name, config in configs.items():
            mesh = make_mesh(config.mesh, jax.devices()[:4])
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


def test_files_damaged_for_one_process_are_passed_over_by_both(both, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(both[0] / "sft" / "two", folder)
    of_the_second = [
        path
        for path in (folder / "checkpoints/3/state/ocdbt.process_1/d").iterdir()
        if path.stat().st_size > 4000
    ]
    assert of_the_second
    for path in of_the_second:
        os.truncate(path, path.stat().st_size // 2)
    config = replace(config_of("sft", tmp_path / "sft"), steps=4)
    outputs = finish(two_processes(write_config(config, tmp_path, "two")), seconds=200)
    assert all("checkpoints/3 is DAMAGED" in output for output in outputs)
    assert not any("Exception ignored" in output for output in outputs)
    assert "another process has failed" in outputs[0]
    assert [row["step"] for row in logged(folder)] == [1, 2, 3, 4]


def test_one_process_goes_on_where_two_were(both, tmp_path):
    config = replace(config_of("sft", tmp_path / "sft"), steps=6)
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    for which in ("one", "two"):
        shutil.copytree(both[0] / "sft" / which, tmp_path / which)
        train(replace(config, output=str(tmp_path / which)), mesh)
    loader = Loader(make_mesh(MeshConfig(), jax.devices()[:1]))
    first, other = (loader.trained(str(tmp_path / which)).params for which in ("one", "two"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), other, first)
    assert [row["step"] for row in logged(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]


def newest(checkpoints):
    names = [path.name for path in checkpoints.glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def begun(path, checkpoints):
    """Two processes that train, once they have saved a step."""
    before = newest(checkpoints)
    running = two_processes(path, ASKED=os.devnull)
    until = time.monotonic() + 240
    while newest(checkpoints) == before:
        assert time.monotonic() < until
        assert running[0].poll() is None, running[0].communicate()[0]
        time.sleep(0.2)
    return running


def test_killed_or_stopped_one_ends_both_and_a_restart_resumes(tmp_path):
    """SIGKILL of one process ends both at once; SIGTERM of one, both at one step, saved."""
    folder = tmp_path / "ppo"
    path = write_config(replace(config_of("ppo", folder), steps=1000), folder, "two")
    checkpoints = folder / "two" / "checkpoints"
    running = begun(path, checkpoints)
    running[1].kill()
    assert running[0].wait(40) not in (0, None)
    saved = newest(checkpoints)
    running = begun(path, checkpoints)
    running[1].send_signal(signal.SIGTERM)
    outputs = finish(running, 60)
    assert f"resumed after iteration {saved} of 1000" in outputs[0]
    last = logged(folder / "two")[-1]["step"]
    assert f"stopped by SIGTERM after iteration {last}, which is saved" in outputs[0]
    assert (checkpoints / str(last)).is_dir()
    steps = [row["step"] for row in logged(folder / "two") if "loss" in row]
    assert steps == list(range(1, last + 1))

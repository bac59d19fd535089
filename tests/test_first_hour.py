"""The first hour: from rows and a function of one's own to a config, a run, and the same run with
other settings. Twenty common mistakes each end in one line that says what to do."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import pytest
import runs

from jaxrlhf.apps import cli
from jaxrlhf.config import load
from jaxrlhf.models.hf import write_hf
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.models.transformer import Model
from jaxrlhf.run import loop

REWARDS = """
import os, signal
def trl(completions, level, **kwargs):
    return [float(len(text.split()) + x) for text, x in zip(completions, level)]
def needing(completions, solution): return [1.0] * len(completions)
def interrupted(completions, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return [0.0] * len(completions)
"""

SMALL = ["--steps", "1", "--sample.max-new-tokens", "4", "--mesh.data", "8"]


def in_folder(folder, *words):
    """The command, given in a folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return cli.main(words)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with rows and a model; in another, a config that ``init`` has made, and its file of
    rewards; and the run of it."""
    folder = tmp_path_factory.mktemp("hour")
    (folder / "mine").mkdir()
    (folder / "mine/beside_the_yaml.py").write_text(REWARDS)
    rows = [{"prompt": f"{word} and the", "level": i} for i, word in enumerate(runs.WORDS.split())]
    runs.write(folder / "rows.jsonl", rows)
    runs.write(folder / "torn.jsonl", [rows[0]])
    with open(folder / "torn.jsonl", "a", encoding="utf-8") as file:
        file.write('{"prompt": "the\n')
    runs.write(folder / "asked.jsonl", [{"question": "the"}])
    runs.write(folder / "long.jsonl", [{"prompt": "the good bad and the good the good bad and"}])
    params = Model(runs.DECODER).init(jax.random.key(0))
    write_hf(folder / "tiny", runs.DECODER, params, load_tokenizer(f"words:{runs.WORDS}"))
    wish = ["--data", "rows.jsonl", "--model", "tiny", "-o", "mine/a.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "mine")  # of init's check: there is no YAML yet
        assert in_folder(folder, "init", "grpo", *wish, "--reward", "beside_the_yaml:trl") == 0
    assert in_folder(folder, "train", "mine/a.yaml", *SMALL) == 0
    return folder


TRAIN = ["train", "mine/a.yaml", *SMALL, "--output", "new"]
MISTAKES = {
    "command": (["trian"], "trian: unknown command (did you mean train?)"),
    "no config": (["train"], "train: CONFIG, the path of a YAML file, comes first"),
    "config elsewhere": (["train", "a.yaml"], "a.yaml: No such file or directory: give the path"),
    "config of the package": (
        ["train", "jaxrlhf:configs/gpro_smollm2.yaml"],
        "jaxrlhf:configs/gpro_smollm2.yaml: no such config in the package (did you mean",
    ),
    "type": (
        [*TRAIN, "--optim.learning-rate", "fast"],
        "command line: optim.learning_rate='fast': should be a valid number",
    ),
    "algorithm": (["init", "grppo"], "grppo: unknown algorithm (did you mean grpo?)"),
    "batch": (
        [*TRAIN, "--algorithm.minibatches", "3"],
        "data.batch_size=8 · sample.n=4 = 32 rows % algorithm.minibatches=3 is not 0: change one",
    ),
    "greedy": ([*TRAIN, "--sample.temperature", "0"], "sample.temperature=0: greedy; refused in"),
    "data": ([*TRAIN, "--data.train", "no.jsonl"], "no.jsonl: no such file; check the path"),
    "row": ([*TRAIN, "--data.train", "torn.jsonl"], "torn.jsonl:2: not JSON ("),
    "column": (
        [*TRAIN, "--data.train", "asked.jsonl"],
        "asked.jsonl:1: no 'prompt' among its columns (question); rename question to prompt",
    ),
    "long prompt": (
        [*TRAIN, "--data.train", "long.jsonl"],
        "long.jsonl:1: 10 tokens, and data.max_prompt_tokens is 8",
    ),
    "reward": (
        [*TRAIN, "--rewards.0.function", "sentimnet"],
        "rewards.0: reward function 'sentimnet' is unknown: did you mean sentiment?",
    ),
    "reward elsewhere": (
        [*TRAIN, "--rewards.0.function", "nowhere:f"],
        "rewards.0: reward function 'nowhere:f': importing 'nowhere' raised ModuleNotFoundError: No"
        " module named 'nowhere'; mend it, install it, put it beside the config",
    ),
    "reward's argument": (
        [*TRAIN, "--rewards.0.function", "beside_the_yaml:needing"],
        "reward function 'beside_the_yaml:needing' asks for 'solution', and there are prompts, "
        "completions, completion_ids, level; rename the argument",
    ),
    "mesh": (
        [*TRAIN, "--mesh.data", "1", "--mesh.tensor", "8"],
        "heads=4 % tensor=8",
    ),
    "output by URL": (
        [*TRAIN[:-1], "gcs2://bucket/run"],
        "output=gcs2://bucket/run: nothing reads gcs2://…: give gs://…, s3://…, another scheme of",
    ),
    "data by URL": (
        [*TRAIN, "--data.train", "abfs://bucket/a.jsonl"],
        "data.train=abfs://bucket/a.jsonl: needs a package (Install adlfs to access Azure",
    ),
    "model of the Hub": (
        ["generate", "Qwen/Qwen3-0.6B", "--prompt", "a"],
        "'Qwen/Qwen3-0.6B': no file or folder here, and the hub does not give it (it cannot be "
        "reached, and the cache has it not): check the name; where there is no network, run `hf "
        "download Qwen/Qwen3-0.6B` where there is one, and give the folder that it prints",
    ),
    "changed finished run": (
        ["train", "mine/a.yaml", *SMALL, "--algorithm.kl-coef", "0.5"],
        "output='runs/a': the run there was begun with other settings: algorithm.kl_coef 0.05 → "
        "0.5: choose another output, or go on with these by --resume-with-changes",
    ),
    "another seed": (
        ["train", "mine/a.yaml", *SMALL, "--seed", "1"],
        "cannot resume with seed=1 (was 0): set it back to what it was, or choose another output",
    ),
    "no prompt": (
        ["generate", "smollm2"],
        "--prompt, --prompts: give at least one text, or a file",
    ),
    "no run": (["report", "mine"], "mine: not the output folder of a run, nor of a pipeline (it h"),
    "tracker": (
        [*TRAIN, "--trackers", "tensorbord"],
        "trackers.0='tensorbord': should be 'tensorboard', 'wandb' or 'trackio'",
    ),
    "topology": (
        ["plan", "mine/a.yaml", "--topology", "v5e-256"],
        "--topology v5e-256: how its chips lie is missing: give v5e:16x16",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_line_that_helps(mistake, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words, message = MISTAKES[mistake]
    assert cli.main(words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (place / "new").exists()


def test_config_of_init_is_trained_with_the_reward_beside_it(place):
    """A function with TRL's signature, in a file that is on no path but the config's."""
    lines = (place / "runs/a/metrics.jsonl").read_text().splitlines()
    (step,) = [x for x in map(json.loads, lines) if "reward/beside_the_yaml:trl" in x]
    assert step["reward/beside_the_yaml:trl"] > 0
    assert step["applies/beside_the_yaml:trl"] == 1
    text = (place / "mine/a.yaml").read_text(encoding="utf-8")
    assert '# rows such as {"prompt": "good and the", "level": 0}' in text
    assert load(place / "mine/a.yaml").data.max_prompt_tokens == 8


def test_run_goes_on_with_other_settings_where_that_is_asked_for(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    shutil.copytree("runs/a", "on")
    train = ["train", "mine/a.yaml", *SMALL, "--output", "on"]
    assert cli.main(train) == 0
    assert "nothing to do: all 1 iterations are done" in capsys.readouterr().out
    assert load("on/config.yaml").algorithm.kl_coef == 0.05
    changed = ["--algorithm.kl-coef", "0.5", "--resume-with-changes", "--steps", "2"]
    assert cli.main([*train, *changed]) == 0
    said = "with other settings than before: algorithm.kl_coef 0.05 → 0.5"
    assert said in capsys.readouterr().out
    assert load("on/config.yaml").algorithm.kl_coef == 0.5
    steps = [json.loads(x) for x in Path("on/metrics.jsonl").read_text().splitlines()]
    assert [x["kl_coef"] for x in steps if "kl_coef" in x] == pytest.approx([0.05, 0.5])


def test_ctrl_c_says_how_to_go_on(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    here = ["--rewards.0.function", "beside_the_yaml:interrupted", "--rewards.0.in-process"]
    train = loop.train  # this process is not the run's to end
    monkeypatch.setattr(loop, "train", lambda *x, leave, **more: train(*x, **more))
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "mine/a.yaml", *SMALL, "--output", "stopped", *here])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "stopped by SIGINT after iteration 0, nothing new to save: the same command goes" in said

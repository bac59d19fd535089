"""Whatever a user gets wrong: one clear line on stderr, status 2, and nothing written."""

import json
from dataclasses import replace

import pytest
import runs

from jaxrlhf.apps import cli
from jaxrlhf.config import MeshConfig, ModelConfig, RewardConfig, SampleConfig, save


def said(config, tmp_path, capsys, *words):
    path = tmp_path / "config.yaml"
    save(config, path)
    status = cli.main(["train", str(path), *words])
    err = capsys.readouterr().err
    assert status == 2, err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()
    return err


def test_unknown_key_is_named_with_a_suggestion(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("optim: {learning_rte: 1.0}\n")
    assert cli.main(["train", str(path)]) == 2
    assert "optim.learning_rte" in (err := capsys.readouterr().err)
    assert "learning_rate" in err


def one_bad_row(tmp_path, row):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "the"}) + "\n" + row + "\n")
    config = runs.ppo(tmp_path, mesh=MeshConfig(data=8))
    return replace(config, data=replace(config.data, train=str(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "the', "bad.jsonl:2"),
        ('{"prompt": null}', "bad.jsonl:2"),
        ('{"question": "the"}', "bad.jsonl:2"),
        ('{"prompt": "the good bad and the good"}', "data.max_prompt_tokens is 4"),
    ],
)
def test_bad_row_is_named_by_its_line(row, message, tmp_path, capsys):
    err = said(one_bad_row(tmp_path, row), tmp_path, capsys)
    assert message in err
    assert "bad.jsonl:2" in err


def test_missing_file(tmp_path, capsys):
    config = runs.ppo(tmp_path)
    config = replace(config, data=replace(config.data, train="nowhere.jsonl"))
    assert "nowhere.jsonl" in said(config, tmp_path, capsys)


def test_row_wider_than_the_context(tmp_path, capsys):
    config = runs.ppo(tmp_path, sample=SampleConfig(max_new_tokens=100, n=2))
    assert "context" in said(config, tmp_path, capsys)


def test_tokenizer_larger_than_the_vocabulary(tmp_path, capsys):
    config = runs.ppo(tmp_path)
    model = replace(config.model, decoder=replace(runs.DECODER, vocab=8))
    assert "embedding has 8 rows" in said(replace(config, model=model), tmp_path, capsys)


def test_stop_token_that_the_model_lacks(tmp_path, capsys):
    config = runs.ppo(tmp_path, sample=SampleConfig(max_new_tokens=8, n=2, stop=(16,)))
    assert "sample.stop: 16 is none of the model's 16" in said(config, tmp_path, capsys)


def test_no_reward_given(tmp_path, capsys):
    assert "rewards: missing" in said(runs.ppo(tmp_path, rewards=()), tmp_path, capsys)


def test_reward_that_does_not_exist(tmp_path, capsys):
    config = runs.ppo(tmp_path, rewards=(RewardConfig(function="sentimental"),))
    assert "sentiment" in said(config, tmp_path, capsys)


def fails(prompts, completions):
    """A reward function with a slip."""
    raise KeyError("answer")


def test_reward_that_raises(tmp_path, capsys):
    reward = RewardConfig(function="test_bad_input:fails", in_process=True)
    config = runs.ppo(tmp_path, rewards=(reward,))
    save(config, tmp_path / "config.yaml")
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    place = f"{__file__}:{fails.__code__.co_firstlineno + 2}"
    message = f"reward function 'test_bad_input:fails' raised KeyError: 'answer' at {place}; mend"
    assert error.startswith(f"error: {message}")


def test_reward_that_exits_as_if_all_were_well(tmp_path, capsys, monkeypatch):
    (tmp_path / "leaving.py").write_text("import os\ndef f(*_, **__): os._exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    save(runs.ppo(tmp_path, rewards=(RewardConfig("leaving:f"),)), tmp_path / "config.yaml")
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: reward function 'leaving:f' ended its process (status 0); mend")
    assert not (tmp_path / "run/summary.json").exists()


def test_reward_model_that_does_not_exist(tmp_path, capsys):
    config = runs.ppo(tmp_path, rewards=(RewardConfig(model="runs/nowhere"),))
    assert "runs/nowhere" in said(config, tmp_path, capsys)


def test_heads_that_the_mesh_does_not_divide(tmp_path, capsys):
    config = runs.ppo(tmp_path, model=ModelConfig(path="smollm2"), mesh=MeshConfig(tensor=2))
    assert "heads=9 % tensor=2" in said(config, tmp_path, capsys)


def test_rows_that_the_mesh_does_not_divide(tmp_path, capsys):
    config = runs.ppo(tmp_path, sample=SampleConfig(max_new_tokens=4, n=1))
    assert "rows=4 % (data·fsdp)=8" in said(config, tmp_path, capsys)


def test_model_path_that_does_not_exist(tmp_path, capsys):
    config = runs.ppo(tmp_path, model=ModelConfig(path="no/such/model"))
    assert "no/such/model" in said(config, tmp_path, capsys)

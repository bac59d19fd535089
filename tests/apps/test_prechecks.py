"""What is found before the first stage of a pipeline begins, and what is left to its stages."""

from dataclasses import replace

import pytest
import runs

from jaxrlhf.apps.pipeline import check_stages
from jaxrlhf.config import PipelineConfig, PreferencesConfig, StageConfig, dump
from jaxrlhf.core.errors import InputError


@pytest.fixture
def stages(tmp_path):
    """SFT, pairs from it, a reward model, PPO, and an evaluation: all that they name is there."""
    out = tmp_path / "out"
    ppo = runs.ppo(tmp_path)
    made = {"sft": runs.sft(tmp_path), "rm": runs.reward_model(tmp_path), "ppo": ppo}
    for name, run in made.items():
        (tmp_path / f"{name}.yaml").write_text(dump(run))
    wish = PreferencesConfig(
        model=str(out / "sft"),
        judge="jaxrlhf.data.words:goodness",
        train=ppo.data.train,
        eval=ppo.data.train,
        max_prompt_tokens=4,
        max_new_tokens=60,
    )
    model = {"model": {"path": str(out / "sft")}}
    pairs = {"data.train": str(out / "pairs/train.jsonl"), "data.eval": ""}
    rewards = {"rewards": [{"model": str(out / "rm")}]}
    file = {name: str(tmp_path / f"{name}.yaml") for name in made}
    return {
        "sft": StageConfig("sft", train=file["sft"]),
        "pairs": StageConfig("pairs", preferences=wish),
        "rm": StageConfig("rm", train=file["rm"], set=model | pairs),
        "ppo": StageConfig("ppo", train=file["ppo"], set=model | rewards),
        "evaluation": StageConfig("evaluation", evaluate=str(out / "ppo"), set={"n": 2}),
    }


def check(stages, folder, done=()):
    check_stages(PipelineConfig(tuple(stages.values()), output=str(folder / "out")), done)


def test_check_stages_trusts_stages_to_come(stages, tmp_path):
    check(stages, tmp_path)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("sft", {"data.train": "no.jsonl"}, "stage sft: no.jsonl: no such file"),
        ("sft", {"data.eval": "no.jsonl"}, "stage sft: no.jsonl: no such file"),
        ("sft", {"model": {"path": "no"}}, "stage sft: model.path='no': no such folder"),
        ("pairs", {"judge": "jaxrlhf.data.words:no"}, "stage pairs: reward function"),
        ("pairs", {"train": "no.jsonl"}, "stage pairs: no.jsonl: no such file"),
        ("pairs", {"eval": "no.jsonl"}, "stage pairs: no.jsonl: no such file"),
        ("pairs", {"model": "no"}, "stage pairs: model.path='no': no such folder"),
        ("pairs", {"max_new_tokens": 61}, "= 65 tokens exceed the context of"),
        ("rm", {"data.max_tokens": 65}, "stage rm: data.max_tokens = 65 tokens exceed"),
        ("rm", {"algorithm.normalise_on": "no.jsonl"}, "stage rm: no.jsonl: no such file"),
        ("ppo", {"rewards": [{"function": "no:no"}]}, "stage ppo: reward function 'no:no'"),
        ("ppo", {"rewards": [{"model": "no"}]}, "stage ppo: no: no reward model"),
        ("ppo", {"reference.path": "no"}, "stage ppo: model.path='no': no such folder"),
        ("evaluation", {"data": "no.jsonl"}, "stage evaluation: no.jsonl: no such file"),
        ("evaluation", {"reward": "no:no"}, "stage evaluation: reward function 'no:no'"),
        ("evaluation", {"against": "no"}, "stage evaluation: model.path='no': no such folder"),
    ],
)
def test_check_stages_refuses(stage, changes, message, stages, tmp_path):
    old = stages[stage]
    if old.preferences:
        stages[stage] = replace(old, preferences=replace(old.preferences, **changes))
    else:
        stages[stage] = replace(old, set=old.set | changes)
    with pytest.raises(InputError) as error:
        check(stages, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_check_stages_of_which_some_are_done(stages, tmp_path):
    """A stage that is done needs its files no more, and those that it has made must be there."""
    (tmp_path / "sft.jsonl").unlink()
    with pytest.raises(InputError, match=r"stage sft: .*no such file"):
        check(stages, tmp_path)
    (tmp_path / "out/sft").mkdir(parents=True)
    (tmp_path / "out/sft/config.yaml").write_text((tmp_path / "sft.yaml").read_text())
    check(stages, tmp_path, ["sft"])
    with pytest.raises(InputError, match=r"stage rm: .*train\.jsonl: no such file"):
        check(stages, tmp_path, ["sft", "pairs"])

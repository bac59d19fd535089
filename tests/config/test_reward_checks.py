from dataclasses import replace

import pytest

from jaxrlhf.config import (
    Config,
    DataConfig,
    ModelConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
    RewardConfig,
    check,
)
from jaxrlhf.core.errors import InputError

PPO = Config(
    model=ModelConfig(path="smollm2"),
    rewards=(RewardConfig(ensemble=("a", "b"), combine="lcb", k=0.5),),
    data=DataConfig(train="prompts.jsonl"),
)


def test_check_passes_an_ensemble():
    check(PPO)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (RewardConfig("f", ensemble=("a", "b")), "rewards.0: function and ensemble are both given"),
        (RewardConfig(ensemble=("a",)), "rewards.0.ensemble: one member"),
        (
            RewardConfig(model="a", combine="min"),
            "rewards.0.combine='min': a model does not read it",
        ),
        (RewardConfig(ensemble=("a", "b"), k=2.0), "rewards.0.k=2.0: combine=mean does not read"),
        (RewardConfig(ensemble=("a", "b"), combine="lcb", k=-1.0), "rewards.0.k=-1.0: must be"),
    ],
)
def test_ensemble_problems(source, message):
    with pytest.raises(InputError) as error:
        check(replace(PPO, rewards=(source,)))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (PointwiseRewardModelConfig(delta=2.0), "algorithm.delta=2.0: kind=mse does not read it"),
        (
            PointwiseRewardModelConfig(kind="huber", delta=0.0),
            "algorithm.delta=0.0: must be",
        ),
        (ProcessRewardModelConfig(separator=""), "algorithm.separator: empty"),
        (ProcessRewardModelConfig(score_l2=-1.0), "algorithm.score_l2=-1.0: must be at least 0"),
    ],
)
def test_reward_model_problems(algorithm, message):
    with pytest.raises(InputError) as error:
        check(replace(PPO, algorithm=algorithm, rewards=()))
    assert str(error.value).startswith(message)

import pytest

from jaxrlhf.config import GateConfig, IsolateConfig, LengthConfig, RewardConfig, ServiceConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.formats import Prompt
from jaxrlhf.rewards.combine import check_truths, load_rewards
from jaxrlhf.rewards.functions import Asked
from jaxrlhf.rewards.isolation import Isolated


def test_load_rewards_of_every_kind():
    gate = GateConfig(1.0)
    rewards = load_rewards(
        (
            RewardConfig(model="runs/rm", weight=2.0),
            RewardConfig(function="sentiment"),
            RewardConfig(verifier="number", gate=gate),
            RewardConfig(service=ServiceConfig("http://127.0.0.1:1")),
            RewardConfig(length=LengthConfig(1, 2)),
        )
    )
    names = ["runs/rm", "sentiment", "number", "http://127.0.0.1:1", "length"]
    assert [reward.name for reward in rewards] == names
    assert [reward.weight for reward in rewards] == [2.0, 1.0, 1.0, 1.0, 1.0]
    assert [reward.gate for reward in rewards] == [None, None, gate, None, None]
    assert [callable(reward.ask) for reward in rewards] == [False, True, True, True, False]
    assert rewards[4].length == LengthConfig(1, 2)


def test_load_rewards_names_are_unique():
    lengths = [RewardConfig(length=LengthConfig(1, n)) for n in (2, 3, 4)]
    assert [reward.name for reward in load_rewards(lengths)] == ["length", "length#2", "length#3"]


def test_load_rewards_names_no_query():
    url = "http://127.0.0.1:1/v1/score"
    configs = [RewardConfig(service=ServiceConfig(f"{url}?key={i}#there")) for i in range(2)]
    assert [reward.name for reward in load_rewards(configs)] == [url, f"{url}#2"]


def test_load_rewards_isolated():
    (reward,) = load_rewards((RewardConfig(verifier="exact", isolate=IsolateConfig()),))
    assert isinstance(reward.ask, Isolated)
    asked = Asked(["p", "p"], ["a", "b"], {"answer": ["a", "a"]}, [True, True])
    assert reward.ask(asked).score_B.tolist() == [1.0, 0.0]
    reward.ask.close()


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((), "rewards: none given; add one"),
        ((RewardConfig(),), r"rewards\.0: give either function or model"),
        ((RewardConfig("sentiment", "runs/rm"),), r"rewards\.0: .* both given"),
        ((RewardConfig("sentimnet"),), r"rewards\.0: reward function 'sentimnet' is unknown"),
        ((RewardConfig("sentiment", weight=float("nan")),), r"rewards\.0\.weight=nan"),
        (
            (RewardConfig(verifier="regex", pattern="("),),
            r"rewards\.0: pattern='\(': no pattern",
        ),
    ],
)
def test_load_rewards_bad_config(configs, message):
    with pytest.raises(InputError, match=message):
        load_rewards(configs)


def test_check_truths_names_the_place():
    rewards = load_rewards((RewardConfig("sentiment"), RewardConfig(verifier="number")))
    rows = [Prompt("p", {"answer": x}, f"f.jsonl:{i}") for i, x in enumerate(("5", 5, "five"))]
    check_truths(rewards, rows[:2])
    with pytest.raises(InputError, match=r"f\.jsonl:2: verifier number: the truth holds no number"):
        check_truths(rewards, rows)
    with pytest.raises(InputError, match=r"f\.jsonl:9: verifier number: the row has no 'answer'"):
        check_truths(rewards, [Prompt("p", {}, "f.jsonl:9")])

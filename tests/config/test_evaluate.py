"""What ``jaxrlhf eval`` is asked for."""

import pytest

from jaxrlhf.config import EvaluateConfig, check_evaluate, parse_evaluate
from jaxrlhf.core.errors import InputError


def test_parse_evaluate():
    words = ["runs/a", "--best-of", "0", "--correct-at", "0.5", "--reward", "sentiment"]
    expected = EvaluateConfig("runs/a", best_of=0, correct_at=0.5, reward="sentiment")
    assert parse_evaluate(words) == expected
    with pytest.raises(SystemExit):
        parse_evaluate([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n=0: must be at least 1"),
        ({"best_of": -1}, "best_of=-1: must be at least 0"),
        ({"fsdp": 0}, "fsdp=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"seed": 10**20}, "seed=100000000000000000000: must be below 4294967296"),
        ({"correct_at": float("nan")}, "correct_at=nan: must be a finite number"),
        ({"correct_at": float("inf")}, "correct_at=inf: must be a finite number"),
        ({"reward": "a", "reward_model": "b"}, "both given"),
    ],
)
def test_check_evaluate_refuses(change, message):
    with pytest.raises(InputError, match=message):
        check_evaluate(EvaluateConfig("runs/a", **change))

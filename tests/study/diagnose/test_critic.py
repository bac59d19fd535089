"""A critic that explains nothing."""

import numpy as np
from histories import STEPS, grpo, line, policy

from jaxrlhf.study.diagnose.critic import value_function
from jaxrlhf.study.diagnose.history import Series

ONES = np.ones(STEPS)


def test_value_function_severity():
    for level, severity in ((0.01, []), (0.0, ["warning"]), (-0.9, ["warning"])):
        found = value_function(policy(explained_variance=level * ONES))
        assert [f.severity for f in found] == severity
    (finding,) = value_function(policy(explained_variance=-1.1 * ONES))
    assert finding.severity == "problem"
    assert finding.evidence == "explained variance -1.1 (steps 33-40, median) after 40 iterations"


def test_value_function_is_given_time():
    history = policy(explained_variance=np.where(np.arange(STEPS) < 19, -0.5, np.nan))
    assert value_function(history) == []


def test_value_function_where_rewards_are_equal():
    """From step 21 on they hardly differ, and nothing of it counts."""
    late = np.arange(STEPS) >= 20
    changes = {"explained_variance": np.where(late, -20.0, 0.5), "score_std": 0.5 - 0.48 * late}
    assert value_function(policy(**changes)) == []
    changes["score_std"] = 0.5 - 0.4 * late
    assert [f.severity for f in value_function(policy(**changes))] == ["problem"]


def test_value_function_of_algorithms_with_a_critic_only():
    history = grpo()
    values = history.training.values | {"explained_variance": line(0, -2)}
    training = Series(history.training.step_I, values)
    assert value_function(type(history)(history.config, training, history.evaluation)) == []

"""Reward models of every kind: one dataclass each, told apart by ``name``."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxrlhf.config.offline import OfflineConfig, Rows


@dataclass(frozen=True)
class RewardModelConfig(OfflineConfig):
    """A scalar reward model trained on preference pairs (Bradley-Terry; arXiv:2203.02155)."""

    is_reward_model: ClassVar[bool] = True
    name: Literal["reward_model"] = "reward_model"
    centre_coef: float = 0.0
    """Weight of (r_chosen + r_rejected)², which keeps scores around 0 (arXiv:2312.09244)."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""
    score_l2: float = 0.0
    """Weight of the mean of score² over a row's answers."""
    normalise_on: str = ""
    """Rows of prompt and completion, the SFT policy's samples, say, whose scores are to have mean 0
    and standard deviation 1 once training ends; the first 128 are measured. Empty: scores stay as
    they are."""


@dataclass(frozen=True)
class ListwiseRewardModelConfig(OfflineConfig):
    """A scalar reward model trained on rankings of 2 to K responses (Plackett-Luce)."""

    rows: ClassVar[Rows] = "ranked"
    is_reward_model: ClassVar[bool] = True
    name: Literal["listwise_reward_model"] = "listwise_reward_model"
    as_pairs: bool = False
    """Bradley-Terry on all pairs of unequal rank instead, each prompt with weight 1 in total."""
    score_l2: float = 0.0
    """Weight of the mean of score² over a row's responses."""
    normalise_on: str = ""
    """Rows whose scores are to have mean 0 and standard deviation 1, as for ``reward_model``."""


@dataclass(frozen=True)
class PointwiseRewardModelConfig(OfflineConfig):
    """A scalar reward model trained on answers with a score, one by one."""

    rows: ClassVar[Rows] = "scored"
    is_reward_model: ClassVar[bool] = True
    name: Literal["pointwise_reward_model"] = "pointwise_reward_model"
    kind: Literal["mse", "huber", "binary"] = "mse"
    """Regression with (r − score)², the same beyond ``delta`` linear, or cross-entropy of σ(r)
    with a label, or a score in [0, 1]."""
    delta: float = 1.0
    """Error above which the Huber loss is linear (units of the score)."""
    score_l2: float = 0.0
    """Weight of score²."""
    normalise_on: str = ""
    """Rows whose scores are to have mean 0 and standard deviation 1, as for ``reward_model``."""


@dataclass(frozen=True)
class ProcessRewardModelConfig(OfflineConfig):
    """A score at the end of each step of an answer (arXiv:2211.14275, arXiv:2305.20050)."""

    rows: ClassVar[Rows] = "steps"
    is_reward_model: ClassVar[bool] = True
    name: Literal["process_reward_model"] = "process_reward_model"
    separator: str = "\n"
    """Text between two steps: joins a row's steps, and cuts what a policy has sampled."""
    aggregate: Literal["min", "product", "last"] = "min"
    """An answer's reward: least, product or last of its steps' probabilities of being right."""
    score_l2: float = 0.0
    """Weight of the mean of score² (a log-odds, squared) over a row's steps."""

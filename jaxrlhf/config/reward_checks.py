"""Rules between the fields of reward models and of the sources that are made of them."""

from collections.abc import Iterator

from jaxrlhf.config.offline import OfflineConfig
from jaxrlhf.config.reward_models import PointwiseRewardModelConfig, ProcessRewardModelConfig
from jaxrlhf.config.run import RewardConfig


def reward_model_problems(algorithm: OfflineConfig) -> Iterator[str]:
    """What a reward model's settings have that would not be read, or miss; a line each."""
    if isinstance(algorithm, PointwiseRewardModelConfig):
        delta, kind = algorithm.delta, algorithm.kind
        if kind != "huber" and delta != PointwiseRewardModelConfig().delta:
            yield f"algorithm.delta={delta}: kind={kind} does not read it: leave it out"
    if isinstance(algorithm, ProcessRewardModelConfig) and not algorithm.separator:
        yield "algorithm.separator: empty: give the text that stands between two steps"


def ensemble_problems(key: str, source: RewardConfig) -> Iterator[str]:
    """The same of a source of reward, whose dotted name is ``key``."""
    if source.ensemble and (source.function or source.model):
        yield f"{key}: ensemble stands beside another source: make them two rewards"
    if len(source.ensemble) == 1:
        yield f"{key}.ensemble: one member: give at least two, or model instead"
    if source.combine != "mean" and not source.ensemble:
        yield f"{key}.combine={source.combine}: nothing to combine: give an ensemble"
    if source.combine != "lcb" and source.k != RewardConfig().k:
        yield f"{key}.k={source.k}: combine={source.combine} does not read it: leave it out"
    if source.k < 0:
        yield f"{key}.k={source.k}: must be at least 0"

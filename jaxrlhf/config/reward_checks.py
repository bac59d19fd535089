"""Rules between the settings of reward models."""

from collections.abc import Iterator

from jaxrlhf.config.offline import OfflineConfig
from jaxrlhf.config.reward_models import PointwiseRewardModelConfig, ProcessRewardModelConfig


def reward_model_problems(algorithm: OfflineConfig) -> Iterator[str]:
    """What a reward model's settings have that would not be read, or miss; a line each."""
    if isinstance(algorithm, PointwiseRewardModelConfig):
        delta, kind = algorithm.delta, algorithm.kind
        if kind != "huber" and delta != PointwiseRewardModelConfig().delta:
            yield f"algorithm.delta={delta}: kind={kind} does not read it: leave it out"
    if isinstance(algorithm, ProcessRewardModelConfig) and not algorithm.separator:
        yield "algorithm.separator: empty: give the text that stands between two steps"

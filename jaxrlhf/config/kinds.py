"""What a config asks for: which way of learning, and which networks."""

from jaxrlhf.config.algorithm import OfflineConfig, OnPolicyConfig
from jaxrlhf.config.run import Config


def is_on_policy(config: Config) -> bool:
    """Whether the run learns from responses it samples."""
    return isinstance(config.algorithm, OnPolicyConfig)


def has_critic(config: Config) -> bool:
    """Whether the run learns a value function."""
    return isinstance(config.algorithm, OnPolicyConfig) and config.algorithm.has_critic


def has_reference(config: Config) -> bool:
    """Whether the run compares the policy with a reference."""
    return isinstance(config.algorithm, OnPolicyConfig) or config.algorithm.has_reference


def is_reward_model(config: Config) -> bool:
    """Whether the run trains a scalar head to judge."""
    return isinstance(config.algorithm, OfflineConfig) and config.algorithm.is_reward_model


def on_policy(config: Config) -> OnPolicyConfig:
    """The settings of an algorithm that samples; only for runs that do."""
    assert isinstance(config.algorithm, OnPolicyConfig)
    return config.algorithm

"""Sources of reward that are Python on the host: functions and verifiers."""

from jaxrlhf.config import RewardConfig, name_of
from jaxrlhf.rewards import verifiers
from jaxrlhf.rewards.asked import Asked, Scored, Source
from jaxrlhf.rewards.functions import RewardFunction, call, resolve


def host_function(config: RewardConfig) -> RewardFunction:
    """The function that a source with ``function`` or ``verifier`` names.

    Raises:
      InputError: it cannot be had.
    """
    if config.function:
        return resolve(config.function)
    return verifiers.function_of(verifiers.make(config.verifier, config.answer, config.pattern))


def make(config: RewardConfig) -> Source:
    """A source that calls the function in this process: what it raises ends the run."""
    function, name = host_function(config), name_of(config)

    def ask(asked: Asked) -> Scored:
        return Scored(call(name, function, asked.prompts, asked.completions, asked.columns))

    return ask

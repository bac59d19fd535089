"""Sources of reward that are Python on the host: functions and verifiers."""

from urllib.parse import urlsplit

from jaxrlhf.config import RewardConfig
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


def name_of(config: RewardConfig) -> str:
    """What errors and metrics call a source."""
    service = _place(config.service.url) if config.service else ""
    several = f"{config.combine}({', '.join(config.ensemble)})" if config.ensemble else ""
    return config.function or config.model or several or config.verifier or service or "length"


def _place(url: str) -> str:
    """Scheme, host and path of a URL: no secrets are in these."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def make(config: RewardConfig) -> Source:
    """A source that calls the function in this process: what it raises ends the run."""
    function, name = host_function(config), name_of(config)

    def ask(asked: Asked) -> Scored:
        return Scored(call(name, function, asked.prompts, asked.completions, asked.columns))

    return ask

"""Where rewards come from, and the rules between the fields of a source. Never imports jax."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from jaxrlhf.config.algorithms import OnPolicyConfig


@dataclass(frozen=True)
class ServiceConfig:
    """A reward service: rows by HTTP, as docs/reward_service.md describes."""

    url: str
    """Where batches are posted to, http:// or https://. Logs and metrics name it without its query;
    a secret belongs into ``header_env``."""
    timeout: float = 60.0
    """Seconds that an attempt may take in all, from connecting to the last byte of the answer."""
    connect_timeout: float = 5.0
    """Seconds of it that connecting may take."""
    retries: int = 3
    """Attempts after the first, where another may help."""
    backoff: float = 0.5
    """Seconds before the first further attempt; they double from one to the next, up to 30."""
    batch_size: int = 64
    """Most rows of one request."""
    concurrency: int = 4
    """Most requests under way at once."""
    max_bytes: int = 16_777_216
    """Most bytes of an answer."""
    header: str = "Authorization"
    """Name of the header that authenticates."""
    header_env: str = ""
    """Environment variable that holds this header's value; empty sends no such header."""


@dataclass(frozen=True)
class IsolateConfig:
    """Limits on a function, which then runs in processes of its own.

    A call that raises, exits, or exceeds a limit costs the rows of that call and nothing else.
    """

    workers: int = 1
    """Processes that take calls at once."""
    chunk: int = 8
    """Most rows of one call."""
    timeout: float = 30.0
    """Seconds that a call may take; the process is then killed and started anew."""
    memory_gib: float = 4.0
    """GiB of address space that a process may have, libraries included."""


@dataclass(frozen=True)
class LengthConfig:
    """A penalty on n tokens, stop token included: −clip((n − start)/(end − start), 0, 1)."""

    start: int
    """Tokens up to which it is 0."""
    end: int
    """Tokens from which on it is −1."""


@dataclass(frozen=True)
class GateConfig:
    """The sum of the other sources counts only where this one's score is high enough.

    Gates are asked in the order of the list. The first that has no score for a row leaves the row
    without a reward; the first whose score is below ``at_least`` gives it ``otherwise``, whatever
    the other sources say. Gates add nothing to the sum.
    """

    at_least: float
    """The lowest score that lets a row pass."""
    otherwise: float = 0.0
    """The reward of a row that does not pass."""


@dataclass(frozen=True)
class RewardConfig:
    """One source of reward: exactly one of function, model, ensemble, verifier, service and length.

    A row's reward is the weighted sum of its sources, and ``gate.otherwise`` where a gate is shut.
    """

    function: str = ""
    """A built-in (sentiment) or a Python function by its dotted path, package.module:function;
    async ones too. The module is imported: a config can run any code that is installed."""
    model: str = ""
    """A reward model: the output folder of its run, or a Hugging Face folder of a
    …ForSequenceClassification with one label and the policy's vocabulary."""
    weight: float = 1.0
    """What its score is multiplied with."""
    ensemble: tuple[str, ...] = ()
    """Reward models, as ``model``, that judge together (arXiv:2310.02743)."""
    combine: Literal["mean", "min", "lcb"] = "mean"
    """The reward of an ensemble: mean or least of its scores, or mean − k · standard deviation."""
    k: float = 1.0
    """Standard deviations that ``lcb`` takes off."""
    verifier: Literal["", "exact", "regex", "number", "choice", "math", "reasoning_gym"] = ""
    """1 for a right answer, 0 for a wrong one; math and reasoning_gym need jaxrlhf[verifiers]."""
    answer: str = "answer"
    """Column of the data with the truth that a verifier compares with."""
    pattern: str = ""
    """Regular expression that verifier: regex looks for, where the rows do not bring their own."""
    special_tokens: bool | None = None
    """Give it completions with their special tokens (<answer> may be one), but for the one that
    stopped them; null: a verifier gets them, a function or service does not."""
    service: ServiceConfig | None = None
    """A server that scores rows."""
    length: LengthConfig | None = None
    """A penalty on length."""
    isolate: IsolateConfig | None = None
    """Have a function or verifier that fails cost the rows of its call, in processes with limits;
    null has it end the run."""
    timeout: float = 1800.0
    """Seconds that a call of a function may take, for all rows of an iteration; the run then ends.
    Read where it is neither isolated nor called in the run's own process."""
    in_process: bool = False
    """Call a function in the run's own process, where it has the run's memory and devices, and not
    in a worker, as all code that is not this package's. There is then no deadline but
    distributed.watchdog, and one that exits or crashes ends the run, with whatever status: with
    os._exit(0) as if all were well."""
    offload: bool = False
    """Keep the weights of a reward model in host memory, and on the devices only while it scores:
    less memory for the other steps, and a copy from host to device each time."""
    gate: GateConfig | None = None
    """Make it a condition on the other sources, instead of a part of their sum."""


KINDS = ("function", "model", "ensemble", "verifier", "service", "length")
"""The fields of which a source has exactly one."""

READERS = {
    "isolate": ("function", "verifier"),
    "timeout": ("function", "verifier"),
    "in_process": ("function", "verifier"),
    "answer": ("verifier",),
    "pattern": ("verifier",),
    "special_tokens": ("function", "verifier", "service"),
    "combine": ("ensemble",),
    "k": ("ensemble",),
    "offload": ("model", "ensemble"),
}
"""Which kinds of source read an option; all of them read the others."""


def name_of(config: RewardConfig) -> str:
    """What errors and metrics call a source."""
    service = _place(config.service.url) if config.service else ""
    several = f"{config.combine}({', '.join(config.ensemble)})" if config.ensemble else ""
    return config.function or config.model or several or config.verifier or service or "length"


def _place(url: str) -> str:
    """Scheme, host and path of a URL: no secrets are in these."""
    parts = urlsplit(url)
    # A name ends up in logs and metrics: user, password and query stay out of it.
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def reward_problems(key: str, rewards: Sequence[RewardConfig]) -> Iterator[str]:
    """What is wrong with a list of sources, a line each.

    Args:
      key: the dotted name of the list.
    """
    for i, reward in enumerate(rewards):
        given = [kind for kind in KINDS if getattr(reward, kind)]
        if not given:
            yield f"{key}.{i}: give either function or model, or one of {', '.join(KINDS[2:])}"
        elif len(given) > 1:
            yield f"{key}.{i}: {' and '.join(given)} are both given: make them two rewards"
        else:
            yield from _source(f"{key}.{i}", given[0], reward)
    # A gate adds nothing to the sum.
    if rewards and all(reward.gate for reward in rewards):
        yield f"{key}: all of them are gates: there is nothing that they could let pass: add one"


def normalise_problems(algorithm: OnPolicyConfig, rewards: Sequence[RewardConfig]) -> Iterator[str]:
    """What ``normalise: each`` has no place for, a line each: all that changes a sum of scores."""
    if algorithm.normalise != "each":
        return
    why = "algorithm.normalise=each takes the scores of rewards one by one, not their sum"
    for i, reward in enumerate(rewards):
        if reward.gate:
            yield f"rewards.{i}.gate: {why}, which a gate replaces: leave one of the two out"
    for name in ("missing_eos_penalty", "overlong_buffer"):
        if value := getattr(algorithm, name):
            yield (
                f"algorithm.{name}={value:g}: {why}, which pays the penalty: give one of the "
                "rewards that charges for it, such as length, instead"
            )
    if algorithm.kl_in == "reward" and algorithm.kl_coef:
        yield f"algorithm.kl_coef={algorithm.kl_coef:g}: {why}, which pays the KL: set kl_in: loss"


def _source(key: str, kind: str, reward: RewardConfig) -> Iterator[str]:
    defaults = RewardConfig()
    for name, readers in READERS.items():
        value = getattr(reward, name)
        if value != getattr(defaults, name) and kind not in readers:
            yield f"{key}.{name}={_shown(value)}: a {kind} does not read it: leave it out"
    if reward.pattern and reward.verifier != "regex":
        yield f"{key}.pattern={reward.pattern!r:.80}: only verifier: regex reads it: leave it out"
    if reward.pattern and reward.answer != defaults.answer:
        yield f"{key}.answer={reward.answer}: the pattern stands in its place: leave one out"
    if len(reward.ensemble) == 1:
        yield f"{key}.ensemble: one member: give at least two, or model instead"
    folders = [os.path.normpath(folder) for folder in reward.ensemble]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            yield f"{key}.ensemble: {folder} is given twice: give each member once"
    if reward.ensemble and reward.combine != "lcb" and reward.k != defaults.k:
        yield f"{key}.k={reward.k}: combine={reward.combine} does not read it: leave it out"
    if reward.k < 0:
        yield f"{key}.k={reward.k}: must be at least 0"
    if not math.isfinite(reward.weight):
        yield f"{key}.weight={reward.weight}: give a finite number"
    if reward.gate is not None:
        if reward.weight != 1:
            yield f"{key}.weight={reward.weight:g}: a gate is no part of the sum: leave it out"
        for name, value in dataclasses.asdict(reward.gate).items():
            if not math.isfinite(value):
                yield f"{key}.gate.{name}={value}: give a finite number"
    if reward.length is not None and not 0 <= reward.length.start < reward.length.end:
        start, end = reward.length.start, reward.length.end
        yield f"{key}.length: start={start}, end={end}: must be 0 ≤ start < end, in tokens"
    if reward.service is not None:
        yield from _address(f"{key}.service.url", reward.service.url)
        positive = ("timeout", "connect_timeout", "batch_size", "concurrency", "max_bytes")
        yield from _ranges(f"{key}.service", reward.service, positive, ("retries", "backoff"))
        if not reward.service.header:
            yield f"{key}.service.header: empty: give the name of a header"
    yield from _where(key, reward)


def _where(key: str, reward: RewardConfig) -> Iterator[str]:
    """In which process a function is called, and how long that may take."""
    yield from _ranges(key, reward, ("timeout",))
    places = [name for name in ("isolate", "in_process") if getattr(reward, name)]
    if len(places) > 1:
        yield f"{key}: isolate and in_process are both given: leave one out"
    if places and reward.timeout != RewardConfig().timeout:
        instead = "isolate.timeout" if reward.isolate else "distributed.watchdog"
        yield f"{key}.timeout={reward.timeout:g}: with {places[0]}, set {instead} instead"
    if reward.isolate is not None:
        names = ("workers", "chunk", "timeout", "memory_gib")
        yield from _ranges(f"{key}.isolate", reward.isolate, names)


def _address(key: str, url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        yield f"{key}: no URL, or no port: must be http://… or https://…"
        return
    if "@" in parts.netloc:  # not shown: there is a secret in it
        yield (
            f"{key}: a name or password stands before the host, and would be written into "
            "config.yaml: leave it out, and name the environment variable that holds it in "
            "header_env"
        )
    elif parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        yield f"{key}={url.partition('?')[0]!r:.80}: must be http://… or https://…"


def _ranges(
    key: str, section: object, positive: Sequence[str], others: Sequence[str] = ()
) -> Iterator[str]:
    for name in (*positive, *others):
        value = getattr(section, name)
        if value < 0 or (value == 0 and name in positive):
            yield f"{key}.{name}={value}: must be {'above' if name in positive else 'at least'} 0"


def _shown(value: object) -> str:
    return "{…}" if dataclasses.is_dataclass(value) else f"{value!r:.80}"

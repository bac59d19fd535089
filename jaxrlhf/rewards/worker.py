"""A worker process: finds a function or verifier, and calls it for whoever asks.

Asked {id, source, memory} it says {id, ready, needs: columns that it cannot do without, ids: if it
wants token ids} or {id, unusable: why}; then for each {id, prompts, completions, columns, ids} {id,
scores: B numbers, NaN where it failed and null where it does not apply} or {id, problem: why}. If
it says nothing, the function has ended the process, or never returns.

It imports neither jax nor transformers: it is ready soon.
"""

import os
import resource
import signal
import socket
import sys
from typing import Any

from jaxrlhf.config import RewardConfig, name_of
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards import verifiers
from jaxrlhf.rewards.channel import ClosedError, receive, send
from jaxrlhf.rewards.functions import FunctionError, RewardFunction, call, callable_of
from jaxrlhf.rewards.signature import signature_of

READ = ("function", "verifier", "answer", "pattern")
"""The fields of a RewardConfig that a worker reads."""

LONGEST = 4096
"""Characters of what a worker says of a failure."""


def host_function(config: RewardConfig) -> RewardFunction:
    """The function that a config names, or its verifier as one; an InputError if it is not to be
    had."""
    if config.function:
        return callable_of(config.function)
    verifier = verifiers.make(config.verifier, config.answer, config.pattern)
    return lambda prompts, completions, **columns: verifiers.verify(verifier, completions, columns)


def serve(handle: int) -> None:
    """Answer what comes over the socket of this descriptor until it is closed."""
    _outlive_signals()
    # Not inherited by what the function starts: nobody but this process can speak here.
    with socket.socket(fileno=handle) as sock:
        sock.set_inheritable(False)
        try:
            function, config = _prepare(sock)
            while function is not None:
                asked = receive(sock)
                send(sock, {"id": asked["id"], **_answer(config, function, asked)})
        except ClosedError:  # whoever asked is gone
            return


def _outlive_signals() -> None:
    """Go on after what a scheduler sends to all of a job: the run may still want its rewards."""
    here = os.getpid()

    def go_on(number: int, _: Any) -> None:
        if os.getpid() != here:  # a fork, which whoever made it may want to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # Handlers, which no other program that is started inherits, as it would that they are ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, go_on)


def _prepare(sock: socket.socket) -> tuple[RewardFunction | None, RewardConfig]:
    """The function, once it is imported; None where it cannot be had, which has then been said."""
    wish = receive(sock)
    config = RewardConfig(**wish["source"])
    # The function's import counts too, and runs under the limit.
    if (size := wish["memory"]) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    try:
        function = host_function(config)
    except InputError as error:
        send(sock, {"id": wish["id"], "unusable": str(error)[:LONGEST]})
        return None, config
    how = signature_of(function)
    send(sock, {"id": wish["id"], "ready": True, "needs": how.needs, "ids": how.ids})
    return function, config


def _answer(config: RewardConfig, function: RewardFunction, asked: dict[str, Any]) -> dict:
    try:
        texts = asked["prompts"], asked["completions"]
        scored = call(name_of(config), function, *texts, asked["columns"], asked["ids"])
    except FunctionError as error:
        return {"problem": error.what[:LONGEST]}
    rows = zip(scored.score_B.tolist(), scored.applies(), strict=True)
    return {"scores": [score if applies else None for score, applies in rows]}


if __name__ == "__main__":
    serve(int(sys.argv[1]))

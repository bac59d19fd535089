"""What processes tell each other beside their devices: short texts, by way of process 0.

The coordinator that brought the processes together holds a small table of texts, which every
process writes and reads from the host. Nothing here waits for a device: a program that exchanges
arrays cannot be left once it has begun, but a wait for texts can.
"""

import itertools
from typing import Any

import jax
from jax._src import distributed  # the table has no public name

LONGEST_MS = 24 * 60 * 60 * 1000
"""Milliseconds that an exchange may wait; the watchdog, which knows what for, ends it before."""

_exchanges = itertools.count()


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("several processes, but no coordinator: call jax.distributed.initialize")
    return client


def post(topic: str, text: str) -> None:
    """Say a text under a topic, once; whoever looks finds it there, at once or later."""
    _client().key_value_set(f"jaxrlhf/{topic}/{jax.process_index()}", text, allow_overwrite=True)


def posted(topic: str) -> dict[int, str]:
    """What has been said under a topic so far, by the process that said it; waits for none."""
    found = _client().key_value_dir_get(f"jaxrlhf/{topic}/")
    return {int(key.rpartition("/")[2]): text for key, text in found}


def withdraw(topic: str) -> None:
    """Take back what this process has said under a topic."""
    _client().key_value_delete(f"jaxrlhf/{topic}/{jax.process_index()}")


def exchange(text: str) -> list[str]:
    """What each process says here, in their order. Each waits for all, in the same order of calls.

    Raises:
      jax.errors.JaxRuntimeError: a process has died meanwhile.
    """
    if jax.process_count() == 1:
        return [text]
    here = next(_exchanges)
    post(f"exchange/{here}", text)
    _client().wait_at_barrier(f"jaxrlhf/exchange/{here}", LONGEST_MS)
    said = posted(f"exchange/{here}")
    # All have come here, so all have read the one before.
    if here:
        withdraw(f"exchange/{here - 1}")
    return [said[process] for process in range(jax.process_count())]

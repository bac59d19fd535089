"""The client of a reward service: rows by HTTP, as docs/reward_service.md describes.

Whatever a service does, a row gets the number that was given for its id or none at all. What may
pass by itself (no connection, a timeout, HTTP 5xx, 408, 425 or 429, an answer that is no such
answer) is tried again, ``retries`` times.
"""

import asyncio
import itertools
import json
import math
import os
import random
import uuid
from collections.abc import Mapping

import httpx2
import numpy as np

from jaxrlhf.config import ServiceConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import shown
from jaxrlhf.rewards.functions import Asked, Scored, Source, describe, finish, number

LONGEST_PAUSE = 30.0
"""Seconds."""

AGAIN = (408, 425, 429)
"""Statuses below 500 after which another attempt may help."""


class NoAnswerError(Exception):
    """A request without a usable answer."""

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final


def make(config: ServiceConfig) -> Source:
    """A source that asks the service.

    Raises:
      InputError: the environment variable that authenticates is unset or cannot be a header.
    """
    headers, hidden = {"Content-Type": "application/json", "Accept-Encoding": "identity"}, []
    if config.header_env:
        wanted = f"the value of the header {config.header}"
        headers[config.header] = secret("service.header_env", config.header_env, wanted)
        # With its scheme, as in "Bearer TOKEN", and without.
        hidden = [headers[config.header], headers[config.header].split()[-1]]
    # No request of another source, run or process has the id of one of these: a server may keep
    # answers by it.
    source, calls = uuid.uuid4().hex, itertools.count()

    def ask(asked: Asked) -> Scored:
        scored = finish(_ask_all(config, headers, asked, f"{source}-{next(calls)}"))
        problem = scored.problem
        for text in hidden:  # what a service says may be what it was sent
            problem = problem.replace(text, "…")
        return scored._replace(problem=problem)

    return ask


def secret(field: str, variable: str, what: str) -> str:
    """The value of an environment variable, which can stand in a header.

    Args:
      field: that names the variable.
      what: the variable is to hold.

    Raises:
      InputError: it is unset or empty, or not printable ASCII.
    """
    value = os.environ.get(variable, "")
    if not value.strip() or not value.isascii() or not value.isprintable():
        is_ = "not printable ASCII" if value.strip() else "unset or empty"
        raise InputError(
            f"{field}={variable}: this environment variable is {is_}: set it to {what}"
        )
    return value


async def _ask_all(
    config: ServiceConfig, headers: Mapping[str, str], asked: Asked, call: str
) -> Scored:
    """All rows, in requests of ``batch_size``, ``concurrency`` of them at once."""
    turn = asyncio.Semaphore(config.concurrency)
    timeout = httpx2.Timeout(config.timeout, connect=config.connect_timeout)
    # trust_env=False: no proxies and passwords out of the environment.
    async with httpx2.AsyncClient(headers=headers, timeout=timeout, trust_env=False) as client:

        async def one(piece: Asked, name: str) -> Scored:
            async with turn:
                return await _ask(client, config, piece, name)

        pieces = asked.split(config.batch_size)
        scored = await asyncio.gather(*(one(p, f"{call}-{i}") for i, p in enumerate(pieces)))
    return Scored.join(scored)


async def _ask(
    client: httpx2.AsyncClient, config: ServiceConfig, asked: Asked, name: str
) -> Scored:
    """One request, attempted until it is answered, at most ``1 + retries`` times."""
    body = question(asked, name)
    # Requests that fail together do not come back together.
    draws = random.Random(name)
    for attempt in range(config.retries + 1):
        try:
            return read_answer(await _attempt(client, config, body), name, len(asked))
        except NoAnswerError as error:
            problem = str(error)
            if error.final or attempt == config.retries:
                break
        # backoff · 2^attempt seconds, and of that a share drawn from [½, 1].
        pause = min(config.backoff * 2**attempt, LONGEST_PAUSE)
        await asyncio.sleep(pause * draws.uniform(0.5, 1.0))
    return Scored(np.full(len(asked), np.nan), problem)


async def _attempt(client: httpx2.AsyncClient, config: ServiceConfig, body: bytes) -> bytes:
    """The body of an answer with status 200."""
    content = bytearray()
    # The client's own timeout is one a read: a server that drips would never be late.
    try:
        async with (
            asyncio.timeout(config.timeout),
            client.stream("POST", config.url, content=body) as response,
        ):
            status = response.status_code
            if status != 200:
                raise NoAnswerError(f"HTTP {status}", final=status < 500 and status not in AGAIN)
            async for part in response.aiter_bytes():
                content += part
                # No length is believed that the server has stated.
                if len(content) > config.max_bytes:
                    raise NoAnswerError(f"an answer of more than max_bytes={config.max_bytes}")
    except TimeoutError:
        raise NoAnswerError(f"no answer within timeout={config.timeout:g} s") from None
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError) as error:
        raise NoAnswerError(describe(error)) from error
    return bytes(content)


def question(asked: Asked, name: str) -> bytes:
    """The body of a request; rows are called "0", "1", … in it.

    Raises:
      InputError: a column holds a number that JSON has not.
    """
    rows = [
        {
            "id": str(b),
            "prompt": asked.prompts[b],
            "completion": asked.completions[b],
            "ended": bool(asked.ended[b]),
            "columns": {key: values[b] for key, values in asked.columns.items()},
        }
        for b in range(len(asked))
    ]
    try:
        return json.dumps({"id": name, "rows": rows}, allow_nan=False, default=str).encode()
    except ValueError as error:
        raise InputError(
            "rewards: a column of the data holds NaN or infinity, which cannot be sent to a "
            "service: make it null"
        ) from error


def read_answer(body: bytes, name: str, rows: int) -> Scored:
    """The scores in the body of an answer, in the order of the rows that were asked.

    A row that is missing, stands there twice, or has anything but a finite number gets NaN. To one
    whose reward is null, without an error, the source does not apply. Rows that were not asked
    about are passed over.

    Args:
      name: the id of the request; an answer may leave it out, but not have another.
      rows: that were asked about, B.

    Raises:
      NoAnswerError: not an answer at all.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise NoAnswerError(f"an answer that is not JSON: {body[:40]!r}") from None
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list):
        raise NoAnswerError(f"an answer without a list of rewards: {body[:40]!r}")
    if answer.get("id", name) != name:
        raise NoAnswerError(f"an answer to another request: id={shown(answer['id'], 40)}")
    # By id alone: rows may come back in any order.
    score_B, seen_B, problem = np.full(rows, np.nan), np.zeros(rows, int), ""
    applies_B = np.ones(rows, bool)
    places = {str(b): b for b in range(rows)}
    for item in rewards:
        given = item.get("id") if isinstance(item, dict) else None
        if not isinstance(given, str) or given not in places:
            problem = f"a reward for an unknown row: {shown(item)}"
            continue
        b = places[given]
        seen_B[b] += 1
        reward = item.get("reward")
        # In Python, True is the number 1; a service that says so means something else.
        score_B[b] = math.nan if isinstance(reward, bool) else number(reward)
        error = item.get("error")
        # A null of its own accord; a reward that is left out, or fails, is none.
        applies_B[b] = reward is not None or "reward" not in item or error is not None
        if applies_B[b] and not math.isfinite(score_B[b]):
            said = error or f"reward={shown(reward)}"
            problem = f"row {given}: {' '.join(str(said).split()):.80}"
    # Two numbers for a row, and no saying which is meant: it gets neither.
    if (seen_B > 1).any():
        problem = f"row {int(np.argmax(seen_B > 1))} has several rewards"
    if (seen_B == 0).any():
        problem = f"row {int(np.argmax(seen_B == 0))} has no reward"
    applies_B |= seen_B > 1
    return Scored(np.where(seen_B == 1, score_B, np.nan), problem, applies_B)

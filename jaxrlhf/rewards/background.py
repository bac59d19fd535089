"""One event loop for all that is asynchronous, in a thread of its own."""

import asyncio
import functools
import threading
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


def finish(awaitable: Awaitable[T]) -> T:
    """The result of an awaitable, waited for; also where the caller is in an event loop itself.

    All of them run in one loop, which lives as long as the process: what an async function keeps
    open from one call to the next (a client, its connections) stays usable.

    Raises:
      RuntimeError: the awaitable tried to end the process; its SystemExit is the cause.
    """

    async def wait() -> T:
        try:
            return await awaitable
        except SystemExit as error:  # would end the loop, and leave all who wait on it waiting
            ended = RuntimeError(f"SystemExit: {error}").with_traceback(error.__traceback__)
            raise ended from error

    return asyncio.run_coroutine_threadsafe(wait(), _loop()).result()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop

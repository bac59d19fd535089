"""A process that calls one reward function under limits; ``isolation`` starts and asks it.

Over its connection it gets (source, bytes of address space, id of the process that started it),
and says ("ready", "") or ("unusable", why). Then for each batch (prompts, completions, columns) it
says ("scores", list of B floats) or ("problem", why); if it says nothing, the function has ended
the process, or never returns.
"""

import os
import resource
import sys
import threading
import time
from multiprocessing.connection import Connection

from jaxrlhf.config import name_of
from jaxrlhf.errors import InputError
from jaxrlhf.rewards.functions import call, describe
from jaxrlhf.rewards.local import host_function


def main(handle: int) -> None:
    """Serve the connection until it is closed."""
    connection = Connection(handle)
    source, size, parent = connection.recv()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    try:
        function = host_function(source)
    except InputError as error:
        connection.send(("unusable", str(error)))
        return
    connection.send(("ready", ""))
    while True:
        try:
            prompts, completions, columns = connection.recv()
        except EOFError:
            return
        try:
            score_B = call(name_of(source), function, prompts, completions, columns)
            said = ("scores", score_B.tolist())
        except InputError as error:
            cause = error.__cause__
            said = ("problem", f"raised {describe(cause)}" if cause else str(error))
        connection.send(said)


def _end_with(parent: int) -> None:
    """End this process once its parent has, even in the midst of a call."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))

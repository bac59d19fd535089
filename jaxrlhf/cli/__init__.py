"""The ``jaxrlhf`` command. ``--help`` must answer at once, so modules are imported where needed."""

import difflib
import sys
from collections.abc import Callable, Sequence

from jaxrlhf.cli.environment import env, settle
from jaxrlhf.cli.parsing import typed
from jaxrlhf.cli.planning import plan
from jaxrlhf.cli.reading import diagnose, report
from jaxrlhf.cli.training import demo, pipeline, train
from jaxrlhf.cli.using import evaluate, export, generate, serve, tasks
from jaxrlhf.errors import InputError


def main(words: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
      words: the command line without the program's name; ``sys.argv[1:]`` if None.

    Returns:
      The exit status: 0, 2 after bad input (one line ``error: …`` on stderr), 130 after Ctrl-C.
    """
    if words is None:  # the process is ours
        settle()
        words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        find(words[0])(list(words[1:]))
    except (InputError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def usage() -> str:
    """The help of the command as a whole."""
    width = max(map(len, COMMANDS)) + 4
    lines = (f"  {name:<{width}}{text}" for name, (text, _) in COMMANDS.items())
    return "\n".join(
        [
            "usage: jaxrlhf COMMAND …",
            "",
            "Reinforcement learning from human feedback in JAX.",
            "",
            *lines,
            "",
            "jaxrlhf COMMAND --help lists what a command takes.",
        ]
    )


def find(name: str) -> Callable[[list[str]], None]:
    """The subcommand called ``name``, a function of the words after it."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        known = f"did you mean {close[0]}?" if close else f"known: {', '.join(COMMANDS)}"
        raise InputError(f"{name}: unknown command ({known})")
    return COMMANDS[name][1]


COMMANDS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "train": ("train as a YAML file says: train CONFIG [--dotted.key value …]", train),
    "plan": ("what a run takes, on devices not at hand: plan CONFIG --topology NAME", plan),
    "demo": ("a whole training run in minutes, on a CPU too: demo [--tiny]", typed(demo)),
    "pipeline": ("several runs, one after the other, as a YAML file says", typed(pipeline)),
    "generate": ("complete prompts: generate MODEL --prompt TEXT", typed(generate)),
    "eval": ("held-out prompts: rewards, KL, win rate, best-of-n: eval RUN", evaluate),
    "report": ("a page about a run, or several compared: report RUN…", typed(report)),
    "export": ("a run's policy as a Hugging Face folder: export RUN OUT", typed(export)),
    "diagnose": ("what is wrong with a run, why, and what to do: diagnose RUN", typed(diagnose)),
    "serve": ("rewards by HTTP: serve RUN|package.module:function", typed(serve)),
    "tasks": ("tasks of reasoning-gym as rows of data: tasks TASK OUT", tasks),
    "env": ("versions and devices", typed(env)),
}

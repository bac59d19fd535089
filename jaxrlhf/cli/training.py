"""The commands that train: train, demo, pipeline."""

from typing import Annotated

from tyro.conf import Positional, arg

from jaxrlhf.cli.environment import prepare_jax
from jaxrlhf.errors import InputError


def train(words: list[str]) -> None:
    """Load CONFIG, change it by the words after it, check it, train."""
    from jaxrlhf.config import Config, check, load, override

    if words[:1] in (["-h"], ["--help"]):
        override(Config(), ["--help"])
    if not words or words[0].startswith("-"):
        raise InputError("train: CONFIG, the path of a YAML file, comes first")
    config = load(words[0], words[1:])
    check(config)
    prepare_jax()
    from jaxrlhf.models.reading import read_ahead

    read_ahead(config.model)
    from jaxrlhf import distributed, loop  # takes a while

    with distributed.together(config.distributed) as watchdog:
        loop.train(distributed.placeless(config), feed=watchdog.feed)


def demo(output: str = "", tiny: bool = False, seed: int = 0) -> None:
    """Train a small model from sampling to evaluation, and show what it has learnt.

    Args:
      output: folder that the runs are written to; runs/demo, or runs/tiny, if empty.
      tiny: a model of a few thousand parameters, in seconds; shows that everything works.
      seed: every draw follows from it.
    """
    prepare_jax()
    from jaxrlhf.demo import run

    run(output, tiny, seed)


def pipeline(
    config: Annotated[Positional[str], arg(metavar="CONFIG")],
    output: str = "",
    seed: int | None = None,
) -> None:
    """Carry out the stages that a YAML file lists: data, runs, evaluations.

    A stage that is done is not done again, one that was interrupted goes on.

    Args:
      config: the YAML file.
      output: folder of the stages, in place of the file's.
      seed: every draw follows from it; in place of the file's.
    """
    from jaxrlhf.config import load_pipeline

    stages = load_pipeline(config, output, seed)
    prepare_jax()
    from jaxrlhf.pipeline import run_pipeline

    run_pipeline(stages)

"""The command that says what a run would take: plan."""

import math
import os

from jaxrlhf.cli.environment import prepare_jax
from jaxrlhf.errors import InputError


def plan(words: list[str]) -> None:
    """Load CONFIG, change it by the words after it, and say what it would take on a topology."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="jaxrlhf plan",
        usage="jaxrlhf plan CONFIG --topology NAME [options] [--dotted.key value …]",
        description="Compile what CONFIG would run, for devices that need not be here, and print "
        "bytes, exchanges, FLOPs and a lower bound of the time of every step. Reads neither data "
        "nor tokenizer nor weights. Ends with status 2 if a step does not fit.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16 (chips along each dimension); cpu:8, "
        "h100:8, h200:8 (fake CPU devices); here",
    )
    parser.add_argument("--mean-length", type=float, metavar="TOKENS", help="of a response; "
        "without it every response is as long as it may be")  # fmt: skip
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a device, if not its own")
    parser.add_argument("--search", action="store_true", help="rank other meshes, microbatches")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given, changes = parser.parse_known_args(words)
    from jaxrlhf.planning.topology import environment, parse

    topology = parse(given.topology)
    if given.mean_length is not None and not 1 <= given.mean_length < math.inf:
        raise InputError(
            f"--mean-length {given.mean_length:g}: must be at least 1 token, and finite"
        )
    if given.memory is not None and not 0 < given.memory < math.inf:
        raise InputError(f"--memory {given.memory:g}: must be above 0 GiB, and finite")
    from jaxrlhf.config import check, is_on_policy, load

    config = load(given.config, changes)
    check(config)
    mean, most = given.mean_length, config.sample.max_new_tokens
    if mean is not None and is_on_policy(config) and mean > most:
        raise InputError(f"--mean-length {mean:g}: above sample.max_new_tokens={most}: lower it")
    os.environ.update(environment(topology, os.environ.get("XLA_FLAGS", "")))
    prepare_jax()
    from jaxrlhf.planning.command import run

    run(config, topology, given.mean_length, given.memory, given.search, not given.json)

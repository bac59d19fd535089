"""What ``jaxrlhf plan`` does once jax has been prepared."""

import json
import sys
from functools import partial

from jaxrlhf.config import Config
from jaxrlhf.core.errors import InputError
from jaxrlhf.study.plan import report
from jaxrlhf.study.plan.advice import advise, search
from jaxrlhf.study.plan.compiling import plan
from jaxrlhf.study.plan.planned import as_json
from jaxrlhf.study.plan.topology import GIB, Topology


def run(
    config: Config,
    topology: Topology,
    mean_length: float | None = None,
    memory_gib: float | None = None,
    rank: bool = False,
    as_text: bool = True,
) -> None:
    """Print a run's plan; with ``rank`` also other layouts; as JSON without ``as_text``.

    Raises:
      InputError: the run does not fit; the message says what to change.
    """
    memory = None if memory_gib is None else memory_gib * GIB
    found = plan(config, topology, mean_length, memory, tell=partial(print, file=sys.stderr))
    if as_text:
        print(report.table(found))
    ranked = search(config, topology, found, mean_length) if rank else []
    change = None if found.fits or rank else advise(config, topology, found, mean_length)
    if not as_text:
        whole = as_json(found)
        whole["search"] = [{"flags": x.flags, **as_json(x.plan)} for x in ranked]
        whole["advice"] = change and {"flags": change.flags, **as_json(change.plan)}
        print(json.dumps(whole))
    elif rank:
        print(f"\nlayouts that fit, of those tried\n{report.ranking(ranked)}")
    if not found.fits:
        more = "" if rank else f"; {report.advice(change)}"
        raise InputError(report.verdict(found) + more)

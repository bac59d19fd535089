"""What a run says of itself: where it is, at its start, and what came of it, at its end."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from jax.sharding import Mesh

from jaxrlhf.config import Config, is_on_policy, is_reward_model
from jaxrlhf.core.files import is_url
from jaxrlhf.mesh.backend import described, unused_gpu
from jaxrlhf.mesh.processes import all_or_none, is_first
from jaxrlhf.run.display import Display, display, number
from jaxrlhf.run.speed import compilations
from jaxrlhf.run.trackers import check_trackers


@contextmanager
def announced(config: Config, mesh: Mesh) -> Iterator[Display]:
    """The terminal of a run, which says first what the run is on.

    Raises:
      InputError: a tracker of the run is not installed.
    """
    all_or_none(partial(check_trackers, config.trackers))
    title = f"{config.algorithm.name} → {config.output}"
    where, compiled = described(mesh, config.model.dtype), compilations().total
    with display(config.steps, title, active=is_first(), where=where, compiled=compiled) as show:
        if unused := unused_gpu(mesh.devices.flat[0].platform):
            show.note(unused)
        show.phase("reading the data")
        yield show


def ending(config: Config, summary: Mapping[str, Any], chats: bool) -> list[str]:
    """What is said at the end of a run: the gold measure, the page, the next command.

    Args:
      config: of the run.
      summary: as in summary.json.
      chats: whether the model has a chat template.
    """
    out = shlex.quote(config.output)
    lines = []
    if summary.get("gold_after") is not None:
        rise = ""
        if summary.get("gold_rise") is not None:
            rise = f" (rise {number(summary['gold_rise'])} ± {number(summary['gold_rise_ci'])})"
        ends = " → ".join(number(summary.get(f"gold_{end}")) for end in ("before", "after"))
        lines.append(f"gold measure {ends}{rise}")
    lines.append(f"report: {config.output}/report.html")
    talk = f"chat {out}" if chats else f"generate {out} --raw --prompt TEXT"
    if is_reward_model(config):
        model = shlex.quote(config.model.path or "MODEL")
        talk = f"generate {model} --prompt TEXT --n 8 --keep best --reward-model {out}"
    # Which would be written into the run's folder.
    measured = is_on_policy(config) and bool(config.data.eval) and not is_url(config.output)
    lines.append("next: " + (f"jaxrlhf eval {out}, or " if measured else "") + f"jaxrlhf {talk}")
    return lines

"""From a config to its plan: every program of the run, compiled for devices not at hand."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.config import Config, MeshConfig, across_slices, resolve_mesh
from jaxrlhf.models.load import is_run
from jaxrlhf.models.read import is_reward_folder
from jaxrlhf.run.setup import Run, outline
from jaxrlhf.study.plan import collectives as exchange
from jaxrlhf.study.plan import flops, hlo
from jaxrlhf.study.plan.devices import chip_name, mesh_of
from jaxrlhf.study.plan.memory import (
    Kinds,
    arguments_by_kind,
    cache_bytes,
    decode_copy,
    refused,
    resident,
)
from jaxrlhf.study.plan.planned import ARGUMENTS, Plan, Step
from jaxrlhf.study.plan.steps import Call, calls_of, decode_trips
from jaxrlhf.study.plan.topology import CHIPS, GIB, Chip, Topology

WORKERS = 4
"""Most programs compiled at a time: each takes a core, and a GiB or two for a large model."""


def plan(
    config: Config,
    topology: Topology,
    mean_length: float | None = None,
    memory: float | None = None,
    names: tuple[str, ...] = (),
    tell: Callable[[str], Any] = str,
) -> Plan:
    """Compile every program of a run for a topology, and say what each takes.

    Args:
      mean_length: of a response, tokens; None plans for the worst case, max_new_tokens.
      memory: bytes that fit on a device; None: the chip's.
      names: only these steps; all if empty.
      tell: is called with a line before each step is compiled, and may show it.

    Raises:
      InputError: the config cannot be laid out there, or libtpu is missing.
    """
    config, assumed = with_stand_ins(config)
    mesh = mesh_of(config.mesh, topology)
    devices = list(mesh.devices.flat)
    chip = CHIPS[chip_name(topology, devices)]
    run = outline(config, mesh)
    with jax.set_mesh(mesh):
        calls = {name: x for name, x in calls_of(run).items() if not names or name in names}

    def work(item: tuple[str, Call]) -> Step:
        tell(f"compiling {item[0]}")
        with jax.set_mesh(mesh):  # it is a thread's own
            return step_of(run, *item, chip, mean_length)

    with ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1, WORKERS)) as pool:
        steps = list(pool.map(work, calls.items()))
    return Plan(
        topology=topology.name,
        chip=chip_name(topology, devices),
        devices=len(devices),
        mesh=dict(mesh.shape),
        memory=memory or chip.memory,
        steps=tuple(steps),
        remarks=(
            *assumed,
            *offloaded(calls),
            *remarks(resolve_mesh(config.mesh, len(devices)), topology, mean_length),
        ),
    )


def step_of(run: Run, name: str, call: Call, chip: Chip, mean_length: float | None = None) -> Step:
    """One program: traced for its FLOPs, compiled for its bytes."""
    traced = call.program.trace(*call.args)
    kinds = arguments_by_kind(call.args, traced.jaxpr)
    trips = decode_trips(run.config, call.responses, mean_length) if call.responses else None
    work = flops.count(traced.jaxpr, trips) / run.mesh.size
    lowered = traced.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = refused(str(error))
        if used is None:
            raise
        kinds["temporaries"] = used - sum(kinds.values())
        kinds["elsewhere"] = elsewhere(run, call, kinds)
        seconds = {"compute": work / chip.flops, "memory": 0.0, "links": 0.0}
        return Step(name, call.calls, kinds, work, 0.0, {}, seconds, trips, refused=True)
    module = hlo.parse(compiled.as_text())
    analysis = compiled.memory_analysis()
    kinds, outputs = _with_temporaries(run, call, kinds, analysis)
    sent = exchange.totals(exchange.collectives(module, trips))
    moved = sum(kinds[kind] for kind in ARGUMENTS) + outputs
    moved += exchange.product_bytes(module, trips)
    seconds = {
        "compute": work / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": sum(size for _, size in sent.values()) / chip.link,
    }
    given = float(analysis.argument_size_in_bytes)
    return Step(name, call.calls, kinds, work, moved, sent, seconds, trips, given)


def _with_temporaries(run: Run, call: Call, kinds: Kinds, analysis: Any) -> tuple[Kinds, float]:
    """All kinds of bytes, and those of the results, by the compiler's own account."""
    out = dict(kinds)
    left = float(analysis.temp_size_in_bytes)
    if call.responses:
        for name, size in (
            ("kv_cache", cache_bytes(run, call.responses)),
            ("weights_copy", decode_copy(run, run.model)),
        ):
            out[name] = min(size, left)
            left -= out[name]
    out["temporaries"] = left
    results = float(analysis.output_size_in_bytes)
    out["outputs"] = max(results - analysis.alias_size_in_bytes, 0.0)
    out["elsewhere"] = elsewhere(run, call, kinds)
    return out, results


def elsewhere(run: Run, call: Call, kinds: Kinds) -> float:
    """Bytes of networks and optimizers that are on a device and not arguments of a call."""
    return resident(run) + call.fetched - kinds["parameters"] - kinds["optimizer"]


def with_stand_ins(config: Config) -> tuple[Config, list[str]]:
    """The config without the networks that are not there yet, and what is assumed of them."""
    said = "nothing is there yet: taken to be of the policy's shape"
    found = [
        f"rewards.{i}: {path}: {said}"
        for i, reward in enumerate(config.rewards)
        for path in (reward.model, *reward.ensemble)
        if path and not is_run(path) and not is_reward_folder(path)
    ]
    for section in ("critic", "reference"):
        path = getattr(config, section).path
        if path and path != "smollm2" and not Path(path).exists():
            found.append(f"{section}.path={path}: {said}")
            blank = replace(getattr(config, section), path="")
            config = replace(config, **{section: blank})
    return config, found


def offloaded(calls: dict[str, Call]) -> list[str]:
    """What comes from host memory, a line a step."""
    return [
        f"{name}: {call.fetched / GIB:.3f} GiB of parameters come from host memory for it; the "
        "time that takes is not counted"
        for name, call in calls.items()
        if call.fetched
    ]


def remarks(mesh: MeshConfig, topology: Topology, mean_length: float | None) -> list[str]:
    """What a reader of the plan has to know to read it right."""
    found = []
    if mesh.slices > 1:
        found.append(
            f"{mesh.slices} slices: what {across_slices(mesh)} sends goes between them, over a "
            "slower network than the links that it is reckoned with"
        )
    if topology.compiler == "cpu":
        found.append("compiled for CPU devices: temporaries and collectives are that compiler's")
    if mean_length is not None:
        found.append(
            f"responses of {mean_length:g} tokens on average, each token as likely to be the last"
        )
    return found

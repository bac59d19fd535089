"""From a config to its plan: every program of the run, compiled for devices not at hand."""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxrlhf.config import Config, MeshConfig, across_slices, resolve_mesh
from jaxrlhf.core.errors import InputError, to_install
from jaxrlhf.mesh.chips import CHIPS, GIB, Chip
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import is_run
from jaxrlhf.models.read import is_reward_folder
from jaxrlhf.run.setup import Run, outline
from jaxrlhf.study.plan import hlo
from jaxrlhf.study.plan.calls import (
    Call,
    Refusal,
    arguments_by_kind,
    cache_bytes,
    calls_of,
    decode_loops,
    decode_trips,
    refused,
    resident,
)
from jaxrlhf.study.plan.gpus import GPUS, described
from jaxrlhf.study.plan.moved import Move, moves, source, sources, total
from jaxrlhf.study.plan.needed import needed
from jaxrlhf.study.plan.topology import Topology, chip_of

WORKERS = 4
"""Most programs compiled at a time: each takes a core, and a GiB or two for a large model."""

HEAVIEST = 10
"""Instructions that a plan keeps of each step."""

ARGUMENTS = ("parameters", "optimizer", "rows", "weights_copy")
"""Kinds of bytes that come as arguments; their sum is what the compiler calls arguments."""

KINDS = (*ARGUMENTS, "kv_cache", "temporaries", "outputs", "elsewhere")
"""Kinds of bytes on a device while a step runs: its arguments, of a sampler the weights in decode
layout too; its KV cache; all other temporaries, activations most of them; results that do not take
an argument's place; and what the run holds besides, for other steps."""


@dataclass(frozen=True)
class Step:
    """One program of a run, compiled."""

    name: str
    calls: int
    """Times an iteration; 0 for what stands outside of it."""
    bytes: dict[str, float]
    """On each device, by kind (``KINDS``)."""
    flops: float
    """Of matrix products, on each device, a call."""
    moved: float
    """Bytes that its instructions move to and from memory, on each device, a call."""
    collectives: dict[str, tuple[int, float]]
    """Kind → (how many, bytes that each device sends), a call."""
    seconds: dict[str, float]
    """A call by the roofline: compute, memory, links. It takes the longest of them at least."""
    trips: int | None = None
    """Of its decode loop, or over the pieces of what it packs."""
    arguments: float = 0.0
    """Bytes of its arguments on each device as the compiler has them, padding included."""
    refused: bool = False
    """The compiler refused it for its size: what it sends and moves is not known."""
    needed: float = 0.0
    """Bytes that a call must move at least (``needed.needed``)."""
    token: tuple[float, float] = (0.0, 0.0)
    """Of a sampler: what a trip of its decode loop moves, and what it must move."""
    heaviest: tuple[tuple[str, str, float, float], ...] = ()
    """The instructions that move most: what they are, their source, bytes a call, its share."""
    at_least: bool = False
    """Refused without a word on how large it is: its bytes may be more."""

    @property
    def peak(self) -> float:
        """Bytes on each device while it runs."""
        return sum(self.bytes.values())

    @property
    def time(self) -> float:
        """Seconds of a call, at least."""
        return max(self.seconds.values())

    @property
    def sent(self) -> float:
        """Bytes that each device sends, a call."""
        return sum(sent for _, sent in self.collectives.values())


@dataclass(frozen=True)
class Plan:
    """All steps of a run on some devices."""

    topology: str
    chip: str
    devices: int
    mesh: dict[str, int]
    memory: float
    """Bytes that fit on a device."""
    steps: tuple[Step, ...]
    remarks: tuple[str, ...] = ()
    """What was assumed."""

    @property
    def peak(self) -> float:
        """Most bytes on a device over the steps."""
        return max(step.peak for step in self.steps)

    @property
    def fits(self) -> bool:
        """Whether every step does."""
        return not self.too_large

    @property
    def time(self) -> float:
        """Seconds of an iteration, at least."""
        return sum(step.calls * step.time for step in self.steps)

    @property
    def too_large(self) -> tuple[Step, ...]:
        """The steps that do not fit."""
        return tuple(s for s in self.steps if s.refused or s.peak > self.memory)

    def share(self, step: Step) -> float:
        """A step's part of the time of an iteration."""
        return step.calls * step.time / self.time if self.time else 0.0


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain lists, dicts and numbers, with what is derived of them."""
    out = asdict(plan)
    for step, row in zip(plan.steps, out["steps"], strict=True):
        row |= {"peak": step.peak, "time": step.time, "sent": step.sent, "share": plan.share(step)}
    return {**out, "peak": plan.peak, "fits": plan.fits, "time": plan.time}


def from_json(found: Mapping[str, Any]) -> Plan:
    """The plan that ``as_json`` has written; what is derived is derived again."""

    def made(kind: Any, row: Mapping[str, Any], **other: Any) -> Any:
        # What an older plan does not say is as it is by default.
        known = {field.name: row[field.name] for field in fields(kind) if field.name in row}
        return kind(**known | other)

    steps = [
        made(
            Step,
            row,
            collectives={kind: tuple(x) for kind, x in row["collectives"].items()},
            token=tuple(row.get("token", (0.0, 0.0))),
            heaviest=tuple(tuple(x) for x in row.get("heaviest", ())),
        )
        for row in found["steps"]
    ]
    return made(Plan, found, steps=tuple(steps), remarks=tuple(found["remarks"]))


def mesh_of(config: MeshConfig, topology: Topology) -> Mesh:
    """The mesh of a topology, to compile for, not to run on; TPUs need not be here.

    Args:
      config: of TPUs, ``slices`` says how many such slices there are.

    Raises:
      InputError: libtpu is not installed or refuses the shape, or jax was started with fewer CPU
        devices; or as ``make_mesh``.
    """
    if topology.compiler == "here":
        return make_mesh(config)
    if topology.compiler == "tpu":
        return make_mesh(config, _tpus(topology, config.slices))
    if topology.compiler == "gpu":
        return make_mesh(replace(config, slices=1), _gpus(topology))
    devices = jax.devices("cpu")[: topology.devices]
    if len(devices) < topology.devices:
        raise InputError(
            f"--topology {topology.name}: jax has {len(devices)} CPU devices: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices} before it starts"
        )
    # fake devices all lie in one slice
    return make_mesh(replace(config, slices=1), devices)


def _tpus(topology: Topology, slices: int) -> list[Any]:
    name = topology.name
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name}: libtpu, the TPU compiler, is not installed: {to_install('plan')}"
        )
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    # without it each of a chip's two cores would be a device
    if topology.chip == "v4":
        more["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **more).devices)
    # its kind differs by jax's and libtpu's versions
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--topology {name}: libtpu refuses it ({reason:.200}): give the shape of a slice "
            "that exists, such as v5e:16x16 or v5p:8x8x4"
        ) from None


def _gpus(topology: Topology) -> list[Any]:
    """GPUs to compile for, eight a host."""
    hosts = topology.devices // 8 if topology.devices % 8 == 0 else 1
    shape, text = f"1x{hosts}x{topology.devices // hosts}", described(topology.chip)
    found = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=text)
    return list(found.devices)


def outlines(config: Config, topology: Topology) -> tuple[Run, Run]:
    """A run as it is compiled for a topology, and as its bytes are counted.

    They differ where a network is offloaded and GPUs are compiled for that are not there: those
    have no host memory. The second is then on as many fake CPU devices, which have.
    """
    mesh = mesh_of(config.mesh, topology)
    away = [config.reference.offload, *(reward.offload for reward in config.rewards)]
    if topology.compiler != "gpu" or not any(away):
        run = outline(config, mesh)
        return run, run
    held = replace(
        config,
        reference=replace(config.reference, offload=False),
        rewards=tuple(replace(reward, offload=False) for reward in config.rewards),
    )
    fake = mesh_of(config.mesh, replace(topology, compiler="cpu"))
    return outline(held, mesh), outline(config, fake)


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
      InputError: the config cannot be laid out there, libtpu is missing, or a name is no step's.
    """
    config, assumed = with_stand_ins(config)
    run, counted = outlines(config, topology)
    mesh = run.mesh
    chip = topology.chip or chip_of(mesh.devices.flat[0].device_kind)
    with jax.set_mesh(mesh):
        every = calls_of(run)
    if counted is not run:
        with jax.set_mesh(counted.mesh):
            fetched = {name: call.fetched for name, call in calls_of(counted).items()}
        every = {name: x._replace(fetched=fetched[name]) for name, x in every.items()}
    held = resident(counted)
    if unknown := set(names) - set(every):
        there = ", ".join(every)
        raise InputError(f"step {', '.join(sorted(unknown))}: the run has none: give {there}")
    calls = {name: x for name, x in every.items() if not names or name in names}

    def work(item: tuple[str, Call]) -> Step:
        tell(f"compiling {item[0]}")
        # the mesh in force is a thread's own
        with jax.set_mesh(mesh):
            return _step(run, *item, CHIPS[chip], held, mean_length)

    # XLA gives the interpreter away while it compiles
    with ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1, WORKERS)) as pool:
        steps = tuple(pool.map(work, calls.items()))
    return Plan(
        topology=topology.name,
        chip=chip,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        memory=memory or CHIPS[chip].memory,
        steps=steps,
        remarks=(*assumed, *_remarks(counted, calls, topology, mean_length)),
    )


def _step(
    run: Run, name: str, call: Call, chip: Chip, held: float, mean_length: float | None
) -> Step:
    """One program: traced for its FLOPs, compiled for its bytes; ``held`` as ``resident``."""
    traced = call.program.trace(*call.args)
    kinds = arguments_by_kind(call.args, traced.jaxpr)
    # networks and optimizers that are on the device and not arguments of this call
    elsewhere = held + call.fetched - kinds["parameters"] - kinds["optimizer"]
    loops = call.loops
    trips = loops.outer[0] if loops and loops.outer else None
    if call.responses:
        trips = decode_trips(run.config, call.responses, mean_length)
        loops = decode_loops(run.config, call.responses, trips)
    # if the work is split evenly
    flops = hlo.flops(traced.jaxpr, loops) / run.mesh.size
    seconds = {"compute": flops / chip.flops, "memory": 0.0, "links": 0.0}
    lowered = traced.lower()
    try:
        compiled = _compiled(lowered)
    except jax.errors.JaxRuntimeError as error:
        refusal = refused(str(error))
        if refusal is None:
            raise
        kinds |= without_room(refusal, sum(kinds.values()), elsewhere, chip.memory)
        told: dict[str, Any] = {"refused": True, "at_least": refusal.at_least}
        return Step(name, call.calls, kinds, flops, 0.0, {}, seconds, trips, **told)
    text, analysis = compiled.as_text(), compiled.memory_analysis()
    module, results = hlo.parse(text), float(analysis.output_size_in_bytes)
    found = moves(module, loops)
    moved, least = total(found), needed(run, call, traced.jaxpr, results, trips)
    decode = hlo.open_loops(module)
    inside = total(x for x in found if x.loops and x.loops[0] in decode)
    more: dict[str, Any] = {"needed": least.call, "heaviest": heaviest(found, text)}
    if trips and inside:
        more["token"] = (inside / trips, least.token)
    sent = hlo.totals(hlo.collectives(module, loops))
    seconds["memory"] = moved / chip.bandwidth
    seconds["links"] = sum(size for _, size in sent.values()) / chip.link
    # the compiler's temporaries have no names: what a sampler must keep is taken off their sum
    left = float(analysis.temp_size_in_bytes)
    if call.responses:
        kinds["kv_cache"] = min(cache_bytes(run, call.responses), left)
        left -= kinds["kv_cache"]
    kinds["temporaries"] = left
    # a result that takes a donated argument's place is counted there
    kinds["outputs"] = max(results - analysis.alias_size_in_bytes, 0.0)
    kinds["elsewhere"] = elsewhere
    given = float(analysis.argument_size_in_bytes)
    return Step(name, call.calls, kinds, flops, moved, sent, seconds, trips, given, **more)


def _compiled(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # without a choice by time XLA's own products for GPUs do not take every size: cuBLAS does
        if "output tile sizes" not in str(error):
            raise
        return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def heaviest(found: list[Move], text: str) -> tuple[tuple[str, str, float, float], ...]:
    """The ``HEAVIEST`` instructions that move most, alike ones of a source line as one.

    Returns:
      (instruction, ``file:line``, bytes of a call, share of it) of each.
    """
    frames, sums = sources(text), dict[tuple[str, str], float]()
    for move in found:
        shape = next(iter(move.op.shapes), None)
        size = f"{shape.dtype}[{','.join(map(str, shape.dims))}]" if shape else ""
        # numbers tell copies of an instruction apart: those of different layers, mostly
        name = re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", move.op.name)
        key = f"{name} {size}".strip(), source(move.op, frames)
        sums[key] = sums.get(key, 0.0) + move.total
    whole = sum(sums.values()) or 1.0
    most = sorted(sums.items(), key=lambda item: -item[1])[:HEAVIEST]
    return tuple((*key, size, size / whole) for key, size in most)


def without_room(
    refusal: Refusal, arguments: float, elsewhere: float, memory: float
) -> dict[str, float]:
    """Bytes on a device of a program that does not compile, by kind, but for its ``arguments``.

    temporaries are what the compiler says, or all that it used less the arguments; where it says
    neither, or less, what would fill the device's ``memory``, for so much at least was asked.
    """
    if refusal.used is not None:
        temporaries = refusal.used - arguments
    else:
        temporaries = refusal.temporaries or 0.0
    if refusal.at_least:
        temporaries = max(temporaries, memory - arguments - elsewhere, 0.0)
    return {"temporaries": temporaries, "elsewhere": elsewhere}


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
            # A teacher has to be named: it is then the policy, before it learns.
            taught = section == "reference" and config.algorithm.name == "gkd"
            blank = replace(getattr(config, section), path=config.model.path if taught else "")
            config = replace(config, **{section: blank})
    return config, found


def _remarks(
    run: Run, calls: dict[str, Call], topology: Topology, mean_length: float | None
) -> list[str]:
    """What a reader of the plan has to know to read it right."""
    found = [
        f"{name}: {call.fetched / GIB:.3f} GiB of parameters come from host memory for it; the "
        "time that takes is not counted"
        for name, call in calls.items()
        if call.fetched
    ]
    mesh = resolve_mesh(run.config.mesh, run.mesh.size)
    if mesh.slices > 1:
        found.append(
            f"{mesh.slices} slices: what {across_slices(mesh)} sends goes between them, over a "
            "slower network than the links that it is reckoned with"
        )
    if topology.compiler == "cpu":
        said = "compiled for CPU devices: temporaries and collectives are that compiler's"
        if topology.chip in GPUS:
            said += f"; {to_install('plan-gpu')} for the GPU's"
        found.append(said)
    if topology.compiler == "gpu" and any(call.fetched for call in calls.values()):
        found.append(
            "compiled with what is offloaded on the devices, as those not here have no host "
            "memory, and taken off the bytes elsewhere"
        )
    if mean_length is not None:
        found.append(
            f"responses of {mean_length:g} tokens on average, each token as likely to be the last"
        )
    return found

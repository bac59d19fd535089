"""The devices of a topology: to compile for, not to run on."""

import importlib.util
from dataclasses import replace
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxrlhf.config import MeshConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.study.plan.topology import Topology, chip_of


def mesh_of(config: MeshConfig, topology: Topology) -> Mesh:
    """The mesh of a topology: of ``config.slices`` such slices if it is one of TPUs.

    Fake devices all lie in one, so that theirs is laid out without slices.

    Raises:
      InputError: as ``devices_of`` and ``make_mesh``.
    """
    if topology.compiler == "cpu":
        config = replace(config, slices=1)
    return make_mesh(config, devices_of(topology, config.slices))


def devices_of(topology: Topology, slices: int = 1) -> list[Any]:
    """The devices of a topology, for ``make_mesh``; TPUs need not be here.

    Args:
      slices: of TPUs, how many of them.

    Raises:
      InputError: libtpu is not installed or refuses the shape, or jax was started with fewer CPU
        devices.
    """
    if topology.compiler == "here":
        return jax.devices()
    if topology.compiler == "tpu":
        return _tpus(topology.name, slices)
    found = jax.devices("cpu")
    if len(found) < topology.devices:
        raise InputError(
            f"--topology {topology.name}: jax has {len(found)} CPU devices: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices} before it starts"
        )
    return found[: topology.devices]


def chip_name(topology: Topology, devices: list[Any]) -> str:
    """The key of the topology's chip in ``CHIPS``."""
    return topology.chip or chip_of(devices[0].device_kind)


def _tpus(name: str, slices: int) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name}: libtpu, the TPU compiler, is not installed: "
            "pip install 'jaxrlhf[plan]'"
        )
    try:
        more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if name.startswith("v4"):
            more["chip_config_name"] = "megacore"  # one core a chip
        return list(topologies.get_topology_desc(name, platform="tpu", **more).devices)
    except Exception as error:  # of jax and of libtpu, by version
        reason = " ".join(str(error).split())
        raise InputError(
            f"--topology {name}: libtpu refuses it ({reason:.200}): give the shape of a slice "
            "that exists, such as v5e:16x16 or v5p:8x8x4"
        ) from None

"""What is compiled ahead is what the loop then calls: same programs, shapes, types and layouts."""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.config import (
    GRPOConfig,
    LengthConfig,
    LoraConfig,
    MeshConfig,
    PPOConfig,
    RewardConfig,
    dump,
)
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.run import loop
from jaxrlhf.run.ahead import arguments, compiled_ahead
from jaxrlhf.run.session import Session
from jaxrlhf.run.setup import fill, setup, start_of


def gdpo(folder, *rewards):
    return runs.of("grpo", folder, algorithm=GRPOConfig(normalise="each"), rewards=rewards)


def configs(folder):
    base = runs.ppo(folder)
    short = RewardConfig(length=LengthConfig(1, 8), weight=0.5)
    lora = replace(base.model, lora=LoraConfig(rank=4, alpha=8))
    rescored = PPOConfig(old_logp="rescore", minibatches=1)
    return {
        "shared": base,
        "separate": runs.ppo(folder, critic=runs.SEPARATE),
        "lora-rescored": runs.ppo(folder, model=lora, algorithm=rescored),
        "remax": runs.of("remax", folder),
        "online_dpo": runs.of("online_dpo", folder),
        "gdpo": gdpo(folder, runs.GOODNESS, short),
        "gdpo-lengths": gdpo(folder, RewardConfig(length=LengthConfig(2, 4)), short),
    }


def assert_same(given, stated, name):
    """Arrays that a program got, and what was said of them before."""
    assert jax.tree.structure(given) == jax.tree.structure(stated), name
    for x, s in zip(jax.tree.leaves(given), jax.tree.leaves(stated), strict=True):
        assert np.shape(x) == s.shape, name
        assert x.dtype == s.dtype, name
        where = getattr(s, "sharding", None)
        if where is not None and s.ndim:
            assert x.sharding.is_equivalent_to(where, s.ndim), (name, x.sharding, where)


KINDS = ["shared", "separate", "lora-rescored", "remax", "online_dpo", "gdpo", "gdpo-lengths"]
SIZES = [(1, 1, 1), (2, 2, 2)]


class Iterated(NamedTuple):
    """A run that has done one iteration."""

    called: set[str]
    stated: set[str]
    first: Any
    again: Any
    after: Any


@pytest.fixture(
    scope="module", params=[*itertools.product(KINDS, SIZES), ("gkd", (2, 2, 2))], ids=str
)
def iterated(request, tmp_path_factory):
    """What its programs were called with is compared on the way, before states are donated."""
    (kind, sizes), folder = request.param, tmp_path_factory.mktemp("run")
    config = runs.gkd(folder) if kind == "gkd" else configs(folder)[kind]
    config = replace(config, mesh=MeshConfig(*sizes))
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        plan = setup(config, mesh, abstract=True)
        stated = dict(arguments(plan))
        called = {}

        def recorded(name, program):
            def call(*args):
                called.setdefault(name, args)
                assert_same(args, stated[name], name)
                return program(*args)

            return call

        run = fill(plan)
        first = jax.device_get(run.states["policy"].params)
        heard = {n: recorded(n, p) for n, p in vars(run.programs).items() if p is not None}
        run = replace(run, programs=replace(run.programs, **heard))
        session = Session(run)
        session.host["kl_coef"] = 0.05
        turn = loop.distil if kind == "gkd" else loop.iterate
        states, *_ = turn(run, session, 0)
        again = jax.device_get(start_of(run))
    return Iterated({*called}, {*stated}, first, again, states["policy"].params)


def test_arguments_are_those_of_an_iteration(iterated):
    assert iterated.called == iterated.stated


def test_start_of_is_the_first_state(iterated):
    jax.tree.map(np.testing.assert_array_equal, iterated.first, iterated.again)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), iterated.first, iterated.after)
    assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("ahead", [True, False])
def test_compile_ahead_compiles_what_is_called(ahead, tmp_path, caplog):
    config = configs(tmp_path)["shared"]
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = setup(config, mesh, abstract=True)
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(run.states))
        if ahead:
            with compiled_ahead(run) as thread:
                thread.join()
        run = fill(run)
        session = Session(run)
        session.host["kl_coef"] = 0.05
        caplog.clear()
        with jax.log_compiles():
            loop.iterate(run, session, 0)
    compiled = re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text)
    for name in ("draw", "reference_score", "targets", "take", "update"):
        assert (name in compiled) != ahead, f"{name}: {compiled}"


def test_a_process_that_has_nothing_to_do_ends_well(tmp_path):
    """A thread that is stopped within XLA aborts its process: exit status 134 or 139."""
    config = runs.ppo(tmp_path, steps=1)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}

    def train(*words):
        command = [sys.executable, "-m", "jaxrlhf", "train", str(path), *words]
        return subprocess.run(
            command, env={**os.environ, **cache}, capture_output=True, text=True, check=False
        )

    loop.train(config, make_mesh(config.mesh))
    again, refused = train(), train("--seed", "1")
    assert (again.returncode, refused.returncode) == (0, 2), again.stderr + refused.stderr
    assert refused.stderr.startswith("error: ")

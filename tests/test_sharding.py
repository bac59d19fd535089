"""Layouts by name: what lies where, and that eight devices compute what one does."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.algorithms import ppo
from jaxrlhf.config import MeshConfig, OptimConfig, PPOConfig, SampleConfig
from jaxrlhf.errors import InputError
from jaxrlhf.sharding import (
    DECODE,
    RULES,
    constrain,
    constrain_tree,
    devices_in_mesh,
    length_shards,
    make_mesh,
    put,
    put_rows,
    row_shards,
    shardings,
    spec,
    train_state_shardings,
)
from jaxrlhf.steps.losses import policy_loss
from jaxrlhf.steps.sampling import sample
from jaxrlhf.steps.updating import make_optimizer, make_update
from jaxrlhf.types import TrainState

CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(CUBE)


def all_weights(model):
    """(shapes, axes) of full fine-tuning with a head."""
    return model.shapes(head=True), model.axes(head=True)


def adapters(model):
    """(shapes, axes) of LoRA with a head."""
    shapes = jax.eval_shape(model.init_lora, jax.random.key(0))
    whole, axes = all_weights(model)
    return (
        {"lora": shapes, "head": whole["head"]},
        {"lora": model.lora_axes(), "head": axes["head"]},
    )


# The mesh and the table


def test_make_mesh_axes(mesh):
    assert list(mesh.shape.items()) == [("data", 2), ("fsdp", 2), ("context", 1), ("tensor", 2)]
    assert mesh.axis_types == (AxisType.Auto,) * 4
    sizes = make_mesh(MeshConfig(fsdp=4, context=2)).shape
    assert dict(sizes) == {"data": 1, "fsdp": 4, "context": 2, "tensor": 1}
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


def test_make_mesh_must_fill_the_devices():
    with pytest.raises(InputError, match="8"):
        make_mesh(MeshConfig(data=3, fsdp=1, tensor=1))


def test_spec_maps_names():
    assert spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, ("fsdp", "context"), "tensor", None
    )
    assert spec(("batch", "length")) == PartitionSpec(("data", "fsdp"), "context")
    assert spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("embed", "mlp"), DECODE) == PartitionSpec(None, "tensor")
    assert spec(()) == PartitionSpec()


def test_spec_unknown_name():
    with pytest.raises(KeyError, match="embeded"):
        spec(("embeded", "mlp"))


def test_decode_gathers_weights_over_fsdp_and_context():
    assert {name for name in RULES if RULES[name] != DECODE[name]} == {"batch", "embed", "length"}
    assert DECODE.keys() == RULES.keys()
    weights = [mesh_axes for name, mesh_axes in DECODE.items() if name != "batch"]
    assert set(weights) == {None, "tensor"}


def test_shardings_of_a_tree(mesh):
    found = shardings({"a": ("embed", "mlp"), "b": {"c": ()}}, mesh)
    assert found["a"] == NamedSharding(mesh, PartitionSpec(("fsdp", "context"), "tensor"))
    assert found["b"]["c"] == NamedSharding(mesh, PartitionSpec())


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((4, 4))
    assert constrain(x, ("batch", "embed")) is x
    assert (row_shards(), row_shards(DECODE), length_shards(), devices_in_mesh()) == (1,) * 4


def test_constrain_lays_out(mesh):
    with jax.set_mesh(mesh):
        assert (row_shards(), devices_in_mesh()) == (4, 8)
        tree = {"x": jnp.ones((8, 4)), "y": jnp.ones((4, 6))}
        axes = {"x": ("batch", None), "y": ("embed", "mlp")}
        plain = jax.jit(lambda t: constrain_tree(t, axes))(tree)
        decode = jax.jit(lambda t: constrain_tree(t, axes, DECODE))(tree)
    assert plain["x"].sharding.shard_shape((8, 4)) == (2, 4)
    assert plain["y"].sharding.shard_shape((4, 6)) == (2, 3)
    assert decode["y"].sharding.shard_shape((4, 6)) == (4, 3)


def test_shards_of_a_mesh_with_context():
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        assert (row_shards(), row_shards(DECODE), length_shards()) == (2, 8, 4)


def test_put_and_put_rows(mesh):
    tree = {"a": np.arange(32.0).reshape(8, 4), "b": np.arange(8)}
    rows = put_rows(tree, mesh)
    assert rows["a"].sharding.shard_shape((8, 4)) == (2, 4)
    assert rows["b"].sharding.shard_shape((8,)) == (2,)
    laid = put(tree, shardings({"a": ("mlp", "embed"), "b": (None,)}, mesh))
    assert laid["a"].sharding.shard_shape((8, 4)) == (4, 2)
    for found in (rows, laid):
        jax.tree.map(np.testing.assert_array_equal, found, tree)


# Training


@pytest.mark.parametrize("trained", [all_weights, adapters])
def test_train_state_shardings_moments_lie_with_their_weights(model, mesh, trained):
    """Left to itself, jit lays the moments of sharded weights out replicated."""
    shapes, axes = trained(model)
    layout = shardings(axes, mesh)
    tx = make_optimizer(OptimConfig(weight_decay=0.1, schedule="linear"), steps=10)
    where = train_state_shardings(tx, shapes, layout, mesh)
    zeros = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape), shapes), out_shardings=layout
    )()
    state = jax.jit(lambda p: TrainState.create(p, tx), out_shardings=where)(zeros)
    adam = next(
        part
        for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )
    for moments in (adam.mu, adam.nu):
        jax.tree.map(
            lambda moment, weight: np.testing.assert_equal(moment.sharding, weight.sharding),
            moments,
            state.params,
        )
    split = [x for x in jax.tree.leaves(adam.mu) if not x.sharding.is_fully_replicated]
    assert len(split) > 5
    assert adam.count.sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated


@pytest.mark.parametrize("trained", [all_weights, adapters])
def test_update_on_eight_devices_equals_one(capfd, model, params, lora, batch, mesh, trained):
    """Three steps; the state stays where it lay, and XLA has no complaint about the layout."""
    full = trained is all_weights
    weights = params if full else {"lora": lora, "head": params["head"]}
    tx = make_optimizer(OptimConfig(learning_rate=1e-2, eps=1e-2, weight_decay=0.1))
    loss = policy_loss(model, ppo(PPOConfig(entropy_coef=0.01)), 0.7, 4, value_coef=0.3)

    def three_steps(update, state, batch, frozen):
        for _ in range(3):
            state, metrics = update(state, batch, frozen)
        return state, metrics

    start = TrainState.create(weights, tx)
    one, one_metrics = three_steps(
        make_update(tx, loss, donate=False), start, batch, None if full else params
    )
    shapes, axes = trained(model)
    where = train_state_shardings(tx, shapes, shardings(axes, mesh), mesh)
    frozen = None if full else put(params, shardings(model.axes(head=True), mesh))
    capfd.readouterr()
    with jax.set_mesh(mesh):
        update = make_update(tx, loss, layout=where)
        rows = put_rows(batch, mesh)
        eight, eight_metrics = three_steps(update, put(start, where), rows, frozen)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    close = partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, eight.params, one.params)
    jax.tree.map(partial(close, rtol=1e-4), eight_metrics, one_metrics)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), one.params, weights)
    assert min(jax.tree.leaves(moved)) > 1e-4
    assert eight.step == 3
    jax.tree.map(lambda x, s: np.testing.assert_equal(x.sharding, s), eight, where)


# Sampling


def computations(text):
    """Compiled HLO → the lines of each computation, by name.

    A computation starts at the left margin, ``%name (…) -> … {`` (``ENTRY`` before the last one's),
    and its instructions are indented.
    """
    found, name = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[1]
            found[name] = []
        elif line.startswith(" "):
            found[name].append(line)
    return found


def called(lines):
    """Names of the computations that these instructions call: loop bodies and conditions,
    fusions, reductions, branches."""
    names = re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", "\n".join(lines))
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", "\n".join(lines)):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return set(names)


def inside_loops(text):
    """The computations that run once an iteration of some while loop: those reachable from a
    body or a condition."""
    found = computations(text)
    loops = [line for lines in found.values() for line in lines if " while(" in line]
    todo, seen = called(loops), set()
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= called(found[name]) - seen
    return {name: found[name] for name in seen}


def test_sample_gathers_weights_once(model):
    """Weights split over eight devices are gathered before the decode loop, not in it: a gather
    in the body of a loop would move every weight for every token."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))

    def abstract(shapes, axes):
        return jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
            shapes,
            shardings(axes, mesh),
        )

    params = abstract(*all_weights(model))
    lora = abstract(jax.eval_shape(model.init_lora, jax.random.key(0)), model.lora_axes())
    prompt = abstract(jax.ShapeDtypeStruct((8, 6), jnp.int32), ("batch", None))
    key = jax.eval_shape(lambda: jax.random.key(0))
    config = SampleConfig(max_new_tokens=8, n=1)
    with jax.set_mesh(mesh):
        run = jax.jit(partial(sample, model, sample_config=config, value=True))
        text = run.lower(params, prompt, prompt, key, lora=lora).compile().as_text()

    def gathers(found):
        return [line for lines in found.values() for line in lines if " all-gather" in line]

    loops = inside_loops(text)
    assert any(" while(" in line for lines in loops.values() for line in lines)  # layers in decode
    assert any(" dot(" in line for lines in loops.values() for line in lines)
    assert len(gathers(computations(text))) >= 10  # each weight, once
    assert gathers(loops) == []

"""Layouts by name: what lies where, on devices and in host memory, and that eight devices compute
what one does."""

from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.algorithms import ppo
from jaxrlhf.config import AXES, MeshConfig, OptimConfig, PPOConfig, SampleConfig, resolve_mesh
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import TrainState
from jaxrlhf.mesh.sharding import (
    DECODE,
    RULES,
    at_hand,
    constrain,
    devices_in_mesh,
    lay_out,
    length_shards,
    make_mesh,
    on_host,
    put,
    put_rows,
    row_layout,
    row_shards,
    shardings,
    spec,
    to_host,
    tpu_slices,
    train_state_shardings,
    with_layout,
)
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.update import make_optimizer, make_update, policy_loss
from jaxrlhf.study.plan.hlo import open_loops, parse, visits


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
    sizes = {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert list(mesh.shape.items()) == list(sizes.items())
    assert mesh.axis_types == (AxisType.Auto,) * 5
    sizes = make_mesh(MeshConfig(fsdp=4, context=2)).shape
    assert dict(sizes) == {"data": 1, "fsdp": 4, "expert": 1, "context": 2, "tensor": 1}
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


def test_make_mesh_must_fill_the_devices():
    with pytest.raises(InputError, match="8"):
        make_mesh(MeshConfig(data=3, fsdp=1, tensor=1))


@dataclass(frozen=True)
class Device:
    """As much of one as a mesh looks at."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, ...] = (0, 0, 0)
    platform: str = "tpu"
    core_on_chip: int = 0
    device_kind: str = "none that mesh_utils knows"


def pods(slices, hosts, each, **changes):
    """Devices of slices of hosts, in the order in which jax lists them: not always by slice."""
    found = [
        Device(1000 * s + each * h + i, hosts * s + h, s, (i, h, 0), **changes)
        for h in range(hosts)
        for s in range(slices)
        for i in range(each)
    ]
    return found[::-1]


def places(devices, what):
    return np.vectorize(lambda device: getattr(device, what))(devices)


@pytest.mark.parametrize(
    ("config", "axis"),
    [
        (MeshConfig(data=4, fsdp=2, tensor=2, slices=2), "data"),
        (MeshConfig(data=1, fsdp=4, tensor=2, context=2, slices=2), "fsdp"),
        (MeshConfig(data=1, fsdp=-1, slices=2), "fsdp"),
    ],
)
def test_lay_out_keeps_a_slice_together(config, axis):
    config = resolve_mesh(config, 16)
    laid = lay_out(config, pods(2, hosts=2, each=4))
    assert laid.shape == tuple(getattr(config, name) for name in AXES)
    assert len(set(laid.flat)) == 16
    along = np.moveaxis(places(laid, "slice_index"), AXES.index(axis), 0)
    first, second = np.split(along, 2)
    assert (set(first.flat), set(second.flat)) == ({0}, {1})


def test_lay_out_processes():
    config = MeshConfig(data=4, tensor=2, slices=4)
    laid = lay_out(config, pods(1, hosts=4, each=2, platform="gpu"))
    assert places(laid, "process_index")[:, 0, 0, 0].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("slices", "devices", "message"),
    [
        (1, pods(2, 1, 4), "mesh.slices=1: the devices lie in 2 TPU slices: set it to 2"),
        (4, pods(2, 1, 4), "mesh.slices=4: the devices lie in 2 slices and 2 processes"),
        (8, None, "mesh.slices=8: the devices lie in 1 slices and 1 processes"),
        (2, [*pods(2, 1, 4)[1:], Device(9, 0, 0)], "have 3 to 5 devices"),
        (3, pods(2, 1, 4), "mesh.slices=3: neither data=8 nor fsdp=1 divides by it"),
        (0, None, "mesh.slices=0: must be at least 1"),
    ],
)
def test_make_mesh_refuses_slices(slices, devices, message):
    with pytest.raises(InputError, match=message):
        make_mesh(MeshConfig(data=8, slices=slices), devices)


def test_tpu_slices():
    assert tpu_slices(pods(3, 1, 2)) == 3
    assert tpu_slices(pods(3, 1, 2, platform="gpu")) == tpu_slices(jax.devices()) == 1


def test_lay_out_takes_hosts_of_gpus_for_one_slice():
    """Where slices are left alone, only TPUs are known to need them."""
    laid = lay_out(
        MeshConfig(data=4, tensor=2), sorted(pods(2, 1, 4, platform="gpu"), key=attrgetter("id"))
    )
    assert places(laid, "slice_index")[:, 0, 0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_lay_out_on_a_torus_of_fewer_axes_than_the_mesh():
    config = MeshConfig(data=1, fsdp=2, tensor=2, context=2)
    laid = lay_out(config, pods(1, hosts=2, each=4))
    assert laid.shape == (1, 2, 1, 2, 2)
    assert len(set(laid.flat)) == 8


def test_spec_maps_names():
    assert spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, ("fsdp", "expert", "context"), "tensor", None
    )
    assert spec(("batch", "length")) == PartitionSpec(("data", "fsdp", "expert"), "context")
    assert spec(("batch", None)) == PartitionSpec(("data", "fsdp", "expert"), None)
    assert spec(("embed", "mlp"), DECODE) == PartitionSpec(None, "tensor")
    assert spec(()) == PartitionSpec()


def test_spec_unknown_name():
    with pytest.raises(KeyError, match="embeded"):
        spec(("embeded", "mlp"))


def test_decode_gathers_weights_over_fsdp_and_context():
    changed = {name for name in RULES if RULES[name] != DECODE[name]}
    assert changed == {"batch", "embed", "expert_embed", "length"}
    assert DECODE.keys() == RULES.keys()
    weights = [mesh_axes for name, mesh_axes in DECODE.items() if name != "batch"]
    assert set(weights) == {None, "tensor", "expert"}


def test_shardings_of_a_tree(mesh):
    found = shardings({"a": ("embed", "mlp"), "b": {"c": ()}}, mesh)
    assert found["a"] == NamedSharding(mesh, PartitionSpec(("fsdp", "expert", "context"), "tensor"))
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
        plain = jax.jit(lambda t: jax.tree.map(constrain, t, axes))(tree)
        decode = jax.jit(lambda y: constrain(y, axes["y"], DECODE))(tree["y"])
    assert plain["x"].sharding.shard_shape((8, 4)) == (2, 4)
    assert plain["y"].sharding.shard_shape((4, 6)) == (2, 3)
    assert decode.sharding.shard_shape((4, 6)) == (4, 3)


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


# Host memory


def test_to_host_and_at_hand_keep_every_bit_and_the_layout(mesh):
    there = jax.device_put(np.arange(16.0), row_layout(mesh))
    away = to_host({"x": there}, mesh, "f")
    back = at_hand(away)["x"]
    assert (on_host(there), on_host(away["x"]), on_host(back)) == (False, True, False)
    assert back.sharding == there.sharding
    np.testing.assert_array_equal(back, there)
    assert at_hand({"x": there})["x"] is there
    shape = jax.ShapeDtypeStruct((16,), np.float32, sharding=row_layout(mesh))
    assert on_host(to_host(shape, mesh, "f"))
    assert at_hand(to_host(shape, mesh, "f")) == shape


def test_to_host_refuses_devices_without_such_memory(mesh, monkeypatch):
    monkeypatch.setattr("jaxrlhf.mesh.sharding.HOST", "tape")
    with pytest.raises(InputError, match=r"reference\.offload: cpu devices have no tape memory"):
        to_host({}, mesh, "reference.offload")


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


def test_sample_gathers_weights_once(model):
    """Weights split over eight devices are gathered before the decode loop, not in it: a gather
    in its body would move every weight for every token. Prompts are read a layer at a time."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))

    def abstract(shapes, axes):
        return with_layout(shapes, shardings(axes, mesh))

    params = abstract(*all_weights(model))
    lora = abstract(jax.eval_shape(model.init_lora, jax.random.key(0)), model.lora_axes())
    prompt = abstract(jax.ShapeDtypeStruct((8, 6), jnp.int32), ("batch", None))
    key = jax.eval_shape(lambda: jax.random.key(0))
    config = SampleConfig(max_new_tokens=8, n=1, stop=(1,))
    with jax.set_mesh(mesh):
        run = jax.jit(partial(sample, model, sample_config=config, value=True))
        text = run.lower(params, prompt, prompt, key, lora=lora).compile().as_text()
    module = parse(text)
    seen = list(visits(module, trips=8))
    (loop,) = open_loops(module)
    assert "dot" in {visit.op.opcode for visit in seen if loop in visit.loops}
    gathers = [visit for visit in seen if visit.op.opcode.startswith("all-gather")]
    assert len(gathers) >= 10  # each weight, once
    assert [visit for visit in gathers if loop in visit.loops] == []

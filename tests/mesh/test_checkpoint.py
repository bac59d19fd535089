"""A checkpoint comes back bit for bit, or is told to be damaged: whatever bit flips, whatever disk
fills up, whenever the process is killed, and on whatever number of devices it is read."""

import gc
import logging
import os
import random
import resource
import shutil
import sys
import threading
import time
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from memory import forget_peak, occupied
from targets import nursery

from jaxrlhf.config import CheckpointConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import TrainState
from jaxrlhf.mesh import checkpoint
from jaxrlhf.mesh.checkpoint import (
    Checkpoints,
    describe,
    digest,
    kind,
    load,
    named_leaves,
)
from jaxrlhf.mesh.notes import steps_in

# A read that fails on a damaged file leaves callbacks behind, which complain as they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

KEEP3 = CheckpointConfig(keep=3)


def state_at(step):
    params = {
        "embed": jnp.arange(48.0).reshape(8, 6) + step,
        "bias": jnp.full(3, step, jnp.bfloat16),
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )
    return {"policy": TrainState.create(params, tx), "critic": None}


ABSTRACT = jax.eval_shape(lambda: state_at(0))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def fill(folder, steps=(1, 2), config=KEEP3):
    with Checkpoints(folder, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), {"kl_coef": step / 10})


def flipped(raw, bit):
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def laid(x, devices, *axes):
    """``x`` over that many devices, split along the axis that is named "fsdp"."""
    mesh = jax.make_mesh((devices,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:devices])
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))


# What a checkpoint says of its arrays


def test_digest_by_hand():
    assert int(digest(jnp.array([[3, 0], [1, 2]], jnp.int32))) == 3 * 1 + 0 * 3 + 1 * 5 + 2 * 7
    assert int(digest(jnp.array([1.0], jnp.float32))) == 0x3F800000
    assert int(digest(jnp.array([-1, -1], jnp.int32))) == (0xFFFFFFFF * 4) % 2**32
    assert int(digest(jnp.int32(5))) == 5
    assert int(digest(jnp.array([1, 2, 3]))) != int(digest(jnp.array([2, 1, 3])))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_digest_any_flipped_bit(dtype):
    x = np.asarray(jnp.arange(12).reshape(3, 4) % 2, dtype=dtype)
    want = int(digest(x))
    raw = x.tobytes()
    for bit in range(1 if dtype == "bool" else 8 * len(raw)):
        other = np.frombuffer(flipped(raw, bit), x.dtype).reshape(x.shape)
        assert int(digest(other)) != want, bit


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_digest_sharding(devices):
    x = jax.random.normal(jax.random.key(0), (16, 24))
    for axes in (("fsdp",), (None, "fsdp")):
        assert int(digest(laid(x, devices, *axes))) == int(digest(x))


def test_named_leaves():
    zero = jnp.zeros(())
    state = TrainState(params={"a": zero}, opt_state=(None, {"b": zero}), step=zero, skipped=zero)
    names = ["p.params.a", "p.opt_state.1.b", "p.step", "p.skipped"]
    assert list(named_leaves({"p": state, "critic": None})) == names
    with pytest.raises(ValueError, match="dotted path"):
        named_leaves({"a.b": 1, "a": {"b": 2}})


def test_kind_and_describe():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert kind(x) == kind(jax.ShapeDtypeStruct(x.shape, x.dtype)) == "bfloat16[2, 3]"
    assert describe({"x": x}) == {"x": {"kind": "bfloat16[2, 3]", "digest": 0x3F80 * 36}}


def test_describing_takes_little_memory():
    """Not as much as the state, as while all digests are added up at once."""
    leaves = {f"x{i}": jnp.full((4_000_000,), float(i)) for i in range(24)}
    jax.block_until_ready(leaves)
    forget_peak()
    before = occupied("VmRSS")
    describe(leaves)
    assert occupied("VmHWM") - before < sum(x.nbytes for x in leaves.values()) / 3


# Saved and restored


def test_save_restore_roundtrip(tmp_path):
    with Checkpoints(tmp_path / "new", KEEP3) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore(ABSTRACT) is None
    fill(tmp_path / "new")
    with Checkpoints(tmp_path / "new", KEEP3) as checkpoints:
        assert checkpoints.latest() == 2
        step, state, host = checkpoints.restore(ABSTRACT)
    assert (step, host) == (2, {"kl_coef": 0.2})
    assert_equal(state, state_at(2))


def test_save_keeps_and_purges(tmp_path):
    fill(tmp_path, range(1, 6), CheckpointConfig(keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5", "run.json"]


def test_save_again_is_nothing_and_before_the_newest_refused(tmp_path):
    with Checkpoints(tmp_path, KEEP3) as checkpoints:
        for _ in range(2):
            checkpoints.save(2, state_at(2), {})
        checkpoints.wait()
        checkpoints.save(2, state_at(2), {})
        with pytest.raises(TypeError):
            checkpoints.save(3, state_at(3), {"x": object()})
    with Checkpoints(tmp_path, KEEP3) as checkpoints:
        with pytest.raises(InputError, match="holds st"):
            checkpoints.save(1, state_at(1), {})
        checkpoints.restore(ABSTRACT)
        checkpoints.save(2, state_at(2), {})
    assert checkpoints.failed == 0


def test_save_donated_afterwards(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"x": jnp.zeros((512, 512))}
    with Checkpoints(tmp_path, KEEP3) as checkpoints:
        for step in range(3):
            checkpoints.save(step, state, {})
            for _ in range(5):
                state = bump(state)
    for step in range(3):
        found = load(tmp_path, {"x": jax.ShapeDtypeStruct((512, 512), jnp.float32)})
        assert float(found[1]["x"].max()) == float(found[1]["x"].min()) == 5 * found[0]
        shutil.rmtree(tmp_path / str(2 - step))


def test_save_more_than_is_written_at_once(tmp_path):
    """An array of 1.1 GB is saved; others wait for their turn, and are donated meanwhile."""
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {f"other{i}": jnp.full(2**24, float(i)) for i in range(8)}
    state["large"] = jnp.zeros(275_000_000)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(tmp_path, KEEP3) as checkpoints:
        checkpoints.save(1, state, {})
        state = bump(bump(state))
        checkpoints.wait()
    del state
    found = load(tmp_path, abstract)[1]
    for name, x in found.items():
        wanted = 0.0 if name == "large" else float(name[-1])
        assert float(x.min()) == float(x.max()) == wanted


def test_amend_replaces_the_numbers_alone(tmp_path, monkeypatch):
    def full(*_):
        raise InputError("x: cannot be written")

    with Checkpoints(tmp_path, KEEP3) as checkpoints:
        checkpoints.save(1, state_at(1), {"kl_coef": 0.1})
        checkpoints.save(2, state_at(2), {"kl_coef": 0.2})
        checkpoints.amend({"kl_coef": 0.2, "mean": 3.0})  # waits for the save in flight
        monkeypatch.setattr("jaxrlhf.mesh.checkpoint.write_atomic", full)
        with pytest.raises(InputError, match="cannot be written"):
            checkpoints.amend({"kl_coef": 0.3})
    for folder in (tmp_path / "2", tmp_path / "2" / "host"):
        assert not list(folder.glob("*.part"))
    step, state, host = load(tmp_path, ABSTRACT)
    assert (step, host) == (2, {"kl_coef": 0.2, "mean": 3.0})
    assert_equal(state, state_at(2))
    shutil.rmtree(tmp_path / "2")
    assert load(tmp_path, ABSTRACT)[2] == {"kl_coef": 0.1}


def test_load_part(tmp_path):
    fill(tmp_path)
    part = {"policy": {"params": ABSTRACT["policy"].params}}
    step, state, host = load(tmp_path, part)
    assert (step, host) == (2, {"kl_coef": 0.2})
    assert_equal(state, {"policy": {"params": state_at(2)["policy"].params}})
    with pytest.raises(InputError, match="holds no checkpoint"):
        load(tmp_path / "nowhere", part)


def test_restore_other_device_counts(tmp_path):
    values = np.asarray(jax.random.normal(jax.random.key(0), (16, 8)))
    state = {}
    for step, devices in enumerate((1, 8, 2)):
        there = laid(values, devices, "fsdp")
        with Checkpoints(tmp_path, KEEP3) as checkpoints:
            if step > 0:
                abstract = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=there.sharding)
                before, state, _ = checkpoints.restore({"x": abstract})
                assert before == step - 1
                assert state["x"].sharding == there.sharding
                assert len(state["x"].addressable_shards) == devices
                np.testing.assert_array_equal(np.asarray(state["x"]), values)
                np.testing.assert_allclose(jax.jit(jnp.sum)(state["x"]), values.sum(), rtol=1e-6)
            checkpoints.save(step, state or {"x": there}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"embed": jnp.zeros((8, 7))}, r"embed is float32\[8, 6\] there, fl.*\[8, 7"),
        (lambda p: p | {"embed": p["embed"].astype(jnp.bfloat16)}, r"embed is float32.*bfloat16"),
        (lambda p: p | {"head": jnp.zeros(2)}, r"head is absent there, float32\[2\] in this run"),
        (lambda p: {"embed": p["embed"]}, r"bias is float32\[3\] there, absent in this run"),
    ],
)
def test_restore_other_state(tmp_path, change, message):
    fill(tmp_path)

    def other():
        state = state_at(0)
        policy = state["policy"].replace(params=change(state["policy"].params))
        return state | {"policy": policy}

    checkpoints = Checkpoints(tmp_path, KEEP3)
    with pytest.raises(InputError, match=rf"policy\.params\.{message}") as error:
        checkpoints.restore(jax.eval_shape(other))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "damaged").exists()


# Damaged


@pytest.mark.parametrize("damage", ["delete", "empty", "cut", "zero", "flip"])
@pytest.mark.parametrize("where", ["state/d/*", "host/metadata"])
def test_restore_damaged_falls_back(tmp_path, caplog, damage, where):
    fill(tmp_path)
    (path,) = (tmp_path / "2").glob(where)
    raw = path.read_bytes()
    path.unlink()
    if damage != "delete":
        half = flipped(raw, 8 * (len(raw) // 2))
        wrong = {"empty": b"", "cut": raw[:-9], "zero": bytes(len(raw)), "flip": half}
        path.write_bytes(wrong[damage])
    with Checkpoints(tmp_path, KEEP3) as checkpoints:
        step, state, host = checkpoints.restore(ABSTRACT)
        assert (step, host) == (1, {"kl_coef": 0.1})
        assert_equal(state, state_at(1))
        assert "2 is DAMAGED" in caplog.text
        assert len(list((tmp_path / "damaged").glob("2-*/state"))) == 1
        checkpoints.save(2, state_at(2), {"kl_coef": 0.2})  # the run writes that step again
    assert load(tmp_path, ABSTRACT)[0] == 2


def test_restore_any_flipped_bit(tmp_path, caplog):
    """Whatever bit of whatever file flips: the right arrays of one of the two steps."""
    fill(tmp_path / "good")
    files = [p for p in (tmp_path / "good" / "2").rglob("*") if p.is_file()]
    chance = random.Random(0)
    caplog.set_level(logging.CRITICAL, "jaxrlhf.mesh.checkpoint")
    fallen = 0
    for _ in range(40):
        path = chance.choice(files)
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        bad = flipped(path.read_bytes(), chance.randrange(8 * path.stat().st_size))
        (tmp_path / "bad" / path.relative_to(tmp_path / "good")).write_bytes(bad)
        step, state, host = load(tmp_path / "bad", ABSTRACT)
        assert host == {"kl_coef": step / 10}
        assert_equal(state, state_at(step))
        fallen += step == 1
    assert fallen > 0


def test_restore_content_changed_with_valid_files(tmp_path, caplog):
    """Arrays that load without any error, but are others: only the digest can tell."""
    fill(tmp_path / "a", [1, 2])
    with Checkpoints(tmp_path / "b", KEEP3) as checkpoints:
        checkpoints.save(2, state_at(99), {"kl_coef": 0.2})
    shutil.rmtree(tmp_path / "a" / "2" / "state")
    shutil.copytree(tmp_path / "b" / "2" / "state", tmp_path / "a" / "2" / "state")
    assert load(tmp_path / "a", ABSTRACT)[0] == 1
    assert "policy.params.bias is not as it was saved" in caplog.text


def test_restore_all_damaged(tmp_path):
    fill(tmp_path)
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / step / "state")
    for _ in range(2):  # never a silent restart at step 0, not even at the second try
        checkpoints = Checkpoints(tmp_path, KEEP3)
        with pytest.raises(InputError, match=r"every checkpoint is damaged \(step 2: .*step 1"):
            checkpoints.restore(ABSTRACT)


def test_restore_ignores_unfinished(tmp_path):
    fill(tmp_path)
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "1", tmp_path / "trash" / "0")
    with Checkpoints(tmp_path, KEEP3) as checkpoints:
        assert checkpoints.restore(ABSTRACT)[0] == 2
        checkpoints.save(3, state_at(3), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "run.json"]


def test_load_while_a_trainer_deletes(tmp_path, monkeypatch):
    """With keep=1, what a reader has found may be gone when it reads."""
    fill(tmp_path, (1,))
    read = checkpoint._read

    def late(path, *rest):
        if path.name == "1":
            fill(tmp_path, (2,), CheckpointConfig(keep=1))
        return read(path, *rest)

    monkeypatch.setattr(checkpoint, "_read", late)
    assert load(tmp_path, ABSTRACT)[0] == 2


# A disk that is full, lost or not there


def test_steps_that_one_process_never_sees(tmp_path, monkeypatch):
    """A folder that is not on a disk of all hosts; seen late: test_saving_together."""
    monkeypatch.setattr(checkpoint, "LOOKS", 1)
    monkeypatch.setattr(checkpoint, "exchange", lambda text: [text, "[3]"])
    with pytest.raises(InputError, match=r"see different steps \(\[\], \[3\]\): the folder"):
        Checkpoints(tmp_path, KEEP3)


def test_checkpoints_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", KEEP3)
    with pytest.raises(InputError, match="cannot be written"):
        Checkpoints("/proc/checkpoints", KEEP3)
    with pytest.raises(InputError, match="mount the bucket"):
        Checkpoints("gs://bucket/run", KEEP3)
    with pytest.raises(InputError, match=r"checkpoint\.keep=0"):
        Checkpoints(tmp_path, CheckpointConfig(keep=0))


@pytest.fixture
def full_disk():
    """While on, no file can grow beyond 64 kB: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def switch(on):
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536 if on else soft, hard))

    yield switch
    switch(False)


def test_save_full_disk(tmp_path, caplog, full_disk):
    def big(step):
        return {"x": jax.random.normal(jax.random.key(step), (512, 512))}

    abstract = jax.eval_shape(lambda: big(0))
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        checkpoints.save(1, big(1), {})
        checkpoints.wait()
        full_disk(True)
        for step in (2, 3):
            checkpoints.save(step, big(step), {})  # training goes on
        with pytest.raises(InputError, match=r"step 3 could not be saved .* resumes from step 1"):
            checkpoints.wait()
        full_disk(False)
        assert checkpoints.failed == 2
        assert "step 2 could not be saved" in caplog.text
        # a failed save gives its space back
        assert sorted(os.listdir(tmp_path)) == ["1", "run.json"]
        assert_equal(load(tmp_path, abstract)[1], big(1))
        checkpoints.save(4, big(4), {})
    assert_equal(load(tmp_path, abstract)[1], big(4))


def held():
    """Open files and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_saves_and_failed_saves_hold_nothing(tmp_path, full_disk, monkeypatch):
    """No more files or threads after many saves than after a few, whether they fail or not."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    checkpoints = Checkpoints(tmp_path, KEEP3)
    for full in (False, True):
        full_disk(full)
        counts = []
        for step in range(8):
            state = {"x": jax.random.normal(jax.random.key(step), (512, 512))}
            checkpoints.save(step + 100 * full + 1, state, {})
            checkpoints._settle()
            counts.append(held())
        assert max(counts[4:]) <= max(counts[:4])
    assert checkpoints.failed == 8
    assert said == []


def test_save_lost_disk(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, KEEP3) as checkpoints:
        checkpoints.save(1, state_at(1), {})
        checkpoints.wait()
        shutil.rmtree(folder)
        folder.write_text("no folder any more")
        checkpoints.save(2, state_at(2), {})  # training goes on
        assert checkpoints.failed == 1
        with pytest.raises(InputError, match="step 2 could not be saved"):
            checkpoints.wait()
        folder.unlink()
        checkpoints.save(3, state_at(3), {})
    assert load(folder, ABSTRACT)[0] == 3


def one_save(folder, error=None):
    with Checkpoints(folder, KEEP3) as checkpoints:
        checkpoints.save(1, {"x": jax.random.normal(jax.random.key(0), (512, 512))}, {})
        if error:
            raise error


def test_checkpoints_end_with_the_last_save(tmp_path, full_disk):
    """A save in flight is finished; the run's own error is the one that is seen."""
    with pytest.raises(KeyboardInterrupt):
        one_save(tmp_path, KeyboardInterrupt())
    assert steps_in(tmp_path) == [1]
    full_disk(True)
    with pytest.raises(InputError, match="step 1 could not be saved"):
        one_save(tmp_path / "full")
    with pytest.raises(ZeroDivisionError):
        one_save(tmp_path / "full", ZeroDivisionError())
    # One disk fails more than the save: neither hides the other.
    with pytest.raises(InputError, match=r"summary\.json: full; .*step 1 could not be saved"):
        one_save(tmp_path / "full", InputError("summary.json: full"))


def train(folder, told):
    """Count upwards and save, for ever; say after which step it begins, and which are durable."""
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)

    def start():
        return {"w": jnp.arange(4096.0), "opt": [jnp.zeros((64, 64)), jnp.int32(0)]}

    with Checkpoints(folder, CheckpointConfig(keep=2)) as checkpoints:
        found = checkpoints.restore(jax.eval_shape(start))
        step, state, host = found or (0, start(), {"consumed": 0})
        assert int(state["opt"][1]) == step
        assert host["consumed"] == 3 * step
        assert bool((state["w"] == jnp.arange(4096.0) + step).all())
        told.send(step)
        while True:
            state, step = update(state), step + 1
            checkpoints.save(step, state, {"consumed": 3 * step})
            told.send(checkpoints.latest() or 0)


def test_restore_after_kills(tmp_path):
    """SIGKILL at random instants of asynchronous saves: nothing durable is lost or damaged."""
    chance, durable = random.Random(time.time_ns()), 0
    for attempt in range(6):
        heard, told = nursery().Pipe(duplex=False)
        child = nursery().Process(target=train, args=(tmp_path, told))
        child.start()
        told.close()
        try:
            at = heard.recv()
            assert at >= durable
            durable = at
            while attempt % 2 and durable == at:  # every second time, it gets somewhere
                durable = heard.recv()
            time.sleep(chance.uniform(0.0, 0.4))
        finally:
            child.kill()
        with suppress(EOFError):  # what follows the last whole number is torn
            while True:
                durable = max(durable, heard.recv())
        child.join()
    abstract = {
        "w": jax.ShapeDtypeStruct((4096,), jnp.float32),
        "opt": [jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)],
    }
    step, state, host = load(tmp_path, abstract)
    assert step >= durable > 0
    assert host == {"consumed": 3 * step}
    np.testing.assert_array_equal(state["w"], np.arange(4096.0) + step)
    assert not (tmp_path / "damaged").exists()

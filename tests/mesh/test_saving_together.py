"""A save that fails on one of two processes has failed on both, which go on and try again."""

from loopback import by_flags, ended, free_port, started

PROGRAM = """
import itertools, resource, sys
import jax, numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from jaxrlhf.config import CheckpointConfig, Config, override
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh import checkpoint
from jaxrlhf.mesh.checkpoint import Checkpoints
from jaxrlhf.mesh.processes import together

begin, unlimited = ocp.CheckpointManager.save, resource.getrlimit(resource.RLIMIT_FSIZE)

def save(manager, step, **kwargs):
    if jax.process_index() == 1 and step == 2:
        raise OSError(28, "No space left on device")
    begin(manager, step, **kwargs)

def limit(size):
    if jax.process_index() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))

ocp.CheckpointManager.save = save
with together(override(Config(), sys.argv[2:]).distributed):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    mine = np.random.default_rng(jax.process_index()).random(1 << 16).astype(np.float32)
    x = jax.make_array_from_process_local_data(rows, mine)
    with Checkpoints(sys.argv[1], CheckpointConfig(keep=9)) as checkpoints:
        for step in range(1, 5):
            limit(4096 if step == 3 else unlimited[0])
            checkpoints.save(step, {"x": x}, {})
            try:
                checkpoints.wait()
            except InputError as error:
                print("said", error, flush=True)
            print("after", step, "failed", checkpoints.failed, flush=True)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {"x": x}
        )
        # A network disk: the second process does not see the newest step yet.
        looks, real = itertools.count(), checkpoint.steps_in
        if jax.process_index() == 1:
            checkpoint.steps_in = lambda folder: [x for x in real(folder) if x < 4 or next(looks)]
        print("restored", checkpoints.restore(abstract)[0], flush=True)
    limit(unlimited[0])
    with Checkpoints(sys.argv[1] + "/another", CheckpointConfig(keep=9)) as checkpoints:
        for step in (1, 3, 4):
            checkpoints.save(step, {"x": x}, {})
            checkpoints.wait()
        print("after another", "failed", checkpoints.failed, flush=True)
"""


def test_save_that_fails_on_one_of_two_fails_on_both(tmp_path):
    """Refused as it begins (step 2), and in the background (step 3); the next one is whole,
    and so are those of another run in the same processes. Both restore the step that both see."""
    with started(tmp_path, *by_flags(free_port()), program=PROGRAM) as running:
        for status, out, errors in ended(running, 90):
            assert status == 0, errors
            failed = [int(line.split()[-1]) for line in out.splitlines() if "after" in line]
            assert failed == [0, 1, 2, 2, 0], out + errors
            assert out.count("No space left on device") == 1
            assert "restored 4" in out
    assert sorted(x.name for x in tmp_path.iterdir() if x.name.isdigit()) == ["1", "4"]

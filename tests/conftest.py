"""Eight fake CPU devices for every test, set before jax is imported; a tiny model for most."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers compile into one folder
    CACHE = tempfile.mkdtemp(prefix="jaxrlhf-tests-")
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # runs that are repeated compile once
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (  # after the first, they only shorten compilation, most of a test's time
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"
    + " --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_parallel_codegen_split_count=1"  # each core has a worker of its own
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")  # gone since
)
os.environ["HF_HUB_OFFLINE"] = "1"  # what is missing here is not looked for there
os.environ["TOKENIZERS_PARALLELISM"] = os.environ.get("TOKENIZERS_PARALLELISM", "false")

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import DecoderConfig, LoraConfig
from jaxrlhf.core import remote
from jaxrlhf.core.types import Batch
from jaxrlhf.models.transformer import Model


def pytest_addoption(parser):
    parser.addoption("--inputs", type=int, default=300, help="inputs a reader in test_fuzz.py")


def pytest_collection_modifyitems(items):
    """Files with long tests first, so that no worker is left alone with one at the end."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """memory://, empty; and a home that has fetched nothing."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_here", {})
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.fixture(autouse=True, scope="module")
def forget():
    """The programs of a file are of no use to the next; of all, a worker would hold 10 GB."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def random_weights():
    """(shapes, seed) → noise, around 1 for norms: no zero and no one hides a leaf left out."""

    def make(shapes, seed):
        rng = np.random.default_rng(seed)

        def leaf(path, shape):
            noise = 0.18 * rng.standard_normal(shape.shape)
            return jnp.array(noise + (path[-1].key == "scale"), jnp.float32)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return make


@pytest.fixture(scope="session")
def decoder():
    """300 tokens are two blocks of a draw."""
    return DecoderConfig(
        vocab=300, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, context=64
    )


@pytest.fixture(scope="session")
def model(decoder):
    return Model(decoder, lora=LoraConfig(rank=2, alpha=4.0))


@pytest.fixture(scope="session")
def params(model, random_weights):
    """Weights and a scalar head."""
    return random_weights(model.shapes(head=True), 0)


@pytest.fixture(scope="session")
def lora(model, random_weights):
    """Adapters that change something."""
    return random_weights(jax.eval_shape(model.init_lora, jax.random.key(0)), 1)


@pytest.fixture(scope="session")
def batch():
    """Eight rows of 10 tokens, prompts of up to 4, padded on both sides; on the host."""
    rng = np.random.default_rng(0)
    real = np.ones((8, 10), np.int32)
    for row in range(8):
        real[row, : row % 3] = real[row, 10 - row % 4 :] = 0
    mask = (real * (np.arange(10) >= 4)).astype(np.float32)
    noise = rng.standard_normal((4, 8, 10)).astype(np.float32)
    return Batch(
        token_BT=rng.integers(0, 300, (8, 10), np.int32),
        attention_mask_BT=real,
        mask_BT=mask,
        old_logp_BT=-5.7 + 0.3 * noise[0],
        advantage_BT=noise[1],
        weight_BT=mask / mask.sum(),
        return_BT=noise[2],
        old_value_BT=noise[3],
    )

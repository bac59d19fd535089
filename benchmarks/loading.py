"""Memory of loading and of exporting a model: python benchmarks/loading.py FOLDER [PROCESSES].

Makes a model of 1.5 GB in bfloat16 in FOLDER, if it is not there, and prints the peak of the host's
memory of each of these, in a process of its own: the imports alone; ``rl.load_model`` on one
device; the same on a mesh over PROCESSES processes (default 2) of one device each; an export in
bfloat16, to FOLDER-out. Two versions are compared by running it with each on PYTHONPATH.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import jaxrlhf as rl
from jaxrlhf.apps import cli
from jaxrlhf.config import MeshConfig
from jaxrlhf.models.hf_config import read_config
from jaxrlhf.models.names import tensors
from jaxrlhf.models.tokenizer import load_tokenizer

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32_000,
    "hidden_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 5632, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
"""Of config.json; 789 million weights."""


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    load_tokenizer("words:" + " ".join(f"w{i}" for i in range(1000))).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    rng = np.random.default_rng(0)
    held = {}
    for weight, layer in tensors(read_config(folder / "config.json")):
        drawn = 0.02 * rng.standard_normal(weight.stored, np.float32)
        held[weight.hf.format(layer)] = drawn.astype(ml_dtypes.bfloat16)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: str, processes: int, process: int, port: int) -> None:
    mesh = None
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
        mesh = rl.make_mesh(MeshConfig(data=1, fsdp=processes))
    jax.block_until_ready(rl.load_model(folder, mesh)[1])


def imports(folder: str) -> None:
    assert rl.load_model is not None  # it is imported where it is asked for
    jax.numpy.zeros(1).block_until_ready()
    load_tokenizer(folder)


def export(folder: str) -> None:
    assert cli.main(["export", folder, f"{folder}-out", "--dtype", "bfloat16"]) == 0


def measured(what: str, *words: object, processes: int = 1) -> None:
    """Print the peak of each process that does ``what``, GiB, and the seconds they all took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, running = time.perf_counter(), []
    for process in range(processes):
        given = [str(x) for x in (what, *words, processes, process, port)]
        command = [sys.executable, __file__, "--one", *given]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
    peaks = [float(one.communicate()[0].split()[-1]) for one in running]
    shown = ", ".join(f"{peak:.2f}" for peak in peaks)
    print(f"{what:<9}{shown} GiB, {time.perf_counter() - began:.1f} s", flush=True)


def one(what: str, folder: str, processes: str, process: str, port: str) -> None:
    if what == "load":
        load(folder, int(processes), int(process), int(port))
    else:
        {"imports": imports, "export": export}[what](folder)
    # Not getrusage's ru_maxrss, in which the process that this one came from lives on.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20)


def main(folder: str, processes: str = "2") -> None:
    path = Path(folder)
    if not path.exists():
        make(path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    print(f"{folder}: {size / 2**30:.2f} GiB of weights")
    measured("imports", folder)
    measured("load", folder)
    measured("load", folder, processes=int(processes))
    shutil.rmtree(f"{folder}-out", ignore_errors=True)
    measured("export", folder)


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1] == "--one" else main(*sys.argv[1:])

"""One node with GPUs: the command that gpu.sh becomes."""


def recorder(workshop):
    return workshop.fake(
        "python", '#!/bin/bash\necho "$JAX_PLATFORMS $XLA_CLIENT_MEM_FRACTION $*"\n'
    )


def test_gpu_trains(workshop):
    done = workshop.run(
        "gpu.sh", "x.yaml", "--steps", "3", CUDA_VISIBLE_DEVICES="0", PYTHON=recorder(workshop)
    )
    assert (done.returncode, done.stdout) == (
        0,
        "cuda,cpu .9 -m jaxrlhf train x.yaml --steps 3\n",
    )


def test_gpu_needs_one(workshop):
    done = workshop.run("gpu.sh", "x.yaml", PYTHON=recorder(workshop))
    assert done.returncode == 2
    assert done.stderr.startswith("error: no GPU: nvidia-smi lists none")
    assert workshop.run("gpu.sh", "x.yaml", CUDA_VISIBLE_DEVICES="").returncode == 2


def test_gpu_config_comes_first(workshop):
    assert "CONFIG" in workshop.run("gpu.sh", "--steps", "3").stderr

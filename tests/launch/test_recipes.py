"""xpk, SkyPilot and Docker: thin recipes, whose parts must exist."""

import re
import subprocess

import pytest
import yaml
from workshop import LAUNCH, ROOT

DOCKERFILE = (LAUNCH / "Dockerfile").read_text()
XPK = ["--cluster", "c", "--name", "n", "--type", "v5litepod-256", "--image", "r.dev/i:1"]


def test_xpk_creates_a_workload(workshop):
    words = [*XPK, "--slices", "2", "--project", "p", "--zone", "z", "/c.yaml", "--output", "a b"]
    workshop.output("xpk.sh", *words)
    [call] = workshop.calls()
    assert call == [
        "xpk", "workload", "create", "--cluster=c", "--workload=n", "--tpu-type=v5litepod-256",
        "--num-slices=2", "--docker-image=r.dev/i:1", "--project=p", "--zone=z",
        r"--command=. launch/env.sh tpu && python -m jaxrlhf train /c.yaml --output a\ b",
    ]  # fmt: skip


@pytest.mark.parametrize("left_out", range(4))
def test_xpk_names_what_is_missing(workshop, left_out):
    words = XPK[: 2 * left_out] + XPK[2 * left_out + 2 :]
    errors = workshop.refusal("xpk.sh", *words, "/c.yaml")
    assert errors.startswith(f"error: {XPK[2 * left_out]} is missing")
    assert workshop.calls() == []


def test_sky_tells_jax_its_place(workshop, tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task) == {
        "name", "resources", "num_nodes", "envs", "workdir", "file_mounts", "setup", "run",
    }  # fmt: skip
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    names = "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
    workshop.fake("gpu.sh", f'#!/bin/bash\necho "{names} $*"\n')
    (tmp_path / "launch").symlink_to(workshop.bin)
    sky = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = workshop.call("bash", "-c", task["run"], cwd=tmp_path, CONFIG="configs/x.yaml", **sky)
    assert done.stdout == "10.0.0.1:8476 2 1 configs/x.yaml --output /runs/x\n", done.stderr
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)


def test_docker_copies_what_exists_and_is_not_ignored():
    lines = re.findall(r"^COPY (.*)$", DOCKERFILE, re.M)
    copied = {name for line in lines for name in line.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    packaged = {"jaxrlhf", "configs", "README.md", "LICENSE", "pyproject.toml"}
    assert packaged <= copied  # what the wheel is built from


def test_docker_installs_an_extra_and_starts_the_pod_script():
    package = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\[", package, re.S)
    named = {"demo", *re.findall(r"EXTRA=(\w+)", DOCKERFILE)}
    assert named == {"demo", "cuda13", "tpu"}
    assert all(re.search(rf"^{name} = ", extras[1], re.M) for name in named)
    assert re.search(r"^USER (?!root)", DOCKERFILE, re.M)
    assert 'ENTRYPOINT ["/app/launch/pod.sh"]' in DOCKERFILE
    assert re.search(r"^WORKDIR /app$", DOCKERFILE, re.M)

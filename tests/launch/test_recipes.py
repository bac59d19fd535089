"""xpk, SkyPilot and Docker: thin recipes, whose parts must exist."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
XPK = ["--cluster", "c", "--name", "n", "--type", "v5litepod-256", "--image", "r.dev/i:1"]


def test_xpk_creates_a_workload(workshop):
    words = [*XPK, "--slices", "2", "--project", "p", "--zone", "z", "c.yaml", "--output", "a b"]
    assert workshop.run("xpk.sh", *words).returncode == 0
    [call] = workshop.calls()
    assert call == [
        "xpk", "workload", "create", "--cluster=c", "--workload=n", "--tpu-type=v5litepod-256",
        "--num-slices=2", "--docker-image=r.dev/i:1", "--project=p", "--zone=z",
        r"--command=. launch/env.sh tpu && python -m jaxrlhf train c.yaml --output a\ b",
    ]  # fmt: skip


@pytest.mark.parametrize("left_out", range(4))
def test_xpk_names_what_is_missing(workshop, left_out):
    words = XPK[: 2 * left_out] + XPK[2 * left_out + 2 :]
    done = workshop.run("xpk.sh", *words, "c.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {XPK[2 * left_out]} is missing")
    assert workshop.calls() == []


def test_sky_tells_jax_its_place(workshop, tmp_path):
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    assert set(task) == {
        "name", "resources", "num_nodes", "envs", "workdir", "file_mounts", "setup", "run",
    }  # fmt: skip
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    (tmp_path / "launch").mkdir()
    names = "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
    (tmp_path / "launch" / "gpu.sh").write_text(f'#!/bin/bash\necho "{names} $*"\n')
    (tmp_path / "launch" / "gpu.sh").chmod(0o755)
    sky = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        env=workshop.environ(CONFIG="configs/x.yaml", **sky),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "10.0.0.1:8476 2 1 configs/x.yaml --output /runs/x\n", done.stderr
    assert (
        subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=False).returncode == 0
    )


def test_docker_copies_what_exists_and_is_not_ignored():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.M) for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied)
    packaged = {"jaxrlhf", "configs", "README.md", "LICENSE", "pyproject.toml"}
    assert packaged <= set(copied)  # what the wheel is built from


def test_docker_installs_an_extra_of_the_package():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    extras = re.search(
        r"optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S
    )
    named = {"demo", *re.findall(r"EXTRA=(\w+)", text)}
    assert named == {"demo", "cuda13", "tpu"}
    assert all(re.search(rf"^{name} = ", extras[1], re.M) for name in named)
    assert re.search(r"^USER (?!root)", text, re.M)


def test_docker_starts_the_pod_script():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["/app/launch/pod.sh"]' in text
    assert re.search(r"^WORKDIR /app$", text, re.M)

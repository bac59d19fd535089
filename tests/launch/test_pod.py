"""What a container runs: the command passes through, and a stopped run is not a finished one."""

import signal

import pytest


def test_pod_runs_the_command(workshop):
    python = workshop.fake("python", '#!/bin/bash\necho "$JAX_PLATFORMS $*"\nexit 5\n')
    done = workshop.run("pod.sh", "train", "x.yaml", DEVICE="cpu", PYTHON=python)
    assert (done.returncode, done.stdout) == (5, "cpu -m jaxrlhf train x.yaml\n")


@pytest.mark.parametrize(("status", "expected"), [(0, 143), (13, 13)])
def test_pod_stopped_is_started_again(workshop, status, expected):
    python = workshop.fake(
        "python",
        f"#!/bin/bash\ntrap 'echo saved; exit {status}' TERM\necho up\n"
        "while true; do sleep .05; done\n",
    )
    process = workshop.start("pod.sh", "train", "x.yaml", DEVICE="cpu", PYTHON=python)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (expected, "saved\n"), errors


def test_pod_needs_its_kind(workshop):
    done = workshop.run("pod.sh", "train", "x.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: DEVICE (cpu, gpu or tpu) is missing")

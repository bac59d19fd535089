"""A slice of the Cloud TPU API, one of Compute Engine: the gcloud commands, in order; and what a
host of a slice is asked to do."""

import re
import shutil
import time

import pytest
from workshop import LAUNCH

# tpu_vm.sh

VM = ["--name", "a", "--zone", "us-east5-b"]
TYPE = ["--type", "v6e-64"]
AT = "--zone=us-east5-b"
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
DESCRIBE = [*QUEUED, "describe", "a", AT, "--format=value(state.state)"]
CREATE = [
    *QUEUED, "create", "a", AT, "--node-id=a", "--accelerator-type=v6e-64",
    "--runtime-version=v2-alpha-tpuv6e",
]  # fmt: skip
DELETE = [*QUEUED, "delete", "a", AT, "--force", "--quiet"]
INSTALL = (
    "mkdir -p jaxrlhf && tar -xzf jaxrlhf.tar.gz -C jaxrlhf && jaxrlhf/launch/remote.sh install"
)
START = "jaxrlhf/launch/remote.sh start"


def ssh(command, worker="all"):
    vm = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "a", AT, "--quiet"]
    return [*vm, f"--worker={worker}", f"--command={command}"]


def test_vm_create_asks_and_waits(workshop):
    states = [(1, ""), (0, "WAITING_FOR_RESOURCES"), (0, "PROVISIONING"), (0, "ACTIVE")]
    workshop.answers = {"describe": states}
    output = workshop.output("tpu_vm.sh", "create", *VM, *TYPE, "--spot", POLL_SECONDS="0")
    made = [DESCRIBE, [*CREATE, "--spot"], DESCRIBE, DESCRIBE, DESCRIBE]
    assert workshop.calls() == made
    assert output.splitlines()[-1] == "a: there"
    workshop.output("tpu_vm.sh", "create", *VM, *TYPE)  # leaves what is there
    assert workshop.calls() == [*made, DESCRIBE]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_vm_create_gives_up(workshop, state):
    workshop.answers = {"describe": [(0, state)]}
    errors = workshop.refusal("tpu_vm.sh", "create", *VM, *TYPE)
    assert errors.startswith(f"error: a: {state}: ")


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-512", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_vm_create_knows_the_runtime(workshop, kind, version):
    words = ["create", *VM, "--type", kind, "--project", "p", "--dry-run"]
    flags = f"--project=p --node-id=a --accelerator-type={kind} --runtime-version={version}"
    assert flags in workshop.output("tpu_vm.sh", *words)
    assert workshop.calls() == []


def test_vm_create_newer_slices_are_elsewhere(workshop):
    assert "tpu_gce.sh" in workshop.refusal("tpu_vm.sh", "create", *VM, "--type", "tpu7x-8")


def test_vm_run_copies_installs_and_starts(workshop):
    before = ["--before", "sudo mount x /runs"]
    workshop.output("tpu_vm.sh", "run", *VM, *before, "/c.yaml", "--output", "/runs/a b")
    scp, *rest = workshop.calls()
    assert scp[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert scp[5].endswith("/jaxrlhf.tar.gz")
    assert scp[6:] == ["a:", AT, "--quiet", "--worker=all"]
    start = rf"{START} /c.yaml --output /runs/a\ b"
    assert rest == [ssh(INSTALL), ssh("sudo mount x /runs"), ssh(start)]


def test_vm_run_stops_at_the_first_failure(workshop):
    workshop.answers = {"install": [(255, "")]}
    assert workshop.run("tpu_vm.sh", "run", *VM, "/c.yaml").returncode == 255
    assert len(workshop.calls()) == 2


def test_vm_resume_replaces_a_preempted_slice(workshop):
    workshop.answers = {"describe": [(0, "SUSPENDED"), (0, "SUSPENDED"), (1, ""), (0, "ACTIVE")]}
    workshop.output("tpu_vm.sh", "resume", *VM, *TYPE, "/c.yaml")
    calls = workshop.calls()
    assert calls[:6] == [DESCRIBE, DESCRIBE, DELETE, DESCRIBE, CREATE, DESCRIBE]
    assert calls[-1] == ssh(f"{START} /c.yaml")


def test_vm_logs_stop_delete(workshop):
    workshop.answers = {"describe": [(0, "ACTIVE"), (1, "")]}
    workshop.run("tpu_vm.sh", "logs", *VM, "--worker", "3")
    workshop.run("tpu_vm.sh", "stop", *VM)
    workshop.run("tpu_vm.sh", "delete", *VM)
    assert workshop.output("tpu_vm.sh", "delete", *VM) == "a: not there\n"
    logs = ssh("tail -n 200 -F jaxrlhf/run.log", 3)
    stop = ssh("jaxrlhf/launch/remote.sh stop")
    assert workshop.calls() == [logs, stop, DESCRIBE, DELETE, DESCRIBE]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "--zone", "z"], "--name is missing: give it, or set NAME"),
        (["create", "--name", "a"], "--zone is missing: give it, or set ZONE"),
        (["create", *VM], "--type is missing: give it, or set TYPE"),
        (["run", *VM], "CONFIG is missing"),
        (["run", "--name"], "--name: a value must follow"),
        (["run", *VM, "--bad"], "--bad: unknown option"),
        (["fly"], "fly is missing or unknown: create, run, resume"),
    ],
)
def test_vm_refuses(workshop, words, message):
    workshop.answers = {"describe": [(1, "")]}
    assert workshop.refusal("tpu_vm.sh", *words).startswith(f"error: {message}")


def test_vm_dry_run_runs_nothing(workshop):
    words = ["resume", *VM, *TYPE, "--dry-run", "/c.yaml"]
    lines = workshop.output("tpu_vm.sh", *words, PATH="/usr/bin:/bin").splitlines()
    assert [line[:8] for line in lines[1::2]] == ["+ gcloud", "+ git -C", *["+ gcloud"] * 3]
    assert all(re.match("# [a-z]", line) for line in lines[::2])  # what each is for


# tpu_gce.sh

GCE = ["--name", "a", "--zone", "us-central1-c", "--project", "p"]
P, Z, R = "--project=p", "--zone=us-central1-c", "--region=us-central1"
GROUP = ["gcloud", "compute", "instance-groups", "managed"]
POLICY = ["gcloud", "compute", "resource-policies"]
TEMPLATE = ["gcloud", "compute", "instance-templates"]
ABSENT = {"describe": [(1, "")]}
HOSTS = {"list-instances": [(0, "a-2\na-1\n")]}


def test_gce_create_makes_policy_template_and_group(workshop):
    workshop.answers = ABSENT
    workshop.output("tpu_gce.sh", "create", *GCE, "--topology", "4x4x4")
    made = [call for call in workshop.calls() if "describe" not in call]
    assert made == [
        [*POLICY, "create", "workload-policy", "a-policy", R, P,
         "--type=HIGH_THROUGHPUT", "--accelerator-topology=4x4x4"],
        [*TEMPLATE, "create", "a-template", P, "--machine-type=tpu7x-standard-4t",
         "--image-family=ubuntu-accel-2404-amd64-tpu-tpu7x",
         "--image-project=ubuntu-os-accelerator-images",
         "--boot-disk-type=hyperdisk-balanced", "--boot-disk-size=200GB",
         "--maintenance-policy=TERMINATE",
         "--scopes=cloud-platform"],
        [*GROUP, "create", "a", Z, P, "--size=16", "--template=a-template",
         "--target-size-policy-mode=bulk",
         "--default-action-on-vm-failure=do-nothing",
         "--workload-policy=projects/p/regions/us-central1/resourcePolicies/a-policy"],
        [*GROUP, "wait-until", "a", Z, P, "--stable"],
    ]  # fmt: skip
    workshop.answers = {}
    workshop.output("tpu_gce.sh", "create", *GCE, "--topology", "4x4x4")  # leaves what is there
    assert [call for call in workshop.calls() if "create" in call] == made[:3]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--spot"], "SPOT --instance-termination-action=DELETE"),
        (
            ["--reservation", "r"],
            "RESERVATION_BOUND --instance-termination-action=DELETE "
            "--reservation-affinity=specific --reservation=r",
        ),
    ],
)
def test_gce_create_capacity(workshop, option, words):
    output = workshop.output(
        "tpu_gce.sh", "create", *GCE, "--topology", "2x2x2", *option, "--dry-run"
    )
    assert f"--scopes=cloud-platform --provisioning-model={words}\n" in output
    assert "--size=2 " in output
    assert workshop.calls() == []


def test_gce_run_tells_every_host(workshop):
    workshop.answers = HOSTS
    workshop.output("tpu_gce.sh", "run", *GCE, "/c.yaml", "--steps", "3")
    told = sorted(
        (call[3], call[-1].rpartition(" && ")[2]) for call in workshop.calls() if call[2] == "ssh"
    )
    commands = (f"--command={START} /c.yaml --steps 3", "jaxrlhf/launch/remote.sh install")
    assert told == [(host, command) for host in ("a-1", "a-2") for command in commands]
    copied = [call[4:] for call in workshop.calls() if call[2] == "scp"]
    assert sorted(copied) == [[f"a-{i}:", Z, P, "--quiet"] for i in (1, 2)]
    workshop.run("tpu_gce.sh", "logs", *GCE)
    assert workshop.calls()[-1][3] == "a-1"


def test_gce_run_fails_if_one_host_does(workshop):
    workshop.answers = HOSTS | {"ssh a-2": [(255, "")]}
    assert "not every host could be told" in workshop.refusal("tpu_gce.sh", "run", *GCE, "/c.yaml")
    assert not any("start" in call[-1] for call in workshop.calls())


def test_gce_delete_what_there_is(workshop):
    workshop.run("tpu_gce.sh", "delete", *GCE)
    assert [call for call in workshop.calls() if "describe" not in call] == [
        [*GROUP, "delete", "a", Z, P, "--quiet"],
        [*TEMPLATE, "delete", "a-template", P, "--quiet"],
        [*POLICY, "delete", "a-policy", R, P, "--quiet"],
    ]
    workshop.answers = ABSENT
    assert workshop.output("tpu_gce.sh", "delete", *GCE) == "a: not there\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "--name", "a", "--zone", "z"], "--project is missing: give it, or set PROJECT"),
        (["create", *GCE], "--topology is missing"),
        (["create", *GCE, "--topology", "big"], "--topology big: must be as 2x2x2"),
        (["create", *GCE, "--topology", "1x3"], "--topology 1x3: its 3 chips do not fill hosts of"),
        (["create", *GCE, "--topology", "2x2", "--machine-type", "x"], "--machine-type x: must en"),
        (["run", *GCE], "CONFIG is missing"),
        (
            ["create", *GCE, "--topology", "2x2", "--spot", "--reservation", "r"],
            "--spot and --reserv",
        ),
    ],
)
def test_gce_refuses(workshop, words, message):
    assert workshop.refusal("tpu_gce.sh", *words).startswith(f"error: {message}")
    assert not any("create" in call for call in workshop.calls())


# remote.sh, on a host

PYTHON = """#!/bin/bash
[[ $1 != *flags.py ]] || { echo --known; exit; }
trap 'echo saved; exit 0' TERM
echo "$LIBTPU_INIT_ARGS $*"
while true; do sleep .05; done
"""


@pytest.fixture
def host(workshop, tmp_path):
    """A host's copy of the repository, installed; what is started there is stopped."""
    home = tmp_path / "jaxrlhf"
    shutil.copytree(LAUNCH, home / "launch")
    (home / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(workshop.fake("python", PYTHON), home / ".venv" / "bin" / "python")
    yield home
    workshop.run(home / "launch" / "remote.sh", "stop")


def wait_for(path, text):
    for _ in range(200):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"{path}: no {text!r}")


def test_host_starts_and_stops(workshop, host):
    script = host / "launch" / "remote.sh"
    workshop.output(script, "stop")  # without a run
    assert ": started, pid " in workshop.output(script, "start", "c.yaml", "--output", "a b")
    wait_for(host / "run.log", "--known -m jaxrlhf train c.yaml --output a b\n")
    assert "a run is in progress" in workshop.refusal(script, "start", "c.yaml")
    workshop.output(script, "stop")
    wait_for(host / "run.log", "saved\n")


def test_host_needs_an_installation(workshop, host):
    shutil.rmtree(host / ".venv")
    errors = workshop.refusal(host / "launch" / "remote.sh", "start", "c.yaml")
    assert "not installed: launch/remote.sh install" in errors

"""A slice of the Cloud TPU API: the gcloud commands, in order."""

import pytest

WHERE = ["--name", "a", "--zone", "us-east5-b"]
Z = "--zone=us-east5-b"
DESCRIBE = [
    "gcloud",
    "compute",
    "tpus",
    "queued-resources",
    "describe",
    "a",
    Z,
    "--format=value(state.state)",
]
CREATE = [
    "gcloud", "compute", "tpus", "queued-resources", "create", "a", Z, "--node-id=a",
    "--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e",
]  # fmt: skip
DELETE = ["gcloud", "compute", "tpus", "queued-resources", "delete", "a", Z, "--force", "--quiet"]
INSTALL = (
    "mkdir -p jaxrlhf && tar -xzf jaxrlhf.tar.gz -C jaxrlhf && jaxrlhf/launch/remote.sh install"
)


def ssh(command, worker="all"):
    return [
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", "a", Z, "--quiet", f"--worker={worker}",
        f"--command={command}",
    ]  # fmt: skip


def test_create_asks_and_waits(workshop):
    states = [(1, ""), (0, "WAITING_FOR_RESOURCES"), (0, "PROVISIONING"), (0, "ACTIVE")]
    workshop.answers = {"describe": states}
    done = workshop.run(
        "tpu_vm.sh", "create", *WHERE, "--type", "v6e-64", "--spot", POLL_SECONDS="0"
    )
    assert done.returncode == 0, done.stderr
    assert workshop.calls() == [DESCRIBE, [*CREATE, "--spot"], DESCRIBE, DESCRIBE, DESCRIBE]
    assert done.stdout.splitlines()[-1] == "a: there"


def test_create_leaves_what_is_there(workshop):
    workshop.answers = {"describe": [(0, "ACTIVE")]}
    assert workshop.run("tpu_vm.sh", "create", *WHERE, "--type", "v6e-64").returncode == 0
    assert workshop.calls() == [DESCRIBE]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_gives_up(workshop, state):
    workshop.answers = {"describe": [(0, state)]}
    done = workshop.run("tpu_vm.sh", "create", *WHERE, "--type", "v6e-64")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: a: {state}: ")


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-512", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_create_knows_the_runtime(workshop, kind, version):
    done = workshop.run(
        "tpu_vm.sh", "create", *WHERE, "--type", kind, "--project", "p", "--dry-run"
    )
    assert (
        f"--project=p --node-id=a --accelerator-type={kind} --runtime-version={version}"
        in done.stdout
    )
    assert workshop.calls() == []


def test_create_newer_slices_are_elsewhere(workshop):
    done = workshop.run("tpu_vm.sh", "create", *WHERE, "--type", "tpu7x-8")
    assert done.returncode == 2
    assert "tpu_gce.sh" in done.stderr


def test_run_copies_installs_and_starts(workshop):
    done = workshop.run("tpu_vm.sh", "run", *WHERE, "c.yaml", "--output", "/runs/a b")
    assert done.returncode == 0, done.stderr
    scp, *rest = workshop.calls()
    assert scp[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert scp[5].endswith("/jaxrlhf.tar.gz")
    assert scp[6:] == ["a:", Z, "--quiet", "--worker=all"]
    start = r"jaxrlhf/launch/remote.sh start c.yaml --output /runs/a\ b"
    assert rest == [ssh(INSTALL), ssh(start)]


def test_run_before(workshop):
    workshop.run("tpu_vm.sh", "run", *WHERE, "--before", "sudo mount x /runs", "c.yaml")
    assert workshop.calls()[2] == ssh("sudo mount x /runs")


def test_run_stops_at_the_first_failure(workshop):
    workshop.answers = {"install": [(255, "")]}
    assert workshop.run("tpu_vm.sh", "run", *WHERE, "c.yaml").returncode == 255
    assert len(workshop.calls()) == 2


def test_resume_replaces_a_preempted_slice(workshop):
    workshop.answers = {"describe": [(0, "SUSPENDED"), (0, "SUSPENDED"), (1, ""), (0, "ACTIVE")]}
    done = workshop.run("tpu_vm.sh", "resume", *WHERE, "--type", "v6e-64", "c.yaml")
    assert done.returncode == 0, done.stderr
    calls = workshop.calls()
    assert calls[:6] == [DESCRIBE, DESCRIBE, DELETE, DESCRIBE, CREATE, DESCRIBE]
    assert calls[-1] == ssh("jaxrlhf/launch/remote.sh start c.yaml")


def test_logs_stop_delete(workshop):
    workshop.answers = {"describe": [(0, "ACTIVE")]}
    workshop.run("tpu_vm.sh", "logs", *WHERE, "--worker", "3")
    workshop.run("tpu_vm.sh", "stop", *WHERE)
    workshop.run("tpu_vm.sh", "delete", *WHERE)
    assert workshop.calls() == [
        ssh("tail -n 200 -F jaxrlhf/run.log", 3), ssh("jaxrlhf/launch/remote.sh stop"),
        DESCRIBE, DELETE,
    ]  # fmt: skip


def test_delete_what_is_not_there(workshop):
    workshop.answers = {"describe": [(1, "")]}
    assert workshop.run("tpu_vm.sh", "delete", *WHERE).stdout == "a: not there\n"
    assert workshop.calls() == [DESCRIBE]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "--zone", "z"], "--name is missing: give it, or set NAME"),
        (["create", "--name", "a"], "--zone is missing: give it, or set ZONE"),
        (["create", *WHERE], "--type is missing: give it, or set TYPE"),
        (["run", *WHERE], "CONFIG is missing"),
        (["run", "--name"], "--name: a value must follow"),
        (["run", *WHERE, "--bad"], "--bad: unknown option"),
        (["fly"], "fly is missing or unknown: create, run, resume"),
    ],
)
def test_tpu_vm_refuses(workshop, words, message):
    workshop.answers = {"describe": [(1, "")]}
    done = workshop.run("tpu_vm.sh", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")


def test_dry_run_runs_nothing(workshop):
    done = workshop.run(
        "tpu_vm.sh",
        "resume",
        *WHERE,
        "--type",
        "v6e-64",
        "--dry-run",
        "c.yaml",
        PATH="/usr/bin:/bin",
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["+", "gcloud"], ["+", "git"], *[["+", "gcloud"]] * 3,
    ]  # fmt: skip

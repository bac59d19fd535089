"""A slice of Compute Engine: the gcloud commands, in order."""

import pytest

WHERE = ["--name", "a", "--zone", "us-central1-c", "--project", "p"]
P, Z, R = "--project=p", "--zone=us-central1-c", "--region=us-central1"
GROUP = ["gcloud", "compute", "instance-groups", "managed"]
POLICY = ["gcloud", "compute", "resource-policies"]
TEMPLATE = ["gcloud", "compute", "instance-templates"]
NONE = {"describe": [(1, "")]}


def test_create_makes_policy_template_and_group(workshop):
    workshop.answers = NONE
    done = workshop.run("tpu_gce.sh", "create", *WHERE, "--topology", "4x4x4")
    assert done.returncode == 0, done.stderr
    assert [call for call in workshop.calls() if "describe" not in call] == [
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


def test_create_leaves_what_is_there(workshop):
    workshop.run("tpu_gce.sh", "create", *WHERE, "--topology", "4x4x4")
    made = [call[-1] for call in workshop.calls() if "create" in call]
    assert made == []


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--spot"], "--provisioning-model=SPOT --instance-termination-action=DELETE"),
        (
            ["--reservation", "r"],
            "--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE "
            "--reservation-affinity=specific --reservation=r",
        ),
    ],
)
def test_create_capacity(workshop, option, words):
    done = workshop.run("tpu_gce.sh", "create", *WHERE, "--topology", "2x2x2", *option, "--dry-run")
    assert f"--scopes=cloud-platform {words}\n" in done.stdout
    assert "--size=2 " in done.stdout
    assert workshop.calls() == []


def test_run_tells_every_host(workshop):
    workshop.answers = {"list-instances": [(0, "a-2\na-1\n")]}
    done = workshop.run("tpu_gce.sh", "run", *WHERE, "c.yaml", "--steps", "3")
    assert done.returncode == 0, done.stderr
    told = sorted(
        (call[3], call[-1].rpartition(" && ")[2]) for call in workshop.calls() if call[2] == "ssh"
    )
    assert told == [
        (host, command)
        for host in ("a-1", "a-2")
        for command in (
            "--command=jaxrlhf/launch/remote.sh start c.yaml --steps 3",
            "jaxrlhf/launch/remote.sh install",
        )
    ]  # fmt: skip
    copied = [call[4:] for call in workshop.calls() if call[2] == "scp"]
    assert sorted(copied) == [[f"a-{i}:", Z, P, "--quiet"] for i in (1, 2)]


def test_run_fails_if_one_host_does(workshop):
    workshop.answers = {"list-instances": [(0, "a-1\na-2\n")], "ssh a-2": [(255, "")]}
    done = workshop.run("tpu_gce.sh", "run", *WHERE, "c.yaml")
    assert done.returncode == 2
    assert "not every host could be told" in done.stderr
    assert not any("start" in call[-1] for call in workshop.calls())


def test_logs_follows_the_first(workshop):
    workshop.answers = {"list-instances": [(0, "a-2\na-1\n")]}
    workshop.run("tpu_gce.sh", "logs", *WHERE)
    assert workshop.calls()[-1][3] == "a-1"


def test_delete_what_there_is(workshop):
    workshop.run("tpu_gce.sh", "delete", *WHERE)
    assert [call for call in workshop.calls() if "describe" not in call] == [
        [*GROUP, "delete", "a", Z, P, "--quiet"],
        [*TEMPLATE, "delete", "a-template", P, "--quiet"],
        [*POLICY, "delete", "a-policy", R, P, "--quiet"],
    ]


def test_delete_what_is_not_there(workshop):
    workshop.answers = NONE
    assert workshop.run("tpu_gce.sh", "delete", *WHERE).stdout == "a: not there\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "--name", "a", "--zone", "z"], "--project is missing: give it, or set PROJECT"),
        (["create", *WHERE], "--topology is missing"),
        (["create", *WHERE, "--topology", "big"], "--topology big: must be as 2x2x2"),
        (
            ["create", *WHERE, "--topology", "1x3"],
            "--topology 1x3: its 3 chips do not fill hosts of 4",
        ),
        (
            ["create", *WHERE, "--topology", "2x2", "--machine-type", "x"],
            "--machine-type x: must end",
        ),
        (["run", *WHERE], "CONFIG is missing"),
        (
            ["create", *WHERE, "--topology", "2x2", "--spot", "--reservation", "r"],
            "--spot and --reserv",
        ),
    ],
)
def test_tpu_gce_refuses(workshop, words, message):
    done = workshop.run("tpu_gce.sh", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert not any("create" in call for call in workshop.calls())

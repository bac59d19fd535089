"""The JobSet manifests: their schema, and that names, ports and counts in them agree."""

import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

GKE = Path(__file__).parents[2] / "launch" / "gke"
TPU = ["--type", "tpu-v6e-slice", "--topology", "8x8", "--slices", "2"]
GPU = ["--type", "nvidia-h100-80gb", "--nodes", "4"]
KINDS = {"tpu": TPU, "gpu": GPU}

NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
COUNT = {"type": "integer", "minimum": 1}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required, **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


JOBSET = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed("name", name=NAME, labels=LABELS, annotations=LABELS, namespace=NAME),
    spec=closed(
        "replicatedJobs",
        coordinator=closed("replicatedJob", replicatedJob=NAME, jobIndex={}, podIndex={}),
        network=closed(
            "",
            enableDNSHostnames={"type": "boolean"},
            publishNotReadyAddresses={"type": "boolean"},
            subdomain=NAME,
        ),
        failurePolicy=closed(
            "maxRestarts",
            maxRestarts={"type": "integer", "minimum": 0},
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
        ),
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished={"type": "integer"},
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": closed(
                "name template", name=NAME, replicas=COUNT, template={"type": "object"}
            ),
        },
    ),
)
"""What JobSet's v1alpha2 resource may hold; its job templates are Kubernetes' own Jobs."""


@pytest.fixture
def manifest(workshop):
    def render(kind, *options, words=("c.yaml", "--output", "/runs/a: b")):
        done = workshop.run(
            "gke.sh", "run", kind, "--name", "ppo-1", "--image", "r.dev/i:1", *KINDS[kind],
            *options, "--dry-run", *words,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return yaml.safe_load(done.stdout)

    return render


def job_of(jobset):
    [replicated] = jobset["spec"]["replicatedJobs"]
    return replicated


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]["template"]["spec"]


def strict(resource):
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_is_a_jobset(manifest, kind):
    jobset = manifest(kind, "--queue", "team")
    jsonschema.validate(jobset, JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    strict(job | job_of(jobset)["template"])


def test_schema_refuses_a_misspelt_key(manifest):
    jobset = manifest("gpu")
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(jobset, JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    spec = job_of(jobset)["template"]["spec"]
    spec["template"]["spec"]["nodeSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectors"):
        strict(job | {"spec": spec})


def test_storage_is_a_claim():
    claim = yaml.safe_load((GKE / "storage.yaml").read_text())
    strict(claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_ends_and_restarts_all_together(manifest, kind):
    jobset = manifest(kind)
    spec = job_of(jobset)["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0
    assert pod_of(jobset)["restartPolicy"] == "Never"
    assert pod_of(jobset)["terminationGracePeriodSeconds"] >= 120
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_runs_the_command(manifest, kind):
    pod = pod_of(manifest(kind))
    [container] = pod["containers"]
    assert container["args"] == ["train", "c.yaml", "--output", "/runs/a: b"]
    assert container["image"] == "r.dev/i:1"
    assert {"name": "DEVICE", "value": kind} in container["env"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_claims_the_disk(manifest, kind):
    claim = yaml.safe_load((GKE / "storage.yaml").read_text())["metadata"]["name"]
    for options, name in (([], claim), (["--claim", "mine"], "mine")):
        runs = next(v for v in pod_of(manifest(kind, *options))["volumes"] if v["name"] == "runs")
        assert runs["persistentVolumeClaim"]["claimName"] == name


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_queue_is_optional(manifest, kind):
    label = "kueue.x-k8s.io/queue-name"
    assert label not in manifest(kind)["metadata"]["labels"]
    assert manifest(kind, "--queue", "team")["metadata"]["labels"][label] == "team"


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_leaves_no_hole(manifest, kind):
    assert "${" not in yaml.safe_dump(manifest(kind))


def test_tpu_slices_and_hosts(manifest):
    jobset = manifest("tpu")
    job = job_of(jobset)
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (2, 16)  # 8·8 chips by 4
    assert job["template"]["spec"]["completions"] == 16
    pod = pod_of(jobset)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert {port["containerPort"] for port in container["ports"]} >= {8471, 8080, 8482}
    names = {variable["name"] for variable in container["env"]}
    assert not any(name.startswith("JAX_") for name in names)  # GKE tells, JAX detects


def test_gpu_processes_find_the_first(manifest):
    jobset = manifest("gpu")
    job = job_of(jobset)
    [container] = pod_of(jobset)["containers"]
    env = {variable["name"]: variable for variable in container["env"]}
    host, port = env["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    pod, subdomain = host.split(".")
    assert pod == f"{jobset['metadata']['name']}-{job['name']}-0-0"
    assert subdomain == jobset["spec"]["network"]["subdomain"] == jobset["metadata"]["name"]
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    assert jobset["spec"]["network"]["publishNotReadyAddresses"] is True
    assert int(port) in {port["containerPort"] for port in container["ports"]}
    assert env["JAX_NUM_PROCESSES"]["value"] == "4"
    assert job["replicas"] == 1
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
    path = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_needs_no_role(manifest, kind):
    text = (GKE / f"{kind}.yaml").read_text()
    assert "serviceAccount" not in text
    assert re.search(r"no role", text.replace("\n# ", " "))


def test_run_applies(workshop):
    workshop.fake("kubectl", '#!/bin/bash\necho "$*"\ncat\n')
    done = workshop.run("gke.sh", "run", "gpu", "--name", "a", "--image", "i", *GPU, "c.yaml")
    assert done.stdout.startswith("apply -f -\n# A run on GPU nodes")


def test_logs_and_delete(workshop):
    workshop.run("gke.sh", "logs", "--name", "a")
    workshop.run("gke.sh", "delete", "--name", "a")
    selector = (
        "--selector=jobset.sigs.k8s.io/jobset-name=a,jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=0"
    )
    assert workshop.calls() == [
        ["kubectl", "logs", "--follow", "--tail=200", selector],
        ["kubectl", "delete", "jobset", "a", "--ignore-not-found"],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "run: tpu or gpu must follow"),
        (["run", "gpu", "--name", "a"], "--image is missing: give it, or set IMAGE"),
        (["run", "gpu", "--name", "a", "--image", "i"], "--type is missing"),
        (["run", "tpu", "--name", "a", "--image", "i", "--type", "t"], "--topology is missing"),
        (["run", "gpu", "--name", "a", "--image", "i", *GPU], "CONFIG is missing"),
        (["run", "gpu", "--name", "A"], "--name A: must be 1 to 40 of a-z, 0-9 and -"),
        (["run", "gpu", "--name", "a" * 41], f"--name {'a' * 41}: must be"),
        (["run", "gpu", "--name", "a", "--image", "i", *GPU, "--chips", "x", "c"], "x: --slices"),
        (["logs"], "--name is missing"),
    ],
)
def test_gke_refuses(workshop, words, message):
    done = workshop.run("gke.sh", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert workshop.calls() == []


def test_topology_must_fill_the_hosts(workshop):
    words = ["--name", "a", "--image", "i", "--type", "t", "--topology", "3x3", "c.yaml"]
    done = workshop.run("gke.sh", "run", "tpu", *words)
    assert done.returncode == 2
    assert "its 9 chips do not fill hosts of 4" in done.stderr
    assert workshop.calls() == []

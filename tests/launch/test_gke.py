"""The JobSet manifests: their schema, and that names, ports and counts in them agree."""

import jsonschema
import kubernetes_validate
import pytest
import yaml
from workshop import LAUNCH

GKE = LAUNCH / "gke"
TPU = ["--type", "tpu-v6e-slice", "--topology", "8x8", "--slices", "2"]
NAMED = ["--name", "a", "--image", "i"]
ODD = ["--type", "t", "--topology", "3x3"]
GPU = ["--type", "nvidia-h100-80gb", "--nodes", "4"]
KINDS = {"tpu": TPU, "gpu": GPU}
every_kind = pytest.mark.parametrize("kind", KINDS)

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
    def render(kind, *options, words=("/c.yaml", "--output", "/runs/a: b")):
        named = ["--name", "ppo-1", "--image", "r.dev/i:1", *KINDS[kind]]
        words = [*named, *options, "--dry-run", *words]
        return yaml.safe_load(workshop.output("gke.sh", "run", kind, *words))

    return render


def job_of(jobset):
    [replicated] = jobset["spec"]["replicatedJobs"]
    return replicated


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]["template"]["spec"]


def strict(resource):
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def strict_job(spec):
    strict({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec})


@every_kind
def test_manifest_is_a_jobset(manifest, kind):
    jobset = manifest(kind, "--queue", "team")
    jsonschema.validate(jobset, JOBSET)
    spec = job_of(jobset)["template"]["spec"]
    strict_job(spec)
    assert "${" not in yaml.safe_dump(jobset)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(jobset, JOBSET)
    spec["template"]["spec"]["nodeSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectors"):
        strict_job(spec)


def test_storage_is_a_claim():
    claim = yaml.safe_load((GKE / "storage.yaml").read_text())
    strict(claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@every_kind
def test_manifest_ends_and_restarts_all_together(manifest, kind):
    jobset = manifest(kind)
    spec = job_of(jobset)["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0
    assert pod_of(jobset)["restartPolicy"] == "Never"
    assert pod_of(jobset)["terminationGracePeriodSeconds"] >= 120
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


@every_kind
def test_manifest_runs_the_command_with_what_it_asks_for(manifest, kind):
    jobset, other = manifest(kind), manifest(kind, "--claim", "mine", "--queue", "team")
    [container] = pod_of(jobset)["containers"]
    assert container["args"] == ["train", "/c.yaml", "--output", "/runs/a: b"]
    assert container["image"] == "r.dev/i:1"
    assert {"name": "DEVICE", "value": kind} in container["env"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod_of(jobset)["volumes"]}
    claim = yaml.safe_load((GKE / "storage.yaml").read_text())["metadata"]["name"]
    for made, name in ((jobset, claim), (other, "mine")):
        [runs] = [volume for volume in pod_of(made)["volumes"] if volume["name"] == "runs"]
        assert runs["persistentVolumeClaim"]["claimName"] == name
    label = "kueue.x-k8s.io/queue-name"
    assert label not in jobset["metadata"]["labels"]
    assert other["metadata"]["labels"][label] == "team"


@every_kind
def test_manifest_needs_no_role(kind):
    text = (GKE / f"{kind}.yaml").read_text()
    assert "serviceAccount" not in text
    assert "no role" in text.replace("\n# ", " ")


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


def test_run_applies(workshop):
    workshop.fake("kubectl", '#!/bin/bash\necho "$*"\ncat\n')
    output = workshop.output("gke.sh", "run", "gpu", *NAMED, *GPU, "/c.yaml")
    assert output.startswith("apply -f -\n# A run on GPU nodes")


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
        (["run", "gpu", *NAMED], "--type is missing"),
        (["run", "tpu", *NAMED, "--type", "t"], "--topology is missing"),
        (["run", "tpu", *NAMED, *ODD, "c"], "--topology 3x3: its 9 chips do not fill hosts of 4"),
        (["run", "gpu", *NAMED, *GPU], "CONFIG is missing"),
        (["run", "gpu", "--name", "A"], "--name A: must be 1 to 40 of a-z, 0-9 and -"),
        (["run", "gpu", "--name", "a" * 41], f"--name {'a' * 41}: must be"),
        (["run", "gpu", *NAMED, *GPU, "--chips", "x", "c"], "x: --slices"),
        (["logs"], "--name is missing"),
    ],
)
def test_gke_refuses(workshop, words, message):
    assert workshop.refusal("gke.sh", *words).startswith(f"error: {message}")
    assert workshop.calls() == []

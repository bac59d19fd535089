"""The Slurm job: what it asks for, what srun gets, and when it goes back to the queue."""

import re
import signal

import pytest
from workshop import LAUNCH, ROOT, UNTIL_TERM

JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "12",
}
TASK = """#!/bin/bash
# srun: the task is its words from bash on; scancel's signal is passed to it
while [[ $1 != bash ]]; do shift; done
"$@" & task=$!
until [[ -e $FAKE_CALLS.signal ]]; do
    kill -0 $task 2>/dev/null || { wait $task; exit; }
    sleep .05
done
kill -TERM $task; wait $task
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >"$FAKE_CALLS.signal"
"""


def test_slurm_asks_for():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
    assert options["signal"] == "B:TERM@120"
    assert "requeue" in options
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["open-mode"] == "append"  # or a requeued job would empty its log


def test_slurm_starts_the_tasks(workshop):
    workshop.output("slurm.sbatch", "x.yaml", "--steps", "3", **JOB)
    [words] = workshop.calls()
    assert words[:5] == ["srun", "--kill-on-bad-exit=1", "--label", "--cpus-per-task=12", "bash"]
    assert words[-5:] == ["task", str(LAUNCH), "x.yaml", "--steps", "3"]


def test_slurm_task_trains(workshop):
    workshop.fake("srun", TASK)
    show = '#!/bin/bash\necho "${JAX_LOCAL_DEVICE_IDS-all by Slurm} $*"\n'
    job = JOB | {"CUDA_VISIBLE_DEVICES": "0", "PYTHON": workshop.fake("python", show)}
    for tasks, devices in (("8", "all by Slurm"), ("1", "0,1,2,3,4,5,6,7")):
        output = workshop.output("slurm.sbatch", "x.yaml", **job | {"SLURM_NTASKS_PER_NODE": tasks})
        assert output == f"{devices} -m jaxrlhf train x.yaml\n"


def test_slurm_failure_is_not_queued_again(workshop):
    workshop.answers = {"srun": [(13, "")]}
    assert workshop.run("slurm.sbatch", "x.yaml", **JOB).returncode == 13
    assert [words[0] for words in workshop.calls()] == ["srun"]


@pytest.mark.parametrize(("count", "queued"), [("0", True), ("3", False)])
def test_slurm_is_queued_again_before_its_time_ends(workshop, count, queued):
    workshop.fake("srun", TASK)
    workshop.fake("scancel", SCANCEL)
    python = workshop.fake("python", UNTIL_TERM.format(status=0))
    process = workshop.start(
        "slurm.sbatch", "x.yaml", **JOB, CUDA_VISIBLE_DEVICES="0", PYTHON=python,
        SLURM_RESTART_COUNT=count, MAX_REQUEUES="3", **workshop.slowly(),
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output.startswith("saved\n"), errors
    assert (workshop.calls_file.parent / "calls.signal").read_text() == "scancel --signal=TERM 17\n"
    assert process.returncode == (0 if queued else 2), errors
    assert workshop.calls() == ([["scontrol", "requeue", "17"]] if queued else [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set: start this with sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "//launch/env.sh is missing"),
        ({"SETUP": "/none"}, "SETUP=/none cannot be read"),
    ],
)
def test_slurm_refuses(workshop, change, message):
    assert message in workshop.refusal("slurm.sbatch", "x.yaml", **JOB | change)

"""The Slurm job: what it asks for, what srun gets, and when it goes back to the queue."""

import re
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

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
    options = dict(
        re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.M)
    )
    assert options["signal"] == "B:TERM@120"
    assert "requeue" in options
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["open-mode"] == "append"  # or a requeued job would empty its log


def test_slurm_starts_the_tasks(workshop):
    done = workshop.run("slurm.sbatch", "x.yaml", "--steps", "3", **JOB)
    assert done.returncode == 0, done.stderr
    [words] = workshop.calls()
    assert words[:5] == ["srun", "--kill-on-bad-exit=1", "--label", "--cpus-per-task=12", "bash"]
    assert words[-5:] == ["task", str(LAUNCH), "x.yaml", "--steps", "3"]


def test_slurm_task_trains(workshop):
    workshop.fake("srun", TASK)
    python = workshop.fake(
        "python", '#!/bin/bash\necho "${JAX_LOCAL_DEVICE_IDS-all by Slurm} $*"\n'
    )
    one = {"CUDA_VISIBLE_DEVICES": "0", "PYTHON": python}
    done = workshop.run("slurm.sbatch", "x.yaml", **JOB, **one)
    assert done.stdout == "all by Slurm -m jaxrlhf train x.yaml\n"
    done = workshop.run("slurm.sbatch", "x.yaml", **JOB | {"SLURM_NTASKS_PER_NODE": "1"}, **one)
    assert done.stdout == "0,1,2,3,4,5,6,7 -m jaxrlhf train x.yaml\n"


def test_slurm_failure_is_not_queued_again(workshop):
    workshop.answers = {"srun": [(13, "")]}
    assert workshop.run("slurm.sbatch", "x.yaml", **JOB).returncode == 13
    assert [words[0] for words in workshop.calls()] == ["srun"]


@pytest.mark.parametrize(("count", "queued"), [("0", True), ("3", False)])
def test_slurm_is_queued_again_before_its_time_ends(workshop, count, queued):
    workshop.fake("srun", TASK)
    workshop.fake("scancel", SCANCEL)
    python = workshop.fake(
        "python",
        "#!/bin/bash\ntrap 'echo saved; exit 0' TERM\necho up\nwhile true; do sleep .05; done\n",
    )
    process = workshop.start(
        "slurm.sbatch", "x.yaml", **JOB, CUDA_VISIBLE_DEVICES="0", PYTHON=python,
        SLURM_RESTART_COUNT=count, MAX_REQUEUES="3",
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert output.startswith("saved\n"), errors
    assert (workshop.calls_file.parent / "calls.signal").read_text() == "scancel --signal=TERM 17\n"
    if queued:
        assert process.returncode == 0, errors
        assert workshop.calls() == [["scontrol", "requeue", "17"]]
    else:
        assert process.returncode == 2
        assert workshop.calls() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set: start this with sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "//launch/env.sh is missing"),
        ({"SETUP": "/none"}, "SETUP=/none cannot be read"),
    ],
)
def test_slurm_refuses(workshop, change, message):
    done = workshop.run("slurm.sbatch", "x.yaml", **JOB | change)
    assert done.returncode == 2
    assert message in done.stderr

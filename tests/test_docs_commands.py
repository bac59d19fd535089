"""The commands of README and docs/, carried out in the order in which their pages have them.

``make docs-commands`` runs them in one empty folder, beside ``configs``, each as a shell runs it,
with what TINY adds to make it short. What is not run has its reason in APART; that every command
has its place is seen in CI.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).parents[1]
ORDER = (
    "docs/install", "docs/quickstart", "docs/reward_hacking", "README", "docs/verifiable_tasks",
    "docs/evaluation",
)  # fmt: skip
"""Pages whose commands stand on those before; the rest follow by name."""

PROGRAMS = (
    r"(jaxrlhf|python|make|pip|launch/\S+|sbatch|gcloud|docker|kubectl|hf|until|[A-Z_]+=\S+)\s"
)

APART = {
    r"make setup|pip install": "installs what this environment has",
    r"make (demo|test)|jaxrlhf demo$": "minutes: a target of its own",
    r"chat smollm2 --against runs/demo|runs/demo/reward_model": "of `jaxrlhf demo`",
    r"gcloud |docker |kubectl |sbatch |launch/(tpu_vm|tpu_gce|gke)|gs://": "a cloud, or a cluster",
    r"launch/gpu\.sh|cuda": "a GPU",
    r"jaxrlhf plan |study\.plan": "minutes of compilation, and the extra plan: docs/scale.md",
    r" hf:|--push|/models/|/runs/": "files that are not here, or a network",
    r"CONFIG|my_script\.py": "names of the reader's",
    r"benchmarks/ensemble": "an hour",
    r"benchmarks/first_answer": "a figure of a quiet machine",
    r"study\.harness": "`make harness`",
    r"completion (bash|zsh) > ": "writes into the folders of the shell",
    r"jaxrlhf serve ": "ends when it is interrupted: tests/apps/test_serve.py",
}
"""Patterns of commands that are not run, and why."""

FEW = "--data.eval held_out.jsonl --sample.max-new-tokens 4 --data.batch-size 2 --sample.n 2"
TINY = {
    r"train \S*configs/\w*smollm2": f"--steps 1 --algorithm.minibatches 1 --eval.n 1 {FEW}",
    r"generate ": "--max-new-tokens 4",
    r"eval (runs/ppo_smollm2|smollm2)": "--n 1 --best-of 2 --max-new-tokens 4",
    r"train configs/hackable_tiny": "--steps 4",
    r"train mine\.yaml$": "--steps 4",
    r"train grpo\.yaml$": "--steps 1 --sample.max-new-tokens 4 --data.batch-size 2 --sample.n 2",
    r"--steps 40": "--steps 6",
    r"init grpo": "--output grpo.yaml",
    r"chat smollm2$": "--max-new-tokens 4",
}
"""What is added to commands that a pattern fits: the last word of a setting counts."""

NAMES = {"runs/reward_model": "runs/tiny/reward_model", "runs/sft": "runs/tiny/sft"}
"""Runs of pages that make none, and what stands for them."""


def shell_lines(path):
    """Commands of a page, as a shell would read them; sketches, with … or [, are none."""
    text = path.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.S | re.M)
    indented = "\n".join(re.findall(r"^ {4}(.*)$", text, re.M))
    for line in re.sub(r"\\\n\s*", "", "\n".join([indented, *fenced])).splitlines():
        if re.match(PROGRAMS, line) and not re.search(r"[…\[|]", line.partition("  #")[0]):
            yield line.partition("  #")[0].rstrip()


def pages():
    first = [ROOT / f"{name}.md" for name in ORDER]
    return [*first, *(x for x in sorted((ROOT / "docs").glob("*.md")) if x not in first)]


COMMANDS = list(dict.fromkeys(line for path in pages() for line in shell_lines(path)))


def apart(line):
    """Why a command is not run; None if it is."""
    return next((why for found, why in APART.items() if re.search(found, line)), None)


def short(line):
    """A command with what makes it short."""
    for name, stand_in in NAMES.items():
        line = re.sub(rf"{name}\b", stand_in, line)
    more = [words for found, words in TINY.items() if re.search(found, line) and words]
    return " ".join([line, *more])


def test_every_pattern_of_a_command_has_one():
    """A page that changes takes its place in the tables along."""
    whole = "\n".join(COMMANDS)
    assert [x for x in [*APART, *TINY, *NAMES] if not re.search(x, whole, re.M)] == []
    assert len(COMMANDS) > 80
    assert sum(apart(line) is None for line in COMMANDS) > 25


def block(page, kind, start):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return next(x for x in re.findall(rf"```{kind}\n(.*?)```", text, re.S) if start in x)


@pytest.fixture
def place(tmp_path):
    """What the pages say that the reader has."""
    for name in ("configs", "launch", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    program = tmp_path / "bin/jaxrlhf"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m jaxrlhf "$@"\n', encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "mine.yaml").write_text(block("quickstart", "yaml", "mine.yaml"), encoding="utf-8")
    brief = block("quickstart", "python", "def brief")
    (tmp_path / "brief.py").write_text(brief, encoding="utf-8")
    (tmp_path / "my_rewards.py").write_text(brief + "\n\nf = brief\n", encoding="utf-8")
    asked = [{"prompt": text} for text in ("The food was", "My phone is", "A day at", "We went")]
    for name in ("mine", "prompts", "held_out"):
        runs.write(tmp_path / f"{name}.jsonl", asked)
    pairs = [{"prompt": "the", "chosen": f"{x} good", "rejected": f"{x} bad"} for x in ("a", "b")]
    words = [{**pair, "chosen": "good nice", "rejected": "bad dull"} for pair in pairs]
    for name in ("pairs", "reward_bench"):
        runs.write(tmp_path / f"{name}.jsonl", [{**pair, "subset": "x"} for pair in words])
    return tmp_path


@pytest.mark.commands
def test_commands_of_the_pages_end_well(place):
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    failed = []
    for line in filter(lambda line: apart(line) is None, COMMANDS):
        began = time.monotonic()
        done = subprocess.run(
            short(line),
            shell=True,
            cwd=place,
            env={**given, "PATH": path, "PYTHONPATH": f"{ROOT}:{given.get('PYTHONPATH', '')}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"{time.monotonic() - began:6.1f} s  status {done.returncode}  {short(line)}")
        if done.returncode:
            failed.append(f"{short(line)}\n{(done.stdout + done.stderr)[-1500:]}")
        # What is made anew has to have room.
        shutil.rmtree(place / "out", ignore_errors=True)
    print(*sorted({f"not run ({apart(x)}): {x}" for x in COMMANDS if apart(x)}), sep="\n")
    assert not failed, "\n\n".join(failed)

"""gcloud, kubectl, srun, xpk and their like, faked on the PATH: they record their words."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

FAKE = f"""#!{sys.executable} -SE
import json, os, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
calls = os.environ["FAKE_CALLS"]
before = [json.loads(line) for line in open(calls)] if os.path.exists(calls) else []
with open(calls, "a") as file:
    print(json.dumps(words), file=file)
for pattern, answers in json.loads(os.environ["FAKE_ANSWERS"]).items():
    if pattern in " ".join(words):
        seen = sum(pattern in " ".join(call) for call in before)
        status, text = answers[min(seen, len(answers) - 1)]
        print(text, end="")
        sys.exit(status)
"""
"""Answers are by pattern: (status, output) of the first, second, … call; the last one repeats."""

UNTIL_TERM = """#!/bin/bash
trap 'echo saved; exit {status}' TERM
echo up
while true; do sleep .05; done
"""
"""A trainer that saves and ends once it is asked to."""

SLOWLY = """
case $0 in */launch/*) trap 'sleep .03' DEBUG ;; esac
"""
"""BASH_ENV: each command of a launcher waits, so that what it has started goes on before it."""


class Workshop:
    """A PATH with fakes, and what they were called with."""

    def __init__(self, folder):
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls_file = folder / "calls"
        self.answers = {}
        for name in ("gcloud", "kubectl", "srun", "scancel", "scontrol", "xpk", "nvidia-smi"):
            self.fake(name)

    def fake(self, name, text=FAKE):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)
        return str(self.bin / name)

    def environ(self, **variables):
        kept = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": os.environ["HOME"]}
        fakes = {"FAKE_CALLS": str(self.calls_file), "FAKE_ANSWERS": json.dumps(self.answers)}
        python = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        return kept | fakes | python | variables

    def slowly(self):
        """Variables with which the machine is a busy one, to launchers."""
        return {"BASH_ENV": self.fake("slowly", SLOWLY)}

    def start(self, script, *words, **variables):
        return subprocess.Popen(
            [str(LAUNCH / script), *words],
            env=self.environ(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *words, cwd=None, **variables):
        return subprocess.run(
            words,
            env=self.environ(**variables),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def run(self, script, *words, **variables):
        return self.call(str(LAUNCH / script), *words, **variables)

    def output(self, script, *words, **variables):
        """What a script that ends well prints."""
        done = self.run(script, *words, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refusal(self, script, *words, **variables):
        """What a script says that refuses its words."""
        done = self.run(script, *words, **variables)
        assert done.returncode == 2, done.stderr
        return done.stderr

    def calls(self):
        if not self.calls_file.exists():
            return []
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

"""Our side of the benchmark beside peers: that it keeps up with the run loop."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import tiny_models

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"
REPEATS = 2


def test_sft_is_measured(tmp_path):
    folder = tmp_path / "model"
    tokenizer = tiny_models.byte_level()
    tiny_models.rigged_folder(folder, tokenizer, len(tokenizer))
    texts = [f"{i:02}" + "x" * 5 for i in range(4)]
    (folder / "prompts.json").write_text(json.dumps(texts), encoding="utf-8")
    task = {
        "subject": "sft", "folder": str(folder), "rows": 4, "n": 1, "prompt": 8, "new": 4,
        "minibatches": 1, "repeats": REPEATS, "began": time.time(),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, PEERS / "on_jaxrlhf.py", json.dumps(task)],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(PEERS.parents[1])},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1].removeprefix("MEASURED "))
    assert len(found["seconds"]) == REPEATS
    assert 0 < sum(found["seconds"]) < found["whole"]

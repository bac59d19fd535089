"""The programs in docs/ run, from top to bottom."""

import re
from pathlib import Path

import pytest

DOCS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_python_blocks_run(path):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    exec(compile("\n".join(blocks), str(path), "exec"), {"__name__": "docs"})


def test_there_are_docs():
    assert {path.stem for path in DOCS} >= {"adding_an_algorithm", "oracle", "reward_hacking"}

"""The notebooks in docs/ run, from top to bottom, and are kept without what they print."""

import json
from pathlib import Path

import pytest

PATHS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    names = {"__name__": "notebook"}
    for number, cell in enumerate(cells(path)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}:{number}", "exec"), names)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_kept_clean(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]


def test_there_are_notebooks():
    text = (PATHS[0].parents[1] / "notebooks.md").read_text(encoding="utf-8")
    assert [path.name for path in PATHS if f"notebooks/{path.name}" in text] == [
        "closed_form_optimum.ipynb", "over_optimisation.ipynb", "ppo_in_four_steps.ipynb",
        "sixty_four_seeds.ipynb",
    ]  # fmt: skip

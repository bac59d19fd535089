"""What docs/ says runs: its programs, its configs, its commands, the tests that it names; and the
site is built whole."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import jaxrlhf as rl
from jaxrlhf.apps import cli
from jaxrlhf.apps.completion import options_of
from jaxrlhf.config import check, load

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md"]
TOLD = [path for path in PAGES if path.stem != "adding_an_algorithm"]
"""Those that speak of what is there: one makes an algorithm, and the files that it takes."""


def blocks(path, kind):
    return re.findall(rf"```{kind}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_python_blocks_run(path):
    source = "\n".join(blocks(path, "python"))
    exec(compile(source, str(path), "exec"), {"__name__": "docs"})


def test_there_are_docs():
    assert {path.stem for path in DOCS} >= {"adding_an_algorithm", "oracle", "reward_hacking"}


def configs():
    for path in TOLD:
        for text in blocks(path, "yaml"):
            if "algorithm:" in text and "stages:" not in text:
                yield pytest.param(
                    text, id=f"{path.stem}-{yaml.safe_load(text)['algorithm']['name']}"
                )


@pytest.mark.parametrize("text", [*configs()])
def test_configs_can_be_started(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    check(load(path))


def commands(path):
    """The words after ``jaxrlhf`` of each line of code that is no sketch."""
    text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
    fenced = re.findall(r"^```\n(.*?)^```", text, re.S | re.M)
    lines = re.findall(r"^ {4}(.*)$", text, re.M) + [
        x for part in fenced for x in part.splitlines()
    ]
    for line in lines:
        if (found := re.match(r"jaxrlhf (.*)", line)) and not re.search(r"[…\[|]|\.\.\.", line):
            yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_are_known(path):
    """Each command is one, and has the options that it is given."""
    known = {}
    for name, *words in commands(path):
        if name == "--version":
            continue
        assert name in cli.COMMANDS, f"jaxrlhf {name}"
        if name not in known:
            known[name] = set(options_of(cli.COMMANDS[name][1]))
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        if name in ("train", "plan") and words and (ROOT / words[0]).is_file():
            # Of this config and its algorithm; what only `plan` has is in its own help.
            own = known["plan"] if name == "plan" else set()
            given = changes(words[1:], own)
            load(ROOT / words[0], given)
            continue
        unknown = [x for x in options if x not in known[name] and "." not in x]
        assert unknown == [], f"jaxrlhf {name} {' '.join(words)}"


def changes(words, own):
    """The words that change the config: not the options of ``own``, nor their values."""
    kept, words = [], list(words)
    while words:
        word = words.pop(0)
        if word.partition("=")[0] in own:
            while "=" not in word and words and not words[0].startswith("--"):
                word = words.pop(0)
                break
            continue
        kept.append(word)
    return kept


def test_files_that_are_named_are_there():
    """Paths in backticks below the folders of the repository."""
    wrong = []
    for path in TOLD:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(
            r"`((?:configs|launch|docs|benchmarks|tests|jaxrlhf)/[\w./-]+)`", text
        ):
            if not (ROOT / name).exists():
                wrong.append(f"{path.name}: {name}")
    assert wrong == []


def test_the_reference_has_every_public_name():
    """Of functions and classes; modules have their parts there."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith(":::")}
    modules = {"algorithms", "config", "masked", "quartet", "__version__"}
    assert set(rl.__all__) - modules - listed == {"Model"}  # which is made by build


def test_the_site_is_built_without_a_warning(tmp_path):
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert "jaxrlhf.steps.iteration.make_iteration" in page


def test_tests_that_docs_name_are_there():
    tests = Path(__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS)
    named = re.findall(r"([\w/]+\.py)::(\w+)", text)
    assert len(named) > 50
    for file, name in named:
        assert f"def {name}(" in (tests / file).read_text(encoding="utf-8"), (file, name)
    for file in re.findall(r"tests/[\w/]+\.py", text):
        assert (tests.parent / file).is_file(), file

"""Commands from functions, and what the process of one is given."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
from command import run

from jaxrlhf.apps import shell


def test_typed_parses_by_the_signature():
    seen = []

    def command(run: str, tiny: bool = False, seed: int = 0) -> None:
        seen.append((run, tiny, seed))

    shell.typed(command)(["--run", "a", "--tiny", "--seed", "3"])
    assert seen == [("a", True, 3)]


def test_prepare_jax_sets_what_is_unset(monkeypatch):
    cache = str(shell.compile_cache())
    assert re.fullmatch(rf"{Path.home()}/\.cache/jaxrlhf/xla/[\d.]+-[0-9a-f]{{8}}", cache)
    monkeypatch.setattr(os, "environ", {"TF_CPP_MIN_LOG_LEVEL": "0"})
    shell.prepare_jax()
    assert os.environ == {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }


def test_only_a_process_of_its_own_is_settled():
    code = (
        "import gc, sys; from jaxrlhf.apps import cli;"
        "state = lambda: (round(sys.getswitchinterval(), 6), gc.get_threshold()[0]);"
        "before = state(); cli.main(['--help']); assert state() == before;"
        "sys.argv[1:] = ['--help']; cli.main(); print(*state())"
    )
    last = run(code=code).stdout.splitlines()[-1]
    assert last == f"{shell.TURN} {shell.YOUNG}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("word", "status"), [("--version", 0), ("no such command", 2)])
def test_a_thread_that_never_ends_holds_no_command_up(word, status):
    code = (
        "import sys, threading; from jaxrlhf.apps import cli, shell; shell.ENDING = 0.2;"
        "threading.Thread(target=threading.Event().wait, name='a save').start();"
        f"sys.argv[1:] = [{word!r}]; sys.exit(cli.main())"
    )
    done = run(code=code)
    assert done.returncode == status
    assert "still there: ['a save']" in done.stderr
    assert "Traceback" not in done.stderr


def test_prepare_jax_is_read_by_jax(tmp_path):
    code = (
        "from jaxrlhf.apps.shell import prepare_jax; prepare_jax();"
        "import jax; c = jax.config;"
        "print(c.jax_compilation_cache_dir, c.jax_persistent_cache_min_compile_time_secs,"
        " c.jax_persistent_cache_min_entry_size_bytes)"
    )
    assert run(code=code, JAX_COMPILATION_CACHE_DIR="/x").stdout == "/x 0.0 -1\n"


def test_importable_puts_folders_last_and_takes_them_away(tmp_path):
    """A file of the user's hides no library's."""
    (tmp_path / "json.py").write_text("")
    (tmp_path / "found_beside.py").write_text("here = True")
    before = list(sys.path)
    with shell.importable(tmp_path, "."):
        assert sys.path == [*before, str(tmp_path), os.getcwd()]
        assert importlib.import_module("found_beside").here
        assert importlib.util.find_spec("json").origin == json.__file__
    assert sys.path == before

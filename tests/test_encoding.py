"""Text files are UTF-8 whatever the locale says, and printing never fails for a letter."""

import ast
import dataclasses
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import yaml
from command import run

from jaxrlhf.apps.cli import main
from jaxrlhf.apps.shell import as_text, never_refuse
from jaxrlhf.config import EvalConfig, ModelConfig, dump
from jaxrlhf.core.errors import InputError

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    p for room in ("jaxrlhf", "benchmarks", "launch") for p in ROOT.glob(f"{room}/**/*.py")
)
ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TEXT_MODES = ("text", "universal_newlines")


def lacks_encoding(call):
    """Whether a call reads or writes text in whatever encoding the locale has."""
    function, given = call.func, {word.arg: word.value for word in call.keywords}
    if "encoding" in given:
        return False
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) < 2
    if any(isinstance(given.get(n), ast.Constant) and given[n].value for n in TEXT_MODES):
        return True
    if name in ("FileHandler", "RotatingFileHandler"):
        return True
    # open(path, mode), os.fdopen(number, mode), path.open(mode); temporary files are binary
    place = {"open": not isinstance(function, ast.Attribute), "fdopen": 1}.get(name)
    if place is not None:
        mode = given.get("mode", call.args[place] if len(call.args) > place else None)
        return mode is None or (isinstance(mode, ast.Constant) and "b" not in str(mode.value))
    if name in ("TemporaryFile", "NamedTemporaryFile"):
        mode = given.get("mode", call.args[0] if call.args else None)
        return isinstance(mode, ast.Constant) and "b" not in mode.value
    return False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_has_its_encoding_named(path):
    calls = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.Call)]
    assert not [f"{path}:{call.lineno}" for call in calls if lacks_encoding(call)]


@pytest.mark.parametrize(
    ("code", "lacks"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(x)", True),
        ("path.write_text(x, encoding='utf-8')", False),
        ("open(x)", True),
        ("open(x, 'a+')", True),
        ("open(x, 'rb')", False),
        ("path.open()", True),
        ("path.open('rb')", False),
        ("os.fdopen(3, 'w')", True),
        ("subprocess.run(x, text=True)", True),
        ("subprocess.run(x, encoding='utf-8')", False),
        ("tempfile.TemporaryFile(dir=x)", False),
        ("tempfile.NamedTemporaryFile('w')", True),
    ],
)
def test_lacks_encoding(code, lacks):
    assert lacks_encoding(ast.parse(code, mode="eval").body) == lacks


WORDS = "schön groß süß 😀 übel böse öde trüb the and"


@pytest.fixture(scope="module")
def german(tmp_path_factory):
    """The folder of a run of words that ASCII lacks, trained where the locale is C."""
    folder = tmp_path_factory.mktemp("german")
    words = WORDS.split()
    rows = [{"prompt": "the", "completion": f"{word} and {word}"} for word in words]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    config = runs.sft(folder, steps=2, eval=EvalConfig())
    config = replace(
        config,
        model=ModelConfig(decoder=runs.DECODER, tokenizer=f"words:{WORDS}"),
        data=replace(config.data, train=str(folder / "rows.jsonl")),
        output=str(folder / "run"),
    )
    # As people write it, and not with escapes.
    written = yaml.safe_dump(dataclasses.asdict(config), allow_unicode=True)
    path = folder / "größe.yaml"
    path.write_text(f"# für süße Wörter 😀\n{written}", encoding="utf-8")
    for said in ("trains", "nothing to do"):
        done = run("train", str(path), **ASCII)
        assert (done.returncode, "Error" in done.stderr) == (0, False), (said, done.stderr[-2000:])
    assert "nothing to do" in done.stdout
    return folder / "run"


def test_a_run_in_an_ascii_locale_reads_and_writes_utf8(german):
    example = (german / "example.txt").read_text(encoding="utf-8")
    assert any(word in example for word in WORDS.split()[:8])


@pytest.mark.parametrize("command", ["generate", "export", "diagnose"])
def test_commands_in_an_ascii_locale(command, german, tmp_path):
    words = {
        "generate": [str(german), "--prompt", "schön groß 😀", "--max-new-tokens", "12"],
        "export": [str(german), str(tmp_path / "exported")],
    }.get(command, [str(german)])
    done = run(command, *words, **ASCII)
    assert done.returncode == 0, done.stderr[-2000:]
    if command == "export":
        again = run("generate", words[1], "--prompt", "schön", "--max-new-tokens", "4", **ASCII)
        assert again.returncode == 0, again.stderr[-2000:]


def test_a_file_that_the_locale_cannot_name_is_a_line_of_error(tmp_path):
    path, deep = tmp_path / "run.yaml", tmp_path / ("a" * 70) / "größe"  # a path that is cut
    path.write_text(dump(runs.sft(tmp_path, output=str(deep))), encoding="utf-8")
    done = run("train", str(path), **ASCII)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "gr\\xf6\\xdfe" in last
    assert "the locale's encoding, ascii, has no such name of a file: set LC_ALL=C.UTF-8" in last


def test_never_refuse():
    held = io.BytesIO()
    stream = io.TextIOWrapper(held, encoding="ascii", errors="surrogateescape")
    never_refuse(stream)
    print("x → ü", file=stream, flush=True)
    assert held.getvalue() == b"x ? ?\n"


def test_as_text():
    assert as_text("grün 😀") == "grün 😀"
    hidden = "grün".encode().decode("ascii", "surrogateescape")
    assert as_text(hidden) == "grün"
    with pytest.raises(InputError, match="is not UTF-8"):
        as_text("gr\udcfcn")


def test_main_lets_other_encoding_errors_through(monkeypatch):
    def broken(words):
        "ü".encode("ascii")

    monkeypatch.setitem(sys.modules["jaxrlhf.apps.cli"].COMMANDS, "env", ("", broken))
    with pytest.raises(UnicodeEncodeError):
        main(["env"])

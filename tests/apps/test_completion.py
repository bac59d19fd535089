"""The scripts that a shell completes words by, asked in the shell itself."""

import shutil
import subprocess

import pytest
from command import tool

from jaxrlhf.apps import cli, completion
from jaxrlhf.core.errors import InputError

SMALL = {name: cli.COMMANDS[name] for name in ("train", "demo", "plan", "completion")}

ASK = """
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_jaxrlhf
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """A function of the words on the line: how the last one may go on."""
    path = tmp_path_factory.mktemp("completion") / "jaxrlhf"
    path.write_text(completion.script("bash", SMALL) + ASK, encoding="utf-8")

    def ask(*words):
        done = subprocess.run(
            ["bash", str(path), *words], capture_output=True, encoding="utf-8", check=True
        )
        assert done.stderr == ""
        return done.stdout.split()

    return ask


def test_bash_completes_commands_and_their_options(bash):
    assert bash("jaxrlhf", "") == list(SMALL)
    assert bash("jaxrlhf", "de") == ["demo"]
    assert bash("jaxrlhf", "demo", "--ti") == ["--tiny"]
    assert bash("jaxrlhf", "plan", "x.yaml", "--top") == ["--topology"]
    assert bash("jaxrlhf", "train", "--optim.learning") == ["--optim.learning-rate"]
    assert "--data.eval" in bash("jaxrlhf", "train", "x.yaml", "--data.")
    assert bash("jaxrlhf", "demo", "ti") == []  # a file, which readline finds


def test_scripts_pass_the_linter(tmp_path):
    path = tmp_path / "jaxrlhf.bash"
    path.write_text(completion.script("bash", SMALL), encoding="utf-8")
    done = subprocess.run(
        [tool("shellcheck"), "--shell=bash", str(path)], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script():
    text = completion.script("zsh", SMALL)
    done = subprocess.run(["zsh", "-n"], input=text, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_zsh_describes_commands():
    text = completion.script("zsh", {"a": ("it's: new", lambda words: print("-h, --help"))})
    assert "commands=('a:it'\\''s\\: new')" in text
    assert "a) options=(--help) ;;" in text


def test_the_script_is_for_a_known_shell():
    with pytest.raises(InputError, match="shell=fish: give bash or zsh"):
        completion.script("fish", SMALL)


def test_completion_prints_all_commands(capsys):
    assert cli.main(["completion", "bash"]) == 0
    out = capsys.readouterr().out
    assert " ".join(cli.COMMANDS) in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxrlhf {cli.__version__}\n"

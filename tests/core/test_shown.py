"""What is quoted of others stays short, and commands no terminal."""

import pytest

from jaxrlhf.apps import cli, generate
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import one_line, shown, visible

BAD = "a\x1b]0;title\x07b\x9bc\x7f\u202ed\r\n\te\u2028f\ud800"


def test_visible_leaves_no_character_that_commands():
    assert visible(BAD) == r"a\x1b]0;title\x07b\x9bc\x7f\u202ed   e f\ud800"
    assert visible(BAD, lines=True) == (
        "a\\x1b]0;title\\x07b\\x9bc\\x7f\\u202ed\\r\n\te\\u2028f\\ud800"
    )


def test_visible_leaves_text_as_it_is():
    text = "naïve 電影\u3000全 👩‍👩‍👧 می‌خواهم \\x1b"
    assert visible(text) == visible(text, lines=True) == text


def test_shown_is_the_repr_cut():
    for value in (3, -0.5, None, True, "it's", b"\xff", [1, ["a"]], {"a": {"b": []}}, (1,)):
        assert shown(value) == repr(value)
    assert shown("x" * 100, 10) == "'xxxxxxxx…"
    assert shown([[]] * 10**6, 10) == "[[], [], …"
    assert shown(10**5000) == "a number of 16610 bits"


def test_shown_writes_no_more_than_it_shows():
    """Each list stands twice in the next: all of it would be 2⁶⁰ characters, or have no end."""
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    assert len(shown(value)) == 60
    value.append(value)
    assert len(shown({"a": value})) == 60


def test_one_line_of_an_error():
    assert one_line(ValueError("a\nb")) == "a"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 10**6))) == 300


def test_input_error_is_one_line_that_commands_nothing():
    assert str(InputError(f"x.jsonl:1: {BAD}")).isprintable()
    long = str(InputError(f"x.jsonl:1: {'a' * 10**6}: mend it"))
    assert (long[:11], long[-9:], len(long)) == ("x.jsonl:1: ", ": mend it", 3999)


def test_generate_prints_what_a_model_says(monkeypatch, capsys):
    said = [[generate.Completed("first\n\x1b[2Jsecond", 0.5)]]
    monkeypatch.setattr(generate, "complete", lambda *_, **__: said)
    assert cli.main(["generate", "smollm2", "--prompt", "a", "--reward", "sentiment"]) == 0
    assert capsys.readouterr().out == "0.500\tfirst\n\\x1b[2Jsecond\n"


@pytest.mark.parametrize("key", ["\x1b[2J", "a\x9bb"])
def test_a_key_of_a_file_is_shown(key, tmp_path, capsys):
    path = tmp_path / "x.yaml"
    escaped = key.encode("unicode_escape").decode()
    path.write_text(f'"{escaped}": 1\n', encoding="utf-8")
    assert cli.main(["train", str(path)]) == 2
    assert escaped in (said := capsys.readouterr().err)
    assert said.removesuffix("\n").isprintable()

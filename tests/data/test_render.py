"""Templates of others are programs: they write the same in their own process, and end."""

import os
import time
from pathlib import Path

import pytest
from chats import CHAT_TEMPLATE, user

from jaxrlhf.core.errors import InputError
from jaxrlhf.data import render as rendering
from jaxrlhf.data.chat import Writer
from jaxrlhf.data.render import RenderError, is_known, render
from jaxrlhf.models.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
GIVEN = {"messages": [user("é 電 \ud800")], "tools": None, "add_generation_prompt": True}

HOSTILE = {
    "{{ 'x' * 10**9 }}": "it takes more than 256 MiB of memory",
    "{{ '%1000000000d' % 1 }}": "it takes more than 256 MiB of memory",
    "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}":
        "it takes more than 256 MiB of memory",
    "{% for i in range(30) %}{{ 'x' * 10**6 }}{% endfor %}": "it writes more than 16777",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages[5].content }}": "list object has no element 5",
    "{% if %}": "Expected an expression",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}": "maximum recursion depth",
}  # fmt: skip
"""Templates, and what is said of them."""


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_render_refuses(template):
    with pytest.raises(RenderError, match=HOSTILE[template]):
        render(template, template, GIVEN)


def test_render_ends_what_does_not_end(make_tokenizer):
    """By the time of the processor; the next chat has another process, and the error the row."""
    ranges = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    began = time.perf_counter()
    with pytest.raises(InputError, match=r"x:1: the chat template failed \(it takes more than 2 s"):
        Writer(make_tokenizer(ranges), "x:1").text([user("a")], open_turn=False)
    assert time.perf_counter() - began < 60
    text = Writer(make_tokenizer(CHAT_TEMPLATE), "x:1").text([user("a")], open_turn=False)
    assert text == "user : a <eos>\n"


def test_render_after_the_process_was_killed():
    assert render("a", "a", GIVEN) == ("a", [])
    process = rendering._worker()._process
    process.kill()
    process.wait()
    assert render("a", "a", GIVEN) == ("a", [])


def test_render_writes_the_same_in_both_places():
    text = (
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m | tojson }}{{ day }}"
        "{% endgeneration %}{% endfor %}{{ thing }}{{ tools is none }}"
    )
    given = {**GIVEN, "day": 5, "thing": object(), "extra": [1.5, True, None, {"a": "b"}]}
    assert not is_known(text)
    for spans in (False, True):
        here = rendering._rendered(text, given, spans)
        assert render(text, text, given, spans) == here
        assert len(here[1]) == int(spans)


def test_the_process_has_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    render("b", "b", GIVEN)
    known = Path(f"/proc/{rendering._worker()._process.pid}/environ")
    if known.exists():
        assert b"SECRET_TOKEN" not in known.read_bytes()
    assert "SECRET_TOKEN" in os.environ


def test_known_templates_are_those_that_were_tried(monkeypatch):
    monkeypatch.setattr(rendering, "_worker", None)  # no process is asked
    for folder in ("tests/data/chat_templates", "jaxrlhf/data/templates"):
        for path in (ROOT / folder).glob("*.jinja"):
            assert is_known(path.read_text(encoding="utf-8")), path
    template = load_tokenizer("smollm2").chat_template
    assert "\ud800" in render(template, template, GIVEN)[0]
    assert not is_known(template + "{{ 'x' * 10**9 }}")

"""Chat templates that write the day: a run has one, by whichever clock it goes on."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import jax
import pytest
from chats import CHAT_TEMPLATE, user
from runs import GOODNESS, WORDS, ppo, write

from jaxrlhf.apps import preferences
from jaxrlhf.config import Config, DataConfig, PreferencesConfig, SFTConfig, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.data import chat as chats_module
from jaxrlhf.data.chat import ChatSettings, chat_settings, dated, with_date
from jaxrlhf.data.formats import read_prompts
from jaxrlhf.data.rows import read_rows
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.run.loop import train
from jaxrlhf.run.speed import TIMED
from jaxrlhf.study import evaluate

TODAY = "{% for m in messages %}{{ m.content }} {% endfor %}{{ strftime_now('%d') }} "


@pytest.fixture
def clock(monkeypatch):
    """Sets the day."""

    def turn(day):
        class Fake(date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        monkeypatch.setattr(chats_module, "date", Fake)

    return turn


FORMATS = "%Y-%m-%d", "%d %b %Y", "%B %d, %Y", "%A, %d %B %Y %H:%M", "%-d/%-m/%y", "%j %a %p%I"


@pytest.mark.parametrize("where", ["", "{% macro m() %}", "{% if strftime_now is defined %}"])
def test_dated_writes_the_day_as_strftime_does(where, make_tokenizer):
    text = "  \n" + "{{ strftime_now(f) }}\n" * bool(not where)
    if "macro" in where:
        text = "  \n{% macro m() %}{{ strftime_now(f) }}{% endmacro %}{{ m() }}"
    if "if" in where:
        text = "  \n{% if strftime_now is defined %}{{ strftime_now(f) }}{% endif %}"
    for day in ("2024-02-29", "2026-11-03"):
        for form in FORMATS:
            options = {"tokenize": False, "f": form}
            tokenizer = make_tokenizer(dated(text, day))
            expected = make_tokenizer("  \n{{ f }}").apply_chat_template(
                [user("a")], tokenize=False, f=date.fromisoformat(day).strftime(form)
            )
            assert tokenizer.apply_chat_template([user("a")], **options).rstrip() == expected


def test_rows_have_the_settings_day(make_tokenizer, jsonl):
    rows = read_rows(jsonl({"prompt": [user("a")]}))
    day = ChatSettings(date="2026-01-31")
    assert read_prompts(rows, make_tokenizer(TODAY), chat=day).items[0].text == "a 31 "


def test_with_date_asks_only_where_the_template_does(make_tokenizer, clock, tmp_path):
    clock("2026-01-01")
    config = Config(algorithm=SFTConfig(), output=str(tmp_path / "run"))
    assert with_date(config, make_tokenizer(CHAT_TEMPLATE)) == config
    assert with_date(config, make_tokenizer()) == config
    assert with_date(config, make_tokenizer(TODAY)).data.date == "2026-01-01"
    several = {"default": CHAT_TEMPLATE, "tool_use": TODAY}
    assert with_date(config, make_tokenizer(several)).data.date == "2026-01-01"
    given = replace(config, data=DataConfig(date="2020-02-02"))
    assert with_date(given, make_tokenizer(TODAY)) == given
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data: {date: 2025-05-05}")
    assert with_date(config, make_tokenizer(TODAY)).data.date == "2025-05-05"
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE)
    own = replace(config, data=DataConfig(chat_template=str(template)))
    assert with_date(own, make_tokenizer(TODAY)) == own


def test_chat_settings_of_a_template_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"x\.jinja: no such file"):
        chat_settings(DataConfig(chat_template="x.jinja"))
    (tmp_path / "x.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"data\.chat_template=.*x\.jinja: cannot be read"):
        chat_settings(DataConfig(chat_template=str(tmp_path / "x.jinja")))


def lines(config):
    """What a run has written, but for how long it took."""
    return [
        {name: x for name, x in json.loads(line).items() if name not in TIMED}
        for file in ("metrics.jsonl", "samples.jsonl")
        for line in (Path(config.output) / file).read_text().splitlines()
    ]


def test_a_run_that_goes_on_the_day_after_is_the_same(clock, tmp_path, monkeypatch):
    words = WORDS.split()
    rows = [{"prompt": [user(f"{words[i % 14]} the")]} for i in range(16)]
    template = tmp_path / "today.jinja"
    template.write_text(TODAY)

    def run(name, *steps_and_days):
        config = ppo(tmp_path, rewards=(GOODNESS,), output=str(tmp_path / name))
        for steps, day in steps_and_days:
            clock(day)
            decoder = replace(config.model.decoder, vocab=18)
            tokenizer = f"words:{WORDS} 01 02"
            config = replace(
                config,
                model=replace(config.model, tokenizer=tokenizer, decoder=decoder),
                data=DataConfig(
                    train=write(tmp_path / "chats.jsonl", rows),
                    batch_size=8,
                    max_prompt_tokens=4,
                    chat_template=str(template),
                ),
                steps=steps,
            )
            train(config)
        return config

    whole = run("whole", (3, "2026-01-01"))
    parted = run("parted", (2, "2026-01-01"), (3, "2026-01-02"))
    assert load(f"{parted.output}/config.yaml").data.date == "2026-01-01"
    assert "the 01" in lines(whole)[-1]["prompt"]
    assert lines(parted) == lines(whole)
    # What is drawn from the run afterwards is asked as the run was.
    clock("2026-01-02")
    kept = load(f"{whole.output}/config.yaml")
    tokenizer = load_tokenizer(kept.model.tokenizer)
    asked = evaluate._prompts(kept.data.train, kept, tokenizer, 18, own=False)
    assert {tokenizer.decode(row.prompt)[-3:] for row in asked.items} == {" 01"}
    seen = []
    monkeypatch.setattr(preferences, "judged", lambda *given: seen.extend(given[3]) or ())
    pairs = PreferencesConfig(
        model=whole.output,
        judge="jaxrlhf.data.words:goodness",
        train=kept.data.train,
        eval=kept.data.train,
        max_prompt_tokens=4,
        max_new_tokens=2,
        n=2,
    )
    with pytest.raises(InputError, match="no pairs"):
        preferences.write_pairs(pairs, tmp_path, 0, make_mesh(kept.mesh, jax.devices()[:1]))
    assert {row.source.text[-4:] for row in seen} == {" 01 "}

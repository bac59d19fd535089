"""Conversations: what is written, what is remembered, and what is said of an answer."""

import io
import json

import pytest
import tiny_models

from jaxrlhf.apps import cli, generate
from jaxrlhf.apps import talk as talking
from jaxrlhf.apps.generate import complete
from jaxrlhf.apps.talk import converse, pieces
from jaxrlhf.config import RewardConfig, SampleConfig
from jaxrlhf.core.errors import InputError

TOKENIZER = tiny_models.byte_level()
SIZE = len(TOKENIZER)
DOT, EOS = (TOKENIZER.convert_tokens_to_ids(text) for text in (".", "<eos>"))
FEW = SampleConfig(n=1, max_new_tokens=4, temperature=0.0)
LONG = SampleConfig(n=1, max_new_tokens=40, temperature=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that says dots."""
    return tiny_models.rigged_folder(tmp_path_factory.mktemp("dots"), TOKENIZER, SIZE, always=DOT)


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """One that ends at once."""
    return tiny_models.rigged_folder(tmp_path_factory.mktemp("ends"), TOKENIZER, SIZE, always=EOS)


def talk(paths, lines, config=FEW, **options):
    out = io.StringIO()
    converse(paths, config, lines=lines, out=out, **options)
    return out.getvalue().splitlines()[1:]


def read_by(monkeypatch):
    """The texts that the models are asked with."""
    seen = []
    encode = generate.encode_prompt

    def kept(tokenizer, text, *rest):
        seen.append(text)
        return encode(tokenizer, text, *rest)

    monkeypatch.setattr(generate, "encode_prompt", kept)
    return seen


def test_converse_keeps_what_was_said(folder, monkeypatch):
    seen = read_by(monkeypatch)
    assert talk([folder], ["hi", "", "/system be good", "hi", "and"]) == ["....", "....", "...."]
    first = "<|user|>hi<|end|><|assistant|>"
    second = f"<|system|>be good<|end|>{first}"
    third = f"{second}....<|end|><|user|>and<|end|><|assistant|>"
    assert list(dict.fromkeys(seen)) == [first, second, third]


def test_converse_side_by_side_says_what_ended_at_once(folder, silent):
    found = talk([folder, silent], ["hi", "/quit", "never"])
    assert found == [f"[{folder}]", "....", f"[{silent}]", "(it ended at once)"]


def test_converse_forgets_what_does_not_fit(folder):
    """Of 256 tokens an answer has 124, so that two of them and their questions do not fit."""
    long, answer = SampleConfig(n=1, max_new_tokens=124, temperature=0.0), "." * 124
    found = talk([folder], ["hi", "again"], long)
    assert found == [answer, "(the first turn no longer fits, and is forgotten)", answer]
    (said,) = talk([folder], ["a" * 140], long)
    assert "ask for fewer" in said


def test_converse_keeps_all_where_a_message_does_not_fit(folder, monkeypatch):
    seen = read_by(monkeypatch)
    talk([folder], ["hi", "a" * 260, "and"])
    turn = "<|user|>{}<|end|><|assistant|>"
    assert seen[-1] == f"{turn.format('hi')}....<|end|>{turn.format('and')}"


def test_converse_judges_answers(folder, tmp_path, monkeypatch):
    (tmp_path / "judges.py").write_text(
        "def dots(prompts, completions):\n"
        "    return [completion[-1]['content'].count('.') for completion in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = RewardConfig(function="judges:dots")
    assert talk([folder], ["hi"], reward=reward) == ["....", "(reward 4.000)"]


def test_converse_refuses_a_model_without_a_template(tmp_path):
    plain = tiny_models.byte_level(template=None)
    path = tiny_models.rigged_folder(tmp_path / "plain", plain, SIZE, always=DOT)
    with pytest.raises(InputError, match="has no chat template: complete plain text"):
        talk([path], ["hi"])


def test_pieces_waits_for_whole_characters():
    ids = TOKENIZER.encode("né!")
    assert len(ids) == 4
    assert list(pieces(TOKENIZER, ids)) == ["n", "é", "!"]
    assert list(pieces(TOKENIZER, ids[:2])) == ["n", "\ufffd"]


def test_answer_writes_what_complete_gives(tmp_path, capsys):
    path = tiny_models.rigged_folder(tmp_path / "any", TOKENIZER, SIZE)
    config = SampleConfig(n=1, max_new_tokens=12)
    for seed in range(3):
        talking.answer(path, "hi", config, seed, chat=True)
        ((said,),) = complete(path, ["hi"], config, seed=seed, chat=True)
        written = capsys.readouterr().out
        assert written.rstrip("\n") == talking.visible(said.text, lines=True).rstrip("\n")


def test_complete_renders_what_is_said(folder, monkeypatch):
    seen = read_by(monkeypatch)
    rows = [{"role": "user", "content": "hi"}]
    for given, said in (("hi", True), ("hi", False)):
        complete(folder, [given], FEW, chat=said)
    complete(folder, [generate.Row({"prompt": rows}, "x:1")], FEW)
    turn = "<|user|>hi<|end|><|assistant|>"
    assert seen == [turn, "hi", turn]


def test_generate_reads_prompts_of_a_file(folder, silent, tmp_path, capsys):
    texts = tmp_path / "prompts.txt"
    texts.write_text("hi\n\nyou\n")
    rows = tmp_path / "prompts.jsonl"
    chats = [[{"role": "user", "content": x}] for x in ("hi", "you", "and")]
    rows.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in chats))
    for path, count in ((texts, 2), (rows, 3)):
        assert cli.main(["generate", folder, "--prompts", str(path), "--max-new-tokens", "3"]) == 0
        assert capsys.readouterr().out.splitlines() == ["..."] * count
    assert cli.main(["generate", silent, "--prompt", "hi"]) == 0
    assert capsys.readouterr().out == "(it ended at once)\n"
    texts.write_text("\n")
    assert cli.main(["generate", folder, "--prompts", str(texts)]) == 2
    assert "no line has a text" in capsys.readouterr().err
    assert cli.main(["generate", folder]) == 2
    assert "--prompt, --prompts: give" in capsys.readouterr().err


def test_chat_reads_standard_input(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert cli.main(["chat", folder, "--temperature", "0", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == ".."


def test_ctrl_c_ends_the_answer(folder, monkeypatch):
    def stopped(*_, **__):
        yield DOT
        raise KeyboardInterrupt

    monkeypatch.setattr(talking, "stream", stopped)
    assert talk([folder], ["hi"]) == [". (interrupted)"]


def test_converse_draws_each_turn_anew(tmp_path):
    path = tiny_models.rigged_folder(tmp_path / "any", TOKENIZER, SIZE)
    once = talk([path], ["hi"], LONG)
    assert talk([path], ["hi"], LONG) == once
    assert talk([path], ["hi", "/clear", "hi"], LONG) != once * 2

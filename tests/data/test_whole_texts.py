"""Ids of a row are those of the whole text, as a sampler's history has them, of four tokenizers."""

import unicodedata

import numpy as np
import pytest
import tiny_models
from chats import assistant, user
from tokenizers import normalizers

from jaxrlhf.data.formats import Completion, Pair, read_completions, read_prompts
from jaxrlhf.data.rows import Row, Rows
from jaxrlhf.data.text import decode_rollout, step_ends
from jaxrlhf.data.tokens import encode_prompt, encode_rows
from jaxrlhf.models.tokenizer import load_tokenizer

CHAT = [
    user("hello, who is he?"),
    assistant("good bye. yes: so\nhe says"),
    user(" go on"),
    assistant(" as he says, 42"),
    user("why?"),
    assistant("because good"),
]
TOKENIZERS = {name: make() for name, make in tiny_models.KINDS.items()}


def one(row):
    return Rows((row,), "rows.jsonl")


def encoded(tokenizer, row, **options):
    stop = [x for x in [tokenizer.convert_tokens_to_ids("<|end|>")] if x != tokenizer.unk_token_id]
    return encode_rows(one(row), tokenizer, 10**6, 10**4, stop, **options).items[0]


def by_template(tokenizer, chat, open_turn):
    """What transformers gives a sampler."""
    options = {"add_generation_prompt": open_turn, "return_dict": False}
    return tokenizer.apply_chat_template(chat, **options)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_sft_ids_are_the_samplers_history(name):
    """Three turns; what the sampler is given at each of them begins the row, id by id."""
    tokenizer = TOKENIZERS[name]
    record = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    row = read_completions(one(Row(record, "rows.jsonl:1")), tokenizer).items[0]
    found = encoded(tokenizer, row)
    ids = found.prompt + found.answers[0]
    whole = by_template(tokenizer, CHAT, False)
    assert ids == whole[: len(ids)]  # a line break after the last stop token is cut
    assert len(found.spans) == 3
    for turn, (start, end) in zip((1, 3, 5), found.spans, strict=True):
        history = by_template(tokenizer, CHAT[:turn], True)
        assert ids[: len(found.prompt) + start] == history
        text = tokenizer.decode(found.answers[0][start : end - 1]).replace(" ", "")
        assert text.replace("\n", "") == CHAT[turn]["content"].replace(" ", "").replace("\n", "")
        prompt = read_prompts(one(Row({"prompt": CHAT[:turn]}, "x:1")), tokenizer).items[0]
        assert encoded(tokenizer, prompt).prompt == history


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("so he is", (" good", " bye")),
        ("say: ", ("good", "hello you")),  # a space that the tokenizer would join to the word
        ("he goo", ("d bye", "ps")),  # within a word
        ("good.", ("\nyes", "\n\nno")),  # two characters that are one token
        ("go\n", ("  good", "on")),
        ("hello, ", ("ки 🔚", "42")),
    ],
)
def test_plain_rows_begin_with_their_prompt_and_spell_the_whole(name, prompt, answers):
    tokenizer = TOKENIZERS[name]
    found = encoded(tokenizer, Pair(prompt, *answers, 0.0, {}, "x:1"))
    assert found.prompt == encode_prompt(tokenizer, prompt, "x:1")
    for text, ids in zip(answers, found.answers, strict=True):
        both = found.prompt + ids[:-1]
        spelt = tokenizer.decode(both, skip_special_tokens=True)
        if name in ("byte-level", "sentencepiece"):
            assert spelt == prompt + text
        elif "ки" not in text:  # white space is not kept, and letters may be unknown
            assert "".join(spelt.split()) == "".join((prompt + text).split())


def test_an_answer_does_not_begin_as_a_text():
    """▁ in front of a text is a space: '▁g' for 'g' is another token than the sampler's."""
    tokenizer = TOKENIZERS["sentencepiece"]
    found = encoded(tokenizer, Completion("he is ", "good", {}, "x:1"))
    tokens = tokenizer.convert_ids_to_tokens(found.answers[0])
    assert tokens == ["g", "o", "o", "d", "</s>"]
    assert tokenizer.tokenize("good")[0] == "▁g"


BYTES_IN_A_TOKEN = [  # of a character whose bytes lie in several tokens, some beside a space
    ("hi ", "🔥🔥 good"),
    ("good ", "日本"),
    ("hello 🔚 ", "🔚.\n"),
]


@pytest.mark.parametrize(("prompt", "answer"), BYTES_IN_A_TOKEN)
def test_a_character_of_several_tokens_is_not_written_twice(prompt, answer):
    """SmolLM2 has a token for a space and the first two bytes of an emoji."""
    tokenizer = load_tokenizer("smollm2")
    found = encoded(tokenizer, Completion(prompt, answer, {}, "x:1"))
    assert tokenizer.decode(found.prompt) == prompt
    assert tokenizer.decode(found.answers[0][:-1]) == answer


@pytest.mark.parametrize(
    ("prompt", "answer"), [("he\u0301", "日本"), ("a", "\u0301s"), ("e", "\u0301")]
)
def test_letters_that_a_normalisation_joins_are_not_written_twice(prompt, answer):
    """Qwen's tokenizers read NFC; the offsets of what they join leave out its second half."""
    tokenizer = tiny_models.byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    found = encoded(tokenizer, Completion(prompt, answer, {}, "x:1"))
    assert tokenizer.decode(found.prompt) == unicodedata.normalize("NFC", prompt)
    assert tokenizer.decode(found.answers[0][:-1]) == answer


def test_bos_is_the_templates_in_a_chat_and_the_tokenizers_in_plain_text():
    tokenizer = tiny_models.byte_level(bos=True)
    bos = tokenizer.bos_token_id
    for prompt, first in (("hello", bos), ([user("hello")], tokenizer.encode("<|user|>")[1])):
        row = read_prompts(one(Row({"prompt": prompt}, "x:1")), tokenizer).items[0]
        assert encoded(tokenizer, row).prompt[0] == first
    template = "{{ bos_token }}" + tiny_models.CHATML
    tokenizer = tiny_models.byte_level(bos=True, template=template)
    row = read_prompts(one(Row({"prompt": [user("hello")]}, "x:1")), tokenizer).items[0]
    assert encoded(tokenizer, row).prompt[:2] == [bos, tokenizer.convert_tokens_to_ids("<|user|>")]


def test_a_special_token_keeps_the_white_space_that_it_takes_in():
    """Phi-3's <|end|> swallows the line break after it, in a row as in the sampler's history."""
    backend = tiny_models.byte_level().backend_tokenizer
    plain = '"content":"<|end|>","single_word":false,"lstrip":false,"rstrip":false'
    said = backend.to_str().replace(plain, plain.replace('"rstrip":false', '"rstrip":true'))
    assert said != backend.to_str()
    template = tiny_models.CHATML.replace("'<|end|>'", "'<|end|>\n'")
    names = {"eos_token": "<|end|>", "pad_token": "<pad>", "bos_token": "<bos>"}
    tokenizer = tiny_models.finish(type(backend).from_str(said), (), template, **names)
    record = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    row = read_completions(one(Row(record, "x:1")), tokenizer).items[0]
    found = encoded(tokenizer, row)
    assert found.prompt + found.answers[0] == by_template(tokenizer, CHAT, False)
    ends = [found.answers[0][end - 1] for _, end in found.spans]
    assert ends == [tokenizer.eos_token_id] * 3


def test_the_first_of_the_models_ends_closes_an_answer():
    """generation_config's eos may be the template's; what follows it is no answer's."""
    tokenizer = tiny_models.byte_level(template=tiny_models.CHATML.replace("<|end|>", "<|end|>\n"))
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<eos>"])
    row = read_completions(
        one(Row({"prompt": CHAT[:1], "completion": CHAT[1:2]}, "x:1")), tokenizer
    )
    assert encoded(tokenizer, row.items[0]).answers[0][-1] == end
    (unknown,) = encode_rows(row, tokenizer, 10**6, 10**4).items
    assert unknown.answers[0][-1] == eos
    text = "good<|end|>\n<eos>"
    found = encoded(tokenizer, Completion("so: ", text, {}, "x:1"))
    assert tokenizer.decode(found.answers[0]) == "good<|end|>"
    tokenizer.eos_token = None
    assert encoded(tokenizer, Completion("so: ", "good", {}, "x:1")).answers[0][-1] == end


def test_an_answer_that_a_string_ends_gets_no_stop_token():
    tokenizer = TOKENIZERS["byte-level"]
    for text, closed in (("good\n\n", False), ("good\n", True)):
        row = Completion("so: ", text, {}, "x:1")
        ids = encoded(tokenizer, row, strings=("\n\n", "END")).answers[0]
        assert (ids[-1] == tokenizer.eos_token_id) == closed


@pytest.mark.parametrize(
    ("name", "separator"),
    [
        *((name, x) for name in ("byte-level", "sentencepiece") for x in ("🔚", "ки", "。", "→")),
        ("sentencepiece", ". "),
        ("byte-level", ". "),
        ("byte-level", " and"),
        ("sentencepiece", " and"),
        ("unigram", " and"),
        ("byte-level", "<|tool|>"),  # a special token of the tokenizer
        ("byte-level", ".\n"),
    ],
)
def test_step_ends_of_separators_that_are_split_over_tokens(name, separator):
    tokenizer = TOKENIZERS[name]
    steps = ["a+b is 3", "so c is 4", "the answer: 7"]
    whole = separator.join(steps)
    ids = [*tokenizer.encode(whole, add_special_tokens=False), tokenizer.eos_token_id]
    ends = step_ends(ids, tokenizer, separator)
    assert len(ends) == 3
    assert ends[-1] == len(ids) - 1
    for count, end in zip((1, 2), ends, strict=False):
        wanted = "".join(step + separator for step in steps[:count])
        for last, there in ((end + 1, True), (end, False)):
            assert tokenizer.decode(ids[:last]).startswith(wanted) == there


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("text", [" as he says", "good", " 42."])
def test_decode_rollout_gives_what_prompt_and_answer_are_joined_of(name, text):
    """A decoder of SentencePiece drops the first space: 'whois' is another pair than 'who is'."""
    tokenizer, prompt = TOKENIZERS[name], "hello, who"
    found = encoded(tokenizer, Completion(prompt, text, {}, "x:1"))
    ids = np.array([found.prompt + found.answers[0]])
    mask_BT = (np.arange(ids.shape[1]) >= len(found.prompt))[None]
    assert decode_rollout(tokenizer, ids, mask_BT, [prompt]) == [text]
    kept = decode_rollout(tokenizer, ids, mask_BT, [prompt], np.array([True]))
    assert kept == [text]
    again = encoded(tokenizer, Completion(prompt, kept[0], {}, "x:1"))
    assert again.answers == found.answers


@pytest.mark.parametrize(("before", "text"), [("cafe", "\u0301 x"), ("\u1100", "\u1161z")])
def test_an_accent_is_not_lost_to_the_letter_before_it(before, text):
    """Qwen's tokenizers compose characters (NFC), across the border too."""
    tokenizer = tiny_models.byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    found = encoded(tokenizer, Completion(before, text, {}, "x:1"))
    assert found.prompt == encode_prompt(tokenizer, before, "x:1")
    assert tokenizer.decode(found.prompt + found.answers[0][:-1]) == before + text

"""Text to ids, with one stop token where a response ends; ids to padded arrays; the rows of a run
and the digest of what is learnt from them.

The tiny vocabulary: <eos> 0 (also padding), <bos> 1, <unk> 2, <stop> 3, … a 8, b 9, c 10, d 11."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import runs
from chats import assistant, user

from jaxrlhf.config import (
    AlgorithmConfig,
    OfflineConfig,
    PointwiseRewardModelConfig,
    RewardModelConfig,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.chat import Writer
from jaxrlhf.data.digest import contents
from jaxrlhf.data.formats import (
    READERS,
    Completion,
    Pair,
    Prompt,
    Ranked,
    Stepwise,
    read_completions,
    read_labelled,
    read_pairs,
    read_prompts,
    read_ranked,
    read_steps,
)
from jaxrlhf.data.rows import Rows, read_rows
from jaxrlhf.data.tokens import (
    Encoded,
    check_ids,
    encode_answer,
    encode_prompt,
    encode_rows,
    encode_turns,
    imitated,
    load_data,
    load_normalise_rows,
    pad_rows,
    prompt_arrays,
)
from jaxrlhf.data.turns import render
from jaxrlhf.models.tokenizer import load_tokenizer

EOS, BOS, STOP, A, B, C, D = 0, 1, 3, 8, 9, 10, 11
VOCAB = 16


def test_encode_prompt_adds_bos_once_if_the_tokenizer_does(make_tokenizer):
    adds = make_tokenizer(adds_bos=True, bos_token="<bos>")
    has = make_tokenizer(bos_token="<bos>")
    assert encode_prompt(adds, "a b", "x:1") == [BOS, A, B]
    assert encode_prompt(adds, "<bos> a", "x:1") == [BOS, A]
    assert encode_prompt(has, "a b", "x:1") == [A, B]
    assert encode_prompt(has, " ", "x:1") == [BOS]
    with pytest.raises(InputError, match="x:1: prompt ' ' has no token"):
        encode_prompt(make_tokenizer(), " ", "x:1")


@pytest.mark.parametrize(
    ("units", "text", "word"), [("words:a b", "b cat a", "cat"), ("chars:ab ", "b ca", "c")]
)
def test_encode_rows_names_a_word_that_is_not_in_the_vocabulary(units, text, word, jsonl):
    tokenizer = load_tokenizer(units)
    path = jsonl({"prompt": "a"}, {"prompt": text})
    rows = read_prompts(read_rows(path), tokenizer)
    with pytest.raises(InputError, match=f"{path}:2: '{word}' is not in the tokenizer's vocab"):
        encode_rows(rows, tokenizer, 5, 8)
    kept = encode_rows(rows, tokenizer, 5, 8, skip_bad_rows=True)
    assert (len(kept), len(kept.skipped)) == (1, 1)
    with pytest.raises(InputError, match=f"x:1: '{word}' is not in"):
        encode_answer(tokenizer, text, "x:1")
    with pytest.raises(InputError, match=f"x:1: '{word}' is not in"):
        encode_turns(tokenizer, ["a", text, "b"], "x:1")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a b", [A, B, EOS]),
        ("a b <eos>", [A, B, EOS]),
        ("a b <eos>\n", [A, B, EOS]),
        ("a <eos> <eos>", [A, EOS]),
        ("a <eos> b", [A, EOS, B, EOS]),
        ("<eos>", [EOS]),
        ("a <stop>", [A, STOP]),
    ],
)
def test_encode_answer_ends_in_one_stop_token(tokenizer, text, ids):
    assert encode_answer(tokenizer, text, "x:1", stop=(STOP,)) == ids


def test_encode_answer_cut_off_carries_none(tokenizer, make_tokenizer):
    assert encode_answer(tokenizer, "a b", "x:1", ended=False) == [A, B]
    for end in ("<eos>", "<eos> \n", "<stop> <eos>", "<stop>\n"):  # of the chat template
        assert encode_answer(tokenizer, f"a b {end}", "x:1", (STOP,), ended=False) == [A, B]
    text = "a <eos> b"  # one in the middle is the answer's own
    assert encode_answer(tokenizer, text, "x:1", ended=False) == [A, EOS, B]
    with pytest.raises(InputError, match="x:1: answer '<eos>' has no token"):
        encode_answer(tokenizer, "<eos>", "x:1", ended=False)
    with pytest.raises(InputError, match="x:1: answer '' has no token"):
        encode_answer(tokenizer, "", "x:1")
    bare = make_tokenizer(eos_token=None, pad_token=None)  # it has none to carry
    assert encode_answer(bare, "a b", "x:1") == [A, B]


def test_encode_turns_trains_up_to_each_stop_token(tokenizer):
    """Between a turn's end and the next header: the template's line break, and the question."""
    pieces = ("a <stop> \n", "user : b <eos>\nassistant : ", "c <eos>\n")
    ids, spans = encode_turns(tokenizer, pieces, "x:1", stop=(STOP,))
    user, assistant, colon = tokenizer.convert_tokens_to_ids(["user", "assistant", ":"])
    assert ids == [A, STOP, user, colon, B, EOS, assistant, colon, C, EOS]
    assert spans == ((0, 2), (8, 10))
    ids, spans = encode_turns(tokenizer, ("a <eos> b", "c", "c"), "x:1", ended=False)
    assert ids == [A, EOS, B, C, C]  # no turn ends in a stop token, and none is added
    assert spans == ((0, 3), (4, 5))
    ids, spans = encode_turns(tokenizer, ("a <eos> \n", "b", "c <eos>\n"), "x:1", ended=False)
    assert ids == [A, EOS, B, C]  # only the last turn was cut off
    assert spans == ((0, 2), (3, 4))


def test_imitated_marks_completions_and_spans():
    source = Completion("", "", {}, "x:1")
    assert imitated(Encoded([A, B], ([C, EOS],), source)).tolist() == [False, False, True, True]
    part = Encoded([A], ([B, C, EOS, B],), source, spans=((0, 1), (3, 4)))
    assert imitated(part).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("chat", [False, True])
def test_encode_rows_training_row_is_what_the_sampler_finishes(chat, chat_tokenizer, jsonl):
    """A reward model trained with the stop token and scored without it (or the reverse) loses
    accuracy without a word: ids of both paths must be equal."""
    prompt, answer, other = "c", "a b", "b"
    if chat:
        prompt, answer, other = [user(prompt)], [assistant(answer)], [assistant(other)]
    path = jsonl({"prompt": prompt, "chosen": answer, "rejected": other, "completion": answer})
    text, _ = render(Writer(chat_tokenizer, ""), prompt, ())
    sampled = [*encode_prompt(chat_tokenizer, text, ""), A, B, EOS]
    for read in (read_pairs, read_completions, read_prompts):
        rows = read(read_rows(path), chat_tokenizer)
        (row,) = encode_rows(rows, chat_tokenizer, VOCAB, limit=20).items
        answers = row.answers or ([A, B, EOS],)  # a prompt's would be sampled
        assert row.prompt + answers[0] == sampled


def test_encode_rows_too_long_names_place_length_limit_and_remedy(tokenizer):
    prompts = Rows((Prompt("a b c", {}, "x:7"),), "x")
    assert encode_rows(prompts, tokenizer, VOCAB, 3).items[0].prompt == [A, B, C]
    message = "x:7: 3 tokens, and data.max_prompt_tokens is 2; raise it, .* data.skip_bad_rows"
    with pytest.raises(InputError, match=message):
        encode_rows(prompts, tokenizer, VOCAB, 2)
    prompts = Rows((*prompts.items, Prompt("b", {}, "x:8")), "x", ("x:0: earlier",))
    rows = encode_rows(prompts, tokenizer, VOCAB, 2, skip_bad_rows=True)
    assert [row.prompt for row in rows.items] == [[B]]
    assert [line.partition(" tokens")[0] for line in rows.skipped] == ["x:0: earlier", "x:7: 3"]
    pairs = Rows((Pair("a", "b", "b c", 0.0, {}, "x:1"),), "x")
    assert len(encode_rows(pairs, tokenizer, VOCAB, 4)) == 1  # prompt, longest answer and its end
    with pytest.raises(InputError, match=r"x:1: 4 tokens, and data\.max_tokens is 3"):
        encode_rows(pairs, tokenizer, VOCAB, 3)


@pytest.mark.parametrize("read", [read_completions, read_labelled, read_pairs])
def test_encode_rows_parquet_null_flag_is_absent(read, tokenizer, parquet):
    row, flag = {"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen_ended"
    if read is read_completions:
        row, flag = {"prompt": "a", "completion": "b"}, "ended"
    path = parquet(*({**row, flag: value} for value in (None, False, True)))
    found = encode_rows(read(read_rows(path), tokenizer), tokenizer, VOCAB, 9).items
    ids = [row.answers[0] for row in found if row.answers[0][0] == B]
    assert ids == [[B, EOS], [B], [B, EOS]]


def test_encode_rows_rankings_and_steps(tokenizer, jsonl):
    ranked = {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1.5, 2]}
    rows = read_ranked(read_rows(jsonl({**ranked, "ended": [True, False, True]})), tokenizer)
    (row,) = encode_rows(rows, tokenizer, VOCAB, 3).items
    assert (row.prompt, row.answers) == ([A], ([B, EOS], [C], [D, EOS]))
    with pytest.raises(InputError, match=r"rows.jsonl:1: 3 tokens, and data.max_tokens is 2"):
        encode_rows(rows, tokenizer, VOCAB, 2)
    steps = [{"prompt": "a", "steps": x, "labels": [1, 0]} for x in (["b c ", " d "], ["b c", "d"])]
    whole, glued = (read_steps(read_rows(jsonl(x)), tokenizer, separator="e") for x in steps)
    assert encode_rows(whole, tokenizer, VOCAB, 9).items[0].ends == (2, 4)
    with pytest.raises(InputError, match="2 labels, and in its tokens the separator 'e' ends 1"):
        encode_rows(glued, tokenizer, VOCAB, 9)


def test_encode_rows_same_tokens_in_chosen_and_rejected(tokenizer):
    rows = Rows((Pair("a", "q", "z", 0.0, {}, "x:1"),), "x")  # both <unk>
    with pytest.raises(InputError, match="x:1: chosen and rejected have the same tokens"):
        encode_rows(rows, tokenizer, VOCAB, 9)


def test_encode_rows_id_outside_the_vocabulary_is_never_skipped(tokenizer):
    rows = Rows((Completion("a", "c", {}, "x:3"), Completion("a", "b", {}, "x:4")), "x")
    with pytest.raises(InputError, match=r"x:3: token 0 has id 10, outside .* of 10"):
        encode_rows(rows, tokenizer, 10, 9, skip_bad_rows=True)
    check_ids([0, 4], 5, "x:1")
    check_ids([], 5, "x:1")
    for ids, at in (([0, 5], 1), ([-1], 0)):
        with pytest.raises(InputError, match=f"x:1: token {at} has id {ids[at]}, outside"):
            check_ids(ids, 5, "x:1")


def test_pad_rows_by_hand():
    token_BT, mask_BT = pad_rows([[A, EOS], [A, B, C]], 3, 7, ["x:1", "x:2"])
    np.testing.assert_array_equal(token_BT, [[A, EOS, 7], [A, B, C]])
    np.testing.assert_array_equal(mask_BT, [[1, 1, 0], [1, 1, 1]])
    assert token_BT.dtype == mask_BT.dtype == np.int32
    with pytest.raises(InputError, match=r"x:2: 3 tokens, and data\.max_tokens is 2"):
        pad_rows([[A], [A, B, C]], 2, EOS, ["x:1", "x:2"])


def test_prompt_arrays_pad_left():
    """Padding may share the id of a token inside."""
    prompts = [Encoded(ids, (), Prompt("", {}, f"x:{len(ids)}")) for ids in ([A], [EOS, B, EOS])]
    token_QP, mask_QP = prompt_arrays(prompts, 3, EOS)
    np.testing.assert_array_equal(token_QP, [[EOS, EOS, A], [EOS, B, EOS]])
    np.testing.assert_array_equal(mask_QP, [[0, 0, 1], [1, 1, 1]])
    assert token_QP.dtype == mask_QP.dtype == np.int32
    with pytest.raises(InputError, match=r"x:3: 3 tokens, and data\.max_prompt_tokens is 2"):
        prompt_arrays(prompts, 2, EOS)


TOKENIZER = load_tokenizer(f"words:{runs.WORDS}")


def test_every_kind_of_rows_has_a_reader():
    kinds = [kind for kind in get_args(AlgorithmConfig) if issubclass(kind, OfflineConfig)]
    assert {kind.rows for kind in kinds} == READERS.keys()


@pytest.mark.parametrize(
    ("name", "answers"),
    [("listwise", [2, 3, 4]), ("pointwise", [1, 1, 1]), ("process", [1, 1, 1])],
)
def test_load_data_reads_rows_for_reward_models(name, answers, tmp_path):
    config = runs.of(f"{name}_reward_model", tmp_path)
    rows = load_data(config, config.data.train, TOKENIZER, 16).items
    assert [len(row.answers) for row in rows[:3]] == answers
    if name == "process":  # its separator is read
        assert [len(row.ends) for row in rows[:2]] == [1, 2]


def test_load_data_tells_a_classifier_that_scores_are_probabilities(tmp_path):
    config = runs.of("pointwise_reward_model", tmp_path)
    row = {"prompt": "the", "completion": "good", "score": 2.0}
    path = runs.write(tmp_path / "rows.jsonl", [row])
    assert len(load_data(config, path, TOKENIZER, 16)) == 1
    config = replace(config, algorithm=PointwiseRewardModelConfig(kind="binary"))
    with pytest.raises(InputError, match=r"rows.jsonl:1: score=2: a probability is in"):
        load_data(config, path, TOKENIZER, 16)


def test_load_normalise_rows_takes_the_first_128(tmp_path):
    words = runs.WORDS.split()
    rows = [{"prompt": words[i % 14], "completion": words[(i + 1) % 14]} for i in range(130)]
    path = runs.write(tmp_path / "samples.jsonl", rows)
    config = runs.reward_model(tmp_path, algorithm=RewardModelConfig(normalise_on=path))
    found = load_normalise_rows(config, TOKENIZER, 16)
    assert [row.source.prompt for row in found.items] == [row["prompt"] for row in rows[:128]]
    for config in (runs.sft(tmp_path), runs.of("process_reward_model", tmp_path)):  # no scores
        assert config.algorithm.normalise_on == ""


PROMPT = Encoded([8, 9], (), Prompt("", {"answer": 3, "id": None}, "x:1"))
COMPLETION = Encoded([8], ([9, 0],), Completion("", "", {"score": 1.0, "label": True}, "x:1"))
PAIR = Encoded([8], ([9], [10, 0]), Pair("", "", "", 0.5, {}, "x:1"))
RANKED = Encoded([8], ([9], [10, 0]), Ranked("", ("", ""), (1, 2), (True, True), {}, "x:1"))
STEPS = Encoded([8], ([9, 0],), Stepwise("", "", " ", (1.0, 0.5), {}, "x:1"), ends=(0, 1))


def said(row, **changes):
    return replace(row, source=replace(row.source, **changes))


@pytest.mark.parametrize(
    ("row", "other"),
    [
        (PROMPT, replace(PROMPT, prompt=[8, 10])),
        (PROMPT, said(PROMPT, columns={"answer": 4})),
        (COMPLETION, replace(COMPLETION, prompt=[8, 9], answers=([0],))),
        (COMPLETION, replace(COMPLETION, spans=((0, 1),))),
        (COMPLETION, said(COMPLETION, columns={"score": 0.0, "label": True})),
        (COMPLETION, said(COMPLETION, columns={"score": 1.0, "label": False})),
        (PAIR, replace(PAIR, answers=([9, 10], [0]))),
        (PAIR, replace(PAIR, answers=PAIR.answers[::-1])),
        (PAIR, said(PAIR, margin=0.0)),
        (RANKED, said(RANKED, ranks=(2, 1))),
        (STEPS, said(STEPS, labels=(0.0, 0.5))),
        (STEPS, replace(STEPS, ends=(1,))),
    ],
)
def test_contents_of_another_row_differ(row, other):
    assert contents([row]) != contents([other])
    assert contents([row, other]) != contents([other, row])


@pytest.mark.parametrize("row", [PROMPT, COMPLETION, PAIR, RANKED, STEPS])
def test_contents_leave_out_what_is_not_learnt_from(row):
    assert contents([row]) == contents([said(row, where="y:2")])
    if row is not PROMPT:
        assert contents([row]) == contents([said(row, columns={**row.source.columns, "id": 1})])


def test_contents_do_not_depend_on_the_format(tokenizer, jsonl, parquet):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0}
    first, second = (
        encode_rows(read_pairs(read_rows(file(row)), tokenizer), tokenizer, VOCAB, 9).items
        for file in (jsonl, parquet)
    )
    assert contents(first) == contents(second)

"""The tiny vocabulary: <eos> 0 (also padding), <bos> 1, <unk> 2, <stop> 3, … a 8, b 9, c 10."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.batches import preference_batch, token_batch
from jaxrlhf.data.chat import render
from jaxrlhf.data.formats import (
    Completion,
    Pair,
    Prompt,
    read_completions,
    read_labelled,
    read_pairs,
    read_prompts,
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
    prompt_arrays,
)
from jaxrlhf.models.tokenizer import load_tokenizer

EOS, BOS, STOP, A, B, C = 0, 1, 3, 8, 9, 10
VOCAB = 16


def completion(prompt, answer):
    return Encoded(prompt, (answer,), Completion("", "", {}, "x:1"))


def pair(prompt, chosen, rejected, margin=0.0):
    return Encoded(prompt, (chosen, rejected), Pair("", "", "", margin, {}, "x:1"))


def test_encode_prompt_adds_bos_once_if_the_tokenizer_does(make_tokenizer):
    adds = make_tokenizer(adds_bos=True, bos_token="<bos>")
    has = make_tokenizer(bos_token="<bos>")
    assert encode_prompt(adds, "a b", "x:1") == [BOS, A, B]
    assert encode_prompt(adds, "<bos> a", "x:1") == [BOS, A]
    assert encode_prompt(has, "a b", "x:1") == [A, B]


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


def test_encode_prompt_without_tokens(make_tokenizer, tokenizer):
    assert encode_prompt(make_tokenizer(bos_token="<bos>"), " ", "x:1") == [BOS]
    with pytest.raises(InputError, match="x:1: prompt ' ' has no token"):
        encode_prompt(tokenizer, " ", "x:1")


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


def test_encode_answer_cut_off_carries_none(tokenizer):
    assert encode_answer(tokenizer, "a b", "x:1", ended=False) == [A, B]
    for end in ("<eos>", "<eos> \n", "<stop> <eos>", "<stop>\n"):  # of the chat template
        assert encode_answer(tokenizer, f"a b {end}", "x:1", (STOP,), ended=False) == [A, B]
    text = "a <eos> b"  # one in the middle is the answer's own
    assert encode_answer(tokenizer, text, "x:1", ended=False) == [A, EOS, B]
    with pytest.raises(InputError, match="x:1: answer '<eos>' has no token"):
        encode_answer(tokenizer, "<eos>", "x:1", ended=False)


def test_encode_answer_without_eos_in_the_tokenizer(make_tokenizer):
    bare = make_tokenizer(eos_token=None, pad_token=None)
    assert encode_answer(bare, "a b", "x:1") == [A, B]


def test_encode_answer_empty(tokenizer):
    with pytest.raises(InputError, match="x:1: answer '' has no token"):
        encode_answer(tokenizer, "", "x:1")


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
    whole, part = completion([A, B], [C, EOS]), completion([A], [B, C, EOS, B])
    assert imitated(whole).tolist() == [False, False, True, True]
    part = replace(part, spans=((0, 1), (3, 4)))
    assert imitated(part).tolist() == [False, True, False, False, True]
    batch = token_batch([whole, part], 5, pad=EOS)
    np.testing.assert_array_equal(batch.weight_BT != 0, [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]])


@pytest.mark.parametrize("chat", [False, True])
def test_encode_rows_training_row_is_what_the_sampler_finishes(chat, chat_tokenizer, jsonl):
    """A reward model trained with the stop token and scored without it (or the reverse) loses
    accuracy without a word: ids of both paths must be equal."""
    prompt = [{"role": "user", "content": "c"}] if chat else "c"
    answer = [{"role": "assistant", "content": "a b"}] if chat else "a b"
    other = [{"role": "assistant", "content": "b"}] if chat else "b"
    path = jsonl({"prompt": prompt, "chosen": answer, "rejected": other, "completion": answer})
    text, _ = render(chat_tokenizer, prompt, (), "")
    sampled = [*encode_prompt(chat_tokenizer, text, ""), A, B, EOS]
    for read in (read_pairs, read_completions):
        rows = read(read_rows(path), chat_tokenizer)
        (row,) = encode_rows(rows, chat_tokenizer, VOCAB, limit=20).items
        assert row.prompt + row.answers[0] == sampled
    (row,) = encode_rows(
        read_prompts(read_rows(path), chat_tokenizer), chat_tokenizer, 16, 20
    ).items
    assert row.prompt == sampled[:-3]


def test_encode_rows_too_long_names_place_length_limit_and_remedy(tokenizer):
    prompts = Rows((Prompt("a b c", {}, "x:7"),), "x")
    assert encode_rows(prompts, tokenizer, VOCAB, 3).items[0].prompt == [A, B, C]
    message = "x:7: 3 tokens, and data.max_prompt_tokens is 2; raise it, .* data.skip_bad_rows"
    with pytest.raises(InputError, match=message):
        encode_rows(prompts, tokenizer, VOCAB, 2)


def test_encode_rows_length_counts_prompt_longest_answer_and_eos(tokenizer):
    rows = Rows((Pair("a", "b", "b c", 0.0, {}, "x:1"),), "x")
    assert len(encode_rows(rows, tokenizer, VOCAB, 4)) == 1
    with pytest.raises(InputError, match=r"x:1: 4 tokens, and data\.max_tokens is 3"):
        encode_rows(rows, tokenizer, VOCAB, 3)


def test_encode_rows_skips_and_counts(tokenizer):
    prompts = Rows((Prompt("a b c", {}, "x:1"), Prompt("b", {}, "x:2")), "x", ("x:0: earlier",))
    rows = encode_rows(prompts, tokenizer, VOCAB, 2, skip_bad_rows=True)
    assert [row.prompt for row in rows.items] == [[B]]
    assert len(rows.skipped) == 2
    assert rows.skipped[1].startswith("x:1: 3 tokens")


@pytest.mark.parametrize("read", [read_completions, read_labelled, read_pairs])
def test_encode_rows_parquet_null_flag_is_absent(read, tokenizer, tmp_path):
    path = str(tmp_path / "rows.parquet")
    if read is read_completions:
        row, flag = {"prompt": "a", "completion": "b"}, "ended"
    else:
        row, flag = {"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen_ended"
    rows = [{**row, flag: value} for value in (None, False, True)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = encode_rows(read(read_rows(path), tokenizer), tokenizer, VOCAB, 9).items
    ids = [row.answers[0] for row in found if row.answers[0][0] == B]
    assert ids == [[B, 0], [B], [B, 0]]


def test_encode_rows_same_tokens_in_chosen_and_rejected(tokenizer):
    rows = Rows((Pair("a", "q", "z", 0.0, {}, "x:1"),), "x")  # both <unk>
    with pytest.raises(InputError, match="x:1: chosen and rejected have the same tokens"):
        encode_rows(rows, tokenizer, VOCAB, 9)


def test_encode_rows_id_outside_the_vocabulary_is_never_skipped(tokenizer):
    rows = Rows((Completion("a", "c", {}, "x:3"), Completion("a", "b", {}, "x:4")), "x")
    with pytest.raises(InputError, match=r"x:3: token 0 has id 10, outside .* of 10"):
        encode_rows(rows, tokenizer, 10, 9, skip_bad_rows=True)


def test_check_ids_edges():
    check_ids([0, 4], 5, "x:1")
    check_ids([], 5, "x:1")
    with pytest.raises(InputError, match="x:1: token 1 has id 5, outside"):
        check_ids([0, 5], 5, "x:1")
    with pytest.raises(InputError, match="x:1: token 0 has id -1, outside"):
        check_ids([-1], 5, "x:1")


def test_prompt_arrays_pads_left():
    rows = [Encoded([A], (), Prompt("", {}, "x:1")), Encoded([B, C], (), Prompt("", {}, "x:2"))]
    token_QP, mask_QP = prompt_arrays(rows, 2, 7)
    np.testing.assert_array_equal(token_QP, [[7, A], [B, C]])
    np.testing.assert_array_equal(mask_QP, [[0, 1], [1, 1]])


def test_token_batch_weighs_completions_with_their_eos():
    """Padding has the id of end-of-sequence: a mask from ids would lose the answer's end."""
    batch = token_batch([completion([A, B], [C, EOS]), completion([A], [EOS])], 5, pad=EOS)
    np.testing.assert_array_equal(batch.token_BT, [[A, B, C, EOS, EOS], [A, EOS, EOS, EOS, EOS]])
    np.testing.assert_array_equal(batch.attention_mask_BT, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    expected = np.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]) / 3
    np.testing.assert_allclose(batch.weight_BT, expected, rtol=1e-6)
    assert batch.weight_BT.dtype == np.float32


def test_token_batch_rows_that_only_fill_weigh_nothing():
    rows = [completion([A, B], [C, EOS]), completion([A], [EOS])]
    batch = token_batch(rows, 4, EOS, np.array([True, False]))
    np.testing.assert_allclose(batch.weight_BT, [[0, 0, 0.5, 0.5], [0, 0, 0, 0]])
    assert batch.attention_mask_BT[1].sum() == 2
    nothing = token_batch(rows, 4, EOS, np.array([False, False]))
    np.testing.assert_array_equal(nothing.weight_BT, 0)


def test_token_batch_weights_are_those_of_masked():
    rows = [completion([A] * i, [B] * (7 - i)) for i in range(1, 7)]
    batch = token_batch(rows, 8, EOS)
    expected = masked.weights(jnp.asarray(batch.weight_BT != 0))
    np.testing.assert_array_equal(batch.weight_BT, expected)


def test_preference_batch_by_hand():
    rows = [pair([A], [B, EOS], [C, C, EOS], 0.7), pair([A, B], [C], [EOS])]
    batch = preference_batch(rows, 4, pad=EOS, real_B=np.array([True, False]))
    np.testing.assert_array_equal(
        batch.token_BCT,
        [[[A, B, EOS, EOS], [A, C, C, EOS]], [[A, B, C, EOS], [A, B, EOS, EOS]]],
    )
    np.testing.assert_array_equal(
        batch.attention_mask_BCT,
        [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 0]]],
    )
    np.testing.assert_allclose(batch.margin_B, [0.7, 0])  # whole numbers would lose it
    np.testing.assert_array_equal(batch.weight_B, [1, 0])
    assert batch.token_BCT.dtype == np.int32
    assert batch.margin_B.dtype == batch.weight_B.dtype == np.float32


def test_preference_batch_weights_are_means():
    batch = preference_batch([pair([A], [B], [C])] * 4, 3, EOS)
    np.testing.assert_array_equal(batch.weight_B, [0.25] * 4)

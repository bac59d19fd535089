"""Labelled answers: read alone or out of pairs, and batched beside an answer to another prompt."""

import json

import numpy as np
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.batches import (
    judged_batch,
    labelled_batch,
    preference_batch,
    ranked_batch,
    scored_batch,
    steps_batch,
)
from jaxrlhf.data.formats import (
    read_completions,
    read_labelled,
    read_pairs,
    read_ranked,
    read_scored,
    read_steps,
)
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows
from jaxrlhf.models.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("words:a b c d e f g")


def rows(folder, *lines, skip=False):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = read_labelled(read_rows(str(path), skip), TOKENIZER, skip)
    return encode_rows(read, TOKENIZER, 16, 8, (), skip)


def test_read_labelled_alone_and_out_of_pairs(tmp_path):
    pair = {"prompt": "a", "chosen": "b c", "rejected": "d", "rejected_ended": False}
    alone = {"prompt": "e", "completion": "f", "label": True, "chosen": None, "rejected": None}
    found = rows(tmp_path, pair, alone).items
    assert [row.source.columns["label"] for row in found] == [True, False, True]
    words = [TOKENIZER.decode(row.answers[0]).split() for row in found]
    assert [w[:2] for w in words] == [["b", "c"], ["d"], ["f", words[2][1]]]
    assert words[0][-1] == words[2][-1] == TOKENIZER.eos_token  # not after a cut answer


@pytest.mark.parametrize("label", [None, 1, "yes"])
def test_read_labelled_wants_true_or_false(label, tmp_path):
    with pytest.raises(InputError, match=r"rows.jsonl:1: label=.*: give true or false"):
        rows(tmp_path, {"prompt": "a", "completion": "b", "label": label})


def test_read_labelled_skips_pairs_whole(tmp_path):
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    good = {"prompt": "a", "completion": "b", "label": False}
    found = rows(tmp_path, same, good, skip=True)
    assert len(found.items) == 1
    assert len(found.skipped) == 1


def test_labelled_batch_pairs_with_another_prompt(tmp_path):
    pair = {"prompt": "a", "chosen": "b c", "rejected": "d"}
    alone = {"prompt": "e a", "completion": "f g f g", "label": True}
    found = rows(tmp_path, pair, alone).items
    batch = labelled_batch(found, 8, 0, np.array([True, True, False]))
    ids = {word: TOKENIZER.convert_tokens_to_ids(word) for word in "abcdefg"}
    own, other = batch.token_BCT[:, 0], batch.token_BCT[:, 1]
    assert own[0, :3].tolist() == [ids["a"], ids["b"], ids["c"]]
    assert other[0, :5].tolist() == [ids[w] for w in "afgfg"]  # not d, its own prompt's
    assert other[1, :5].tolist() == [ids[w] for w in "afgfg"]
    assert other[2, :4].tolist() == [ids[w] for w in "eabc"]
    np.testing.assert_array_equal(batch.label_B, [1, 0, 1])
    np.testing.assert_array_equal(batch.weight_B, [0.5, 0.5, 0])
    np.testing.assert_array_equal(batch.mask_BCT[0, 0], [0, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.mask_BCT[2, 1], [0, 0, 1, 1, 1, 0, 0, 0])


def test_labelled_batch_of_one_prompt(tmp_path):
    found = rows(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}).items
    with pytest.raises(InputError, match=r"rows.jsonl:1: a batch of labelled rows needs two prom"):
        labelled_batch(found, 8, 0)
    assert judged_batch(found, 8, 0).token_BCT.shape == (2, 1, 8)


def test_preference_batch_masks_answers_alone(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a b", "chosen": "c", "rejected": "d e"}) + "\n")
    from_file = read_rows(str(path))
    found = encode_rows(read_pairs(from_file, TOKENIZER), TOKENIZER, 16, 8).items
    batch = preference_batch(found, 6, 0)
    np.testing.assert_array_equal(batch.mask_BCT[0], [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]])


def encoded(folder, read, *lines, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = read(read_rows(str(path)), TOKENIZER, **options)
    return encode_rows(read, TOKENIZER, 16, 8).items


def test_ranked_batch_fills_short_rows_with_their_first_response(tmp_path):
    three = {"prompt": "a", "responses": ["b", "c", "d e"], "ranks": [2, 1, 2]}
    two = {"prompt": "a b", "responses": ["c", "d"], "ranks": [1, 2]}
    batch = ranked_batch(encoded(tmp_path, read_ranked, three, two), 5, 0, None, 3)
    assert batch.token_BCT.shape == (2, 3, 5)
    np.testing.assert_array_equal(batch.rank_BC, [[2, 1, 2], [1, 2, 0]])
    np.testing.assert_array_equal(batch.candidate_mask_BC, [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(batch.token_BCT[1, 2], batch.token_BCT[1, 0])
    np.testing.assert_array_equal(batch.attention_mask_BCT[0, 2], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(batch.weight_B, [0.5, 0.5])


def test_scored_batch_has_scores_as_labels(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    found = encoded(tmp_path, read_scored, {**row, "score": -2}, {**row, "score": 0.5})
    batch = scored_batch(found, 5, 0, np.array([True, False]))
    assert batch.token_BCT.shape == (2, 1, 5)
    np.testing.assert_array_equal(batch.label_B, [-2, 0.5])
    np.testing.assert_array_equal(batch.weight_B, [1, 0])


def test_preference_batch_reads_no_score(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    found = encoded(tmp_path, read_completions, row, {**row, "score": "great"})
    batch = preference_batch(found, 5, 0, np.array([True, False]))
    assert batch.label_B is None
    np.testing.assert_array_equal(batch.token_BCT[:, 0, :3], [[2, 3, 1]] * 2)  # a b <eos>
    np.testing.assert_array_equal(batch.weight_B, [1, 0])


def test_steps_batch_marks_the_end_of_each_step(tmp_path):
    row = {"prompt": "a b", "steps": ["c ", " d e "], "labels": [True, False]}
    found = encoded(tmp_path, read_steps, row, separator="g")
    batch = steps_batch(found, 8, 0)  # a b c g d e <eos>
    np.testing.assert_array_equal(batch.step_mask_BCT, [[[0, 0, 0, 1, 0, 0, 1, 0]]])
    np.testing.assert_array_equal(batch.label_BCT, [[[0, 0, 0, 1, 0, 0, 0, 0]]])

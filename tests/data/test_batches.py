"""Which rows are in a step's batch, and the arrays of each kind of batch, by hand: tokens, masks,
labels, and weights that make sums into means over all that is real."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.batches import (
    answers_of,
    held_out_batches,
    judged_batch,
    labelled_batch,
    minibatch_rows,
    order,
    packed_batch,
    preference_batch,
    ranked_batch,
    samples_at,
    scored_batch,
    steps_batch,
    token_batch,
)
from jaxrlhf.data.formats import Completion, Pair, Ranked, Stepwise
from jaxrlhf.data.tokens import Encoded

EOS, A, B, C, D, E = 0, 8, 9, 10, 11, 12
ONE_OF_TWO = np.array([True, False])


def completion(prompt, answer, spans=None, **columns):
    return Encoded(prompt, (answer,), Completion("", "", columns, "x:1"), spans=spans)


def pair(prompt, chosen, rejected, margin=0.0):
    return Encoded(prompt, (chosen, rejected), Pair("", "", "", margin, {}, "x:1"))


def ranked(prompt, answers, ranks):
    texts, ended = ("",) * len(answers), (True,) * len(answers)
    return Encoded(prompt, tuple(answers), Ranked("", texts, ranks, ended, {}, "x:1"))


@pytest.mark.parametrize(
    ("count", "batch_size"), [(12, 4), (10, 4), (7, 3), (3, 8), (1, 5), (5, 5)]
)
def test_order_uses_each_row_once_an_epoch(count, batch_size):
    epochs = 8
    steps = -(-count * epochs // batch_size)
    stream = np.concatenate([order(count, batch_size, 3, step) for step in range(steps)])
    for epoch in stream[: count * epochs].reshape(epochs, count):
        assert sorted(epoch) == list(range(count))


def test_order_batch_across_an_epochs_end_takes_the_rest_and_the_next_start():
    whole = np.concatenate([order(5, 5, 0, epoch) for epoch in range(3)])
    parts = [order(5, 4, 0, step) for step in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[:12])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_samples_at_is_so_likely_and_follows_from_the_step(share):
    drawn = [samples_at(share, 5, step) for step in range(400)]
    assert drawn == [samples_at(share, 5, step) for step in range(400)]
    assert abs(np.mean(drawn) - share) < 0.07


def test_answers_of_by_hand():
    """An answer with two of its three tokens to learn; then one that was cut off."""
    rows = [completion([A], [B, C, EOS], ((0, 1), (2, 3))), completion([A, B], [C], ended=False)]
    found = answers_of(rows, 2, 4, 7)
    np.testing.assert_array_equal(found.token_BT, [[7, A, B, C, EOS, 7], [A, B, C, 7, 7, 7]])
    np.testing.assert_array_equal(found.attention_mask_BT, [[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(found.mask_BT, [[0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(found.ended_B, [True, False])
    assert not found.logp_BT.any()


def test_order_every_epoch_and_every_seed_shuffles_afresh():
    epochs = [tuple(order(50, 50, seed, step)) for seed in range(3) for step in range(4)]
    assert len(set(epochs)) == len(epochs)


def test_order_follows_from_seed_and_step_alone():
    """A resumed run must go on where it was: these rows are a promise, in later versions too."""
    assert order(10, 10, 0, 0).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    assert order(10, 10, 0, 0).dtype == np.int64
    alone = order(100, 8, 1, 57)
    for step in range(60):
        order(100, 8, 1, step)[:] = -1  # what it gives is the caller's own
    np.testing.assert_array_equal(order(100, 8, 1, 57), alone)


def test_order_first_rows_are_uniform():
    first = [order(4, 1, seed, 0)[0] for seed in range(400)]
    counts = np.bincount(first, minlength=4)
    assert (abs(counts - 100) < 40).all()  # 4.6 standard deviations


def test_order_and_held_out_batches_bad_input():
    for count, batch_size, message in ((0, 4, "dataset has 0 rows"), (4, 0, "batch_size=0")):
        with pytest.raises(InputError, match=message):
            order(count, batch_size, 0, 0)
        with pytest.raises(InputError, match=message):
            held_out_batches(count, batch_size)
    with pytest.raises(InputError, match="seed=-1: give 0 or more"):
        order(4, 4, -1, 0)
    with pytest.raises(ValueError, match="step=-1"):
        order(4, 2, 0, -1)


@pytest.mark.parametrize(
    ("count", "batch_size", "multiple", "batches", "size"),
    [
        (8, 4, 1, 2, 4), (9, 4, 1, 3, 3), (5, 4, 1, 2, 3), (1, 3, 1, 1, 1), (4, 1, 1, 4, 1),
        (45, 32, 1, 2, 23), (45, 32, 4, 2, 24), (45, 30, 4, 2, 24), (3, 32, 4, 1, 4),
        (9, 1, 4, 3, 4),
    ],
)  # fmt: skip
def test_held_out_batches_real_rows_once_in_order(count, batch_size, multiple, batches, size):
    made = held_out_batches(count, batch_size, multiple)
    assert len(made) == batches
    assert all(index.shape == real.shape == (size,) for index, real in made)
    rows = np.concatenate([index[real] for index, real in made])
    np.testing.assert_array_equal(rows, np.arange(count))
    filled = np.concatenate([index[~real] for index, real in made])
    np.testing.assert_array_equal(filled, 0)  # with a row that exists


def test_token_batch_weighs_completions_with_their_eos():
    """Padding has the id of end-of-sequence: a mask from ids would lose the answer's end."""
    batch = token_batch([completion([A, B], [C, EOS]), completion([A], [EOS])], 5, pad=EOS)
    np.testing.assert_array_equal(batch.token_BT, [[A, B, C, EOS, EOS], [A, EOS, EOS, EOS, EOS]])
    np.testing.assert_array_equal(batch.attention_mask_BT, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    expected = np.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]) / 3
    np.testing.assert_allclose(batch.weight_BT, expected, rtol=1e-6)
    assert batch.weight_BT.dtype == np.float32


def test_token_batch_weights_are_those_of_masked_over_real_rows():
    rows = [completion([A, B], [C, EOS]), completion([A], [EOS])]
    batch = token_batch(rows, 4, EOS, ONE_OF_TWO)
    np.testing.assert_allclose(batch.weight_BT, [[0, 0, 0.5, 0.5], [0, 0, 0, 0]])
    assert batch.attention_mask_BT[1].sum() == 2
    nothing = token_batch(rows, 4, EOS, np.array([False, False]))
    np.testing.assert_array_equal(nothing.weight_BT, 0)
    rows = [completion([A] * i, [B] * (7 - i)) for i in range(1, 7)]
    weight_BT = token_batch(rows, 8, EOS).weight_BT
    np.testing.assert_array_equal(weight_BT, masked.weights(jnp.asarray(weight_BT != 0)))


def test_packed_batch_by_hand():
    """Of the second row's answer, only its first and last tokens are the assistant's."""
    bins = [
        [completion([1], [2, 3]), completion([4, 5], [6, 7, 8], ((0, 1), (2, 3)))],
        [completion([9], [10])],
    ]
    batch = packed_batch(bins, 10, pad=0)
    np.testing.assert_array_equal(
        batch.token_BT, [[1, 2, 3, 4, 5, 6, 7, 8, 0, 0], [9, 10, 0, 0, 0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.segment_BT, [[1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch.attention_mask_BT, batch.segment_BT != 0)
    learn = np.array([[0, 1, 1, 0, 0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(batch.weight_BT, learn / 5, rtol=1e-6)
    assert batch.segment_BT.dtype == np.int32
    assert batch.weight_BT.dtype == np.float32
    with pytest.raises(InputError, match=r"x:1: 6 tokens, and data\.max_tokens is 5"):
        packed_batch([[completion([1], [2, 3]), completion([4], [5, 6])]], 5, 0)


def test_preference_batch_by_hand():
    rows = [pair([A], [B, EOS], [C, C, EOS], 0.7), pair([A, B], [C], [EOS])]
    batch = preference_batch(rows, 4, pad=EOS, real_B=ONE_OF_TWO)
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
    np.testing.assert_array_equal(batch.mask_BCT[0], [[0, 1, 1, 0], [0, 1, 1, 1]])
    assert batch.token_BCT.dtype == np.int32
    assert batch.margin_B.dtype == batch.weight_B.dtype == np.float32
    whole = preference_batch([pair([A], [B], [C])] * 4, 3, EOS)
    np.testing.assert_array_equal(whole.weight_B, [0.25] * 4)


def test_ranked_batch_fills_short_rows_with_their_first_response():
    three = ranked([A], [[B, EOS], [C, EOS], [D, E, EOS]], (2.0, 1.0, 2.0))
    two = ranked([A, B], [[C, EOS], [D, EOS]], (1.0, 2.0))
    batch = ranked_batch([three, two], 5, 0, None, 3)
    assert batch.token_BCT.shape == (2, 3, 5)
    np.testing.assert_array_equal(batch.rank_BC, [[2, 1, 2], [1, 2, 0]])
    np.testing.assert_array_equal(batch.candidate_mask_BC, [[1, 1, 1], [1, 1, 0]])
    assert batch.rank_BC.dtype == batch.candidate_mask_BC.dtype == np.float32
    np.testing.assert_array_equal(batch.token_BCT[1, 2], batch.token_BCT[1, 0])
    np.testing.assert_array_equal(batch.attention_mask_BCT[0, 2], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(batch.weight_B, [0.5, 0.5])


@pytest.mark.parametrize(
    ("make", "said", "label_B"),
    [
        (scored_batch, [{"score": -2.0}, {"score": 0.5}], [-2, 0.5]),
        (judged_batch, [{"label": True}, {"label": False}], [1, 0]),
        (preference_batch, [{}, {"score": "great"}], None),  # no column is read to be scored
    ],
)
def test_batches_of_single_answers_have_their_labels(make, said, label_B):
    batch = make([completion([A], [B, EOS], **x) for x in said], 5, 0, ONE_OF_TWO)
    np.testing.assert_array_equal(batch.token_BCT, [[[A, B, EOS, 0, 0]]] * 2)
    np.testing.assert_array_equal(batch.label_B, label_B)
    np.testing.assert_array_equal(batch.weight_B, [1, 0])


def test_labelled_batch_pairs_with_another_prompt():
    good, bad = completion([A], [B, C], label=True), completion([A], [D], label=False)
    long = completion([E, A], [C, D, C, D, EOS], label=True)
    batch = labelled_batch([good, bad, long], 7, 0, np.array([True, True, False]))
    own, other = batch.token_BCT[:, 0].tolist(), batch.token_BCT[:, 1].tolist()
    assert own[0] == [A, B, C, 0, 0, 0, 0]
    assert other[0] == other[1] == [A, C, D, C, D, EOS, 0]  # not its own prompt's
    assert other[2] == [E, A, B, C, 0, 0, 0]
    np.testing.assert_array_equal(batch.label_B, [1, 0, 1])
    np.testing.assert_array_equal(batch.weight_B, [0.5, 0.5, 0])
    np.testing.assert_array_equal(batch.mask_BCT[0, 0], [0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.mask_BCT[2, 1], [0, 0, 1, 1, 0, 0, 0])
    longer = labelled_batch([completion([A, B, C], [D], label=True), long], 7, 0)
    assert longer.token_BCT[0, 1].tolist() == [A, B, C, C, D, C, D]  # cut where it is too long
    with pytest.raises(InputError, match=r"x:1: a batch of labelled rows needs two prompts"):
        labelled_batch([good, bad], 8, 0)


def test_steps_batch_marks_the_end_of_each_step():
    source = Stepwise("", "", "", (1.0, 0.0), {}, "x:1")
    row = Encoded([A, B], ([C, E, D, D, EOS],), source, ends=(1, 4))
    batch = steps_batch([row], 8, 0)
    np.testing.assert_array_equal(batch.step_mask_BCT, [[[0, 0, 0, 1, 0, 0, 1, 0]]])
    np.testing.assert_array_equal(batch.label_BCT, [[[0, 0, 0, 1, 0, 0, 0, 0]]])
    with pytest.raises(InputError, match=r"x:1: 7 tokens, and data\.max_tokens is 6"):
        steps_batch([row], 6, 0)


def test_minibatch_rows_cover_every_row_once():
    parts = minibatch_rows(16, 2, seed=5, step=3, epoch=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(16))
    again = minibatch_rows(16, 2, seed=5, step=3, epoch=1)
    np.testing.assert_array_equal(np.stack(parts), np.stack(again))
    for other in ({"seed": 6}, {"step": 4}, {"epoch": 0}):
        changed = minibatch_rows(16, 2, **{"seed": 5, "step": 3, "epoch": 1, **other})
        assert not np.array_equal(np.stack(parts), np.stack(changed))

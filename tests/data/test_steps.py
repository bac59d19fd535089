"""Steps are found where their separator ends, in whatever pieces the tokenizer has it."""

import numpy as np
import pytest

from jaxrlhf.data.text import mark_step_ends, step_ends


class Letters:
    """Token i is PIECES[i]; 0 is special."""

    PIECES = ("", "a", "b", "\n", "\n\n", ".\n", "a\nb")

    def decode(self, ids, **options):
        assert options["skip_special_tokens"]
        return "".join(self.PIECES[i] for i in ids)


TOKENIZER = Letters()


@pytest.mark.parametrize(
    ("ids", "separator", "ends"),
    [
        ([1, 3, 2, 0], "\n", [1, 3]),  # the last step ends with its stop token
        ([1, 3, 2], "\n", [1, 2]),  # or where it was cut off
        ([1, 3, 2, 3, 0], "\n", [1, 3]),  # nothing after the last separator is no step
        ([1, 3, 3, 2, 0], "\n", [1, 4]),  # nor is nothing between two
        ([3, 1, 0], "\n", [2]),
        ([1, 5, 2, 0], "\n", [1, 3]),  # a separator inside a token
        ([1, 6, 2, 0], "\n", [1, 3]),
        ([1, 4, 2, 0], "\n", [1, 3]),
        ([1, 3, 3, 2, 0], "\n\n", [2, 4]),  # one of two tokens
        ([1, 3, 2, 0], "\n\n", [3]),
        ([1, 2, 1], "b", [1, 2]),
        ([0], "\n", [0]),  # an empty answer is one step
        ([3, 0], "\n", [1]),
    ],
)
def test_step_ends_hand_computed(ids, separator, ends):
    assert step_ends(ids, TOKENIZER, separator) == ends


def test_mark_step_ends_reads_responses_alone():
    token_BT = np.array([[1, 3, 1, 3, 2, 0, 0], [2, 3, 1, 2, 0, 3, 3], [1, 1, 1, 1, 1, 1, 1]])
    mask_BT = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0], [0] * 7])
    wanted = [[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0], [0] * 7]
    np.testing.assert_array_equal(mark_step_ends(token_BT, mask_BT, TOKENIZER, "\n"), wanted)

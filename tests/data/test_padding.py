"""Token ids → padded arrays."""

import numpy as np
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.tokens import pad_rows

A, B, C, EOS = 5, 6, 7, 0


def test_left_pad_by_hand():
    token_QP, mask_QP = pad_rows([[A], [EOS, B, EOS]], 3, EOS, ["x:1", "x:2"], left=True)
    np.testing.assert_array_equal(token_QP, [[EOS, EOS, A], [EOS, B, EOS]])
    np.testing.assert_array_equal(mask_QP, [[0, 0, 1], [1, 1, 1]])
    assert token_QP.dtype == mask_QP.dtype == np.int32


def test_left_pad_too_long():
    with pytest.raises(InputError, match=r"x:2: 3 tokens, and data\.max_prompt_tokens is 2"):
        pad_rows([[A], [A, B, C]], 2, EOS, ["x:1", "x:2"], left=True)


def test_pad_rows_by_hand():
    token_BT, mask_BT = pad_rows([[A, EOS], [A, B, C]], 3, 7, ["x:1", "x:2"])
    np.testing.assert_array_equal(token_BT, [[A, EOS, 7], [A, B, C]])
    np.testing.assert_array_equal(mask_BT, [[1, 1, 0], [1, 1, 1]])
    with pytest.raises(InputError, match=r"x:2: 3 tokens, and data\.max_tokens is 2"):
        pad_rows([[A], [A, B, C]], 2, EOS, ["x:1", "x:2"])

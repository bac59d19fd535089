import numpy as np

from jaxrlhf.rewards.judge import length_penalty


def test_length_penalty_by_hand():
    """Responses of 0, 2, 3, 4 and 6 tokens after prompts of two, padded: 0 up to 2, −1 from 4."""
    mask_BT = np.zeros((5, 10), np.float32)
    for row, count in enumerate((0, 2, 3, 4, 6)):
        mask_BT[row, 2 : 2 + count] = 1
    penalty_B = length_penalty(mask_BT, 2, 4)
    np.testing.assert_allclose(penalty_B, [0, 0, -0.5, -1, -1])
    assert penalty_B.dtype == np.float32


def test_length_penalty_counts_tokens_of_the_response_wherever_they_stand():
    mask_BT = np.array([[0, 1, 0, 1, 1]])  # a gap: the tokens of a tool
    np.testing.assert_allclose(length_penalty(mask_BT, 0, 6), [-0.5])

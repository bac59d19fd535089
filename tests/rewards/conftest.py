"""Four responses to two prompts."""

import jax.numpy as jnp
import numpy as np
import pytest
import runs

from jaxrlhf.core.types import Rollout
from jaxrlhf.models.tokenizer import load_tokenizer

TEXTS = ["good", "bad", "good and good", ""]


@pytest.fixture
def rollout():
    """Two samples of each prompt, the third cut off."""
    tokenizer = load_tokenizer(f"words:{runs.WORDS}")
    token_BT = np.zeros((4, 6), np.int32)
    mask_BT = np.zeros((4, 6), np.float32)
    for row, text in enumerate(TEXTS):
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids += [tokenizer.eos_token_id] * (row != 2)
        token_BT[row, 2 : 2 + len(ids)] = ids
        mask_BT[row, 2 : 2 + len(ids)] = 1
    zero_BT = jnp.zeros((4, 6))
    ended_B = jnp.array([True, True, False, True])
    mask = jnp.array(mask_BT)
    return Rollout(jnp.array(token_BT), mask, mask, zero_BT, zero_BT, ended_B, n=2)

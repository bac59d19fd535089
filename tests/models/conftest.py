"""A tiny decoder, random weights for any decoder, and a tokenizer."""

import numpy as np
import pytest

from jaxrlhf.config import DecoderConfig
from jaxrlhf.models import names
from jaxrlhf.models.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tiny():
    return DecoderConfig(
        vocab=48, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=40, context=64
    )


@pytest.fixture(scope="session")
def random_params():
    """Every leaf random, norms and biases included, so that none can be left out unseen."""

    def make(decoder):
        rng = np.random.default_rng(0)
        return names.assemble(
            decoder, lambda weight, _: 0.3 * rng.standard_normal(weight.stored, dtype=np.float32)
        )

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return load_tokenizer("words:" + " ".join(f"w{i}" for i in range(40)))

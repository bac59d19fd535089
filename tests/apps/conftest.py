"""A policy that has learnt nothing, for what asks any policy."""

import pytest
import runs

from jaxrlhf.run import loop


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    config = runs.sft(tmp_path_factory.mktemp("policy"), steps=1)
    loop.train(config, runs.one_device())
    return config.output

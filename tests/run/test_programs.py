"""How a rollout is cut into minibatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import one_device

from jaxrlhf.config import GRPOConfig, PPOConfig
from jaxrlhf.core.types import Batch
from jaxrlhf.run.programs import minibatch_rows
from jaxrlhf.run.setup import setup


def test_minibatch_rows_cover_every_row_once(tmp_path):
    config = runs.ppo(tmp_path)
    parts = minibatch_rows(config, 16, step=3, epoch=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(16))
    again = minibatch_rows(config, 16, step=3, epoch=1)
    np.testing.assert_array_equal(np.stack(parts), np.stack(again))
    other = minibatch_rows(config, 16, step=3, epoch=0)
    assert not np.array_equal(np.stack(parts), np.stack(other))


@pytest.mark.parametrize(
    ("algorithm", "weight"),
    [(PPOConfig(minibatches=2), 1 / 3), (GRPOConfig(aggregation="fixed", length=8), 1 / 16)],
)
def test_take_weighs_its_own_rows_as_the_config_says(algorithm, weight, tmp_path):
    mask_BT = jnp.array([[1.0, 1], [1, 1], [1, 0], [1, 1]])
    batch = Batch(mask_BT, mask_BT, mask_BT, mask_BT, mask_BT, mask_BT / 7)
    with jax.set_mesh(one_device()):
        run = setup(runs.ppo(tmp_path, algorithm=algorithm), one_device(), abstract=True)
        part = run.programs["take"](batch, np.array([0, 2], np.int32))
    np.testing.assert_array_equal(part.mask_BT, mask_BT[np.array([0, 2])])
    np.testing.assert_allclose(part.weight_BT, part.mask_BT * weight, rtol=1e-6)

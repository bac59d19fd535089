"""The batch of a run that learns from rows, without the rows."""

from types import SimpleNamespace
from typing import Any

import jax

from jaxrlhf.data.batches import packed_batch
from jaxrlhf.data.tokens import Encoded
from jaxrlhf.mesh.sharding import few_rows_layout
from jaxrlhf.run.setup import Run, host_batch

ANSWERS = {"pairs": 2, "ranked": 2}
"""Answers of a row, by the kind of rows; one where it is not said."""


def batch_of(run: Run) -> Any:
    """Shapes and layouts of the batch that an update learns from; no reference's log-probs in it.

    Rankings, whose length only the data tells, are taken to be of two responses.
    """
    config: Any = run.config
    count = ANSWERS.get(config.algorithm.rows, 1)
    source: Any = SimpleNamespace(
        where="", columns={"label": True, "score": 0.0}, margin=0.0, ranks=(0.0,) * count, labels=()
    )
    rows = [Encoded([i % 2], ([0],) * count, source) for i in range(config.data.batch_size)]
    if config.data.packing:
        made = packed_batch([[row] for row in rows], config.data.max_tokens, config.sample.pad)
    else:
        made = host_batch(run, rows)
    layout = few_rows_layout(run.mesh, config.data.batch_size)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), made)

"""What a run is fed with: the batch of each step, and one example of it for people to read."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrlhf.config import is_on_policy
from jaxrlhf.data.batches import order, packed_batch
from jaxrlhf.data.packing import packing
from jaxrlhf.data.text import MARKS, show_batch, show_example
from jaxrlhf.run.setup import Run, host_batch


def batches(run: Run) -> Callable[[int], Any]:
    """step → its batch of numpy arrays, which follows from seed and step; for runs on rows."""
    data, seed, rows = run.config.data, run.config.seed, run.train_rows.items
    if not data.packing:

        def plain(step: int) -> Any:
            chosen = order(len(rows), data.batch_size, seed, step)
            return host_batch(run, [rows[i] for i in chosen])

        return plain
    lengths = np.array([len(row.prompt) + len(row.answers[0]) for row in rows])
    rows_of = packing(lengths, data.max_tokens, data.batch_size, seed)

    def packed(step: int) -> Any:
        chosen = [[rows[i] for i in together] for together in rows_of(step)]
        return packed_batch(chosen, data.max_tokens, run.config.sample.pad)

    return packed


def packing_metrics(batch: Any) -> dict[str, float]:
    """Of a packed batch: ``rows``, how many rows are in it, and ``packing_efficiency``, the share
    of its tokens that are no padding; nothing of another batch."""
    if getattr(batch, "segment_BT", None) is None:
        return {}
    return {
        "rows": float(batch.segment_BT.max(1).sum()),
        "packing_efficiency": float((batch.segment_BT != 0).mean()),
    }


def example(run: Run) -> str:
    """The first row that a run learns from, what is trained on between ⟦ and ⟧.

    On policy that is a prompt, and the mark of the response to it; of rewards' pairs, the answers
    whose scores are learnt.
    """
    if not is_on_policy(run.config):
        return show_batch(run.tokenizer, batches(run)(0))
    chosen = order(len(run.train_rows), run.config.data.batch_size, run.config.seed, 0)
    ids = run.train_rows.items[chosen[0]].prompt
    return show_example(run.tokenizer, ids, [0] * len(ids)) + "…".join(MARKS)

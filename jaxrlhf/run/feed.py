"""What a run on rows is fed with: the batch of each step on the mesh; and one example, shown."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrlhf.config import OfflineConfig, is_on_policy
from jaxrlhf.core.types import AnyBatch
from jaxrlhf.data.batches import (
    judged_batch,
    labelled_batch,
    order,
    packed_batch,
    preference_batch,
    ranked_batch,
    scored_batch,
    steps_batch,
    token_batch,
)
from jaxrlhf.data.formats import Prompt, prompt_of
from jaxrlhf.data.packing import packing
from jaxrlhf.data.text import MARKS, show_batch, show_example
from jaxrlhf.data.tokens import Encoded
from jaxrlhf.mesh.sharding import at_hand, put_rows
from jaxrlhf.run.setup import Run

PACKERS = {
    "pairs": preference_batch,
    "completions": token_batch,
    "labelled": labelled_batch,
    "judged": judged_batch,
    "ranked": ranked_batch,
    "scored": scored_batch,
    "steps": steps_batch,
}
"""How such rows become a batch."""


def pack(run: Run, rows: Sequence[Encoded], real_B: np.ndarray | None = None) -> AnyBatch:
    """Rows as the batch that the run's offline algorithm learns from, on the mesh.

    Where it is relative to a reference, that one's log-probs are in it. Rows that only fill the
    batch (``real_B`` False) have weight 0.
    """
    return place(run, host_batch(run, rows, real_B))


def host_batch(run: Run, rows: Sequence[Encoded], real_B: np.ndarray | None = None) -> Any:
    """As ``pack``, but of numpy arrays, and without a reference's log-probs."""
    config = run.config
    assert isinstance(config.algorithm, OfflineConfig)
    make = PACKERS[config.algorithm.rows]
    more = {"candidates": run.candidates} if make is ranked_batch else {}
    return make(rows, run.width, config.sample.pad, real_B, **more)


def place(run: Run, batch: Any) -> AnyBatch:
    """A batch of numpy arrays on the mesh, with what it needs of a reference."""
    batch = put_rows(batch, run.mesh)
    if run.reference is None:
        return batch
    return run.programs.reference(at_hand(run.reference.params), batch)


def batches(run: Run) -> Callable[[int], Any]:
    """step → its batch of numpy arrays, which follows from seed and step; for runs on rows."""
    data, seed, rows = run.config.data, run.config.seed, run.train_rows.items
    if not data.packing:

        def plain(step: int) -> Any:
            # A permutation an epoch, from the seed: a resumed run reads on where it stopped.
            chosen = order(len(rows), data.batch_size, seed, step)
            return host_batch(run, [rows[i] for i in chosen])

        return plain
    # Packing is planned over all rows, so that a step's batch follows from the step alone.
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


def last_turn(run: Run, ids: list[int]) -> dict[str, str]:
    """What the user said last in the prompt with these ids, as ``user``; nothing of plain text."""
    source = next((row.source for row in run.train_rows.items if row.prompt == ids), None)
    found = prompt_of(source) if isinstance(source, Prompt) else {}
    return {name: text for name, text in found.items() if name == "user"}


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

"""What rows say, as one short text that is the same if and only if they are."""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

from jaxrlhf.data.formats import Pair, Prompt, Ranked, Stepwise
from jaxrlhf.data.tokens import Encoded


def contents(rows: Sequence[Encoded]) -> str:
    """A digest of rows, in hex: of token ids, of what is said of the answers, and of their order.

    Of prompts all columns count, which rewards may read. Neither the file's name nor its format
    do, nor where in it a row stands: a file that was moved or converted is the same data.
    """
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        # Every list goes in after its length, so that no two rows run into one another alike.
        ids = [x for part in (row.prompt, *row.answers) for x in (len(part), *part)]
        digest.update(array("q", [len(ids), *ids]).tobytes())
        digest.update(f"{row.ends} {row.spans} {_said(row.source)}\n".encode())
    return digest.hexdigest()


def _said(source: Any) -> Any:
    """What a row says besides its texts that is learnt from."""
    match source:
        case Pair():
            return source.margin
        case Ranked():
            return source.ranks
        case Stepwise():
            return source.labels
    columns = source.columns
    names = sorted(columns) if isinstance(source, Prompt) else ("label", "score")
    return [(name, columns[name]) for name in names if columns.get(name) is not None]

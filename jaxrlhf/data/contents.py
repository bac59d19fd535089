"""Whether rows are the rows that they were: a digest of what is learnt from them."""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

from jaxrlhf.data.formats import Pair, Prompt
from jaxrlhf.data.judged import Ranked, Stepwise
from jaxrlhf.data.tokens import Encoded


def contents(rows: Sequence[Encoded]) -> str:
    """A digest of rows, in hex: of token ids, of what is said of the answers, and of their order.

    Of prompts all columns count, which rewards may read. Neither the file's name nor its format
    do, nor where in it a row stands.
    """
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        ids = [len(row.prompt), *row.prompt]
        for answer in row.answers:
            ids += [len(answer), *answer]
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

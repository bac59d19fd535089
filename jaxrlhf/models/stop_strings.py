"""Stop strings as a small automaton over tokens, which the sampler runs on the device.

A string may be split over tokens in many ways, so it cannot be sought by ids. Aho and Corasick's
automaton (CACM 18, 1975) reads bytes: a state is how much of the strings has been read so far. What
a token's bytes do to a state is worked out once for every token, and most of them do the same.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast as Tokenizer

from jaxrlhf.core.types import StopTable
from jaxrlhf.models.tokenizer import token_bytes


def stop_table(tokenizer: Tokenizer, strings: Sequence[str], vocab: int) -> StopTable | None:
    """The automaton of ``strings``; None where there are none.

    Special tokens count with the text they are written as. The last state is that of a string which
    is complete, and nothing leaves it.

    Args:
      strings: none of them empty.
      vocab: rows of the model's embedding table.
    """
    if not strings:
        return None
    goto = _automaton([text.encode() for text in strings])
    bytes_V = token_bytes(tokenizer)
    tokens = [bytes_V.get(token, b"") for token in range(vocab)]
    # The longest first: at each place, those that have a byte there are the first ones.
    order = sorted(range(vocab), key=lambda token: -len(tokens[token]))
    lengths = np.array([len(tokens[token]) for token in order])
    byte_VL = np.zeros((vocab, max(int(lengths[0]), 1)), np.uint8)
    for row, token in enumerate(order):
        byte_VL[row, : lengths[row]] = np.frombuffer(tokens[token], np.uint8)
    state_SV = np.repeat(np.arange(len(goto), dtype=np.int16)[:, None], vocab, axis=1)
    for place in range(byte_VL.shape[1]):
        longer = int((lengths > place).sum())
        state_SV[:, :longer] = goto[state_SV[:, :longer], byte_VL[:longer, place]]
    next_SC, class_V = np.unique(state_SV, axis=1, return_inverse=True)
    place_V = np.empty(vocab, np.int32)
    place_V[order] = class_V.reshape(-1)
    return StopTable(place_V, next_SC.astype(np.int32))


def _automaton(strings: Sequence[bytes]) -> np.ndarray:
    """Aho-Corasick: int16 [S, 256], state and byte → state; the last state is a complete string."""
    edges: list[dict[int, int]] = [{}]
    complete: set[int] = set()
    for text in strings:
        node = 0
        for byte in text:
            if byte not in edges[node]:
                edges[node][byte] = len(edges)
                edges.append({})
            node = edges[node][byte]
        complete.add(node)
    goto = np.zeros((len(edges) + 1, 256), np.int16)
    fail = [0] * len(edges)
    row = [0]
    # Breadth first: what a node falls back on is shorter, and done before it.
    for node in row:
        goto[node] = goto[fail[node]] if node else 0
        if fail[node] in complete:
            complete.add(node)
        for byte, child in edges[node].items():
            fail[child] = int(goto[node, byte])
            goto[node, byte] = child
            row.append(child)
    last = len(edges)
    done = np.zeros(last + 1, bool)
    done[list(complete)] = True
    goto = np.where(done[goto], last, goto).astype(np.int16)
    goto[last] = last
    return goto

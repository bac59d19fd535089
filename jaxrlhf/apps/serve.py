"""Rewards by HTTP: a reward model or a function behind the protocol of docs/reward_service.md."""

import contextlib
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.apps.listener import Server
from jaxrlhf.config import MeshConfig, RewardConfig
from jaxrlhf.config.checks import below_least
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Rollout
from jaxrlhf.data.tokens import check_ids, encode_answer, encode_prompt, pad_rows
from jaxrlhf.mesh.sharding import make_mesh, put_rows
from jaxrlhf.models.ends import Ends, read_ends
from jaxrlhf.models.hub import fetch
from jaxrlhf.models.load import Loader, is_run, tokenizer_path
from jaxrlhf.models.read import is_reward_folder, read_decoder
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.rewards.functions import Asked, Scored, Source
from jaxrlhf.rewards.isolation import host_source
from jaxrlhf.rewards.models import load_scorer
from jaxrlhf.rewards.service import secret

WIDEST = 64
"""Characters that a token may stand for, if no token of the vocabulary has more: blanks between
words may be no token at all."""

LEAST = {"batch_size": 1, "concurrency": 1, "max_tokens": 2}
"""What these must at least be; a row has a token of a prompt and one of an answer."""


def serve(
    what: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 32,
    concurrency: int = 1,
    header_env: str = "",
    max_tokens: int | None = None,
    token_env: str = "",
) -> Server:
    """A server of rewards, ready for ``serve_forever()``.

    The arguments are those of ``jaxrlhf serve``; an InputError if one of them cannot be used.
    """
    given = {"batch_size": batch_size, "concurrency": concurrency, "max_tokens": max_tokens}
    for problem in below_least(given, LEAST):
        raise InputError(problem)
    if header_env and token_env:
        raise InputError("header_env and token_env are both given: leave one out")
    wanted = ""
    if header_env:
        wanted = secret("header_env", header_env, "what the header Authorization must say")
    elif token_env:
        wanted = "Bearer " + secret("token_env", token_env, "the token")
    what = fetch(what)
    if is_run(what) or is_reward_folder(what):
        # The device takes one batch at a time, whoever asks.
        source, concurrency = model_source(what, batch_size, max_tokens=max_tokens), 1
    else:
        source = host_source(RewardConfig(function=what), concurrency, devices=True)
    return Server(source, host, port, concurrency, secret=wanted)


def attend(server: Server) -> None:
    """Answer requests until Ctrl-C or a SIGTERM, after which those under way are still answered.

    Says on stderr whom it lets in where that is more than this machine.
    """
    if not server.is_local:
        who = "who shows the secret" if server.secret else "whoever asks: set --token-env"
        print(f"others can reach {server.url}; it answers {who}", file=sys.stderr, flush=True)

    def stop(*_: Any) -> None:
        # Not in this thread: it is the one that serves, and has to come to an end.
        threading.Thread(target=server.shutdown).start()

    with contextlib.suppress(ValueError):  # not the main thread: its owner handles signals
        signal.signal(signal.SIGTERM, stop)
    with server:
        server.serve_forever()


def model_source(
    folder: str, batch_size: int = 32, mesh: Mesh | None = None, max_tokens: int | None = None
) -> Source:
    """A reward model as a source of text's rewards.

    Rows are padded to ``max_tokens`` and batches to ``batch_size``: one shape, which is compiled
    once. A row that does not fit or has no token gets no reward.

    Args:
      mesh: where it lies (default: on the first device).
      max_tokens: default: ``data.max_tokens`` of the reward model's run; 1,024, or its context if
        that is less, where it is a Hugging Face folder.

    Raises:
      InputError: not the folder of a reward model; ``max_tokens`` exceed its context.
    """
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    loader = Loader(mesh)
    config = loader.config_of(folder)
    width = max_tokens or config.data.max_tokens
    decoder = read_decoder(folder, head=is_reward_folder(folder))
    if width > decoder.context:
        raise InputError(
            f"max_tokens={width}: exceed the context of {folder}, {decoder.context}: lower it"
        )
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    # No policy is there whose vocabulary the model would have to share.
    with jax.set_mesh(mesh):
        score = load_scorer(RewardConfig(model=folder), loader, tokenizer, None, "serve")
    ends = read_ends(folder, tokenizer, decoder.vocab)
    most = width, width * max(WIDEST, *map(len, tokenizer.get_vocab()))

    def batch(rows: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        # Rows that fill a batch up are the first again, and their scores are not read.
        filled = [*rows, *[rows[0]] * (batch_size - len(rows))]
        texts = [prompt + answer for prompt, answer in filled]
        token_BT, real_BT = pad_rows(texts, width, ends.pad, [""] * batch_size)
        starts_B = np.array([len(prompt) for prompt, _ in filled])
        mask_BT = (real_BT * (np.arange(width) >= starts_B[:, None])).astype(np.float32)
        zero_BT, ended_B = np.zeros(token_BT.shape, np.float32), np.ones(batch_size, bool)
        with jax.set_mesh(mesh):
            arrays = put_rows((token_BT, real_BT, mask_BT, zero_BT, zero_BT, ended_B), mesh)
            return np.asarray(score(Rollout(*arrays)), np.float64)[: len(rows)]

    def ask(asked: Asked) -> Scored:
        ids, problem = {}, ""
        for b, row in enumerate(zip(asked.prompts, asked.completions, asked.ended, strict=True)):
            try:
                ids[b] = _encode(tokenizer, ends, decoder.vocab, most, *row)
            except InputError as error:
                problem = str(error)
        score_B = np.full(len(asked), np.nan)
        places = np.array(list(ids), int)
        for start in range(0, len(places), batch_size):
            some = places[start : start + batch_size]
            score_B[some] = batch([ids[b] for b in some])
        return Scored(score_B, problem)

    batch([([ends.pad], [ends.pad])])  # compiles, before anybody waits
    return ask


def _encode(
    tokenizer: Any,
    ends: Ends,
    vocab: int,
    most: tuple[int, int],
    prompt: str,
    completion: str,
    ended: bool,
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its completion, which is closed by a stop token if it ``ended``;
    ``most`` tokens of both, and characters."""
    width, longest = most
    # It does not fit, whatever it says: splitting it into tokens would take its time.
    if (length := len(prompt) + len(completion)) > longest:
        raise InputError(f"{length} characters, and the reward model reads max_tokens={width}")
    ids = encode_prompt(tokenizer, prompt, "prompt")
    # An empty completion is an answer where it ended at once: its stop token is scored.
    answer = list(ends.stop[:1])
    if completion or not ended:
        how = ends.stop, ended, prompt, ends.strings
        answer = encode_answer(tokenizer, completion, "completion", *how)
    check_ids(ids + answer, vocab, "row")
    tokens = len(ids) + len(answer)
    if tokens > width:
        raise InputError(f"{tokens} tokens, and the reward model reads max_tokens={width}")
    return ids, answer

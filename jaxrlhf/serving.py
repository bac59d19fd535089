"""Serving a reward model, or a reward function, to others (``rewards.server``)."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import MeshConfig, RewardConfig
from jaxrlhf.config.ranges import below_least
from jaxrlhf.data.padding import right_pad
from jaxrlhf.data.tokens import encode_answer, encode_prompt
from jaxrlhf.errors import InputError
from jaxrlhf.models.reading import is_reward_folder, read_decoder
from jaxrlhf.models.tokenizers import ends_of, load_tokenizer
from jaxrlhf.networks import Loader, is_run, tokenizer_path
from jaxrlhf.rewards import local
from jaxrlhf.rewards.asked import Asked, Scored, Source
from jaxrlhf.rewards.server import Server
from jaxrlhf.scorers import load_scorer
from jaxrlhf.sharding import make_mesh, put_rows
from jaxrlhf.types import Rollout

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
) -> Server:
    """A server of rewards, ready for ``serve_forever()``.

    Args:
      what: a reward model (the output folder of its run, or the Hugging Face folder of a
        …ForSequenceClassification), or a function: a built-in or package.module:function.
      host, port: where to listen; port 0 takes a free one.
      batch_size: rows that the reward model scores at once.
      concurrency: requests that a function is asked at once, from as many threads.
      header_env: environment variable with the value that requests must have in their header
        Authorization; empty lets everybody in.
      max_tokens: most tokens of a row that a reward model scores; see ``model_source``.

    Raises:
      InputError: one of these cannot be used.
    """
    given = {"batch_size": batch_size, "concurrency": concurrency, "max_tokens": max_tokens}
    for problem in below_least(given, LEAST):
        raise InputError(problem)
    secret = os.environ.get(header_env, "") if header_env else ""
    if header_env and not secret:
        raise InputError(f"header_env={header_env}: this environment variable is unset or empty")
    if is_run(what) or is_reward_folder(what):
        source, concurrency = model_source(what, batch_size, max_tokens=max_tokens), 1
    else:
        source = local.make(RewardConfig(function=what))
    return Server(source, host, port, concurrency, secret=secret)


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
    context = read_decoder(folder, head=is_reward_folder(folder)).context
    if width > context:
        raise InputError(f"max_tokens={width}: exceed the context of {folder}, {context}: lower it")
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    with jax.set_mesh(mesh):
        score = load_scorer(RewardConfig(model=folder), loader, tokenizer, None, "serve")
    stop, pad = ends_of(tokenizer)

    def batch(rows: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        filled = [*rows, *[rows[0]] * (batch_size - len(rows))]
        texts = [prompt + answer for prompt, answer in filled]
        token_BT, real_BT = right_pad(texts, width, pad, [""] * batch_size)
        starts_B = np.array([len(prompt) for prompt, _ in filled])
        mask_BT = (real_BT * (np.arange(width) >= starts_B[:, None])).astype(np.float32)
        zero_BT = np.zeros(token_BT.shape, np.float32)
        ended_B = np.ones(batch_size, bool)
        with jax.set_mesh(mesh):
            arrays = put_rows((token_BT, real_BT, mask_BT, zero_BT, zero_BT, ended_B), mesh)
            return np.asarray(score(Rollout(*arrays)), np.float64)[: len(rows)]

    def ask(asked: Asked) -> Scored:
        ids, problem = {}, ""
        rows = zip(asked.prompts, asked.completions, asked.ended, strict=True)
        for b, row in enumerate(rows):
            try:
                ids[b] = _encode(tokenizer, stop, width, *row)
            except InputError as error:
                problem = str(error)
        score_B = np.full(len(asked), np.nan)
        places = np.array(list(ids), int)
        for start in range(0, len(places), batch_size):
            some = places[start : start + batch_size]
            score_B[some] = batch([ids[b] for b in some])
        return Scored(score_B, problem)

    batch([([pad], [pad])])  # compiles, before anybody waits
    return ask


def _encode(
    tokenizer: Any, stop: Sequence[int], width: int, prompt: str, completion: str, ended: bool
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its completion, which is closed by a stop token if it ``ended``."""
    ids = encode_prompt(tokenizer, prompt, "prompt")
    answer = list(stop[:1])  # where it ended at once
    if completion or not ended:
        answer = encode_answer(tokenizer, completion, "completion", stop, ended)
    tokens = len(ids) + len(answer)
    if tokens > width:
        raise InputError(f"{tokens} tokens, and the reward model reads max_tokens={width}")
    return ids, answer

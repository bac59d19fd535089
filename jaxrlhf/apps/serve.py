"""Rewards by HTTP: a reward model or a function behind the protocol of docs/reward_service.md."""

import hmac
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import MeshConfig, RewardConfig
from jaxrlhf.config.checks import below_least
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Rollout
from jaxrlhf.data.tokens import check_ids, encode_answer, encode_prompt, pad_rows
from jaxrlhf.mesh.sharding import make_mesh, put_rows
from jaxrlhf.models.ends import Ends, read_ends
from jaxrlhf.models.load import Loader, is_run, tokenizer_path
from jaxrlhf.models.read import is_reward_folder, read_decoder
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.rewards.functions import Asked, Scored, Source, describe
from jaxrlhf.rewards.isolation import host_source
from jaxrlhf.rewards.models import load_scorer

MAX_BYTES = 64 * 2**20
"""Most bytes of a request."""

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
) -> "Server":
    """A server of rewards, ready for ``serve_forever()``.

    The arguments are those of ``jaxrlhf serve``; an InputError if one of them cannot be used.
    """
    given = {"batch_size": batch_size, "concurrency": concurrency, "max_tokens": max_tokens}
    for problem in below_least(given, LEAST):
        raise InputError(problem)
    secret = os.environ.get(header_env, "") if header_env else ""
    if header_env and not secret:
        raise InputError(f"header_env={header_env}: this environment variable is unset or empty")
    if is_run(what) or is_reward_folder(what):
        # The device takes one batch at a time, whoever asks.
        source, concurrency = model_source(what, batch_size, max_tokens=max_tokens), 1
    else:
        source = host_source(RewardConfig(function=what))
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

    def batch(rows: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        # Rows that fill a batch up are the first again, and their scores are not read.
        filled = [*rows, *[rows[0]] * (batch_size - len(rows))]
        texts = [prompt + answer for prompt, answer in filled]
        token_BT, real_BT = pad_rows(texts, width, ends.pad, [""] * batch_size)
        starts_B = np.array([len(prompt) for prompt, _ in filled])
        mask_BT = (real_BT * (np.arange(width) >= starts_B[:, None])).astype(np.float32)
        zero_BT = np.zeros(token_BT.shape, np.float32)
        ended_B = np.ones(batch_size, bool)
        with jax.set_mesh(mesh):
            arrays = put_rows((token_BT, real_BT, mask_BT, zero_BT, zero_BT, ended_B), mesh)
            return np.asarray(score(Rollout(*arrays)), np.float64)[: len(rows)]

    def ask(asked: Asked) -> Scored:
        ids, problem = {}, ""
        for b, row in enumerate(zip(asked.prompts, asked.completions, asked.ended, strict=True)):
            try:
                ids[b] = _encode(tokenizer, ends, decoder.vocab, width, *row)
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
    tokenizer: Any, ends: Ends, vocab: int, width: int, prompt: str, completion: str, ended: bool
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its completion, which is closed by a stop token if it ``ended``."""
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


class BadRequestError(Exception):
    """A request that does not follow the protocol."""


class Server(ThreadingHTTPServer):
    """``serve_forever()`` answers requests until ``shutdown()``.

    Args:
      source: what scores rows; what it raises is answered with HTTP 500.
      host, port: where to listen; port 0 takes a free one (``server_port``).
      concurrency: requests that the source is asked at once, each from a thread of its own.
      header, secret: a header and the value that requests must have in it; no check if empty.

    Raises:
      InputError: there is no listening there.
    """

    daemon_threads = True

    def __init__(
        self,
        source: Source,
        host: str = "127.0.0.1",
        port: int = 0,
        concurrency: int = 1,
        header: str = "Authorization",
        secret: str = "",
    ):
        self.source, self.header, self.secret = source, header, secret
        self.turn = threading.Semaphore(concurrency)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"host={host}, port={port}: {error}: choose another") from error

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        self._say(200, {"ready": True})

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if not size.isascii() or not size.isdigit() or int(size) > MAX_BYTES:
            # The body stays unread: what follows on this connection would be taken for a request.
            self.close_connection = True
            self._say(413, {"error": f"Content-Length={size!r:.40}: at most {MAX_BYTES} bytes"})
            return
        body = self.rfile.read(int(size))
        # Compared in a time that does not tell how much of it is right.
        given, secret = self.headers.get(self.server.header, ""), self.server.secret
        if secret and not hmac.compare_digest(given.encode(), secret.encode()):
            self._say(401, {"error": f"the header {self.server.header} is missing or wrong"})
            return
        try:
            with self.server.turn:
                answer = reply(body, self.server.source)
            self._say(200, answer)
        except BadRequestError as error:
            self._say(400, {"error": str(error)})
        except Exception as error:
            self.log_error("%s", describe(error))
            self._say(500, {"error": describe(error)})

    def _say(self, status: int, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, *_: Any) -> None:
        """Requests are not logged; errors are."""


def reply(body: bytes, source: Source) -> dict[str, Any]:
    """The answer to a request: the source's scores, null where it does not apply, null with an
    error where it failed; a BadRequestError where the body is no request."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"not JSON: {error}") from None
    rows = request.get("rows") if isinstance(request, dict) else None
    if not isinstance(rows, list) or not rows:
        raise BadRequestError("no list of rows")
    for index, row in enumerate(rows):
        _check(row, f"rows[{index}]")
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        raise BadRequestError("two rows with one id")
    # A column that only some rows have is None in the others.
    names = dict.fromkeys(name for row in rows for name in row.get("columns", {}))
    scored = source(
        Asked(
            [row["prompt"] for row in rows],
            [row["completion"] for row in rows],
            {name: [row.get("columns", {}).get(name) for row in rows] for name in names},
            [row.get("ended", True) for row in rows],
        )
    )
    why = scored.problem or "no finite score"
    rewards: list[dict[str, Any]] = []
    for key, score, applies in zip(ids, scored.score_B.tolist(), scored.applies(), strict=True):
        has = applies and math.isfinite(score)
        rewards.append({"id": key, "reward": score if has else None})
        if applies and not has:
            rewards[-1]["error"] = why
    return {**({"id": request["id"]} if "id" in request else {}), "rewards": rewards}


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise BadRequestError(f"{where}: not an object")
    for name in ("id", "prompt", "completion"):
        if not isinstance(row.get(name), str):
            raise BadRequestError(f"{where}.{name}: not text")
    if not isinstance(row.get("ended", True), bool):
        raise BadRequestError(f"{where}.ended: neither true nor false")
    if not isinstance(row.get("columns", {}), dict):
        raise BadRequestError(f"{where}.columns: not an object")

"""A conversation with a model, or with two side by side, written as it is drawn."""

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.apps.generate import ENDED_AT_ONCE, Policy, load_policy
from jaxrlhf.config import MeshConfig, RewardConfig, SampleConfig, check_sample, check_seed
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import visible
from jaxrlhf.core.types import Rollout
from jaxrlhf.data.formats import Prompt
from jaxrlhf.data.rows import Message, Row
from jaxrlhf.data.text import answer_text
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.decode import Weights, lay_out_soon
from jaxrlhf.models.load import Loader
from jaxrlhf.rewards.judge import Judge, make_judge
from jaxrlhf.steps.stream import stream

HELP = "/clear  begin anew    /system TEXT  what the model is told first    /quit  or Ctrl-D"


class Speaker(NamedTuple):
    """A policy in its decode layout, and what judges its answers."""

    policy: Policy
    weights: Weights
    judge: Judge | None

    def prompt(self, chat: list[Message]) -> Prompt:
        """A conversation, up to where the answer begins."""
        row = Row({"prompt": chat}, f"{self.policy.path}: message {len(chat)}")
        return self.policy.prompt_of(row, row.where, chat=True)

    def answer(self, prompt: Prompt, key: jax.Array) -> Iterator[int]:
        """The tokens of an answer, each as soon as it is drawn."""
        model, params, config = self.policy.model, self.policy.params, self.policy.config
        ids, stops = self.policy.encode(prompt), self.policy.stops()
        return stream(model, params, ids, key, config, stops, self.weights)

    def reward(self, prompt: Prompt, said: Sequence[int]) -> float:
        """The reward of an answer; NaN where it has none."""
        assert self.judge is not None
        ids = self.policy.encode(prompt)
        token_BT = jnp.array([[*ids, *said]], jnp.int32)
        mask_BT = (jnp.arange(token_BT.shape[1]) >= len(ids)).astype(jnp.float32)[None]
        ended_B = jnp.array([len(said) < self.policy.config.max_new_tokens])
        nothing = jnp.zeros(token_BT.shape)
        rollout = Rollout(token_BT, token_BT * 0 + 1, mask_BT, nothing, nothing, ended_B)
        return float(np.asarray(self.judge(rollout, [prompt]).reward_B)[0])


def speaker(path: str, config: SampleConfig, reward: RewardConfig | None, mesh: Mesh) -> Speaker:
    """The model of a path, ready to be asked.

    Raises:
      InputError: as ``load_policy``.
    """
    policy = load_policy(path, config, mesh)
    weights = lay_out_soon(policy.model, policy.params)
    judge = None
    if reward is not None:
        given = policy.tokenizer, policy.model.decoder.vocab
        judge = make_judge((reward,), Loader(mesh), *given, "reward")
    return Speaker(policy, weights, judge)


def pieces(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece; a character of several tokens comes with its last."""
    so_far: list[int] = []
    said = ""
    for token in ids:
        so_far.append(token)
        text = answer_text(tokenizer, so_far)
        if not text.endswith("\ufffd") and text.startswith(said) and text != said:
            yield text[len(said) :]
            said = text
    text = answer_text(tokenizer, so_far)
    if text != said:
        yield text.removeprefix(said)


class Conversation:
    """What was said to one speaker and by it."""

    def __init__(self, who: Speaker, system: str = ""):
        self.who = who
        self.chat: list[Message] = []
        self.begin(system)

    def begin(self, system: str) -> None:
        """Forget what was said; the first message is ``system``, if it says anything."""
        self.chat = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, key: jax.Array, out: TextIO) -> None:
        """Add a message, write the answer as it is drawn, and add that too."""
        chat, prompt = self._fitting([*self.chat, {"role": "user", "content": text}], out)
        said = write_answer(self.who, prompt, key, out)
        self.chat = [*chat, {"role": "assistant", "content": said}]

    def _fitting(self, chat: list[Message], out: TextIO) -> tuple[list[Message], Prompt]:
        """A conversation without as many of its first turns as leave no room, and its prompt.

        Raises:
          InputError: its last message alone leaves none.
        """
        first, forgotten = int(chat[0]["role"] == "system"), 0
        while True:
            prompt = self.who.prompt(chat)
            try:
                self.who.policy.encode(prompt)
                break
            except InputError:
                if len(chat) - first < 3:
                    raise
            chat = chat[:first] + chat[first + 2 :]
            forgotten += 1
        if forgotten:
            many = (
                "turn no longer fits, and is" if forgotten == 1 else "turns no longer fit, and are"
            )
            print(f"(the first {many} forgotten)", file=out)
        return chat, prompt


def write_answer(who: Speaker, prompt: Prompt, key: jax.Array, out: TextIO) -> str:
    """Write an answer as it is drawn, then its reward if it is judged; returns its text.

    Ctrl-C ends the answer.
    """
    said: list[int] = []

    def kept() -> Iterator[int]:
        for token in who.answer(prompt, key):
            said.append(token)
            yield token

    try:
        for piece in pieces(who.policy.tokenizer, kept()):
            out.write(visible(piece, lines=True))
            out.flush()
    except KeyboardInterrupt:
        out.write(" (interrupted)")
    text = answer_text(who.policy.tokenizer, said)
    out.write("\n" if text.strip() else f"{ENDED_AT_ONCE}\n")
    if who.judge is not None and said:
        out.write(f"(reward {who.reward(prompt, said):.3f})\n")
    out.flush()
    return text


def answer(path: str, given: str | Row, config: SampleConfig, seed: int, chat: bool) -> None:
    """Write one answer to standard output as it is drawn: what ``complete`` gives for this prompt.

    Args:
      chat: as in ``complete``.

    Raises:
      InputError: as ``load_policy``, and a prompt that has no token or leaves no room.
    """
    check_seed(seed)
    who = speaker(path, config, None, make_mesh(MeshConfig(), jax.devices()[:1]))
    prompt = who.policy.prompt_of(given, "prompt 1", chat)
    write_answer(who, prompt, jax.random.key(seed), sys.stdout)


def converse(
    paths: Sequence[str],
    config: SampleConfig,
    reward: RewardConfig | None = None,
    system: str = "",
    seed: int = 0,
    lines: Iterable[str] | None = None,
    out: TextIO | None = None,
) -> None:
    """Talk to models until the input ends.

    Args:
      paths: of the models, which answer one after the other, each in a conversation of its own.
      lines: what is said; None: what is typed.

    Raises:
      InputError: a setting out of its range, a model without a chat template, or as
        ``load_policy``.
    """
    check_sample(config)
    check_seed(seed)
    to = sys.stdout if out is None else out
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    talks = [Conversation(speaker(path, config, reward, mesh), system) for path in paths]
    for who in (talk.who.policy for talk in talks):
        if not who.chats:
            remedy = "complete plain text by jaxrlhf generate"
            raise InputError(f"{who.path}: has no chat template: {remedy}")
    key = jax.random.key(seed)
    print(HELP, file=to)
    for turn, line in enumerate(typed() if lines is None else lines):
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return
        if word in ("/clear", "/system"):
            system = rest if word == "/system" else system
            for talk in talks:
                talk.begin(system)
        elif word.startswith("/"):
            print(HELP, file=to)
        elif word:
            for talk in talks:
                if len(talks) > 1:
                    print(f"[{talk.who.policy.path}]", file=to)
                try:
                    talk.ask(line.strip(), jax.random.fold_in(key, turn), to)
                except InputError as error:
                    print(f"({error})", file=to)


def typed() -> Iterator[str]:
    """Lines of standard input, with a prompt and a history where that is a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    # Having been imported, it gives input() a history and keys to edit with; Windows has none.
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return

"""Whose text is whose in a rendered chat.

A chat is never taken apart otherwise than by rendering its prefixes. What the assistant's turn i
adds is what

    rendered(turns 0…i)   has after   rendered(turns 0…i−1, with the header of an assistant's turn)

so the end of the turn (its stop token) is in it, and its header is not. That takes a template that
is stable: one that renders the start of a chat alike, whatever follows. Of a template that is not,
its own ``{% generation %}`` marks say which text of several turns is the assistant's; without them
only the last turn is learnt.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import shown
from jaxrlhf.data.chat import KEEP_THOUGHTS, Writer
from jaxrlhf.data.dropped import check_learnt, check_past, check_tools
from jaxrlhf.data.rows import Message, Text

FAMILIES = {
    "gpt_oss": ("<|channel|>analysis", "<|start|>"),
    "deepseek_r1": ("<｜Assistant｜><think>\\n", "split('</think>')[-1]"),
    "qwq": ("assistant\\n<think>\\n", "split('</think>')[-1]", "<tools>", "!enable_thinking"),
    "qwen3": ("<|im_start|>", "<think>\\n\\n</think>\\n\\n", "enable_thinking", "!<function="),
}
"""Training templates that are shipped, and by what words (and by which not) those are known that
they stand in for."""


def render(writer: Writer, prompt: Text, answers: Sequence[Text]) -> tuple[str, tuple[str, ...]]:
    """The text of a prompt and of each answer to it: THE rendering, for training and scoring.

    Args:
      prompt, answers: all plain text, or all chats.

    Returns:
      The prompt's text, header of the assistant's turn included, and each answer's text:
      ``rendered(prompt + answer)`` less its prefix ``rendered(prompt)``.

    Raises:
      InputError: a chat beside plain text, a prompt that ends in an assistant's turn or an answer
        that is not one, a missing or failing chat template, one that is not stable, or one that
        leaves out what is in the chat.
    """
    kinds = {type(text) for text in (prompt, *answers)}
    if kinds == {str}:
        return str(prompt), tuple(str(answer) for answer in answers)
    where = writer.where
    if isinstance(prompt, str) or str in kinds:
        raise InputError(f"{where}: plain text beside a chat; make all columns one or the other")
    # A template would add a second header, and the model see two turns where there is one.
    if prompt[-1]["role"] == "assistant":
        raise InputError(f"{where}: the prompt ends with an assistant's turn; end with a user's")
    text = writer.text(prompt, open_turn=True)
    check_past(writer, enumerate(prompt), text)
    check_tools(writer, prompt, text)
    return text, tuple(_answer(writer, prompt, text, answer) for answer in answers)


def _answer(writer: Writer, prompt: list[Message], text: str, answer: Any) -> str:
    """The text of an answer of one turn, after a prompt that is rendered as ``text``."""
    if answer[0]["role"] != "assistant":
        role = shown(answer[0]["role"])
        raise InputError(
            f"{writer.where}: the answer begins with role {role}; it must be 'assistant'"
        )
    if len(answer) > 1:
        raise InputError(
            f"{writer.where}: the answer has {len(answer)} turns, and only one can be compared; "
            "move the others to the prompt"
        )
    whole = writer.text(prompt + answer, open_turn=False)
    if not whole.startswith(text):
        raise _changes(writer)
    made = whole[len(text) :]
    check_learnt(writer, answer[0], made, len(prompt), lambda: _header(writer, prompt))
    return made


def _header(writer: Writer, prompt: list[Message]) -> str:
    """The header of the assistant's turn after a prompt; it may begin a thought."""
    text, before = (writer.text(prompt, open_turn) for open_turn in (True, False))
    return text[len(before) :] if text.startswith(before) else ""


def _changes(writer: Writer) -> InputError:
    what = "the chat template renders the prompt otherwise once an answer follows"
    return InputError(f"{writer.where}: {what}; {_remedy(writer)}")


def _remedy(writer: Writer) -> str:
    """What to do about a template that is not stable."""
    own = writer.settings.template is None
    for name, marks in FAMILIES.items() if own else ():
        if all((mark.lstrip("!") in writer.template) != mark.startswith("!") for mark in marks):
            return f"give data.chat_template: jaxrlhf:templates/{name}.jinja, made for training"
    return "give a data.chat_template under which prompt + answer starts with the prompt"


def cut_turns(writer: Writer, chat: list[Message], first: int) -> tuple[str, tuple[str, ...]]:
    """A rendered chat, cut where it passes to the assistant and back.

    Args:
      chat: its last turn is an assistant's.
      first: turns before this one count as the prompt's.

    Returns:
      (prompt, pieces): the text up to and including the header of the first assistant's turn from
      ``first`` on; then, in turn, what the assistant wrote and what follows up to and including
      its next header: 2n − 1 pieces for n turns. Of a template that is not stable and marks
      nothing, the last turn alone is a piece, and the writer notes it.

    Raises:
      InputError: a chat that begins with an assistant's turn, has two in a row or does not end
        with one; a missing or failing chat template, one whose marks do not tell the turns apart,
        one that is not stable and for which another is shipped, or one that leaves out what is in
        the chat.
    """
    _check_roles(writer.where, [message["role"] for message in chat])
    turns = [i for i in range(first, len(chat)) if chat[i]["role"] == "assistant"]
    if len(turns) > 1:
        writer = replace(writer, more={KEEP_THOUGHTS: True})
    cuts = (_marked if writer.marks() else _by_prefixes)(writer, chat, turns)
    if cuts is None:
        writer = replace(writer, more={})
        text, pieces = render(writer, chat[:-1], (chat[-1:],))
        if len(turns) > 1:
            line = f"{writer.where}: {len(turns) - 1} earlier of its turns are not"
            writer.note("learn the last turn alone, as the chat template rewrites past ones", line)
        return text, pieces
    whole = writer.text(chat, open_turn=False)
    pieces = tuple(whole[a:b] for a, b in pairwise(cuts))
    check_past(writer, ((i, message) for i, message in enumerate(chat) if i not in turns), whole)
    for turn, piece in zip(turns, pieces[::2], strict=True):
        header = partial(_header, writer, chat[:turn])
        check_learnt(writer, chat[turn], piece, turn, header)
    if writer.tools:
        start = chat[: turns[0]]
        check_tools(writer, start, writer.text(start, open_turn=True))
    return whole[: cuts[0]], pieces


def _check_roles(where: str, roles: Sequence[str]) -> None:
    for here, following in pairwise([None, *roles]):
        if following == "assistant" and here in (None, "assistant"):
            what = "begins with" if here is None else "goes on from one to"
            raise InputError(
                f"{where}: the chat {what} an assistant's turn; let each answer another's"
            )
    if roles[-1] != "assistant":
        role = shown(roles[-1])
        raise InputError(f"{where}: the chat ends with role {role}; it must be 'assistant'")


def _by_prefixes(writer: Writer, chat: list[Message], turns: Sequence[int]) -> list[int] | None:
    """Where each of the assistant's turns begins, after its header, and ends; None if the template
    is not stable, and no other is shipped for it."""
    whole = writer.text(chat, open_turn=False)
    cuts: list[int] = []
    for turn in turns:
        for part, open_turn in ((chat[:turn], True), (chat[: turn + 1], False)):
            text = writer.text(part, open_turn)
            if not open_turn and not whole.startswith(text):
                text = _less_end(writer, text)
            if not whole.startswith(text) or len(text) < (cuts or [0])[-1]:
                remedy = _remedy(writer)
                if "jaxrlhf:templates" in remedy:
                    raise InputError(
                        f"{writer.where}: the chat template renders messages[:{len(part)}] "
                        f"otherwise once others follow; {remedy}"
                    )
                return None
            cuts.append(len(text))
    return cuts


def _less_end(writer: Writer, text: str) -> str:
    """``text`` less the end that some templates write after the last turn, which has its own."""
    less = text.removesuffix(str(writer.tokenizer.eos_token))
    ends = tuple(writer.tokenizer.get_added_vocab())
    return less if less.rstrip().endswith(ends) else text


def _marked(writer: Writer, chat: list[Message], turns: Sequence[int]) -> list[int]:
    """Where the template's marks around each of the assistant's turns begin and end; a header
    inside of them is left out, which the sampler is given.

    Raises:
      InputError: other marks than turns, or a first turn before which the prompt changes.
    """
    spans: list[tuple[int, int]] = []
    for start, end in writer.spans(chat):
        # Several in a row are one.
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, end))
    every = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    if len(spans) != len(every):
        raise InputError(
            f"{writer.where}: the chat template marks {len(spans)} stretches with "
            f"{{% generation %}}, and the assistant has {len(every)} turns; mend the template"
        )
    whole = writer.text(chat, open_turn=False)
    cuts: list[int] = []
    for turn in turns:
        start, end = spans[every.index(turn)]
        header = _header(writer, chat[:turn])
        # Where it begins at the marks, before them, or not at all.
        begin = whole.find(header, max(0, start - len(header)), start + len(header))
        start = start if begin < 0 else max(start, begin + len(header))
        cuts += [start, max(start, end)]
    # What is sampled after must be what is learnt after.
    if whole[: cuts[0]] != writer.text(chat[: turns[0]], open_turn=True):
        raise _changes(writer)
    return cuts

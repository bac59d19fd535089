"""The one place where chats become text, and whose text is whose.

A chat is rendered by the tokenizer's chat template, and never taken apart otherwise than by
rendering its prefixes. What the assistant's turn i adds is what

    rendered(turns 0…i)   has after   rendered(turns 0…i−1, with the header of an assistant's turn)

so the end of the turn (its stop token) is in it, and its header is not. That takes a template that
is stable: one that renders the start of a chat alike, whatever follows.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast as Tokenizer

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.rows import Message, Text, one_line, shown


def render(
    tokenizer: Tokenizer, prompt: Text, answers: Sequence[Text], where: str
) -> tuple[str, tuple[str, ...]]:
    """The text of a prompt and of each answer to it: THE rendering, for training and scoring.

    Args:
      prompt, answers: all plain text, or all chats.
      where: the row's place, for errors.

    Returns:
      The prompt's text, header of the assistant's turn included, and each answer's text:
      ``rendered(prompt + answer)`` less its prefix ``rendered(prompt)``.

    Raises:
      InputError: a chat beside plain text, a prompt that ends in an assistant's turn or an answer
        that is not one, a missing or failing chat template, or one that is not stable.
    """
    kinds = {type(text) for text in (prompt, *answers)}
    if kinds == {str}:
        return str(prompt), tuple(str(answer) for answer in answers)
    if isinstance(prompt, str) or str in kinds:
        raise InputError(f"{where}: plain text beside a chat; make all columns one or the other")
    # A template would add a second header, and the model see two turns where there is one.
    if prompt[-1]["role"] == "assistant":
        raise InputError(f"{where}: the prompt ends with an assistant's turn; end with a user's")
    text = _apply(tokenizer, prompt, where, open_turn=True)
    return text, tuple(_answer(tokenizer, prompt, text, answer, where) for answer in answers)


def _answer(tokenizer: Tokenizer, prompt: list[Message], text: str, answer: Any, where: str) -> str:
    """The text of an answer of one turn, after a prompt that is rendered as ``text``."""
    if answer[0]["role"] != "assistant":
        role = shown(answer[0]["role"])
        raise InputError(f"{where}: the answer begins with role {role}; it must be 'assistant'")
    if len(answer) > 1:
        raise InputError(
            f"{where}: the answer has {len(answer)} turns, and only one can be compared; "
            "move the others to the prompt"
        )
    whole = _apply(tokenizer, prompt + answer, where, open_turn=False)
    if not whole.startswith(text):
        raise InputError(
            f"{where}: the chat template renders the prompt otherwise once an answer follows; "
            "use a template under which prompt + answer starts with the prompt"
        )
    return whole[len(text) :]


def _apply(tokenizer: Tokenizer, chat: list[Message], where: str, open_turn: bool) -> str:
    """A chat as its template writes it; ``open_turn`` adds the header of an assistant's turn."""
    if not tokenizer.chat_template:
        raise InputError(f"{where}: a chat, and the tokenizer has no chat template; use plain text")
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": open_turn}
    try:
        return str(tokenizer.apply_chat_template(chat, **options))
    # Templates index and join what is in the row, which fails with errors of Python's own too.
    except (TemplateError, TypeError, ValueError) as error:
        message = f"{where}: the chat template failed ({one_line(error)}); mend the row or template"
        raise InputError(message) from error


def cut_turns(
    tokenizer: Tokenizer, chat: list[Message], first: int, where: str
) -> tuple[str, tuple[str, ...]]:
    """A rendered chat, cut where it passes to the assistant and back.

    Args:
      chat: its last turn is an assistant's.
      first: turns before this one count as the prompt's.

    Returns:
      (prompt, pieces): the text up to and including the header of the first assistant's turn from
      ``first`` on; then, in turn, what the assistant wrote and what follows up to and including
      its next header: 2n − 1 pieces for n turns.

    Raises:
      InputError: a chat that begins with an assistant's turn, has two in a row or does not end
        with one; a missing or failing chat template, or one that is not stable.
    """
    roles = [message["role"] for message in chat]
    for here, following in pairwise([None, *roles]):
        if following == "assistant" and here in (None, "assistant"):
            what = "begins with" if here is None else "goes on from one to"
            raise InputError(
                f"{where}: the chat {what} an assistant's turn; let each answer another's"
            )
    if roles[-1] != "assistant":
        role = shown(roles[-1])
        raise InputError(f"{where}: the chat ends with role {role}; it must be 'assistant'")
    whole = _apply(tokenizer, chat, where, open_turn=False)
    cuts: list[int] = []
    for turn in (i for i in range(first, len(chat)) if roles[i] == "assistant"):
        # Where the turn begins, after its header; and where it ends.
        for part, open_turn in ((chat[:turn], True), (chat[: turn + 1], False)):
            text = _apply(tokenizer, part, where, open_turn)
            if not whole.startswith(text) or len(text) < (cuts or [0])[-1]:
                raise InputError(
                    f"{where}: the chat template renders messages[:{len(part)}] otherwise once "
                    "others follow, so nothing says which text is the assistant's; use a template "
                    "that does not, or give one prompt and completion a row"
                )
            cuts.append(len(text))
    return whole[: cuts[0]], tuple(whole[a:b] for a, b in pairwise(cuts))

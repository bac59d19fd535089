"""The one place where chats become text: a chat template, and what it is given.

A template gets the messages and the row's ``tools``, the settings' ``template_kwargs`` (and the
row's ``chat_template_kwargs``, as TRL has them), and the run's date where it would read the clock.
Whose text is whose is in turns.py; docs/chat.md says it all in a few pages.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast as Tokenizer

from jaxrlhf.config import Config, DataConfig
from jaxrlhf.config.load import read
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.reading import NotJsonError, parse_json
from jaxrlhf.core.remote import scratch
from jaxrlhf.core.shown import one_line, shown
from jaxrlhf.data.render import Rendered, RenderError, render
from jaxrlhf.data.rows import Message, Row, calls_of, content_text, locate
from jaxrlhf.mesh.processes import assemble, is_first

CLOCK = "strftime_now"
"""The function by which a template reads the clock."""
KEEP_THOUGHTS = "preserve_thinking"
"""The variable by which templates can be told to keep the thoughts of past turns."""


@dataclass(frozen=True)
class ChatSettings:
    """What chats are rendered with."""

    template: str | None = None
    """The text of a Jinja template; None: the tokenizer's."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Given to the template besides the chat."""
    date: str = ""
    """Today, YYYY-MM-DD; "" leaves it to the clock."""
    allow_dropped: bool = False
    """Accept what the template leaves out of a chat, with a note."""


PLAIN = ChatSettings()
"""The tokenizer's template as it is."""


def chat_settings(data: DataConfig) -> ChatSettings:
    """The settings that a run's config describes; InputError if its template cannot be read."""
    template = None
    if data.chat_template:
        try:
            template = locate(data.chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            message = f"data.chat_template={data.chat_template}: cannot be read: {one_line(error)}"
            raise InputError(message) from None
        # A file read as a template ends with the line break that an editor puts there.
        template = template.removesuffix("\n")
    return ChatSettings(template, data.template_kwargs, data.date, data.allow_dropped)


def with_date(config: Config, tokenizer: Tokenizer) -> Config:
    """``config`` with the day that its chat template writes, if it writes one.

    That is ``data.date`` where it is given; that of the config.yaml in the output folder, so that a
    run goes on with the rows it began with; else today, by process 0's clock. All processes call
    this, which exchanges a number.
    """
    templates = chat_settings(config.data).template or tokenizer.chat_template or ""
    texts = templates.values() if isinstance(templates, dict) else [templates]
    if config.data.date or not any(CLOCK in text for text in texts):
        return config
    path = scratch(config.output) / "config.yaml"
    saved = read(path) if path.is_file() else {}
    data = saved.get("data") if isinstance(saved, dict) else None
    known = data.get("date") if isinstance(data, dict) else None
    try:
        day = date.fromisoformat(known) if known else date.today()
    except (TypeError, ValueError):
        said = f"data.date={shown(known)}: is no day"
        raise InputError(f"{path}: {said}: mend it, or give --data.date") from None
    share = slice(1 if is_first() else 0)
    (number,) = assemble(np.array([day.toordinal()])[share], share, 1)
    day = date.fromordinal(int(number))
    return replace(config, data=replace(config.data, date=day.isoformat()))


@lru_cache(maxsize=64)
def dated(template: str, day: str) -> str:
    """``template`` with ``strftime_now`` on that day at midnight, in place of the clock's.

    A macro of that name goes before it: what is passed to a template is data, and no function.
    """
    at = date.fromisoformat(day)
    steps = "".join(
        f"|replace({'%' + code!r}, {at.strftime('%' + code)!r})" for code in _DIRECTIVES
    )
    # The line break after a block is no text, whatever the template begins with.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{template}"


_DIRECTIVES = [*(f"-{code}" for code in "dmyjHIMS"), *"dmYyBbAajUWwuGVHIMSfpDFTRcxXeh"]
"""What a date's format may hold; those with a hyphen first, which hold no other."""


@dataclass(frozen=True)
class Writer:
    """The rendering of the chats of one row."""

    tokenizer: Tokenizer
    where: str
    """``path:line``, for errors."""
    settings: ChatSettings = PLAIN
    values: Mapping[str, Any] = field(default_factory=dict)
    """The row's columns, of which ``tools`` and ``chat_template_kwargs`` are read."""
    notes: dict[str, dict[str, str]] = field(default_factory=dict)
    """What is to be said of the rows of a file: by what it is and the row's place, a line."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Given to the template, if it reads it and nothing else says otherwise."""

    def note(self, kind: str, line: str) -> None:
        """Remember something to be said, once for all rows of its kind."""
        self.notes.setdefault(kind, {}).setdefault(self.where, line)

    @cached_property
    def tools(self) -> list[dict[str, Any]] | None:
        """The JSON schemas in the column ``tools``, which may hold them as a JSON string."""
        tools = self.values.get("tools")
        if isinstance(tools, str):
            try:
                tools = parse_json(tools.encode())
            except NotJsonError as error:
                message = f"{self.where}: tools={shown(tools)} is not JSON ({error})"
                raise InputError(f"{message}; mend or drop it") from None
        if not isinstance(tools, list | None) or not all(isinstance(x, dict) for x in tools or ()):
            kind = "a list of JSON schemas, or that as a JSON string"
            raise InputError(f"{self.where}: tools={shown(tools)}: should be {kind}")
        return tools or None

    @cached_property
    def template(self) -> str:
        """The text of the template; InputError if there is none."""
        if self.settings.template is not None:
            return self.settings.template
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{self.where}: a chat, and the tokenizer has no chat template; "
                "give data.chat_template, or use plain text"
            )
        try:
            return str(self.tokenizer.get_chat_template(tools=self.tools))
        except ValueError as error:  # several, and none of them is the default
            message = f"{self.where}: {one_line(error)}; give data.chat_template"
            raise InputError(message) from None

    @cached_property
    def _source(self) -> str:
        """The template's text as it is run."""
        clock = self.settings.date and CLOCK in self.template
        return dated(self.template, self.settings.date) if clock else self.template

    @cached_property
    def _kwargs(self) -> dict[str, Any]:
        row = self.values.get("chat_template_kwargs") or {}
        if not isinstance(row, dict):
            raise InputError(f"{self.where}: chat_template_kwargs={shown(row)}: is no object")
        named = {f"data.template_kwargs.{name}": name for name in self.settings.kwargs}
        named |= {f"chat_template_kwargs.{name}": name for name in row}
        for title, name in named.items():
            if not self.reads(name):
                message = f"{self.where}: {title}: the chat template does not read it"
                raise InputError(f"{message}; mend its name or leave it out")
        more = {name: value for name, value in self.more.items() if self.reads(name)}
        return more | dict(self.settings.kwargs) | row

    def reads(self, name: str) -> bool:
        """Whether the template's text has a word ``name``."""
        return re.search(rf"\b{re.escape(name)}\b", self.template) is not None

    def text(self, chat: list[Message], open_turn: bool, tools: bool = True) -> str:
        """A chat as its template writes it.

        Args:
          open_turn: add the header of an assistant's turn.
          tools: False leaves the row's tools out.

        Raises:
          InputError: a missing or failing chat template.
        """
        return self._rendered(chat, open_turn, tools)[0]

    def _rendered(
        self, chat: list[Message], open_turn: bool, tools: bool = True, spans: bool = False
    ) -> Rendered:
        chat = self._readable(chat)
        try:
            return self._run(chat, open_turn, tools, spans)
        except RenderError as error:
            raise self._failed(error, chat) from error

    def _run(self, chat: list[Message], open_turn: bool, tools: bool, spans: bool) -> Rendered:
        given = {
            **self.tokenizer.special_tokens_map,
            **self._kwargs,
            "messages": chat,
            "tools": self.tools if tools else None,
            "add_generation_prompt": open_turn,
        }
        return render(self.template, self._source, given, spans)

    def _readable(self, chat: list[Message]) -> list[Message]:
        """The chat as its template can read it: parts of text joined, unless it takes parts."""
        if not any(isinstance(message.get("content"), list) for message in chat):
            return chat
        if self._takes_parts:
            return chat
        return [
            {**message, "content": content_text(message)}
            if isinstance(message.get("content"), list)
            else message
            for message in chat
        ]

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes the text of a part, and not the part as Python writes it."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            text, _ = self._run(probe, open_turn=False, tools=False, spans=False)
        except RenderError:
            return False
        return "probe" in text and "'text'" not in text and '"text"' not in text

    def spans(self, chat: list[Message]) -> list[tuple[int, int]]:
        """Where in the text of a whole chat the template's ``{% generation %}`` marks are."""
        return self._rendered(chat, open_turn=False, spans=True)[1]

    def marks(self) -> bool:
        """Whether the template says itself which text is the assistant's."""
        return re.search(r"{%-?\s*generation\s*-?%}", self.template) is not None

    def _failed(self, error: BaseException, chat: list[Message]) -> InputError:
        remedy = "mend the row or template"
        # Some templates join the arguments to other text, as DeepSeek's do.
        calls = (call for message in chat for _, call in calls_of(message))
        if any(isinstance(call.get("arguments"), dict) for call in calls):
            remedy += "; if it joins a call's arguments to text, give them as a JSON string"
        return InputError(f"{self.where}: the chat template failed ({one_line(error)}); {remedy}")


def writer_of(row: Row, tokenizer: Tokenizer, settings: ChatSettings, notes: dict) -> Writer:
    """The rendering of a row's chats."""
    return Writer(tokenizer, row.where, settings, row.values, notes)

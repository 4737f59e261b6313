"""
Keep control tokens to the template: nothing that is said can become one.

What is said gets a mark inside each control token that it spells, and at its ends where it could complete
one; the marks travel through the template, and no control token may be where they come out. Nearly all
texts get none. Only a template that removes letters from what is said, or changes their case, could still
make a control token of it. Knows no conversation and no token ids.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

from recollect.errors import TemplateError
from recollect.text.tokenizer import ControlTokens, Shown
from recollect.types import Message

ToolSchemas = Sequence[Mapping[str, Any]]
Render = Callable[[list[Message], ToolSchemas], str]

_MARKS: Final = (range(0xFDD0, 0xFDF0), range(0xF0000, 0x10FFFE))
"""
Characters of which one marks: noncharacters, for which no text has a use, then those of private use.
Nothing strips, splits, escapes them or changes their case. Source: The Unicode Standard, sections 23.5
and 23.7.
"""

_SCHEMA_WORDS: Final = frozenset(
    {"type", "function", "name", "description", "parameters", "properties", "required", "items"}
    | {"enum", "default", "title", "object", "array", "string", "integer", "number", "boolean"}
)
"""Words that templates look up in the descriptions of tools: to mark them would hide them."""


class Guard:
    """Marks what is said in one conversation. Immutable."""

    def __init__(self, control: ControlTokens, messages: Sequence[Message], tools: ToolSchemas):
        self._control = control
        values = [value for one in messages for name, value in one.items() if name != "role"]
        said = [text for value in values for text in strings_in(value)]
        suspicious: list[str] = []
        if control.may_be_in(said):
            suspicious += said
        if tools and control.may_be_in_json(_json(tools), except_for=_SCHEMA_WORDS):
            suspicious += strings_in(tools)
        self.is_needed: Final = any(map(self._cuts, suspicious))
        """Whether anything that is said could make a control token."""
        self._mark = _new_mark([*said, *strings_in(tools)]) if self.is_needed else ""

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages with marks in them."""
        return [cast("Message", {**one, **self._marked(_said_in(one))}) for one in messages]

    def tools(self, tools: ToolSchemas) -> list[Mapping[str, Any]]:
        """Return descriptions of tools with marks in them."""
        return [self._marked(tool) for tool in tools]

    def read(self, text: str) -> Shown:
        """Return a text that a template made of what is marked."""
        parts = text.split(self._mark)
        breaks, end = [], 0
        for part in parts[:-1]:
            end += len(part)
            breaks.append(end)
        return Shown("".join(parts), tuple(breaks))

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            ends = [0, *self._cuts(value), len(value)]
            if len(ends) == 2:
                return value
            return self._mark.join(value[a:b] for a, b in itertools.pairwise(ends))
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(one) for key, one in value.items()}
        return [self._marked(one) for one in value] if isinstance(value, list | tuple) else value

    def _cuts(self, text: str) -> list[int]:
        """Return where a text is to be marked."""
        if text in _SCHEMA_WORDS:
            return []
        control, core = self._control, text.strip()
        cuts = {place + 1 for place in control.begins(text)}
        if core and control.may_begin_before(core):
            cuts.add(len(text) - len(text.lstrip()))
        if core and control.may_end_after(core):
            cuts.add(len(text.rstrip()))
        return sorted(cuts)


def shown(
    render: Render, messages: list[Message], tools: ToolSchemas, control: ControlTokens
) -> tuple[Shown, Guard | None]:
    """
    Return what a template shows of a conversation.

    Beside it, the guard whose marks the template reacted to; None where it shows the same with them
    as without.
    """
    guard = Guard(control, messages, tools)
    text = render(messages, tools)
    if not guard.is_needed:
        return Shown(text), None
    marked = guard.read(render(guard.messages(messages), guard.tools(tools)))
    if marked.text == text:
        return marked, None
    # The template looks at what is said. Where that is about something else than control tokens,
    # its own answer counts; otherwise the one that it gives to a text without any.
    if _written(Shown(text), control) == _written(marked, control):
        return Shown(text), None
    return marked, guard


def _written(text: Shown, control: ControlTokens) -> list[str]:
    """Return the control tokens that lie across no break, in order."""
    found, start = [], 0
    while (span := control.find(text.text, start)) is not None:
        if text.has_break(*span):
            start = span[0] + 1
        else:
            found.append(text.text[slice(*span)])
            start = span[1]
    return found


def _new_mark(strings: Iterable[str]) -> str:
    """
    Return a character that is in none of the texts, so that no two of them can make it together.

    Raises:
        TemplateError: They have every one that could be taken.
    """
    used = set().union(*strings)
    for place in itertools.chain(*_MARKS):
        if chr(place) not in used:
            return chr(place)
    raise TemplateError(
        "The messages hold every character of private use, which no text needs: take some out."
    )


def _json(tools: ToolSchemas) -> str:
    return json.dumps(list(tools), ensure_ascii=False)


def _said_in(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "role"}


def strings_in(value: Any) -> Iterable[str]:
    """Return the texts of a JSON value, keys among them."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping):
        return [text for pair in value.items() for one in pair for text in strings_in(one)]
    if isinstance(value, list | tuple):
        return [text for one in value for text in strings_in(one)]
    return ()

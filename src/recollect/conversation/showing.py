"""
What a prompt is made of, and where a template shows replies that call tools.

A template writes the JSON of calls in its own way, so the text of such a reply is seldom what the model
wrote. The reply is recognised all the same where the template shows calls of the same tools with the same
arguments and the same text beside them; its ids then stay those that the model generated.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from recollect.conversation.matching import shared_characters
from recollect.conversation.tree import Node, canonical_reply, parsed_reply
from recollect.text.call_parts import object_of
from recollect.text.template import ChatTemplate
from recollect.text.tool_calls import shown_calls
from recollect.text.tool_formats import HERMES, ToolFormat
from recollect.types import Message, MessageToolCall, ToolCall, ToolLinks

_MOST_MARKED: Final = 4096
"""Characters of a call without arguments, and of what a template puts around it."""
_MOST_SHOWN: Final = 8
"""How many times as many characters a template may take for a reply with calls: it escapes some."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A reply, or what leads to it, that is shown otherwise than when it was generated."""

    reply: int
    """Which, counted from 0."""
    start: int
    """Of the prompt's ids, the first that was another then."""
    end: int
    """Where in the prompt the reply ends."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as token ids."""

    token_ids: list[int]
    rewritten: tuple[Rewritten, ...] = ()
    """The replies of this model that are shown otherwise; there the ids are those of the template's text."""
    reencoded_replies: int = 0
    """Replies that another model wrote: their text is encoded, since its ids mean nothing here."""
    reencoded_length: int = 0
    """Leading ids up to the end of the last of these."""
    ending: str = ""
    """The last characters of the text, in which one sees whether the template has opened reasoning."""
    generated_length: int = 0
    """Leading ids up to the end of the last reply of this model. All but the last of them were read
    before, unless something is shown otherwise."""

    @property
    def rewritten_reply(self) -> int | None:
        """Return the first reply, counted from 0, that is shown otherwise; None where none is."""
        return self.rewritten[0].reply if self.rewritten else None


@dataclass(frozen=True, slots=True)
class Opening:
    """What a template shows after a reply, or from the beginning on, up to where the next one begins."""

    after: int
    """Which reply that is, counted from 0; -1: from the beginning on."""
    text: str


_FIRST, _PROBES, _LAST = 4, 16, 16
"""Replies at the beginning, spread over all, and at the end, of which what led to them is rendered."""
FEW_REPLIES: Final = _FIRST + _LAST
"""Of a conversation with so few, what led to each is rendered."""
_MOST_ENDING: Final = 200
"""Characters of what a template shows to begin a reply; longer than that of any."""
_LEAST_ENDING: Final = 8
"""Of which so few may stand anywhere."""
_MOST_PLACES: Final = 16
"""In what is shown before a reply, that are looked at."""


class Leads:
    """
    What led to the replies of one long conversation when they were generated, rendered for some of them.

    To render for each of a thousand replies what was said before it takes a thousand times as long as all
    of it. But a template begins every reply alike: how, is learned from some and tried on others, and where
    it is once another, nothing is guessed any more. A wrong guess would cost tokens that are read again,
    and no more: where it says other things than what is shown, it does not count.
    Used for one prompt, by one thread.
    """

    def __init__(self, replies: int) -> None:
        self._replies = replies
        self._may_guess = True
        self._ending: str | None = None
        """With what all texts ended that were rendered: it begins a reply."""

    def guess(self, reply: int, opening: str) -> str | None:
        """
        Return what led to a reply; None: it has to be rendered.

        Args:
            reply: Which, counted from 0.
            opening: What is shown now between the reply before and this one.
        """
        step = max(1, self._replies // _PROBES)
        is_probe = reply < _FIRST or reply >= self._replies - _LAST or reply % step == 0
        return None if is_probe else self._guessed(opening)

    def learn(self, opening: str, asked: str) -> None:
        """Take note of what led to a reply, and of what is shown there now."""
        if self._ending is None:
            self._ending = asked[-_MOST_ENDING:]
            return
        known = self._ending
        same = shared_characters(known[::-1], asked[-_MOST_ENDING:][::-1])
        self._ending = known[len(known) - same :]
        guessed = self._guessed(opening)
        self._may_guess &= guessed is None or guessed == asked

    def _guessed(self, opening: str) -> str | None:
        ending = self._ending
        if not self._may_guess or ending is None or len(ending) < _LEAST_ENDING:
            return None
        # Where most of it stands, and of such places the last.
        start = re.escape(ending[:_LEAST_ENDING])
        places = [found.start() for found in re.finditer(start, opening)][-_MOST_PLACES:]
        lengths = [shared_characters(ending, opening[place:]) for place in places]
        _, place = max(zip(lengths, places, strict=True), default=(0, -1))
        return None if place < 0 else opening[:place] + ending


def message_of(reply: Node, template: ChatTemplate) -> Message:
    """Return a reply with calls as a template takes it: with calls beside the text, or in it."""
    links, form, message = (
        cast("ToolLinks", reply.links),
        template.tool_format,
        reply.written_message(),
    )
    parsed = parsed_reply(reply.content, links, is_cut=True)
    given = [object_of(call.arguments or "{}") for call in parsed.calls]
    if any(one is None for one in given):
        return message  # it was cut within a call
    if template.call_style.takes_calls:
        calls = _calling(parsed.content, parsed.calls, cast("list[dict[str, Any]]", given))
        return cast("Message", {**message, **calls})
    if links.format == (None if form is HERMES else form.name):
        return message
    text = form.text_of([(call.name, call.arguments) for call in parsed.calls])
    return {**message, "content": "\n".join(filter(None, (parsed.content, text)))}


def marked(mark: str, calls: Sequence[MessageToolCall]) -> tuple[Message, Sequence[ToolCall]]:
    """
    Return a message whose calls have a mark in them, and those calls.

    The mark is in the first call, since some templates show no text beside calls.
    """
    given: list[dict[str, Any]] = [{mark: ""}, *({} for _ in calls[1:])]
    made = [
        ToolCall(call["id"], call["function"]["name"], json.dumps(one))
        for call, one in zip(calls, given, strict=True)
    ]
    return _calling("", made, given), made


def changed(message: Message, change: Callable[[Any], Any]) -> Message:
    """Return a message with other values; its role and the names of its fields are the template's words."""
    fields: dict[str, Any] = {
        name: value if name in ("role", "tool_calls") else change(value)
        for name, value in message.items()
    }
    if calls := message.get("tool_calls"):
        fields["tool_calls"] = [
            {
                **call,
                "id": change(call["id"]),
                "function": {name: change(value) for name, value in call["function"].items()},
            }
            for call in calls
        ]
    return cast("Message", fields)


def collapsed(text: str, marked: Mapping[str, Sequence[ToolCall]], format_: ToolFormat) -> str:
    """
    Return a text with a mark alone where calls are shown that have it in them.

    Args:
        text: What a template shows.
        marked: Calls by the marks that are in them, in their order in the text.
        format_: How the template writes calls.
    """
    parts, done = list[str](), 0
    for mark, calls in marked.items():
        place = text.find(mark, done)
        start = text.rfind(format_.beginning, done, place) if place >= 0 else -1
        if start < 0:
            continue
        found = shown_calls(text, start, calls, format_, most=_MOST_MARKED * len(calls))
        if found is not None and found.end > place:
            parts += [text[done:start], mark]
            done = found.end
    return "".join([*parts, text[done:]])


def place_of(
    reply: Node, text: str, start: int, leads: Sequence[str], format_: ToolFormat
) -> tuple[int, int] | None:
    """
    Return from where to where a reply is shown; None where it says or calls other things there.

    Args:
        reply: With calls.
        text: What a template shows.
        start: Where what leads to the reply begins.
        leads: What that may be.
        format_: How the template writes calls.
    """
    said = parsed_reply(reply.content, cast("ToolLinks", reply.links), is_cut=True)
    most = _MOST_SHOWN * len(reply.content) + _MOST_MARKED
    for lead in dict.fromkeys(leads):
        if text.startswith(lead, start):
            begin = start + len(lead)
            found = shown_calls(text, begin, said.calls, format_, most=most)
            if found is not None and canonical_reply(found.reply) == canonical_reply(said):
                return begin, found.end
    return None


def _calling(
    content: str, calls: Sequence[ToolCall], arguments: Sequence[Mapping[str, Any]]
) -> Message:
    """Return a message with calls beside its text, with objects as arguments."""
    each = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": given}}
        for call, given in zip(calls, arguments, strict=True)
    ]
    return cast("Message", {"role": "assistant", "content": content, "tool_calls": each})

"""
Turn a conversation into token ids, with each reply as the ids that the model generated.

`PromptEncoder` renders the template twice, once with marks in place of the replies, which tell where
each reply is shown. There the ids that the model generated go in, and the text around them is encoded
piece by piece, so a reply is never decoded and encoded again. The model reads what the template shows,
with one exception: where a reply is shown as it was generated, space at its ends apart, and what leads
to it as it was then, space and marks of thinking around nothing apart, the ids are those that the model
has read and generated. Whatever else the template shows otherwise is read again, and told.

`guard` keeps control tokens to the template: what is said is text even where it spells one.
Nothing here knows KV: what of a prompt is computed already is found out by its sequence.
"""

import copy
import json
import re
import secrets
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from sys import getsizeof
from typing import Any, Final, cast

from recollect.conversation.guard import Render, ToolSchemas, shown, strings_in
from recollect.conversation.matching import shared_characters
from recollect.conversation.tree import (
    ROOT_KEY,
    Node,
    canonical_reply,
    message_key,
    parsed_reply,
)
from recollect.errors import InvalidParameterError, TemplateError
from recollect.text.call_parts import object_of
from recollect.text.reasoning import ShowingTokenizer, says_nothing, says_the_same
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import ControlTokens, Shown, Tokenizer, encode_shown
from recollect.text.tool_calls import ShownCalls, shown_calls
from recollect.text.tool_formats import HERMES, control_marks
from recollect.types import (
    Message,
    Remembered,
    Role,
    ToolCall,
    ToolLinks,
    common_prefix_length,
)


def has_calls(node: Node) -> bool:
    """Return whether a message calls tools."""
    return node.links is not None and bool(node.links.call_ids)


def calling(
    content: str, calls: Sequence[ToolCall], arguments: Sequence[Mapping[str, Any]]
) -> Message:
    """Return a message with calls beside its text, as templates get it: with objects as arguments."""
    each = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": given}}
        for call, given in zip(calls, arguments, strict=True)
    ]
    return cast("Message", {"role": "assistant", "content": content, "tool_calls": each})


MOST_REMEMBERED_BYTES: Final = 32 << 20
"""
Of segments whose ids are remembered, for all sessions of a model together.

Four bytes a token, so 8 million tokens: thousands of turns, or 270 prompts of 30,000. What is
forgotten is encoded again, at 15 million characters in a second. Source: smollm2 on two cores.
"""

_MOST_MARKED: Final = 4096
"""Characters of a call without arguments, and of what a template puts around it."""
_MOST_SHOWN: Final = 8
"""How many times as many characters a template may take for a reply with calls: it escapes some."""

_ENTRY_BYTES: Final = 250
"""What one segment takes beside its ids: its name, the array's head and its place in the table.
Source: `sys.getsizeof` of these in CPython 3.12, rounded up."""


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


MOST_OPENING_BYTES: Final = 2 << 20
"""
Of what led to replies, for all sessions of a model together: hundreds of turns of agents, or the first
turns of dozens. What is forgotten is rendered again.
"""


@dataclass(frozen=True, slots=True)
class Opening:
    """What a template shows after a reply, or from the beginning on, up to where the next one begins."""

    after: int
    """Which reply that is, counted from 0; -1: from the beginning on."""
    text: str


def size_of_ids(ids: "array[int]") -> int:
    """Return how many bytes a segment takes."""
    return ids.itemsize * len(ids) + _ENTRY_BYTES


_ENDING_CHARACTERS: Final = 200
"""Longer than any mark that opens reasoning."""


class PromptEncoder:
    """
    Encodes conversations with one template and one tokenizer.

    Safe from any thread; what it remembers is derived, and bounded.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, *, fingerprint: str = ""
    ) -> None:
        self._fingerprint = fingerprint
        self._template = template
        self._tokenizer = tokenizer
        self.remembered: Final = Remembered(size_of_ids, MOST_REMEMBERED_BYTES)
        self.openings: Final = Remembered[Opening](
            lambda one: getsizeof(one.text) + _ENTRY_BYTES, MOST_OPENING_BYTES
        )
        self._written = Remembered[str](
            lambda one: getsizeof(one) + _ENTRY_BYTES, MOST_OPENING_BYTES
        )
        # Texts that nobody writes and that templates which strip or split leave whole.
        self._secret = secrets.token_hex(12)
        self._typed_mark = f"typed{self._secret}x"

    def encode(
        self, path: Sequence[Node], said: str | None = None, tools: ToolSchemas = ()
    ) -> Prompt:
        """
        Return the ids of the messages and of the start of the reply to them.

        Args:
            path: Messages from the first on.
            said: A user's message after those, which is no node yet.
            tools: What the model may call, as the template expects it.

        Raises:
            TemplateError: The template refuses the conversation.
        """
        messages = self._messages(path)
        if said is not None:
            messages.append({"role": "user", "content": said})

        return self._remembered(_Encoding(self, path, messages, tools, self.asking), said=said)

    def _remembered(
        self, encoding: "_Encoding", role: Role = "assistant", said: str | None = None
    ) -> Prompt:
        """Return the prompt, and remember what leads to the reply where it is a reply that follows."""
        prompt = encoding.prompt()
        if role == "assistant" and (opening := encoding.opening()) is not None:
            self.openings.put(encoding.name(len(encoding.path), said), opening)
        return prompt

    def said_ids(self, reply: Node) -> list[int]:
        """Return the ids of a reply by itself: those that were generated, or of its text."""
        if reply.token_ids is not None and self.is_own(reply):
            return [*reply.token_ids]
        return self.ids(Shown("").followed_by_said(reply.content, self.control))

    def asking(self, messages: list[Message], tools: ToolSchemas) -> str:
        """Return what the template shows of messages and of the start of the reply to them."""
        return self._template.render(messages, add_generation_prompt=True, tools=tools)

    def with_options(self, options: Mapping[str, Any]) -> "PromptEncoder":
        """
        Return one that gives the template options besides the conversation.

        Raises:
            InvalidParameterError: One is no option, or a text in it could be a control token.
        """
        for name, value in options.items():
            if any(map(self.control.may_make, (name, *strings_in(value)))):
                raise InvalidParameterError(
                    f"The template option {name[:40]!r} has a text in which the model could read a "
                    "control token: leave that out.",
                    param="template_options",
                )
        other = copy.copy(self)
        other._template = self._template.with_options(options)
        return other

    def encode_typed(
        self, path: Sequence[Node], typed: str, tools: ToolSchemas = (), *, role: Role = "user"
    ) -> Prompt:
        """
        Return the ids of the messages and of a user's message that is still being typed.

        They end where the text ends: what the template puts after it would have to be taken back.

        Args:
            path: Messages from the first on.
            typed: What of the message is there.
            tools: What the model may call.
            role: Whose message it is.

        Raises:
            TemplateError: The template refuses the conversation, or does not show a reply at its end.
        """
        last: Message = {"role": role, "content": self._typed_mark}

        def render(messages: list[Message], tools: ToolSchemas) -> str:
            text = self._template.render(
                [*messages, last], add_generation_prompt=False, tools=tools
            )
            before, mark, _ = text.partition(self._typed_mark)
            if not mark and role == "assistant":
                raise TemplateError("The model's chat template does not show a reply at the end.")
            return before

        messages = self._messages(path)
        return self._remembered(_Encoding(self, path, messages, tools, render, typed), role)

    def _messages(self, path: Sequence[Node]) -> list[Message]:
        """Return messages as the template takes them: with calls beside the text, or as it writes them."""
        return [self._message(node) if has_calls(node) else node.written_message() for node in path]

    def _message(self, node: Node) -> Message:
        reply = parsed_reply(node.content, cast("ToolLinks", node.links), is_cut=True)
        form = self._template.tool_format
        given = [object_of(call.arguments or "{}") for call in reply.calls]
        if any(one is None for one in given):
            return node.written_message()  # it was cut within a call
        message = node.written_message()
        if self._template.call_style.takes_calls:
            called = calling(reply.content, reply.calls, cast("list[dict[str, Any]]", given))
            return {**message, **called}
        if cast("ToolLinks", node.links).format == (None if form is HERMES else form.name):
            return message
        calls = form.text_of([(call.name, call.arguments) for call in reply.calls])
        return {**message, "content": "\n".join(filter(None, (reply.content, calls)))}

    def shown_calls(
        self, text: str, start: int, calls: Sequence[ToolCall], most: int
    ) -> ShownCalls | None:
        """Return the calls that are shown in a text from a place on; see `tool_calls.shown_calls`."""
        return shown_calls(text, start, calls, self._template.tool_format, most=most)

    def collapsed(self, text: str, marked: Mapping[int, Sequence[ToolCall]]) -> str:
        """Return a text with the mark of a reply alone where it shows calls with that mark in them."""
        parts, done = list[str](), 0
        beginning = self._template.tool_format.beginning
        for number, calls in marked.items():
            mark = self.mark(number)
            place = text.find(mark, done)
            start = text.rfind(beginning, done, place) if place >= 0 else -1
            if start < 0:
                continue
            found = self.shown_calls(text, start, calls, _MOST_MARKED * len(calls))
            if found is not None and found.end > place:
                parts += [text[done:start], mark]
                done = found.end
        return "".join([*parts, text[done:]])

    def mark(self, reply: int) -> str:
        """Return the text that stands for what a reply says."""
        return f"reply{reply}y{self._secret}x"

    def thought_mark(self, reply: int) -> str:
        """Return the text that stands for what was thought before a reply."""
        return f"thought{reply}y{self._secret}x"

    def before_said(self, reply: Node) -> str:
        """Return what this model wrote before what a reply says: its reasoning, with the marks."""
        marks = self._template.reasoning
        if marks is None or reply.token_ids is None:
            return ""
        name = blake2b(array("i", reply.token_ids).tobytes(), digest_size=16).digest()
        known = self._written.get(name)
        if known is None:
            calls = control_marks(self._template.tool_format, self.control)
            text = ShowingTokenizer(self._tokenizer, marks, calls).decode(reply.token_ids)
            known = text.removesuffix(reply.content) if text.endswith(reply.content) else ""
            self._written.put(name, known)
        return known

    def unmarked(self, text: str) -> tuple[list[int], list[str]]:
        """
        Return which replies a text shows, and what is around them: one text more.

        A reply that is shown again, or after a later one, and all that follows it, is left out.
        """
        first, *rest = re.split(rf"reply(\d+)y{self._secret}x", text)
        numbers = [int(number) for number in rest[::2]]
        last = 0
        while last < len(numbers) and (not last or numbers[last - 1] < numbers[last]):
            last += 1
        return numbers[:last], [first, *rest[1::2]][: last + 1]

    @property
    def control(self) -> ControlTokens:
        """Return the tokenizer's control tokens."""
        return self._tokenizer.control_tokens

    def is_own(self, reply: Node) -> bool:
        """Return whether this model generated a reply."""
        return reply.token_ids is not None and reply.fingerprint == self._fingerprint

    def ids(self, part: Shown) -> list[int]:
        """Return the ids of a part of what is shown, from memory where they are there."""
        name = part.name()
        known = self.remembered.get(name)
        if known is not None:
            return known.tolist()
        ids = encode_shown(self._tokenizer, part)
        self.remembered.put(name, array("i", ids))
        return ids


class _Encoding:
    """
    One conversation on its way to token ids. Used once, by one thread.

    Invariant: the ids stand for the text up to `_done`, and the replies up to `_end` were looked at.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        path: Sequence[Node],
        messages: list[Message],
        tools: ToolSchemas,
        render: Render,
        typed: str = "",
    ) -> None:
        self._encoder, self._control = encoder, encoder.control
        self.path, self._messages, self._tools = path, messages, tools
        self._render = render
        self._whole, self._guard = shown(render, messages, tools, self._control)
        self._length = len(self._whole.text)
        if typed:
            self._whole = self._whole.followed_by_said(typed, self._control)
        self._places = [place for place, node in enumerate(path) if node.role == "assistant"]
        self._ids: list[int] = []
        self._done = self._end = 0
        # The reply that ends at `_end`, -1 before the first; None: nobody knows where it ends.
        self._last: int | None = -1
        self._rewritten: list[Rewritten] = []
        self._reencoded = self._reencoded_length = self._generated_length = 0

    def prompt(self) -> Prompt:
        """Return the prompt."""
        numbers, around = self._marked(self._render, len(self._messages))
        for place, number in enumerate(numbers):
            self._drop(range(numbers[place - 1] + 1 if place else 0, number))
            self._reply(number, *around[place : place + 2], is_last=place + 1 == len(numbers))
            if self._last is None:
                break
        else:
            self._drop(range(numbers[-1] + 1 if numbers else 0, len(self._places)))
        return Prompt(
            token_ids=self._ids + self._encoder.ids(self._whole.part(self._done)),
            rewritten=tuple(self._rewritten),
            reencoded_replies=self._reencoded,
            reencoded_length=self._reencoded_length,
            ending=self._whole.text[-_ENDING_CHARACTERS:],
            generated_length=self._generated_length,
        )

    def opening(self) -> Opening | None:
        """Return what is shown after the last reply; None where it is not known where that ends."""
        if self._last is None:
            return None
        return Opening(self._last, self._whole.text[self._end :])

    def name(self, messages: int, said: str | None = None) -> bytes:
        """Return a hash of the first *messages* messages, and of the text *said* by a user after them."""
        name, key = blake2b(digest_size=16), ROOT_KEY
        for node in self.path[:messages]:
            key = node.key
            name.update(key)
        if said is not None:
            name.update(message_key(key, "user", said))
        return name.digest()

    def _marked(self, render: Render, count: int) -> tuple[list[int], list[str]]:
        """Return which replies are shown of the first *count* messages, and what is around them."""
        messages, tools, guard = self._messages[:count], self._tools, self._guard
        if guard is not None:
            messages, tools = guard.messages(messages), guard.tools(tools)
        marked: dict[int, Sequence[ToolCall]] = {}
        thoughts: dict[str, str] = {}
        for number, place in enumerate(self._places):
            if place >= count:
                continue
            mark, said = self._encoder.mark(number), self._messages[place]
            messages[place] = {"role": "assistant", "content": mark}
            if calls := said.get("tool_calls"):
                # The mark is in the first call: some templates show no text beside calls.
                given: list[dict[str, Any]] = [{mark: ""}, *({} for _ in calls[1:])]
                as_called = [
                    ToolCall(call["id"], call["function"]["name"], json.dumps(one))
                    for call, one in zip(calls, given, strict=True)
                ]
                messages[place] = calling("", as_called, given)
                marked[number] = as_called
            if thought := said.get("reasoning_content"):
                instead = self._encoder.thought_mark(number)
                messages[place]["reasoning_content"] = instead
                thoughts[instead] = thought
        text = render(messages, tools)
        text = text if guard is None else guard.read(text).text
        numbers, around = self._encoder.unmarked(self._encoder.collapsed(text, marked))
        for instead, thought in thoughts.items():
            around = [one.replace(instead, thought) for one in around]
        return numbers, around

    def _asked(self, number: int) -> str | None:
        """Return what led to a reply of this model when it was generated; None where nobody knows."""
        place = self._places[number]
        if not self._encoder.is_own(self.path[place]):
            return None
        name = self.name(place)
        opening = self._encoder.openings.get(name)
        if opening is None:
            try:
                numbers, around = self._marked(self._encoder.asking, place)
            except TemplateError:
                return None
            opening = Opening(numbers[-1] if numbers else -1, around[-1])
            self._encoder.openings.put(name, opening)
        return opening.text if opening.after == self._last else None

    def _drop(self, numbers: Iterable[int]) -> None:
        """Take note of replies that are not shown."""
        for number in numbers:
            if self._encoder.is_own(self.path[self._places[number]]):
                self._tell(number, self._asked(number), None)

    def _reply(self, number: int, opening: str, after: str, *, is_last: bool) -> None:
        """Take the next reply that is shown, between two texts of the template."""
        reply, asked = self.path[self._places[number]], self._asked(number)
        is_own = self._encoder.is_own(reply)
        before = self._encoder.before_said(reply) if is_own else ""
        led = None if before else asked
        if self._messages[self._places[number]].get("tool_calls"):
            place = self._shown_calls(reply, led, opening)
        else:
            place = self._shown(reply.content, led, opening, after)
        if place is None:
            stop = self._found(opening, after, is_last=is_last)
            if is_own:
                self._tell(number, asked, stop)
            elif reply.token_ids is not None:
                self._reencode(len(self._encoder.ids(self._whole.part(self._done, stop))))
            self._last, self._end = (None, self._end) if stop is None else (number, stop)
            return
        start, stop = place
        lead = self._whole.part(self._done, start)
        if is_own:
            now = self._whole.text[self._end : start]
            same = shared_characters(asked or now, now)
            if before and (asked is None or not says_the_same(asked + before, now)):
                self._tell(number, asked, stop)
                self._last, self._end = number, stop
                return
            if before and asked is not None:
                lead = self._whole.part(self._done, self._end + same)
                lead = Shown(lead.text + asked[same:], lead.breaks)
            elif asked is not None and asked != now:
                if says_nothing(asked, same) and says_nothing(now, same):
                    lead = self._whole.part(self._done, self._end + same)
                    lead = Shown(lead.text + asked[same:], lead.breaks)
                else:
                    self._tell(number, asked, stop)
            self._ids += self._encoder.ids(lead)
            self._ids += reply.token_ids or ()
            self._done, self._generated_length = stop, len(self._ids)
        elif reply.token_ids is not None:
            self._ids += self._encoder.ids(lead)
            self._ids += self._encoder.ids(self._whole.part(start, stop))
            self._done = stop
            self._reencode(0)
        self._last, self._end = number, stop

    def _reencode(self, more: int) -> None:
        self._reencoded += 1
        self._reencoded_length = len(self._ids) + more

    def _shown(
        self, content: str, asked: str | None, opening: str, after: str
    ) -> tuple[int, int] | None:
        """
        Return from where to where a reply is shown; None where something else is in its place.

        Args:
            content: What it says; space at its ends may be missing.
            asked: What led to it when it was generated; None: nobody knows.
            opening: What leads to a mark in its place.
            after: What follows such a mark.
        """
        text = self._whole.text
        for lead in (opening if asked is None else asked, opening):
            if not text.startswith(lead, self._end):
                continue
            start = self._end + len(lead)
            ends = [
                start + len(said)
                for said in (content, content.rstrip(), content.lstrip(), content.strip())
                if self._whole.says(said, start, self._control)
            ]
            follows = [shared_characters(after, text[end : end + len(after)]) for end in ends]
            most = max(follows, default=0)
            if ends and (most or not after):
                return start, ends[follows.index(most)]
        return None

    def _shown_calls(self, reply: Node, asked: str | None, opening: str) -> tuple[int, int] | None:
        """
        Return from where to where a reply with calls is shown; None where it says or calls other things.

        How the JSON of its calls is written, and space around them, is the template's: the ids are
        those that the model generated all the same.
        """
        text = self._whole.text[: self._length]
        said = parsed_reply(reply.content, cast("ToolLinks", reply.links), is_cut=True)
        most = _MOST_SHOWN * len(reply.content) + _MOST_MARKED
        for lead in dict.fromkeys((opening if asked is None else asked, opening)):
            if not text.startswith(lead, self._end):
                continue
            start = self._end + len(lead)
            found = self._encoder.shown_calls(text, start, said.calls, most)
            if found is not None and canonical_reply(found.reply) == canonical_reply(said):
                return start, found.end
        return None

    def _found(self, opening: str, after: str, *, is_last: bool) -> int | None:
        """Return where what follows a reply begins that is shown otherwise."""
        text = self._whole.text[: self._length]
        start = self._end + shared_characters(opening, text[self._end :])
        place = text.rfind(after, start) if is_last else text.find(after, start)
        return None if place < 0 or (is_last and not text.endswith(after)) else place

    def _tell(self, number: int, asked: str | None, stop: int | None) -> None:
        """Take note that a reply is shown otherwise, up to *stop*; None: it is not, or nobody knows."""
        ids, reply = self._encoder.ids, self.path[self._places[number]]
        start, now = len(self._ids), ids(self._whole.part(self._done, stop))
        if asked is not None:
            before = self._whole.part(self._done, self._end)
            was = [*ids(Shown(before.text + asked, before.breaks)), *(reply.token_ids or ())]
            start += common_prefix_length(was, now)
        end = max(start + 1, len(self._ids) + len(now)) if stop is not None else start + 1
        self._rewritten.append(Rewritten(number, start, end))
        self._generated_length = max(self._generated_length, end)

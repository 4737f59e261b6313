"""
Turn a conversation into token ids, with each reply as the ids that the model generated.

`PromptEncoder` renders the template twice, once with marks in place of the replies, which tell where
each reply is shown. There the ids that the model generated go in, and the text around them is encoded
piece by piece, so a reply is never decoded and encoded again.

The model reads what the template shows, with one exception: a reply, and what leads to it, keep the ids
that the model has read and generated where the template shows both as they were then, or nearly so. At the
ends of the reply, space may differ; in what leads to it, space and empty marks of thinking. Whatever else
the template shows otherwise is encoded and read again, and the turn tells that.

`Guard` lets nothing but the template write control tokens. A text gets a mark inside each control token
that it spells, and at its ends where it could complete one with its neighbour. The marks go through the
template with the text, and no control token is made where they come out. Nearly all texts need no mark.
Only a template that removes letters from a text, or changes their case, could still make a control token of
it.

Nothing here knows KV: what of a prompt is computed already is found out by its sequence.
"""

import copy
import itertools
import json
import re
import secrets
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from sys import getsizeof
from typing import Any, Final

from recollect.conversation import showing
from recollect.conversation.matching import shared_characters
from recollect.conversation.showing import FEW_REPLIES, Leads, Opening, Prompt, Rewritten
from recollect.conversation.tree import ROOT_KEY, Node, message_key
from recollect.errors import InvalidParameterError, TemplateError
from recollect.text.detokenizer import told_before
from recollect.text.reasoning import ShowingTokenizer
from recollect.text.reasoning_marks import says_nothing, says_the_same
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import ControlTokens, Shown, Tokenizer, encode_shown
from recollect.text.tool_calls import CallRules
from recollect.types import Message, Remembered, Role, ToolCall, common_prefix_length

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
    | {"id", "arguments"}
)
"""Words that templates look up in tools and their calls: to mark them would hide them."""


class Guard:
    """Marks what is said in one conversation. Immutable."""

    def __init__(self, control: ControlTokens, messages: Sequence[Message], tools: ToolSchemas):
        self._control = control
        values = [value for one in messages for name, value in one.items() if name != "role"]
        said = [text for value in values for text in _strings(value)]
        suspicious: list[str] = []
        if control.may_be_in(said):
            suspicious += said
        if tools and control.may_be_in_json(
            json.dumps(list(tools), ensure_ascii=False), except_for=_SCHEMA_WORDS
        ):
            suspicious += _strings(tools)
        self.is_needed: Final = any(map(self._cuts, suspicious))
        """Whether anything that is said could make a control token."""
        self._mark = _new_mark([*said, *_strings(tools)]) if self.is_needed else ""

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages with marks in them."""
        return [showing.changed(one, self._marked) for one in messages]

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
    if Shown(text).written(control) == marked.written(control):
        return Shown(text), None
    return marked, guard


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


def _strings(value: Any) -> Iterable[str]:
    """Return the texts of a JSON value, keys among them."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping):
        return [text for pair in value.items() for one in pair for text in _strings(one)]
    if isinstance(value, list | tuple):
        return [text for one in value for text in _strings(one)]
    return ()


MOST_REMEMBERED_BYTES: Final = 32 << 20
"""
Of segments whose ids are remembered, for all sessions of a model together.

Four bytes a token, so 8 million tokens: thousands of turns, or 270 prompts of 30,000. What is
forgotten is encoded again, at 15 million characters in a second. Source: smollm2 on two cores.
"""

_ENTRY_BYTES: Final = 250
"""What one segment takes beside its ids: its name, the array's head and its place in the table.
Source: `sys.getsizeof` of these in CPython 3.12, rounded up."""


MOST_OPENING_BYTES: Final = 2 << 20
"""
Of what led to replies, for all sessions of a model together: hundreds of turns of agents, or the first
turns of dozens. What is forgotten is rendered again.
"""


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
        self._template, self.tool_format = template, template.tool_format
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
            if any(map(self.control.may_make, (name, *_strings(value)))):
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
        """Return messages as the template takes them: with calls beside the text, or in it."""
        template = self._template
        return [
            showing.message_of(one, template) if one.calls_tools else one.written_message()
            for one in path
        ]

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
            shown = ShowingTokenizer(self._tokenizer, marks, CallRules(self.tool_format))
            known = told_before(shown.decode(reply.token_ids), reply.content)
            self._written.put(name, known)
        return known

    def unmarked(self, text: str, thoughts: Mapping[str, str]) -> tuple[list[int], list[str]]:
        """
        Return which replies a text shows, and what is around them: one text more.

        A reply that is shown again, or after a later one, and all that follows it, is left out.

        Args:
            text: With marks in it.
            thoughts: What was thought, by the marks that stand for it.
        """
        if thoughts:
            mark = rf"thought\d+y{self._secret}x"
            text = re.sub(mark, lambda found: thoughts[found[0]], text)
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
        self._name, self._named = blake2b(digest_size=16), 0
        self._places = [place for place, node in enumerate(path) if node.role == "assistant"]
        self._ids: list[int] = []
        self._done = self._end = 0
        # The reply that ends at `_end`, -1 before the first; None: nobody knows where it ends.
        self._last: int | None = -1
        self._leads = Leads(len(self._places)) if len(self._places) > FEW_REPLIES else None
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
        if messages < self._named:
            self._name, self._named = blake2b(digest_size=16), 0
        for node in self.path[self._named : messages]:
            self._name.update(node.key)
        self._named, name = messages, self._name.copy()
        key = self.path[messages - 1].key if messages else ROOT_KEY
        if said is not None:
            name.update(message_key(key, "user", said))
        return name.digest()

    def _marked(self, render: Render, count: int) -> tuple[list[int], list[str]]:
        """Return which replies are shown of the first *count* messages, and what is around them."""
        messages, tools, guard = self._messages[:count], self._tools, self._guard
        if guard is not None:
            messages, tools = guard.messages(messages), guard.tools(tools)
        marked: dict[str, Sequence[ToolCall]] = {}
        thoughts: dict[str, str] = {}
        for number, place in enumerate(self._places):
            if place >= count:
                continue
            mark, said = self._encoder.mark(number), self._messages[place]
            messages[place] = {"role": "assistant", "content": mark}
            if calls := said.get("tool_calls"):
                messages[place], marked[mark] = showing.marked(mark, calls)
            if thought := said.get("reasoning_content"):
                instead = self._encoder.thought_mark(number)
                messages[place]["reasoning_content"] = instead
                thoughts[instead] = thought
        text = render(messages, tools)
        text = text if guard is None else guard.read(text).text
        if marked:
            text = showing.collapsed(text, marked, self._encoder.tool_format)
        return self._encoder.unmarked(text, thoughts)

    def _asked(self, number: int, now: str | None = None) -> str | None:
        """
        Return what led to a reply of this model when it was generated; None where nobody knows.

        Args:
            number: Of the reply.
            now: What is shown there now; None: nothing is.
        """
        place = self._places[number]
        if not self._encoder.is_own(self.path[place]):
            return None
        name, leads = self.name(place), self._leads
        opening = self._encoder.openings.get(name)
        guess = None if leads is None or now is None or opening else leads.guess(number, now)
        if guess is not None:
            return guess if self._last == number - 1 else None
        if opening is None:
            try:
                numbers, around = self._marked(self._encoder.asking, place)
            except TemplateError:
                return None
            opening = Opening(numbers[-1] if numbers else -1, around[-1])
            self._encoder.openings.put(name, opening)
        if opening.after != self._last:
            return None
        if leads is not None and now is not None:
            leads.learn(now, opening.text)
        return opening.text

    def _drop(self, numbers: Iterable[int]) -> None:
        """Take note of replies that are not shown."""
        for number in numbers:
            if self._encoder.is_own(self.path[self._places[number]]):
                self._tell(number, self._asked(number), None)

    def _reply(self, number: int, opening: str, after: str, *, is_last: bool) -> None:
        """Take the next reply that is shown, between two texts of the template."""
        reply, asked = self.path[self._places[number]], self._asked(number, opening)
        is_own = self._encoder.is_own(reply)
        before = self._encoder.before_said(reply) if is_own else ""
        led = None if before else asked
        if self._messages[self._places[number]].get("tool_calls"):
            text = self._whole.text[: self._length]
            leads = (opening if led is None else led, opening)
            place = showing.place_of(reply, text, self._end, leads, self._encoder.tool_format)
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
            if asked is not None and asked != now:
                if before or (says_nothing(asked, same) and says_nothing(now, same)):
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

"""
Turn a conversation into token ids, with each reply as the ids that the model generated.

`PromptEncoder` renders the template twice, once with marks in place of the replies. The text between
the marks is encoded segment by segment and the replies' own ids go in between, so a reply is never
decoded and encoded again.

`Guard` keeps control tokens to the template. What is said gets a mark inside each control token that it
spells, and at its ends where it could complete one; the marks travel through the template, and no
control token may be where they come out. Nearly all texts get none. Only a template that removes
letters from what is said, or changes their case, could still make a control token of it.

`Prompting` makes the prompts of one session, and remembers what was once left out of a full context.
Nothing here knows KV: what of a prompt is computed already is found out by its sequence.
"""

import copy
import itertools
import json
import secrets
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Final, cast

from recollect.conversation.tools import Tools
from recollect.conversation.tree import Node, Overflow, Window, turn_starts
from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import ContextFullError, InvalidParameterError, TemplateError
from recollect.text.template import ChatTemplate
from recollect.text.tokenizer import ControlTokens, Tokenizer
from recollect.types import Message, Role

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


@dataclass(frozen=True, slots=True)
class Shown:
    """What a template shows of a conversation."""

    text: str
    breaks: tuple[int, ...] = ()
    """Places in the text, ascending: a control token that lies across one was said, not written."""

    def name(self) -> bytes:
        """Return a name that no other text, or the same with other places, has."""
        text = self.text.encode("utf-8", "surrogatepass")
        if not self.breaks:
            return blake2b(text, digest_size=16).digest()
        places = blake2b(array("q", self.breaks).tobytes(), digest_size=32).digest()
        return blake2b(text, digest_size=16, key=places).digest()

    def part(self, start: int, end: int | None = None) -> "Shown":
        """Return what lies in `[start, end)`."""
        stop = len(self.text) if end is None else end
        if not self.breaks:
            return Shown(self.text[start:stop])
        first, last = bisect_right(self.breaks, start), bisect_right(self.breaks, stop - 1)
        breaks = tuple(place - start for place in self.breaks[first:last])
        return Shown(self.text[start:stop], breaks)

    def has_break(self, start: int, end: int) -> bool:
        """Return whether there is one inside `[start, end)`, its ends apart."""
        place = bisect_right(self.breaks, start)
        return place < len(self.breaks) and self.breaks[place] < end

    def says(self, text: str, start: int, control: ControlTokens) -> bool:
        """Return whether a text is shown from *start* on, and none of its control tokens written."""
        begins = (start + place for place in control.begins(text))
        return self.text.startswith(text, start) and all(
            self.has_break(place, place + 2) for place in begins
        )

    def followed_by_said(self, text: str, control: ControlTokens) -> "Shown":
        """Return this and a text that somebody says after it."""
        start = len(self.text)
        begins = (start + place + 1 for place in control.begins(text))
        return Shown(self.text + text, (*self.breaks, start, *begins))


def said_alone(text: str, control: ControlTokens) -> Shown:
    """Return a text in which no control token was written by a template."""
    return Shown(text, tuple(place + 1 for place in control.begins(text)))


class Guard:
    """Marks what is said in one conversation. Immutable."""

    def __init__(self, control: ControlTokens, messages: Sequence[Message], tools: ToolSchemas):
        self._control = control
        values = [value for one in messages for name, value in one.items() if name != "role"]
        said = [text for value in values for text in _strings(value)]
        suspicious: list[str] = []
        if control.may_be_in(said):
            suspicious += said
        if tools and control.may_be_in_json(_json(tools), except_for=_SCHEMA_WORDS):
            suspicious += _strings(tools)
        self.is_needed: Final = any(map(self._cuts, suspicious))
        """Whether anything that is said could make a control token."""
        self._mark = _new_mark([*said, *_strings(tools)]) if self.is_needed else ""

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


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as token ids."""

    token_ids: list[int]
    rewritten_reply: int | None = None
    """
    The first reply, counted from 0, that the template does not show as it was generated; None
    where it shows all of them. From there on the ids are those of the template's text.
    """
    reencoded_replies: int = 0
    """Replies that another model wrote: their text is encoded, since its ids mean nothing here."""
    generated_length: int = 0
    """Leading ids that a model has seen or generated before: up to the end of the last own reply."""


class RememberedIds:
    """
    The ids of segments that were encoded before. Safe from any thread.

    Invariant: `held_bytes` is the sum over all segments, and at most `most_bytes`.
    """

    def __init__(self, most_bytes: int = MOST_REMEMBERED_BYTES) -> None:
        self.most_bytes: Final = most_bytes
        self.held_bytes = 0
        self._ids: OrderedDict[bytes, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many segments are remembered."""
        return len(self._ids)

    def get(self, name: bytes) -> list[int] | None:
        """Return the ids of a segment; None where they are not known."""
        with self._lock:
            ids = self._ids.get(name)
            if ids is None:
                return None
            self._ids.move_to_end(name)
        return ids.tolist()

    def put(self, name: bytes, token_ids: Sequence[int]) -> None:
        """Remember the ids of a segment, and forget those that were used longest ago."""
        ids = array("i", token_ids)
        if _size(ids) > self.most_bytes:
            return
        with self._lock:
            if name in self._ids:
                return
            self._ids[name] = ids
            self.held_bytes += _size(ids)
            while self.held_bytes > self.most_bytes:
                self.held_bytes -= _size(self._ids.popitem(last=False)[1])

    def check(self) -> None:
        """
        Verify the invariant.

        Raises:
            AssertionError: It does not hold.
        """
        with self._lock:
            held = sum(map(_size, self._ids.values()))
            assert held == self.held_bytes <= self.most_bytes, "bytes are not counted right"


def _size(ids: "array[int]") -> int:
    return ids.itemsize * len(ids) + _ENTRY_BYTES


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
        self.remembered: Final = RememberedIds()
        # Texts that nobody writes and that templates which strip or split leave whole.
        self._reply_mark = f"reply{secrets.token_hex(12)}x"
        self._typed_mark = f"typed{secrets.token_hex(12)}x"

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
        messages = [node.written_message() for node in path]
        if said is not None:
            messages.append({"role": "user", "content": said})

        def render(messages: list[Message], tools: ToolSchemas) -> str:
            return self._template.render(messages, add_generation_prompt=True, tools=tools)

        return self._encode_path(path, messages, tools, render)

    def with_options(self, options: Mapping[str, Any]) -> "PromptEncoder":
        """
        Return one that gives the template options besides the conversation.

        Raises:
            InvalidParameterError: One is no option, or a text in it could be a control token.
        """
        control = self._tokenizer.control_tokens
        for name, value in options.items():
            texts = [text.strip() for text in (name, *_strings(value))]
            if any(
                [*control.begins(text)]
                or control.may_begin_before(text)
                or control.may_end_after(text)
                for text in texts
                if text
            ):
                raise InvalidParameterError(
                    f"The template option {name[:40]!r} has a text in which the model could read a "
                    "control token: leave that out."
                )
        other = copy.copy(self)
        other._template = self._template.with_options(options)
        return other

    def encode_begun(
        self, path: Sequence[Node], reply: Node, tools: ToolSchemas = ()
    ) -> tuple[Prompt, list[int]]:
        """
        Return the ids of messages and of a reply that is to go on after its text; and the latter's.

        Raises:
            TemplateError: The template refuses the conversation.
        """
        begun = list(self._reply_ids(reply))
        try:
            prompt = self.encode_typed(path, "", tools, role="assistant")
        except TemplateError:  # it refuses to end with a reply, or does not show one there
            prompt = self.encode(path, tools=tools)
        ids = prompt.token_ids + begun
        known = len(ids) if self._is_own(reply) else prompt.generated_length
        return replace(prompt, token_ids=ids, generated_length=known), begun

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

        messages = [node.written_message() for node in path]
        return self._encode_path(path, messages, tools, render, typed)

    def _encode_path(
        self,
        path: Sequence[Node],
        messages: list[Message],
        tools: ToolSchemas,
        render: Render,
        typed: str = "",
    ) -> Prompt:
        replies = [node for node in path if node.role == "assistant"]
        control = self._tokenizer.control_tokens
        whole, guard = shown(render, messages, tools, control)
        if typed:
            whole = whole.followed_by_said(typed, control)
        segments = self._segments(render, messages, tools, guard)
        ids: list[int] = []
        end = 0  # of the text whose ids are in the list
        rewritten = None
        generated_length = 0
        for number, reply in enumerate(replies):
            middle = end + len(segments[number])
            # The last segment is followed by no reply; fewer segments mean that a reply was dropped.
            if number + 1 >= len(segments) or not (
                whole.text.startswith(segments[number], end)
                and whole.says(reply.content, middle, control)
            ):
                rewritten = number
                break
            ids += self._ids(whole.part(end, middle))
            ids += self._reply_ids(reply)
            end = middle + len(reply.content)
            if self._is_own(reply):
                generated_length = len(ids)
        return Prompt(
            token_ids=ids + self._ids(whole.part(end)),
            rewritten_reply=rewritten,
            reencoded_replies=sum(not self._is_own(reply) for reply in replies),
            generated_length=generated_length,
        )

    def _segments(
        self, render: Render, messages: list[Message], tools: ToolSchemas, guard: Guard | None
    ) -> list[str]:
        """Return what the template shows before, between and after the replies."""
        if guard is not None:
            messages, tools = guard.messages(messages), guard.tools(tools)
        text = render([self._marked(message) for message in messages], tools)
        return (text if guard is None else guard.read(text).text).split(self._reply_mark)

    def _marked(self, message: Message) -> Message:
        if message["role"] != "assistant":
            return message
        return {"role": "assistant", "content": self._reply_mark}

    def _reply_ids(self, reply: Node) -> Sequence[int]:
        """Return the generated ids; for a reply that this model did not generate, its text's."""
        if reply.token_ids is None or not self._is_own(reply):
            return self._ids(said_alone(reply.content, self._tokenizer.control_tokens))
        return reply.token_ids

    def _is_own(self, reply: Node) -> bool:
        return reply.token_ids is not None and reply.fingerprint == self._fingerprint

    def _ids(self, part: Shown) -> list[int]:
        """Return the ids of a part of what is shown, from memory where they are there."""
        name = part.name()
        ids = self.remembered.get(name)
        if ids is None:
            ids = self._encoded(part)
            self.remembered.put(name, ids)
        return ids

    def _encoded(self, part: Shown) -> list[int]:
        """
        Return the ids of a part, control tokens only where the template wrote them.

        Between two of those the text is encoded in one piece, as it always is. So all but the
        pieces in which a control token was said have the ids that the whole text would have.
        """
        encode, find = self._tokenizer.encode, self._tokenizer.control_tokens.find
        text, ids = part.text, []
        done = piece = start = 0  # `[done, piece)` is encoded as always, once `[piece, …)` is not
        is_plain = False
        while part.breaks and (span := find(text, start)) is not None:
            begin, end = span
            if part.has_break(begin, end):
                is_plain, start = True, begin + 1
                continue
            if is_plain:
                ids += encode(text[done:piece]) + self._tokenizer.encode_text(text[piece:begin])
                done, is_plain = begin, False
            piece = start = end
        if is_plain:
            return ids + encode(text[done:piece]) + self._tokenizer.encode_text(text[piece:])
        return ids + encode(text[done:])


class Prompting:
    """Prompts in one namespace. Owned by a session."""

    def __init__(self, engine: Engine, encoder: PromptEncoder, namespace: str) -> None:
        self._engine = engine
        self._encoder = encoder
        self._namespace = namespace
        self._window = Window()

    def asking(
        self, at: Node, said: str | None, tools: Tools, overflow: Overflow
    ) -> tuple[Prompt, int]:
        """
        Return the prompt for a reply, and how many turns were left out of it.

        Args:
            at: The messages up to here, all or those that still fit.
            said: A user's message after those.
            tools: What the reply may call.
            overflow: What happens when not all fit.
        """

        def encode(messages: Sequence[Node]) -> Prompt:
            return self._encoder.encode(messages, said, tools.schemas)

        def measure(messages: Sequence[Node]) -> int:
            return len(encode(messages).token_ids)

        path = at.path()
        shown = self._window.fitting(path, self._engine.info.context_length, measure, overflow)
        return encode(shown), len(turn_starts(path)) - len(turn_starts(shown))

    def continuing(self, reply: Node, tools: Tools) -> tuple[Prompt, list[int]]:
        """Return the prompt for a reply that goes on after what it says, and the ids of that."""
        assert reply.parent is not None, "a reply has a parent"
        shown = self._window.shown(reply.parent.path())
        return self._encoder.encode_begun(shown, reply, tools.schemas)

    def typing(self, at: Node, text: str, tools: Tools) -> list[int]:
        """Return the ids of what is shown up to a node, and of a message that is being typed."""
        shown = self._window.shown(at.path())
        return self._encoder.encode_typed(shown, text, tools.schemas).token_ids

    def sequence(self, token_ids: list[int]) -> TokenSequence:
        """
        Return a sequence with this history.

        Raises:
            ContextFullError: It leaves no place for a reply.
        """
        limit = self._engine.info.context_length
        needed = len(token_ids) + 1
        if needed > limit:
            raise ContextFullError(needed=needed, limit=limit)
        sequence = self._engine.new_sequence(self._namespace)
        sequence.append(token_ids)
        return sequence

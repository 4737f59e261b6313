"""
Find the calls of tools in what a model writes, while it writes; and write tools as text.

Both are in the Hermes format, which ChatML models were trained on: a call is a JSON object between
marks. Templates and tokens are others' business. Pure: text in, events out; messages in, messages out.
Source of the words: the chat templates of Qwen2.5 and Hermes 2 Pro.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from recollect.types import Message, ToolCall

CALL_START: Final = "<tool_call>"
CALL_END: Final = "</tool_call>"

_PREAMBLE: Final = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def call_opening(name: str) -> str:
    """Return what comes before the arguments of a call."""
    return f'{CALL_START}\n{{"name": {json.dumps(name)}, "arguments": '


CALL_CLOSING: Final = f"}}\n{CALL_END}"
"""What comes after the arguments of a call."""


def call_text(name: str, arguments: str) -> str:
    """Return a call, its arguments JSON text, as a model writes it."""
    return call_opening(name) + arguments + CALL_CLOSING


def spelled_out(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """
    Return messages for a template that knows neither tools nor their results.

    Tools are described in the instructions, and results are what the user says, those that follow
    each other in one message.
    """
    spelled: list[Message] = []
    for place, message in enumerate(messages):
        if message["role"] != "tool":
            spelled.append(message)
            continue
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        if place and messages[place - 1]["role"] == "tool":
            spelled[-1] = {"role": "user", "content": f"{spelled[-1]['content']}\n{result}"}
        else:
            spelled.append({"role": "user", "content": result})
    if not tools:
        return spelled
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    preamble = _PREAMBLE.format(tools=lines)
    if spelled and spelled[0]["role"] == "system":
        instructions = f"{spelled[0]['content']}\n\n{preamble}"
        return [{"role": "system", "content": instructions}, *spelled[1:]]
    return [{"role": "system", "content": preamble}, *spelled]


# The usual beginning: the name, then arguments that can be passed on as they come.
_OPENING: Final = re.compile(
    r'\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)'
)
# A call without the marks, which some models write instead: bare or in a fence of Markdown, and with
# the doubled brace that Qwen2.5-Coder's own template shows them.
_BARE_OPENING: Final = re.compile(
    r'\s*(?:```(?:json)?\s*)?\{\{?\s*"name"\s*:\s*"(?P<name>[^"]*)"\s*,\s*"arguments"\s*:\s*(?=\{)'
)
_BARE_BEGINNINGS: Final = tuple(f"{fence}{{" for fence in ("", "```", "```json"))
_NAMES: Final = re.compile(r'"name"\s*:\s*"([^"]*)"')
_BARE_CLOSING: Final = re.compile(r"\s*\}")
_AFTER_BARE: Final = re.compile(r"\s*\}?\s*(?:```)?\s*")
_CLEARLY_A_MARK: Final = len("tool")
"""Letters of the mark after which it is nothing else: `<t` may begin a table."""
_Place = Literal["bare", "text", "opening", "arguments", "closing"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of what is said beside the calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call has begun; its arguments follow."""

    index: int
    """Which call of the reply, counted from 0."""
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the arguments of a call, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call is whole. Where a reply is cut inside a call, this does not come."""

    index: int


Event = TextDelta | CallStarted | ArgumentsDelta | CallEnded


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """A reply, taken apart."""

    content: str
    """What is said beside the calls."""
    calls: tuple[ToolCall, ...]
    """Those that are whole; where the reply was cut, the last may have only a part of its arguments."""


def new_call_prefix() -> str:
    """Return what the ids of the calls of one reply begin with: no two replies have the same."""
    return f"call_{secrets.token_hex(8)}_"


class ToolCallParser:
    """
    Turns pieces of a reply into events.

    White space around a call belongs to neither call nor text. What looks like a call and is none
    is text. Owned by whoever reads the reply.

    Args:
        id_prefix: What the ids of the calls begin with; None: something new.
        names: Tools whose calls are calls without the marks too, where the reply begins with them.

    Invariants:
        1. The events do not depend on how the text falls into pieces, but for how deltas do.
        2. Without a call, the text deltas joined are the pieces joined.
        3. What was told is never taken back.
        4. What `parse_reply` returns for the whole text of a reply that was cut is what the events tell.
    """

    def __init__(self, id_prefix: str | None = None, names: Iterable[str] = ()) -> None:
        self._prefix = new_call_prefix() if id_prefix is None else id_prefix
        self._beginnings = [
            f'{beginning}{brace}"name":"{name}","arguments":{{'
            for name in names
            for beginning in _BARE_BEGINNINGS
            for brace in ("", "{")
        ]
        self._is_bare = bool(self._beginnings)
        self._place: _Place = "bare" if self._is_bare else "text"
        self._rest = ""  # not told yet
        self._before = ""  # white space before the mark of what may be a call
        self._calls = 0
        self._after_call = False  # nothing was said since the last one
        self._json = _JsonObject()
        self._steps: dict[_Place, Callable[[], Iterator[Event]]] = {
            "bare": self._in_bare,
            "text": self._in_text,
            "opening": self._in_opening,
            "arguments": self._in_arguments,
            "closing": self._in_closing,
        }

    def push(self, piece: str) -> Iterator[Event]:
        """Take more text; yield what it tells."""
        self._rest += piece
        while True:
            place, length = self._place, len(self._rest)
            yield from self._steps[place]()
            if (self._place, len(self._rest)) == (place, length) or not self._rest:
                return

    def finish(self, *, is_cut: bool = False) -> Iterator[Event]:
        """
        Yield what was held back, now that no more comes.

        Args:
            is_cut: Whether the reply would have gone on. What may be the beginning of a call is then
                no text.
        """
        if self._place == "opening":
            if not is_cut:
                yield from self._no_call(self._rest)
        elif self._place == "closing":
            yield self._end()
        elif self._place == "bare":
            if not (is_cut and '"name"' in self._rest):
                yield from self._text(self._after_bare())
        elif self._place == "text" and (self._rest.strip() or not self._after_call):
            yield from self._text(self._without_mark() if is_cut else self._rest)
        self._rest = ""

    def _without_mark(self) -> str:
        """Return the text that was held back without what is clearly the beginning of a mark."""
        said, _, mark = self._rest.rpartition("<")
        is_mark = len(mark) >= _CLEARLY_A_MARK and CALL_START[1:].startswith(mark)
        return said.rstrip() if is_mark else self._rest

    def _in_bare(self) -> Iterator[Event]:
        rest = self._after_bare()
        written = "".join(rest.split())
        if any(beginning.startswith(written) for beginning in self._beginnings):
            return  # it may become a call
        opening = _BARE_OPENING.match(rest)
        if opening and any(written.startswith(beginning) for beginning in self._beginnings):
            self._rest = rest[opening.end() :]
            self._place, self._json = "arguments", _JsonObject()
            yield self._start(opening["name"])
        else:
            self._rest, self._place, self._is_bare = rest, "text", False

    def _after_bare(self) -> str:
        """Return what is not told yet, without what ends the call before it."""
        return _AFTER_BARE.sub("", self._rest, count=1) if self._after_call else self._rest

    def _in_text(self) -> Iterator[Event]:
        said, mark, after = self._rest.partition(CALL_START)
        if mark:
            text = said.rstrip()
            self._before, self._rest, self._place = said[len(text) :], after, "opening"
            yield from self._text(text)
            return
        # Hold back what may be a part of the mark, and the white space before it.
        cut = max(0, len(said) - len(CALL_START))
        while not CALL_START.startswith(said[cut:]):
            cut += 1
        text = said[:cut].rstrip()
        self._rest = said[len(text) :]
        yield from self._text(text)

    def _in_opening(self) -> Iterator[Event]:
        if opening := _OPENING.match(self._rest):
            self._rest = self._rest[opening.end() :]
            self._place, self._json = "arguments", _JsonObject()
            yield self._start(json.loads(opening["name"], strict=False))
            return
        body, mark, after = self._rest.partition(CALL_END)
        if not mark:
            return
        self._rest, self._place = after, "text"
        call = _as_call(body)
        if call is None:
            yield from self._no_call(body + CALL_END)
            return
        name, arguments = call
        yield self._start(name)
        yield ArgumentsDelta(self._calls - 1, arguments)
        yield self._end()

    def _in_arguments(self) -> Iterator[Event]:
        length = self._json.length_in(self._rest)
        text, self._rest = self._rest[:length], self._rest[length:]
        if self._json.closed:
            self._place = "closing"
        if text:
            yield ArgumentsDelta(self._calls - 1, text)

    def _in_closing(self) -> Iterator[Event]:
        if self._is_bare:
            if closing := _BARE_CLOSING.match(self._rest):
                self._rest = self._rest[closing.end() :]
                yield self._end()
            return
        _, mark, after = self._rest.partition(CALL_END)
        if mark:
            self._rest = after
            yield self._end()

    def _start(self, name: str) -> CallStarted:
        self._calls += 1
        return CallStarted(self._calls - 1, f"{self._prefix}{self._calls - 1}", name)

    def _end(self) -> CallEnded:
        self._place, self._after_call = "bare" if self._is_bare else "text", True
        return CallEnded(self._calls - 1)

    def _text(self, text: str) -> Iterator[TextDelta]:
        if text:
            self._after_call = False
            yield TextDelta(text)

    def _no_call(self, body: str) -> Iterator[TextDelta]:
        self._place = "text"
        yield from self._text(self._before + CALL_START + body)


class _JsonObject:
    """Finds the end of a JSON object in text that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.closed = False

    def length_in(self, text: str) -> int:
        """Return how much of more text belongs to the object."""
        for place, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = letter == "\\", letter != '"'
            elif letter == '"':
                self._in_string = True
            else:
                self._depth += (letter in "{[") - (letter in "}]")
                if self._depth == 0:
                    self.closed = True
                    return place + 1
        return len(text)


def parse_reply(
    text: str,
    ids: str | Iterable[str] = "",
    names: Iterable[str] | None = (),
    *,
    is_cut: bool = False,
) -> ParsedReply:
    """
    Take a whole reply apart.

    Args:
        text: As the model wrote it.
        ids: Of its calls, or what `ToolCallParser` was told that they begin with.
        names: As `ToolCallParser` was told; None: whatever they are.
        is_cut: As in `ToolCallParser.finish`.
    """
    if names is None:
        names = set(_NAMES.findall(text))
    if CALL_START not in text and not names and not is_cut:
        return ParsedReply(text, ())
    parser = ToolCallParser(ids if isinstance(ids, str) else "", names)
    known = () if isinstance(ids, str) else tuple(ids)
    content: list[str] = []
    started: list[CallStarted] = []
    arguments: list[str] = []
    whole = 0
    for event in [*parser.push(text), *parser.finish(is_cut=is_cut)]:
        match event:
            case TextDelta(said):
                content.append(said)
            case CallStarted():
                started.append(event)
                arguments.append("")
            case ArgumentsDelta(index, more):
                arguments[index] += more
            case CallEnded():
                whole += 1
    calls = [
        ToolCall(known[call.index] if call.index < len(known) else call.id, call.name, given)
        for call, given in zip(started, arguments, strict=True)
    ][: None if is_cut else whole]
    return ParsedReply("".join(content), tuple(calls))


def is_whole(arguments: str) -> bool:
    """Return whether the arguments of a call are all there; none at all are, too."""
    try:
        return not arguments.strip() or isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _as_call(body: str) -> tuple[str, str] | None:
    """Return the name and the arguments in an unusual call; None where it is none."""
    try:
        call: Any = json.loads(body)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return (call["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None

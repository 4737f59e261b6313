"""
Find the calls of tools in what a model writes, while it writes; and write tools as text.

What calls look like says a row of `tool_formats`. The parser reads each letter a bounded number of
times, so that a long reply costs no more per token than a short one. Templates and tokens are others'
business. Pure: text in, events out; messages in, messages out.
"""

import ast
import json
import re
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from recollect.text.tool_formats import HERMES, ToolFormat
from recollect.types import Message, ToolCall

CALL_START: Final = HERMES.mark


def call_text(name: str, arguments: str) -> str:
    """Return a call, its arguments JSON text, in the format that messages are kept in."""
    return HERMES.text_of([(name, arguments)])


def with_results_spelled(messages: Sequence[Message]) -> list[Message]:
    """Return messages for a template that knows no results: they are what the user says."""
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
    return spelled


def with_tools_spelled(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], format_: ToolFormat
) -> list[Message]:
    """Return messages for a template that knows no tools: the instructions describe them."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    preamble = format_.preamble.format(tools=lines)
    if messages and messages[0]["role"] == "system":
        instructions = f"{messages[0]['content']}\n\n{preamble}"
        return [{"role": "system", "content": instructions}, *messages[1:]]
    return [{"role": "system", "content": preamble}, *messages]


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


@dataclass(frozen=True, slots=True)
class CallRules:
    """What calls in a reply look like."""

    format: ToolFormat = HERMES
    names: tuple[str, ...] | None = ()
    """Tools whose calls are calls without marks too; None: whatever their names are."""
    texts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By tools, the arguments that are texts, where the format does not tell a text from a number; of a
    tool that is not there, what reads as JSON and is no text is JSON."""


HERMES_CALLS: Final = CallRules()
"""As messages are kept: in the format of Hermes, with marks."""


def _rules_of(rules: CallRules | Iterable[str], text: str = "") -> CallRules:
    """Return rules where names alone are given, and with the names in a text where any will do."""
    found = rules if isinstance(rules, CallRules) else CallRules(names=tuple(rules))
    if found.names is not None:
        return found
    return replace(
        found, names=tuple({one for pair in _NAMES.findall(text) for one in pair if one})
    )


def new_call_prefix() -> str:
    """Return what the ids of the calls of one reply begin with: no two replies have the same."""
    return f"call_{secrets.token_hex(8)}_"


_FENCE: Final = r"(?:```(?:json)?\s*)?"
_MOST_OPENING: Final = 2048
"""Characters in which the name of a call, and what is around it, has to come."""
_NAME: Final = re.compile(r"[\w.-]{1,128}")
_NAMES: Final = re.compile(r'"name"\s*:\s*"([^"]*)"|\[\s*([\w.-]{1,128})\s*\(')
_CLEARLY_A_MARK: Final = len("<tool")
"""Letters of a mark after which it is nothing else: `<t` may begin a table."""
_SPACE: Final = " \t\n\r\f\v"

_Reader = Generator[Event | None, None, bool]
"""Yields events, and None where it needs more text. Returns whether it found what it was to read."""


def _object_opening(format_: ToolFormat) -> "re.Pattern[str]":
    """Return the usual beginning of a call: the name, then arguments that can be passed on as they come."""
    key, value = format_.keys
    end = f"(?!{re.escape(format_.closing.strip())})" if format_.closing.strip() else ""
    name = rf'(?P<name>"(?:{end}[^"\\]|\\.)*")'
    kind = r'(?:"type"\s*:\s*"function"\s*,\s*)?'
    return re.compile(rf'\s*\{{\s*{kind}"{key}"\s*:\s*{name}\s*,\s*"{value}"\s*:\s*(?=\{{)')


class _Bare:
    """
    How calls without marks begin: bare or in a fence of Markdown, and with known names alone.

    With the doubled brace too that Qwen2.5-Coder's own template shows its models.
    """

    def __init__(self, format_: ToolFormat, names: Sequence[str]) -> None:
        self.is_anywhere = format_.is_bare
        """At the beginning of any line, and not of the reply alone."""
        self.is_python = format_.kind == "python"
        leads = ("", format_.lead) if format_.lead else ("",)
        lead = rf"(?:{re.escape(format_.lead)}\s*)?"
        if self.is_python:
            self._beginnings = [f"{one}[{name}(" for name in names for one in leads]
            self._opening = re.compile(rf"\s*{lead}\[\s*(?=[\w.-]+\s*\()")
            self.after = re.compile("")
            self._clear = "("
            return
        key, value = format_.keys
        kinds = ("", '"type":"function",') if self.is_anywhere else ("",)
        braces = ("{",) if self.is_anywhere else ("{", "{{")
        self._beginnings = [
            f'{one}{fence}{brace}{kind}"{key}":"{name}","{value}":{{'
            for name in names
            for one in leads
            for fence in ("", "```", "```json")
            for brace in braces
            for kind in kinds
        ]
        kind = r'(?:"type"\s*:\s*"function"\s*,\s*)?' if self.is_anywhere else ""
        self._opening = re.compile(
            rf'\s*{lead}{_FENCE}\{{\{{?\s*{kind}"{key}"\s*:\s*"(?P<name>[^"]*)"\s*,\s*"{value}"\s*:\s*(?=\{{)'
        )
        self.after = re.compile(
            r"\s*\}?\s*(?:```)?\s*;?\s*" if self.is_anywhere else r"\s*\}?\s*(?:```)?\s*"
        )
        self._clear = f'"{key}"'

    def may_begin(self, text: str) -> bool:
        """Return whether a text may become the beginning of a call."""
        written = "".join(text.split())
        return len(text) < _MOST_OPENING and any(
            one.startswith(written) for one in self._beginnings
        )

    def opening(self, text: str) -> "re.Match[str] | None":
        """Return the beginning of a call in a text."""
        written = "".join(text[:_MOST_OPENING].split())
        if not any(written.startswith(one) for one in self._beginnings):
            return None
        return self._opening.match(text)

    def is_clear(self, text: str) -> bool:
        """Return whether the beginning of a text that was cut is nothing else than a call."""
        return self._clear in text and self.may_begin(text)


class ToolCallParser:
    """
    Turns pieces of a reply into events.

    White space around a call belongs to neither call nor text. What looks like a call and is none
    is text. Owned by whoever reads the reply.

    Args:
        id_prefix: What the ids of the calls begin with; None: something new.
        rules: What calls look like. Or the tools whose calls, in the format of Hermes, are calls without
            the marks too, where the reply begins with them.

    Invariants:
        1. The events do not depend on how the text falls into pieces, but for how deltas do.
        2. Without a call, the text deltas joined are the pieces joined.
        3. What was told is never taken back.
        4. What `parse_reply` returns for the whole text of a reply that was cut is what the events tell.
    """

    def __init__(
        self,
        id_prefix: str | None = None,
        rules: CallRules | Iterable[str] = HERMES_CALLS,
    ) -> None:
        self._prefix = new_call_prefix() if id_prefix is None else id_prefix
        rules = _rules_of(rules)
        self._format, self._texts = rules.format, rules.texts
        known = rules.names or ()
        self._bare = _Bare(self._format, known) if known and _may_be_bare(self._format) else None
        self._mark = self._format.mark
        self._rest = ""  # not consumed yet: short, but for what came last
        self._taken = 0
        self._space: list[str] = []  # white space before what comes
        self._trail: list[str] = []  # of what may be a call and is not told yet
        self._is_over = self._is_cut = False
        self._calls = 0
        self._after_call = False  # nothing was said since the last one
        self._opening = _object_opening(self._format)
        self.end_of_calls = 0
        """After how many characters the last call, and what closes it, ended."""
        self._reader = self._read()

    @property
    def is_in_text(self) -> bool:
        """Return whether what comes next belongs to no call."""
        return not self._in_calls

    def push(self, piece: str) -> Iterator[Event]:
        """Take more text; yield what it tells."""
        self._rest += piece
        while (event := next(self._reader, None)) is not None:
            yield event

    def finish(self, *, is_cut: bool = False) -> Iterator[Event]:
        """
        Yield what was held back, now that no more comes.

        Args:
            is_cut: Whether the reply would have gone on. What may be the beginning of a call is then
                no text.
        """
        self._is_over, self._is_cut = True, is_cut
        for event in self._reader:
            if event is not None:
                yield event

    _in_calls = False

    def _read(self) -> Generator[Event | None, None, None]:
        while True:
            if self._bare is not None:
                self._in_calls = True
                while (yield from self._bare_calls(self._bare)):
                    pass
                self._in_calls = False
                if not self._bare.is_anywhere:
                    self._bare = None
            if not (yield from self._text()):
                return
            if self._trail:
                self._in_calls = True
                yield from self._section()
                self._in_calls = False

    def _more(self) -> _Reader:
        """Wait for more text; return whether there is any."""
        if self._is_over:
            return False
        yield None
        return True

    def _take(self, length: int) -> str:
        taken, self._rest = self._rest[:length], self._rest[length:]
        self._taken += length
        return taken

    def _text(self) -> _Reader:
        """Tell text up to a mark or, where calls begin lines, to a line; False: it is over."""
        marks = [one for one in (self._mark, "\n" if self._is_anywhere() else "") if one]
        marks += _CHANNEL_MARKS if self._format.kind == "channels" else ()
        while True:
            places = [(self._rest.find(one), one) for one in marks]
            place, mark = min((one for one in places if one[0] >= 0), default=(-1, ""))
            if place >= 0:
                yield from self._say(self._take(place))
                self._take(len(mark))
                if mark == "\n":
                    self._space.append(mark)
                elif mark not in _SILENT:
                    self._trail = [mark]
                return True
            held = max((_held(self._rest, one) for one in marks), default=0)
            yield from self._say(self._take(len(self._rest) - held))
            if not (yield from self._more()):
                is_mark = self._is_cut and held >= _CLEARLY_A_MARK
                if is_mark:
                    self._take(held)
                    self._space.clear()
                yield from self._say_rest()
                return False

    def _is_anywhere(self) -> bool:
        return self._bare is not None and self._bare.is_anywhere

    def _say_rest(self) -> Iterator[Event]:
        """Tell what was held back; white space after a call is nothing."""
        rest = "".join(self._space) + self._take(len(self._rest))
        self._space.clear()
        if rest.strip() or not self._after_call:
            yield from self._tell(rest)

    def _say(self, text: str) -> Iterator[Event]:
        """Tell text, and hold back the white space at its end."""
        said = text.rstrip()
        if said:
            yield from self._tell("".join((*self._space, said)))
            self._space.clear()
        if len(said) < len(text):
            self._space.append(text[len(said) :])

    def _tell(self, text: str) -> Iterator[Event]:
        if text:
            self._after_call = False
            yield TextDelta(text)

    def _no_call(self) -> _Reader:
        """Tell as text what was taken since the mark; False: it was no call."""
        text = "".join((*self._space, *self._trail))
        self._space.clear()
        self._trail.clear()
        if not (self._is_over and self._is_cut and not self._rest):
            yield from self._tell(text)
        return False

    def _start(self, name: str) -> CallStarted:
        self._calls += 1
        self._space.clear()
        self._trail.clear()
        return CallStarted(self._calls - 1, f"{self._prefix}{self._calls - 1}", name)

    def _given(self, text: str) -> Iterator[Event]:
        if text:
            yield ArgumentsDelta(self._calls - 1, text)

    def _end(self) -> CallEnded:
        self._after_call, self.end_of_calls = True, self._taken
        return CallEnded(self._calls - 1)

    # What stands between calls and their parts.

    def _word(self, word: str) -> _Reader:
        """Take a word, and white space before it; nothing where another one is there."""
        while True:
            rest = self._rest.lstrip(_SPACE)
            if rest.startswith(word):
                self._trail.append(self._take(len(self._rest) - len(rest) + len(word)))
                return True
            if not word.startswith(rest) or len(self._rest) > _MOST_OPENING:
                return False
            if not (yield from self._more()):
                return False

    def _words(self, text: str) -> _Reader:
        """Take words in their order; False: one was not there."""
        for word in text.split():
            if not (yield from self._word(word)):
                return False
        return True

    def _up_to(
        self, mark: str, *, feed: bool = False, most: int | None = None
    ) -> Generator[Event | None, None, tuple[str, bool]]:
        """
        Take text up to a mark and the mark; return the text, and whether the mark came.

        Args:
            mark: What it goes up to.
            feed: Whether a line feed before the mark belongs to that.
            most: How many characters are looked at; None: all.
        """
        parts: list[str] = []
        while most is None or sum(map(len, parts)) < most:
            place = self._rest.find(mark)
            if place >= 0:
                parts.append(self._take(place))
                self._take(len(mark))
                if feed and parts[-1].endswith("\n"):
                    parts[-1] = parts[-1][:-1]
                return "".join(parts), True
            parts.append(self._take(len(self._rest) - _held(self._rest, mark)))
            if not (yield from self._more()):
                parts.append(self._take(len(self._rest)))
                break
        return "".join(parts), False

    def _section(self) -> _Reader:
        """Read what follows the mark of calls, up to where text goes on."""
        form = self._format
        if not (yield from self._words(form.opening if form.kind != "channels" else "")):
            return (yield from self._no_call())
        is_first = True
        while True:
            if not (yield from self._words(form.head)):
                if is_first:
                    return (yield from self._no_call())
                break
            if not (yield from self._call()):
                break
            is_first = False
            if form.between is None:
                break
            if form.between.strip() and not (yield from self._word(form.between.strip())):
                break
        if form.closing and not is_first:
            yield from self._close()
        return True

    def _close(self) -> _Reader:
        """Take what closes a section, where it is there."""
        closing = self._format.closing
        if self._format.kind == "object" and self._format.between is None:
            return True  # the call has taken it
        if (yield from self._words(closing)):
            self.end_of_calls = self._taken
        self._trail.clear()
        return True

    # Calls, each kind in its way.

    def _call(self) -> _Reader:
        """Read one call; False: there is none, or it is not whole."""
        kind = self._format.kind
        if kind == "object":
            return (yield from self._object())
        if kind == "python":
            return (yield from self._python())
        if kind == "elements":
            return (yield from self._elements())
        if kind == "channels":
            return (yield from self._channel())
        return (yield from self._named())

    def _object(self) -> _Reader:
        """Read a call that is a JSON object."""
        closing = self._format.closing.strip() if self._format.between is None else ""
        while not (opening := self._opening.match(self._rest[:_MOST_OPENING])):
            if closing and closing in self._rest:
                return (yield from self._unusual(closing))
            if len(self._rest) >= _MOST_OPENING or not (yield from self._more()):
                return (yield from self._unusual(closing))
        self._take(opening.end())
        yield self._start(json.loads(opening["name"], strict=False))
        if not (yield from self._json()):
            return False
        return (yield from self._end_of_object(closing))

    def _end_of_object(self, closing: str) -> _Reader:
        """Pass over what is left of a call whose arguments are whole."""
        if closing:
            _, is_there = yield from self._up_to(closing)
            if not is_there and self._is_cut:
                pass  # only the mark was missing
        else:
            outer = _JsonObject(depth=1)
            while not outer.closed:
                self._take(outer.length_in(self._rest))
                if not outer.closed and not (yield from self._more()):
                    break
        yield self._end()
        return True

    def _unusual(self, closing: str) -> _Reader:
        """Read a call whose name does not come first."""
        if closing:
            body, is_there = yield from self._up_to(closing)
            self._trail.append(body + (closing if is_there else ""))
        else:
            whole, parts = _JsonObject(), list[str]()
            space = len(self._rest) - len(self._rest.lstrip(_SPACE))
            self._trail.append(self._take(space))
            if not self._rest.startswith("{"):
                return (yield from self._no_call())
            while not whole.closed:
                parts.append(self._take(whole.length_in(self._rest)))
                if not whole.closed and not (yield from self._more()):
                    break
            body, is_there = "".join(parts), whole.closed
            self._trail.append(body)
        call = _as_call(body, self._format.keys) if is_there else None
        if call is None:
            return (yield from self._no_call())
        name, arguments = call
        yield self._start(name)
        yield from self._given(arguments)
        yield self._end()
        return True

    def _json(self) -> _Reader:
        """Tell the arguments, a JSON object that begins here; False: it is not whole."""
        whole = _JsonObject()
        while True:
            yield from self._given(self._take(whole.length_in(self._rest)))
            if whole.closed:
                return True
            if not (yield from self._more()):
                return False

    def _name(self, separator: str) -> Generator[Event | None, None, str | None]:
        """Take the name of a tool and what follows it; None: there is none."""
        first = separator.split()[:1]
        while True:
            rest = self._rest.lstrip(_SPACE)
            name = _NAME.match(rest)
            is_whole = name is not None and len(name[0]) < len(rest)
            if is_whole or (rest and name is None) or len(rest) > _MOST_OPENING:
                break
            if not (yield from self._more()):
                break
        if name is None or (not is_whole and not self._is_over):
            return None
        self._trail.append(self._take(len(self._rest) - len(rest) + len(name[0])))
        if first and not (yield from self._words(separator)):
            return None
        return name[0]

    def _named(self) -> _Reader:
        """Read a name, and arguments as JSON."""
        separator = self._format.separator
        name = yield from self._name("")
        if name is None:
            return (yield from self._no_call())
        if (yield from self._word("[CALL_ID]")):
            yield from self._name("")
        if not (yield from self._words(separator)):
            return (yield from self._no_call())
        return (yield from self._arguments_of(name))

    def _arguments_of(self, name: str) -> _Reader:
        """Read the arguments of a call as JSON, and what closes it."""
        while not (rest := self._rest.lstrip(_SPACE)):
            if not (yield from self._more()):
                break
        if not rest.startswith("{"):
            return (yield from self._no_call())
        self._take(len(self._rest) - len(rest))
        yield self._start(name)
        if not (yield from self._json()):
            return False
        yield self._end()
        if (yield from self._words(self._format.tail)):
            self.end_of_calls = self._taken
        self._trail.clear()
        return True

    def _channel(self) -> _Reader:
        """Read the head of a message in a channel: a call, or text whose head is no text."""
        head, is_there = yield from self._up_to("<|message|>", most=_MOST_OPENING)
        to = _RECIPIENT.search(self._trail[0] + head)
        self._trail.append(head + ("<|message|>" if is_there else ""))
        if not is_there or to is None:
            if is_there and _PLAIN_CHANNEL.fullmatch(head.strip()):
                self._trail.clear()
                return False
            return (yield from self._no_call())
        return (yield from self._arguments_of(to["name"]))

    def _elements(self) -> _Reader:
        """Read a name, and an element for each argument."""
        form = self._format
        before, middle, end = (part.strip() for part in form.parameter)
        name = yield from self._name(form.separator)
        if name is None:
            return (yield from self._no_call())
        texts, count = self._texts.get(name), 0
        # It is a call where an argument follows, or the end of the call.
        closing = (form.tail + form.closing).split()[0]
        has_one = yield from self._word(before)
        if not has_one and not (yield from self._word(closing)):
            return (yield from self._no_call())
        yield self._start(name)
        yield from self._given("{")
        while has_one:
            key, is_there = yield from self._up_to(middle.split()[0])
            if not is_there or not (yield from self._words(" ".join(middle.split()[1:]))):
                return False
            yield from self._given(
                f"{', ' if count else ''}{json.dumps(key, ensure_ascii=False)}: "
            )
            count += 1
            if not (yield from self._value(end, None if texts is None else key in texts)):
                return False
            has_one = yield from self._word(before)
            if not has_one and not (yield from self._word(closing)) and self._is_over:
                return False
        yield from self._given("}")
        yield self._end()
        for word in (form.tail + ("" if form.between is not None else form.closing)).split()[1:]:
            if (yield from self._word(word)):
                self.end_of_calls = self._taken
        self._trail.clear()
        return True

    def _value(self, end: str, is_text: bool | None) -> _Reader:
        """Tell the value of an argument as JSON; False: it is not whole."""
        _, middle, closing = self._format.parameter
        if middle.endswith("\n"):
            while not self._rest and (yield from self._more()):
                pass
            if self._rest.startswith("\n"):
                self._take(1)
        has_feed = closing.startswith("\n")
        if not is_text:
            value, is_there = yield from self._up_to(end, feed=has_feed)
            yield from self._given(_json_value(value, is_text) if is_there else "")
            return is_there
        yield from self._given('"')
        while True:
            place = self._rest.find(end)
            if place >= 0:
                value = self._take(place)
                self._take(len(end))
                value = value[:-1] if has_feed and value.endswith("\n") else value
                yield from self._given(_escaped(value) + '"')
                return True
            held = _held(self._rest, end)
            if has_feed and self._rest[: len(self._rest) - held].endswith("\n"):
                held += 1
            yield from self._given(_escaped(self._take(len(self._rest) - held)))
            if not (yield from self._more()):
                return False

    def _python(self) -> _Reader:
        """Read a call as Python has it."""
        name = yield from self._name("(")
        if name is None:
            return (yield from self._no_call())
        scan, parts = _PythonArguments(), list[str]()
        while not scan.closed:
            parts.append(scan.taken_from(self._rest))
            self._trail.append(self._take(scan.length))
            if not scan.closed and not (yield from self._more()):
                break
        arguments = _python_arguments("".join(parts)) if scan.closed else None
        if scan.closed and arguments is None:
            return (yield from self._no_call())
        if arguments is None and not self._is_cut:
            return (yield from self._no_call())
        yield self._start(name)
        if arguments is None:
            return False
        yield from self._given(arguments)
        yield self._end()
        return True

    def _bare_calls(self, bare: _Bare) -> _Reader:
        """Read a call without marks; False: there is none here."""
        while True:
            lead = bare.after.match(self._rest) if self._after_call else None
            rest = self._rest[lead.end() :] if lead is not None else self._rest
            if not bare.may_begin(rest):
                break
            if not (yield from self._more()):
                if self._is_cut and bare.is_clear(rest):
                    self._take(len(self._rest))
                elif lead is not None:
                    self._take(lead.end())
                return False
        opening = bare.opening(rest)
        if lead is not None and not (bare.is_anywhere and opening is None):
            self._take(lead.end())
        if opening is None:
            return False
        if bare.is_python:
            self._trail = [self._take(opening.end())]
            is_call = yield from self._python_list()
            return is_call
        self._take(opening.end())
        yield self._start(opening["name"])
        if not (yield from self._json()):
            return False
        if (yield from self._word("}")) or self._is_over:
            yield self._end()
            self._trail.clear()
            return True
        yield self._end()
        return True

    def _python_list(self) -> _Reader:
        """Read the calls of a list that stands without marks."""
        while (yield from self._python()):
            if not (yield from self._word(",")):
                yield from self._close()
                return True
        return False


_CHANNEL_MARKS: Final = (" to=functions.", "<|start|>assistant", "<|end|>")
_SILENT: Final = ("<|start|>assistant", "<|end|>")
"""Marks of messages in channels, which are no text."""
_RECIPIENT: Final = re.compile(r"\bto=functions\.(?P<name>[\w.-]{1,128})")
_PLAIN_CHANNEL: Final = re.compile(r"(?:final|commentary)(?:\s*<\|constrain\|>\s*\w+)?")


def _may_be_bare(format_: ToolFormat) -> bool:
    return format_ is HERMES or format_.is_bare


def _held(text: str, mark: str) -> int:
    """Return how many letters at the end of a text may be the beginning of a mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


_IN_STRING: Final = re.compile(r'["\\]')
_OUTSIDE: Final = re.compile(r'["{}\[\]]')


class _JsonObject:
    """Finds the end of a JSON object in text that arrives in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False
        self.closed = False

    def length_in(self, text: str) -> int:
        """Return how much of more text belongs to the object."""
        place = 0
        if self._escaped and text:
            self._escaped, place = False, 1
        while found := (_IN_STRING if self._in_string else _OUTSIDE).search(text, place):
            letter, place = found[0], found.end()
            if letter == "\\":
                self._escaped = place == len(text)
                place += 1
            elif letter == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if letter in "{[" else -1
                if self._depth == 0:
                    self.closed = True
                    return place
        return len(text)


class _PythonArguments:
    """Finds the parenthesis that closes a call in Python, in text that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 1
        self._quote = ""
        self._escaped = False
        self.closed = False
        self.length = 0
        """Of what was taken from the text that came last."""

    def taken_from(self, text: str) -> str:
        """Return what of more text is in the call, with line feeds in texts as Python spells them."""
        taken: list[str] = []
        for letter in text:
            if self._quote:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == self._quote:
                    self._quote = ""
                elif letter in "\n\r":
                    letter = {"\n": "\\n", "\r": "\\r"}[letter]  # noqa: PLW2901 - as it is spelled
            elif letter in "\"'":
                self._quote = letter
            else:
                self._depth += (letter in "([{") - (letter in ")]}")
                if self._depth == 0:
                    self.closed = True
                    self.length = len(taken) + 1
                    return "".join(taken)
            taken.append(letter)
        self.length = len(taken)
        return "".join(taken)


_CONSTANTS: Final = {"true": True, "false": False, "null": None}


def _python_arguments(text: str) -> str | None:
    """Return keyword arguments in Python as JSON; None where they are none."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        given = {one.arg: _constant(one.value) for one in call.keywords}
        return None if None in given else json.dumps(given, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _constant(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | bool() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_constant(one) for one in items]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {str(_constant(key)): _constant(one) for key, one in pairs if key is not None}
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
    raise ValueError("it is no constant")


def _json_value(text: str, is_text: bool | None) -> str:
    """Return the value of an argument that is written without quotation marks as JSON."""
    plain = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text.strip())
    try:
        value = json.loads(plain)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if is_text is None and isinstance(value, str):
        return json.dumps(text, ensure_ascii=False)
    return plain


def parse_reply(
    text: str,
    ids: str | Iterable[str] = "",
    rules: CallRules | Iterable[str] = HERMES_CALLS,
    *,
    is_cut: bool = False,
) -> ParsedReply:
    """
    Take a whole reply apart.

    Args:
        text: As the model wrote it.
        ids: Of its calls, or what `ToolCallParser` was told that they begin with.
        rules: As `ToolCallParser` was told.
        is_cut: As in `ToolCallParser.finish`.
    """
    rules = _rules_of(rules, text)
    mark = rules.format.mark
    if not (mark and mark in text) and not rules.names and not is_cut:
        return ParsedReply(text, ())
    parser = ToolCallParser(ids if isinstance(ids, str) else "", rules)
    known = () if isinstance(ids, str) else tuple(ids)
    content: list[str] = []
    started: list[CallStarted] = []
    arguments: list[list[str]] = []
    whole = 0
    for event in [*parser.push(text), *parser.finish(is_cut=is_cut)]:
        match event:
            case TextDelta(said):
                content.append(said)
            case CallStarted():
                started.append(event)
                arguments.append([])
            case ArgumentsDelta(index, more):
                arguments[index].append(more)
            case CallEnded():
                whole += 1
    calls = [
        ToolCall(
            known[call.index] if call.index < len(known) else call.id, call.name, "".join(given)
        )
        for call, given in zip(started, arguments, strict=True)
    ][: None if is_cut else whole]
    return ParsedReply("".join(content), tuple(calls))


@dataclass(frozen=True, slots=True)
class ShownCalls:
    """What a template shows of a reply with calls."""

    reply: ParsedReply
    end: int
    """Where it ends in the text."""


_LOOKED_AT: Final = 4096
"""Characters that are given to a parser at once."""


def shown_calls(
    text: str, start: int, calls: Sequence[ToolCall], format_: ToolFormat, *, most: int
) -> ShownCalls | None:
    """
    Return the calls that stand in a text from a place on, and where they end; None: they do not.

    Args:
        text: What a template shows.
        start: Where the reply begins in it.
        calls: Those that are looked for.
        format_: Of the calls in the text.
        most: How many characters they may take.
    """
    names = {call.name for call in calls}
    parser = ToolCallParser("", CallRules(format_, tuple(names), texts_in(calls)))
    said, found = list[str](), list[list[str]]()
    started, ended = list[str](), 0
    for place in range(start, min(len(text), start + most), _LOOKED_AT):
        for event in parser.push(text[place : place + _LOOKED_AT]):
            match event:
                case TextDelta(more):
                    if ended == len(calls):
                        break
                    said.append(more)
                case CallStarted(_, _, name):
                    started.append(name)
                    found.append([])
                case ArgumentsDelta(index, more):
                    found[index].append(more)
                case CallEnded():
                    ended += 1
        if ended >= len(calls) and parser.is_in_text:
            break
    if ended < len(calls):
        return None
    both = zip(calls, started, found, strict=False)
    as_found = tuple(ToolCall(call.id, name, "".join(given)) for call, name, given in both)
    return ShownCalls(ParsedReply("".join(said), as_found), start + parser.end_of_calls)


def texts_in(calls: Sequence[ToolCall]) -> Mapping[str, frozenset[str]]:
    """Return which arguments of calls are texts, as `CallRules.texts` has it."""
    texts: dict[str, set[str]] = {}
    for call in calls:
        given = _object_of(call.arguments) or {}
        here = texts.setdefault(call.name, set())
        here |= {key for key, value in given.items() if isinstance(value, str)}
    return {name: frozenset(keys) for name, keys in texts.items()}


def _object_of(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _as_call(body: str, keys: tuple[str, str]) -> tuple[str, str] | None:
    """Return the name and the arguments in an unusual call; None where it is none."""
    call = _object_of(body)
    if call is None or not isinstance(call.get(keys[0]), str):
        return None
    arguments = call.get(keys[1], {})
    return (call[keys[0]], json.dumps(arguments)) if isinstance(arguments, dict) else None

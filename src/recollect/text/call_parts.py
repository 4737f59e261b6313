"""
What the finder of calls tells and is told, and the parts that calls are made of.

Events and rules; how calls without marks begin; where a value ends in text that arrives in pieces, and
what it is as JSON. Pure: text in, values out.
"""

import ast
import json
import re
import secrets
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from recollect.text.tool_formats import HERMES, ToolFormat


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
class CallRules:
    """What calls in a reply look like."""

    format: ToolFormat = HERMES
    names: tuple[str, ...] | None = ()
    """Tools whose calls are calls without marks too; None: whatever their names are."""
    texts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By tools, the arguments that are texts, where the format does not tell a text from a number; of a
    tool that is not there, what reads as JSON and is no text is JSON."""

    def with_names_in(self, text: str) -> "CallRules":
        """Return the same, and where any name will do, with those in a text."""
        if self.names is not None:
            return self
        found = {one for pair in _NAMES.findall(text) for one in pair if one}
        return replace(self, names=tuple(found))


HERMES_CALLS: Final = CallRules()
"""As messages are kept: in the format of Hermes, with marks."""


def new_call_prefix() -> str:
    """Return what the ids of the calls of one reply begin with: no two replies have the same."""
    return f"call_{secrets.token_hex(8)}_"


_FENCE: Final = r"(?:```(?:json)?\s*)?"
MOST_OPENING: Final = 2048
"""Characters in which the name of a call, and what is around it, has to come."""
LOOKED_AT: Final = 4096
"""Characters that are searched together: to take some of them copies those that follow."""
NAME: Final = re.compile(r"[\w.-]{1,128}")
_NAMES: Final = re.compile(r'"name"\s*:\s*"([^"]*)"|\[\s*([\w.-]{1,128})\s*\(')
CLEARLY_A_MARK: Final = len("<tool")
"""Letters of a mark after which it is nothing else: `<t` may begin a table."""
CHANNEL_MARKS: Final = (" to=functions.", "<|start|>assistant", "<|end|>")
"""What begins or ends a message in a channel."""
SILENT: Final = ("<|start|>assistant", "<|end|>")
"""Those of them that are no text."""
RECIPIENT: Final = re.compile(r"\bto=functions\.(?P<name>[\w.-]{1,128})")
PLAIN_CHANNEL: Final = re.compile(r"(?:final|commentary)(?:\s*<\|constrain\|>\s*\w+)?")
"""What the head of a message says that calls nothing."""
SPACE: Final = " \t\n\r\f\v"

Reader = Generator[Event | None, None, bool]
"""Yields events, and None where it needs more text. Returns whether it found what it was to read."""


def object_opening(format_: ToolFormat) -> "re.Pattern[str]":
    """Return the usual beginning of a call: the name, then arguments that can be passed on as they come."""
    key, value = format_.keys
    end = f"(?!{re.escape(format_.closing.strip())})" if format_.closing.strip() else ""
    name = rf'(?P<name>"(?:{end}[^"\\]|\\.)*")'
    kind = r'(?:"type"\s*:\s*"function"\s*,\s*)?'
    return re.compile(rf'\s*\{{\s*{kind}"{key}"\s*:\s*{name}\s*,\s*"{value}"\s*:\s*(?=\{{)')


class Bare:
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
            self._clear = "["
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
        if len(text) >= MOST_OPENING:
            return False
        written = "".join(text.split())
        return any(one.startswith(written) for one in self._beginnings)

    def opening(self, text: str) -> "re.Match[str] | None":
        """Return the beginning of a call in a text."""
        written = "".join(text[:MOST_OPENING].split())
        if not any(written.startswith(one) for one in self._beginnings):
            return None
        return self._opening.match(text)

    def is_clear(self, text: str) -> bool:
        """Return whether the beginning of a text that was cut is nothing else than a call."""
        is_enough = len("".join(text.split())) >= CLEARLY_A_MARK and self._clear in text
        return is_enough and self.may_begin(text)


def held(text: str, mark: str) -> int:
    """Return how many letters at the end of a text may be the beginning of a mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def before_mark(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """
    Return how much of a text comes before the first of some marks, and which mark that is.

    It is empty where none is there; what may be the beginning of one does not count then.
    """
    places = [(text.find(one), one) for one in marks]
    if found := [one for one in places if one[0] >= 0]:
        return min(found)
    return len(text) - max((held(text, one) for one in marks), default=0), ""


def escaped(text: str) -> str:
    """Return a text as it stands in a JSON text, without the quotation marks around it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


_IN_STRING: Final = re.compile(r'["\\]')
_OUTSIDE: Final = re.compile(r'["{}\[\]]')


class JsonObject:
    """Finds the end of a JSON object in text that arrives in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self.escaped = False
        self.closed = False

    def length_in(self, text: str) -> int:
        """Return how much of more text belongs to the object."""
        place = 0
        if self.escaped and text:
            self.escaped, place = False, 1
        while found := (_IN_STRING if self._in_string else _OUTSIDE).search(text, place):
            letter, place = found[0], found.end()
            if letter == "\\":
                self.escaped = place == len(text)
                place += 1
            elif letter == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if letter in "{[" else -1
                if self._depth == 0:
                    self.closed = True
                    return place
        return len(text)


class PythonArguments:
    """Finds the parenthesis that closes a call in Python, in text that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 1
        self._quote = ""
        self.escaped = False
        self.closed = False
        self.length = 0
        """Of what was taken from the text that came last."""

    def taken_from(self, text: str) -> str:
        """Return what of more text is in the call, with line feeds in texts as Python spells them."""
        taken: list[str] = []
        for letter in text:
            if self._quote:
                if self.escaped:
                    self.escaped = False
                elif letter == "\\":
                    self.escaped = True
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


class BracedArguments:
    """Finds the brace that closes an object whose texts have a mark around them, in pieces of text."""

    def __init__(self, quote: str) -> None:
        self._quote = quote
        self._words = re.compile(rf"{re.escape(quote)}|[{{}}\[\]]")
        self._depth = 1
        self._in_text = False
        self.closed = False
        self.length = 0
        """Of what was taken from the text that came last."""

    def taken_from(self, text: str) -> str:
        """Return what of more text is in the object, the brace at its end apart."""
        place = 0
        while found := self._words.search(text, place):
            place = found.end()
            if found[0] == self._quote:
                self._in_text = not self._in_text
            elif not self._in_text:
                self._depth += 1 if found[0] in "{[" else -1
                if self._depth == 0:
                    self.closed, self.length = True, place
                    return text[: place - 1]
        self.length = max(place, len(text) - held(text, self._quote))
        return text[: self.length]


_BARE_KEY: Final = re.compile(r"(?P<before>[{,]\s*)(?P<key>[\w.-]+)(?=\s*:)")


def braced_arguments(text: str, quote: str) -> str | None:
    """Return an object whose keys are bare, and whose texts stand between *quote*, as JSON."""
    parts = f"{{{text}}}".split(quote)
    # Outside of texts a key has no quotation marks; where it has the mark around it, it is a text.
    parts[::2] = [
        _BARE_KEY.sub(lambda found: f"{found['before']}{json.dumps(found['key'])}", one)
        for one in parts[::2]
    ]
    parts[1::2] = [json.dumps(one, ensure_ascii=False) for one in parts[1::2]]
    given = object_of("".join(parts)) if len(parts) % 2 else None
    return None if given is None else json.dumps(given, ensure_ascii=False)


_CONSTANTS: Final = {"true": True, "false": False, "null": None}


def python_arguments(text: str) -> str | None:
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


def json_value(text: str, is_text: bool | None) -> str:
    """Return the value of an argument that is written without quotation marks as JSON."""
    plain = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text.strip())
    try:
        value = json.loads(plain)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if is_text is None and isinstance(value, str):
        return json.dumps(text, ensure_ascii=False)
    return plain


def object_of(text: str) -> dict[str, Any] | None:
    """Return the object that a JSON text is; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def as_call(body: str, keys: tuple[str, str]) -> tuple[str, str] | None:
    """Return the name and the arguments in an unusual call; None where it is none."""
    call = object_of(body)
    if call is None or not isinstance(call.get(keys[0]), str):
        return None
    arguments = call.get(keys[1], {})
    return (call[keys[0]], json.dumps(arguments)) if isinstance(arguments, dict) else None


class PiecewiseReader:
    """
    Takes words and values from text that arrives in pieces.

    Its methods are generators, which wait where they need more text: see `Reader`.
    """

    def __init__(self) -> None:
        self._rest = ""  # not taken yet: short, but for what came last
        self._taken = 0
        self._trail: list[str] = []  # what was taken, and may have to be told as text
        self._is_over = self._is_cut = False
        self._ran_out = False  # more was needed, and there was none

    def _more(self) -> Reader:
        """Wait for more text; return whether there is any."""
        if self._is_over:
            self._ran_out = True
            return False
        yield None
        return True

    def _take(self, length: int) -> str:
        taken, self._rest = self._rest[:length], self._rest[length:]
        self._taken += length
        return taken

    def _word(self, word: str) -> Reader:
        """Take a word, and white space before it; nothing where another one is there."""
        while True:
            rest = self._rest.lstrip(SPACE)
            if rest.startswith(word):
                self._trail.append(self._take(len(self._rest) - len(rest) + len(word)))
                return True
            if not word.startswith(rest) or len(self._rest) > MOST_OPENING:
                return False
            if not (yield from self._more()):
                if self._is_cut and rest:
                    self._take(len(self._rest))  # the beginning of the word
                return False

    def _words(self, text: str) -> Reader:
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
            parts.append(self._take(len(self._rest) - held(self._rest, mark)))
            if not (yield from self._more()):
                parts.append(self._take(len(self._rest)))
                break
        return "".join(parts), False

    def _whole_object(self, scan: JsonObject) -> Generator[Event | None, None, tuple[str, bool]]:
        """Take a JSON object up to its end; return it, and whether the end came."""
        parts = list[str]()
        while True:
            parts.append(self._take(scan.length_in(self._rest)))
            if scan.closed or not (yield from self._more()):
                return "".join(parts), scan.closed

"""
Jinja as chat templates use it, and the program that renders those of strangers.

A template is a program: in a few characters it can ask for a number of a hundred million digits or
a text of a terabyte, and what Python has begun of that cannot be interrupted. So it is rendered in a
process of its own, this module run as a script, which is given bounds by `template` and can
be ended. Imports nothing of recollect, so that it starts in a tenth of a second.

What it is asked comes in frames: 8 bytes of length, then JSON. What it answers: one letter, 8 bytes
of length, then text.
"""

import contextlib
import json
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from types import CodeType
from typing import Any, BinaryIO, Final, Never

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH_BYTES: Final = 8
TEXT, REFUSED, TOO_MUCH, UNKNOWN, COMPILED = b"T", b"R", b"M", b"U", b"C"
"""Kinds of answers; `COMPILED` comes with whether the template looks at tools, `1` or nothing."""

_KEPT: Final = 32
"""Compiled templates that are kept, each some hundred kilobytes; others are sent again."""

# What an expression in a template can raise besides Jinja's own errors: `none + "x"`, `1 / 0`, and
# what Python's own compiler finds too deep.
FAILURES: Final = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    SyntaxError,
)


class _Generation(Extension):
    """Accepts `{% generation %}` around a reply: a mark for training, without effect here."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as a class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body in a scope of its own, as the tag's usual implementation has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def compiled(source: str, now: datetime) -> jinja2.Template:
    """
    Return the template; what it prints as today's date is *now*.

    Raises:
        One of `FAILURES`: It is not valid Jinja.
    """
    environment = _environment()
    environment.globals["strftime_now"] = now.strftime
    variables = environment.make_globals(None)
    return environment.template_class.from_code(environment, _code(source), variables)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


@lru_cache(_KEPT)
def _code(source: str) -> CodeType:
    """Return what a template is compiled to, which depends on nothing but its source."""
    return _environment().compile(source)


@lru_cache(_KEPT)
def looks_at_tools(source: str) -> bool:
    """Return whether a template uses the variable `tools`."""
    return "tools" in meta.find_undeclared_variables(_environment().parse(source))


def words(cause: BaseException) -> str:
    """Return what an error says, to stand in a sentence."""
    return str(cause).strip().rstrip(".") or type(cause).__name__


def moment_fields(now: datetime) -> dict[str, str | None]:
    """Return a moment as JSON, with the name of its time zone."""
    return {"at": now.isoformat(), "zone": now.tzname()}


def _moment(fields: Mapping[str, str | None]) -> datetime:
    now = datetime.fromisoformat(str(fields["at"]))
    offset, zone = now.utcoffset(), fields["zone"]
    return now if offset is None or zone is None else now.replace(tzinfo=timezone(offset, zone))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as models were trained on it; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> Never:
    raise jinja2.TemplateError(message)


class _Answers:
    """The templates that this process knows, and what it answers."""

    def __init__(self) -> None:
        self._templates: OrderedDict[str, jinja2.Template] = OrderedDict()

    def answer(self, request: Mapping[str, Any]) -> tuple[bytes, str]:
        name = request["template"]
        try:
            if "source" in request:
                template = compiled(request["source"], _moment(request["now"]))
                self._templates[name] = template
                if len(self._templates) > _KEPT:
                    self._templates.popitem(last=False)
                return COMPILED, "1" if looks_at_tools(request["source"]) else ""
            if name not in self._templates:
                return UNKNOWN, ""
            self._templates.move_to_end(name)
            return TEXT, self._templates[name].render(request["variables"])
        except FAILURES as cause:
            return REFUSED, words(cause)


def _bound(most_bytes: int) -> None:
    """Take from this process what rendering does not need; on Windows its parent looks at it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started it
    with contextlib.suppress(ImportError):
        import resource  # noqa: PLC0415 - not on Windows

        for limit, most in (
            ("RLIMIT_AS", most_bytes),
            ("RLIMIT_FSIZE", 0),  # it writes no file
            ("RLIMIT_CORE", 0),  # nor what it was given, should it crash
        ):
            with contextlib.suppress(
                AttributeError, ValueError, OSError
            ):  # macOS refuses the first
                resource.setrlimit(getattr(resource, limit), (most, most))


def _read(stream: BinaryIO) -> bytes | None:
    """Return the next frame; None: there will be none."""
    header = stream.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    return stream.read(int.from_bytes(header, "big"))


def main(most_bytes: int) -> None:
    """Answer until nobody asks any more."""
    _bound(most_bytes)
    answers = _Answers()
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    while (frame := _read(stdin)) is not None:
        try:
            kind, text = answers.answer(json.loads(frame.decode("utf-8", "surrogatepass")))
            content = text.encode("utf-8", "surrogatepass")
        except MemoryError:
            kind, content = TOO_MUCH, b""
        except Exception as cause:  # noqa: BLE001 - the last resort: whoever asked waits for an answer
            kind, content = REFUSED, words(cause).encode("utf-8", "surrogatepass")
        stdout.write(kind + len(content).to_bytes(LENGTH_BYTES, "big") + content)
        stdout.flush()
        if kind == TOO_MUCH:
            os._exit(0)  # what is left is not to be relied upon


if __name__ == "__main__":
    main(int(sys.argv[1]))

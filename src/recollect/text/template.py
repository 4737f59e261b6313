"""
Render a model's chat template the way its author tested it.

Templates are programs by strangers: they run in Jinja's sandbox, in processes of their own, within
bounds. The processes serve all templates of this process: the first is started with the first template,
and all end with this process. What goes beyond a bound is refused, and ends the process that it ran in.
Knows no tokens, and not which part of a conversation is new.
"""

import atexit
import contextlib
import copy
import hashlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, Literal, cast

import psutil

from recollect.errors import InvalidParameterError, TemplateError
from recollect.text import template_engine
from recollect.text.reasoning import parted
from recollect.text.reasoning_marks import ReasoningMarks, find_marks
from recollect.text.template_engine import (
    COMPILED,
    FAILURES,
    LENGTH_BYTES,
    REFUSED,
    TEXT,
    TOO_MUCH,
    UNKNOWN,
    words,
)
from recollect.text.template_style import TRIED_TOOLS, CallStyle, folded, tried_style
from recollect.text.tool_calls import with_results_spelled, with_tools_spelled
from recollect.text.tool_formats import HERMES, ToolFormat, of_template
from recollect.types import Message

MOST_SECONDS: Final = 30.0
"""
For one rendering. Of 70 real templates 69 take at most 14 ms for 101 messages; the time of one
(Gemma 4) grows with the square of their number: 0.09 s, and 6 s for 1,001.

Source: benchmarks/templates.py.
"""
MOST_PROCESSES: Final = 4
"""At once, 25 MB each; more than one is started only where somebody would have to wait."""
MOST_MEMORY_BYTES: Final = 1 << 30
"""Of the process. A conversation of four million tokens takes a third of that."""
MOST_TEXT_BYTES: Final = 64 << 20
"""Of a rendered conversation: sixteen million tokens, more than any context holds."""

_POLL_SECONDS: Final = 0.05
"""How often the memory of a process that renders is looked at, where the system does not bound it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one rendering may take."""

    seconds: float = MOST_SECONDS
    memory_bytes: int = MOST_MEMORY_BYTES
    text_bytes: int = MOST_TEXT_BYTES


class _EndedError(Exception):
    """The process is gone."""


class _Child:
    """
    One process, and the thread that reads its answers.

    A thread, because a pipe cannot be waited for with a deadline on every system.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.owner = os.getpid()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and program
                [
                    sys.executable,
                    "-P",
                    "-B",
                    str(Path(template_engine.__file__)),
                    str(bounds.memory_bytes),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # What is in the environment is not the templates' business, a passphrase least of all.
                env={name: text for name, text in os.environ.items() if not _is_own(name)},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as cause:
            raise _too_much(f"cannot be rendered ({cause.strerror or cause})") from cause
        assert self._process.stdin is not None, "it was asked for"
        assert self._process.stdout is not None, "likewise"
        self._requests: IO[bytes] = self._process.stdin
        self._answers: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
        threading.Thread(
            target=_read_answers,
            args=(self._process.stdout, self._answers, bounds.text_bytes),
            name="recollect-templates",
            daemon=True,
        ).start()

    def ask(self, frame: bytes) -> tuple[bytes, bytes]:
        """
        Return kind and content of the answer.

        Raises:
            _EndedError: The process was gone before it was asked.
            TemplateError: It went beyond a bound, or crashed; it is gone now.
        """
        try:
            self._requests.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)
            self._requests.flush()
        except OSError as cause:
            raise _EndedError from cause
        answer = self._wait()
        if answer is None:
            most = self._bounds.text_bytes >> 20
            raise _too_much(f"crashed, or its text is larger than {most:,} MiB")
        if answer[0] == TOO_MUCH:
            raise _too_much(f"takes more memory than {self._bounds.memory_bytes >> 20:,} MiB")
        return answer

    def _wait(self) -> tuple[bytes, bytes] | None:
        until = time.monotonic() + self._bounds.seconds
        while (left := until - time.monotonic()) > 0:
            try:
                return self._answers.get(timeout=min(left, _POLL_SECONDS))
            except queue.Empty:
                if self._memory() > self._bounds.memory_bytes:
                    return TOO_MUCH, b""
        raise _too_much(f"takes longer than {self._bounds.seconds:g} s")

    def _memory(self) -> int:
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except (psutil.Error, OSError):
            return 0  # it has just ended, which the next look at the queue tells

    def end(self) -> None:
        """End the process; its thread goes with it."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not written has nobody to read it
                    stream.close()
        self._process.wait()


def _read_answers(
    stream: IO[bytes], answers: "queue.SimpleQueue[tuple[bytes, bytes] | None]", most_bytes: int
) -> None:
    """Read answers until the process ends, or one is too long."""
    with contextlib.suppress(OSError, ValueError):  # it was closed
        while len(header := stream.read(1 + LENGTH_BYTES)) == 1 + LENGTH_BYTES:
            length = int.from_bytes(header[1:], "big")
            if length > most_bytes:
                break
            answers.put((header[:1], stream.read(length)))
    answers.put(None)


def _is_own(variable: str) -> bool:
    return variable.upper().startswith("RECOLLECT_")


class TemplateProcesses:
    """
    Renders templates in processes of their own. Safe from any thread.

    One process serves whoever comes while it is free; those that come meanwhile get others, so that
    a slow template keeps nobody else waiting.

    Invariants:
        1. Whoever asks gets the answer to what was asked: after an exception its process is gone.
        2. A process is used only by the one that started it, not by one that was forked from that.
    """

    def __init__(self, bounds: Bounds = Bounds()) -> None:
        self._bounds = bounds
        self._may_ask = threading.BoundedSemaphore(MOST_PROCESSES)
        self._idle: list[_Child] = []
        """The one that answered last is the last: without others at once, one is all there is."""

    def ask(
        self, request: Mapping[str, Any], introduction: Mapping[str, Any] | None = None
    ) -> tuple[bytes, str]:
        """
        Return kind and text of the answer.

        Args:
            introduction: What is asked before, where the process does not know the template.

        Raises:
            TemplateError: A bound was reached.
            TypeError, ValueError, RecursionError: The request is no JSON.
        """
        frame = _frame(request)
        with self._may_ask:
            child, kind, content = self._first_answer(frame)
            try:
                if kind == UNKNOWN and introduction is not None:
                    kind, content = child.ask(_frame(introduction))
                    if kind == COMPILED:
                        kind, content = child.ask(frame)
            except BaseException:
                child.end()
                raise
            self._idle.append(child)
        return kind, content.decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """End the processes that nobody asks; the next question starts another."""
        while self._idle:
            child = self._idle.pop()
            if child.owner == os.getpid():
                child.end()

    def _first_answer(self, frame: bytes) -> tuple[_Child, bytes, bytes]:
        for is_last in (False, True):
            child = self._any()
            try:
                return child, *child.ask(frame)
            except _EndedError as cause:  # while it was idle, as where memory runs out
                child.end()
                if is_last:
                    raise _too_much("cannot be rendered: its process ends at once") from cause
            except BaseException:  # also Ctrl-C: the answer would be taken for the next
                child.end()
                raise
        raise AssertionError("the second try returns or raises")

    def _any(self) -> _Child:
        """Return a process that is free, or a new one."""
        if sys.is_finalizing():  # a thread that is started now never runs, and would be waited for
            raise TemplateError("Nothing can be rendered any more: the program is ending.")
        try:
            child = self._idle.pop()
        except IndexError:
            return _Child(self._bounds)
        return child if child.owner == os.getpid() else self._any()


def _frame(request: Mapping[str, Any]) -> bytes:
    return json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _too_much(what: str) -> TemplateError:
    return TemplateError(
        f"The model's chat template {what}: see that the machine has room, or get a corrected version "
        "of the model."
    )


PROCESSES: Final = TemplateProcesses()
"""Those that all templates share."""
atexit.register(PROCESSES.close)


MOST_SOURCE: Final = 1 << 20
"""Characters of a template. The longest of 70 real ones has 17,000."""


class ChatTemplate:
    """
    A chat template, compiled once. Any thread may render it.

    A template that prints today's date gets the date on which this object was made, for as long
    as it lives: were it to change at midnight, every conversation would begin anew.

    Args:
        is_own: Whether it is part of recollect: such a one is rendered in this process.
        tool_format: How the model writes calls of tools; None: as the template shows.
        processes: Render the others.

    Raises:
        TemplateError: There is no template, it is not valid Jinja, or it takes too much to read.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        now: datetime | None = None,
        is_own: bool = False,
        tool_format: ToolFormat | None = None,
        processes: TemplateProcesses = PROCESSES,
    ) -> None:
        if not source:
            raise TemplateError(
                "This model has no chat template, so it cannot hold a conversation: "
                "choose one that was tuned for chat (its name often says Instruct or Chat)."
            )
        if len(source) > MOST_SOURCE:
            raise TemplateError(
                f"The model's chat template has {len(source):,} characters, and {MOST_SOURCE:,} are "
                "read: get a corrected version of the model."
            )
        self.source: Final = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        # What the model lacks stays undefined and prints as nothing; None would print "None".
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._now = now or datetime.now().astimezone()
        self._processes = processes
        # A date is part of what is compiled, so templates of two days are two.
        named = f"{template_engine.moment_fields(self._now)}{source}".encode(
            "utf-8", "surrogatepass"
        )
        self._name = hashlib.sha256(named).hexdigest()
        self._own = None
        try:
            if is_own:
                self._own = template_engine.compiled(source, self._now)
                uses_tools = template_engine.looks_at_tools(source)
            else:
                uses_tools = self._compile()
        except FAILURES as cause:
            raise _broken(words(cause)) from cause
        shown = of_template(source, knows_tools=uses_tools)
        self._has_format = (tool_format or shown) is not None
        self.tool_format: Final = tool_format or shown or HERMES
        """How the model writes calls of tools."""
        self.knows_tools: Final = uses_tools and shown is self.tool_format
        """Whether it shows tools, and asks for calls of them in that format, by itself."""
        self._options: Mapping[str, Any] = {}
        self._takes: dict[_System, bool] = {}
        self._calls: list[CallStyle] = []
        self._marks: list[ReasoningMarks | None] = []

    @property
    def reasoning(self) -> ReasoningMarks | None:
        """Return the marks of what the model thinks; None: it knows none. They are tried out once."""
        if not self._marks:
            until = time.monotonic() + MOST_SECONDS  # all trials together, as one rendering
            self._marks.append(find_marks(self.source, partial(self._tried, until)))
        return self._marks[0]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """
        Return the conversation as the text that the model was trained on.

        Args:
            messages: From the first on.
            add_generation_prompt: Whether the text ends with the opening of a reply.
            tools: Descriptions of tools, as JSON values. A template that does not know them gets
                them spelled out in the instructions, and their results as what the user says.

        Raises:
            TemplateError: The template refuses this conversation; the message gives its words.
        """
        if any(one["role"] == "tool" or one.get("tool_calls") for one in messages):
            if not self.call_style.has_results:
                messages = with_results_spelled(messages)
            messages = self.call_style.applied(messages)
        if tools and not self.knows_tools:
            messages, tools = with_tools_spelled(messages, tools, self.tool_format), None
        messages = self._with_reasoning(self._folded(messages))
        return self._rendered(messages, add_generation_prompt, tools)

    @property
    def call_style(self) -> CallStyle:
        """Return how the template takes calls and results; it is tried out once."""
        if not self._calls:
            found = tried_style(self._rendered_or_none) if self._has_format else CallStyle()
            self._calls.append(found)
        return self._calls[0]

    def _rendered_or_none(self, messages: Sequence[Message]) -> str | None:
        """Return what the template shows of messages that are tried out; None: it refuses them."""
        try:
            return self._rendered(messages, True, TRIED_TOOLS if self.knows_tools else None)
        except TemplateError:
            return None

    def with_options(self, options: Mapping[str, Any]) -> "ChatTemplate":
        """
        Return the same template with more variables that it can look at.

        Raises:
            InvalidParameterError: One has the name of what every template is given.
        """
        if taken := sorted(_GIVEN & options.keys()):
            raise InvalidParameterError(
                f"{taken[0]!r} is no option of a chat template, but what it shows: leave it out.",
                param="template_options",
            )
        other = copy.copy(self)
        other._options = dict(options)
        return other

    def with_thoughts(self, messages: Sequence[Message]) -> list[Message]:
        """
        Return messages with the reasoning of replies apart from what they say.

        Without any, where the template knows none.
        """
        return [self._apart(one) for one in messages]

    def _apart(self, message: Any) -> Any:
        """Return a message with reasoning apart; what is none stays, and is refused later."""
        if not isinstance(message, dict) or message.get("role") != "assistant":
            return message
        said, marks = message.get("content"), self.reasoning
        if marks is None:
            return _without_reasoning(cast("Message", message))
        is_apart = message.get("reasoning_content") or not isinstance(said, str)
        if is_apart or not str(said).lstrip().startswith(marks.open):
            return message
        parts = parted(str(said), marks)
        return {**message, "content": parts.said, "reasoning_content": parts.reasoning}

    def _with_reasoning(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return messages with their reasoning where the template looks for it."""
        if not any("reasoning_content" in one for one in messages):
            return messages
        marks = self.reasoning
        if marks is None:
            return [_without_reasoning(one) for one in messages]
        return [cast("Message", marks.told(one)) for one in messages]

    def _tried(
        self,
        until: float,
        messages: Sequence[Mapping[str, Any]],
        opens: bool,
        options: Mapping[str, Any],
    ) -> str | None:
        """Return what the template shows of messages that are tried out; None: it refuses, or is slow."""
        template = copy.copy(self)
        template._options = options
        try:
            return None if time.monotonic() > until else template._rendered(messages, opens, None)
        except TemplateError:
            return None

    def _folded(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return messages with the instructions where the template takes them; see `folded`."""
        systems = [place for place, one in enumerate(messages) if one["role"] == "system"]
        if not systems:
            return messages
        in_front = next(n for n in range(len(messages) + 1) if n not in systems)
        takes = (
            not in_front or self._does_take("one"),
            in_front < 2 or self._does_take("two"),
            in_front == len(systems) or self._does_take("later"),
        )
        if all(takes):
            return messages
        return folded(messages, takes_one=takes[0], takes_two=takes[1], takes_later=takes[2])

    def _does_take(self, kind: "_System") -> bool:
        """Return whether instructions are shown that stand somewhere; it is tried out once."""
        if kind not in self._takes:
            said = [Message(role="system", content=text) for text in _TRIED_OUT[1:]]
            asked = Message(role="user", content=_TRIED_OUT[0])
            # Later, after a turn, where roles may have to alternate; and not in place of the first.
            turn = [asked, Message(role="assistant", content=_TRIED_OUT[0])]
            first = said[:1] if kind == "later" and self._does_take("one") else []
            messages = {
                "one": [said[0], asked],
                "two": [*said, asked],
                "later": [*first, *turn, said[1], asked],
            }[kind]
            # Some are broken without tools.
            each = [self._tried(math.inf, messages, True, self._options)]
            each += [self._rendered_or_none(messages)] if each[0] is None else []
            text = each[-1] or ""
            self._takes[kind] = all(str(one["content"]) in text for one in messages)
        return self._takes[kind]

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        variables = {
            **self._options,
            "messages": [dict(message) for message in messages],
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        try:
            if self._own is not None:
                return self._own.render(variables)
            request = {"template": self._name, "variables": variables}
            kind, text = self._processes.ask(request, self._introduction())
        except FAILURES as cause:  # of the template here; elsewhere the request is no JSON
            raise _refused(words(cause)) from cause
        if kind == REFUSED:
            raise _refused(text)
        assert kind == TEXT, "a rendering is a text, or refused"
        return text

    def _compile(self) -> bool:
        """Have the process compile the template; return whether it looks at tools."""
        kind, text = self._processes.ask(self._introduction())
        if kind == REFUSED:
            raise _broken(text)
        assert kind == COMPILED, "what was compiled is not rendered yet"
        return bool(text)

    def _introduction(self) -> dict[str, Any]:
        """Return what a process is told that does not know the template."""
        return {
            "template": self._name,
            "source": self.source,
            "now": template_engine.moment_fields(self._now),
        }


_System = Literal["one", "two", "later"]
"""Where instructions may stand: one before everything, two there, or one after a user's message."""

_GIVEN: Final = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
}
"""The variables that are a conversation; others are options."""

_TRIED_OUT: Final = ("recollect0question", "recollect0first", "recollect0second")
"""Texts of a trial conversation, which a template shows as they are or not at all."""


def _without_reasoning(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    plain = message.copy()
    del plain["reasoning_content"]
    return plain


def _broken(why: str) -> TemplateError:
    return TemplateError(
        f"The model's chat template is broken ({why}): get a corrected version of the model."
    )


def _refused(why: str) -> TemplateError:
    return TemplateError(f"The model's chat template refuses this conversation: {why}")

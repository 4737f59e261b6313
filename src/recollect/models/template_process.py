"""
The process that renders chat templates, and the bounds that it has.

One for all templates of this process, started when the first is met and ended with it. What goes
beyond a bound is refused, and the next template gets a new process. Knows no messages and no models.
"""

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import psutil

from recollect.errors import TemplateError
from recollect.models import template_engine
from recollect.models.template_engine import LENGTH_BYTES, TOO_MUCH

MOST_SECONDS: Final = 10.0
"""
For one rendering. Of 25 real templates the slowest takes 1.6 ms for 101 messages.

Source: benchmarks/templates.py.
"""
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


class _Ended(Exception):  # noqa: N818 - not an error where the request can be made again
    """The process is gone."""


class _Child:
    """
    One process, and the thread that reads its answers.

    A thread, because a pipe cannot be waited for with a deadline on every system.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.owner = os.getpid()
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
            _Ended: The process was gone before it was asked.
            TemplateError: It went beyond a bound, or crashed; it is gone now.
        """
        try:
            self._requests.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)
            self._requests.flush()
        except OSError as cause:
            raise _Ended from cause
        answer = self._wait()
        if answer is None:
            raise _too_much("crashed, or its text is larger than 64 MiB")
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
        except psutil.Error:
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


class TemplateProcess:
    """
    Renders templates in a process of its own. Safe from any thread, one rendering at a time.

    Invariants:
        1. Whoever asks gets the answer to what was asked: after an exception the process is gone.
        2. It is used only by the process that started it, not by one that was forked from that.
    """

    def __init__(self, bounds: Bounds = Bounds()) -> None:
        self._bounds = bounds
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def ask(self, request: Mapping[str, Any]) -> tuple[bytes, str]:
        """
        Return kind and text of the answer.

        Raises:
            TemplateError: A bound was reached.
            TypeError, ValueError, RecursionError: The request is no JSON.
        """
        frame = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with self._lock:
            try:
                kind, content = self._ask(frame)
            except BaseException:
                self._end()  # also where Ctrl-C came: the answer would be taken for the next
                raise
        return kind, content.decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """End the process; the next question starts another."""
        with self._lock:
            self._end()

    def _ask(self, frame: bytes) -> tuple[bytes, bytes]:
        for is_last in (False, True):
            if self._child is None or self._child.owner != os.getpid():
                self._child = _Child(self._bounds)
            try:
                return self._child.ask(frame)
            except _Ended as cause:  # while it was idle, as where memory runs out
                self._end()
                if is_last:
                    raise _too_much("cannot be rendered: its process ends at once") from cause
        raise AssertionError("the second try returns or raises")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None and child.owner == os.getpid():
            child.end()


def _too_much(what: str) -> TemplateError:
    return TemplateError(
        f"The model's chat template {what}, which none that is meant to be used does: get a corrected "
        "version of the model."
    )


PROCESS: Final = TemplateProcess()
"""The one that all templates share."""
atexit.register(PROCESS.close)

"""
A reply on the terminal while it is generated.

It is printed without echo of what is typed meanwhile, with a bar while a long prompt is read, and what the
model thinks before it dim, or folded. Ctrl-C stops it. Is given what starts a reply, and what writes it.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from recollect.cli.display import PlainWriter, Writer
from recollect.conversation.session import ReplyStream
from recollect.conversation.turn import Reply
from recollect.text.reasoning import ReasoningDelta
from recollect.text.tool_calls import TextDelta


@contextmanager
def no_echo() -> Iterator[None]:
    """Keep what is typed meanwhile off the screen, for the next prompt; on Windows, do nothing."""
    try:
        import termios  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = list(before)
    quiet[3] &= ~termios.ECHO  # the fourth field holds the local modes
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


PATIENCE_S: Final = 0.5
"""How long a prompt is read without a word about it."""
_REFRESH_S: Final = 0.1


class Interrupt:
    """Ctrl-C while a reply is under way: it asks the reply to stop, as soon as there is one."""

    def __init__(self) -> None:
        self.pressed = False
        self._stop: Callable[[], None] | None = None

    def press(self, _signal: int = signal.SIGINT, _frame: FrameType | None = None) -> None:
        """Note it and stop what there is to stop. This is the signal handler."""
        self.pressed = True
        if self._stop is not None:
            self._stop()

    def stops(self, stop: Callable[[], None]) -> None:
        """Have *stop* called by Ctrl-C, or at once where that came already."""
        self._stop = stop
        if self.pressed:
            stop()


@contextmanager
def interrupt_handler() -> Iterator[Interrupt]:
    """Take Ctrl-C over until the end of the block. In the main thread only."""
    interrupt = Interrupt()
    previous = signal.signal(signal.SIGINT, interrupt.press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class _Thoughts:
    """Shows what a model thinks before it says something, dim; or only that it does."""

    def __init__(self, console: Console, *, are_shown: bool) -> None:
        self._out = console.file
        self._writer = PlainWriter(console.file, console.width)
        self._are_shown = are_shown
        has_styles = console.color_system is not None and not console.legacy_windows
        self._dim, self._plain = (_DIM, _PLAIN) if has_styles else ("", "")
        self._is_thinking = False

    def push(self, text: str) -> None:
        """Show more of a thought."""
        if not self._is_thinking:
            self._is_thinking = True
            self._out.write(self._dim)
            if not self._are_shown:
                self._writer.push("thinking …")
        if self._are_shown:
            self._writer.push(text)

    def end(self, gap: str = "") -> None:
        """Show what was held back of a thought, and a gap after it; the cursor is at the start of a line."""
        if self._is_thinking:
            self._is_thinking = False
            self._writer.finish()
            self._out.write(self._plain + gap)


def show_reply(
    start: Callable[[], ReplyStream],
    console: Console,
    writer: Writer,
    *,
    shows_reasoning: bool = True,
) -> Reply | None:
    """
    Show a reply as it is generated. Ctrl-C ends it, and what was said until then is kept.

    Args:
        start: Starts it.
        console: Where the bar is drawn while its prompt is read.
        writer: Shows what it says.
        shows_reasoning: Whether what the model thinks before it is shown, too.

    Returns:
        The reply; None where it was stopped before anything was said.

    Raises:
        RecollectError: As *start* and the stream do; the cursor is at the start of a line.
    """
    thoughts = _Thoughts(console, are_shown=shows_reasoning)
    with no_echo(), interrupt_handler() as interrupt, start() as stream:
        interrupt.stops(stream.stop)
        meter = PrefillMeter(stream, console)
        try:
            for event in stream.events():
                meter.close()
                if isinstance(event, ReasoningDelta):
                    thoughts.push(event.text)
                elif isinstance(event, TextDelta):
                    thoughts.end(gap="\n")
                    writer.push(event.text)
        finally:
            meter.close()
            thoughts.end()
            writer.finish()
    return stream.reply


class PrefillMeter:
    """
    A bar that appears when a prompt takes long to read, until it is closed.

    Draws from a thread of its own, because the main thread waits for the first piece.
    """

    def __init__(self, stream: ReplyStream, console: Console) -> None:
        self._stream = stream
        self._console = console
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if console.is_terminal:
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Take the bar away. Calling it again does nothing."""
        if self._thread is not None:
            self._closed.set()
            self._thread.join()
            self._thread = None

    def _draw(self) -> None:
        if self._closed.wait(PATIENCE_S):
            return
        bar = Bars(
            TextColumn("[dim]reading"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("[dim]tokens"),
            console=self._console,
            transient=True,
        )
        with bar:
            task = bar.add_task("", total=None)
            while not self._closed.wait(_REFRESH_S):
                done, total = self._stream.prefill_progress
                bar.update(task, completed=done, total=total)

"""
A reply on a terminal while it is generated: pieces as they come, Ctrl-C to stop, prefill progress.

Does not know sessions or commands: it is given something that starts a reply.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from recollect.cli.terminal import WordWrapper, no_echo, printable
from recollect.conversation.turn import Reply, ReplyStream

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


def show_reply(start: Callable[[], ReplyStream], console: Console) -> Reply | None:
    """
    Print a reply as it is generated. Ctrl-C ends it, and what was said until then is kept.

    Returns:
        The reply; None where it was stopped before anything was said.

    Raises:
        RecollectError: As *start* and the stream do; the cursor is at the start of a line.
    """
    out = console.file
    wrapper = WordWrapper(console.width)
    with no_echo(), interrupt_handler() as interrupt, start() as stream:
        interrupt.stops(stream.stop)
        meter = PrefillMeter(stream, console)
        try:
            for piece in stream:
                meter.close()
                out.write(wrapper.push(printable(piece)))
                out.flush()
        finally:
            meter.close()
            out.write(wrapper.finish() + ("\n" if wrapper.column else ""))
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
        bar = Progress(
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

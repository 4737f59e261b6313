"""
Work that is done for a session while nobody waits for it.

Knows no conversation: it is given sequences to compute.
"""

from collections import deque
from typing import Final

from recollect.engine.engine import Engine
from recollect.engine.reply import ReadAhead
from recollect.engine.scheduler import Task
from recollect.engine.sequence import Sequence
from recollect.errors import MisuseError, RuntimeFailure

_MOST_REMEMBERED: Final = 32
"""
Drafts of one message whose cost is known apart. Each holds its token ids, 8 bytes a token; whoever
pauses more often finds what the first drafts had computed among the reused.
"""


class IdleWork:
    """
    A sequence that the engine computes when it has nothing else to do; at most one.

    Remembers what was computed since the last turn, so that the next can tell it from what it reuses.
    Safe from several threads where only one of them starts work.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._task: Task | None = None
        self._ahead: deque[ReadAhead] = deque(maxlen=_MOST_REMEMBERED)

    @property
    def ahead(self) -> tuple[ReadAhead, ...]:
        """Return what was computed ahead since the last turn."""
        return tuple(self._ahead)

    def note(self, ahead: ReadAhead) -> None:
        """Remember something else that was computed ahead."""
        self._ahead.append(ahead)

    def forget(self) -> None:
        """Let what was computed so far be of a turn that is over."""
        self._ahead.clear()

    def start(self, sequence: Sequence) -> None:
        """
        Have a sequence computed instead of the one before, and return at once.

        The sequence is released when that is done, or given up; what was computed stays findable.
        """
        if self._task is not None:
            self._task.cancel()  # not waited for: a forward pass may be under way
            self._task = None
        if sequence.is_warm():
            sequence.release()
            return
        task = Task(sequence, lambda: False, idle=True, spare=True, on_end=sequence.release)
        try:
            self._engine.submit(task)
        except (MisuseError, RuntimeFailure):
            sequence.release()  # the engine is gone: whoever asks it for something is told
        else:
            self._task = task
            self.note(ReadAhead(sequence, task.fed, task))

    def stop(self) -> None:
        """Give it up, and wait for the end of a forward pass that is under way."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            task.join()

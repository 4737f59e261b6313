"""
Work that is done for a session while nobody waits for it.

Knows no conversation: it is given sequences to compute.
"""

from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence
from recollect.engine.task import Task
from recollect.errors import MisuseError, RuntimeFailure


class IdleWork:
    """
    A sequence that the engine computes when it has nothing else to do; at most one.

    Safe from several threads where only one of them starts work.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._task: Task | None = None

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

    def stop(self) -> None:
        """Give it up, and wait for the end of a forward pass that is under way."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            task.join()

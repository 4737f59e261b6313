"""
A piece of work for the engine: bring a sequence to its next logits, again and again.

Knows nothing of sampling or text: what is done with the logits is a callback's business.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal

from recollect.engine.sequence import FeedPlan, Sequence
from recollect.runtime.base import PagedRuntime, ReplayingRuntime, Row

TaskState = Literal["waiting", "running", "done", "cancelled", "failed"]

_FIRST_TOKENS_S: Final = 0.001
"""
How long the cores are left to those who read a first token. A pass, which takes tens of milliseconds,
has all of them; on two cores a server's first token was 3 ms longer on its way through two threads.
"""


class Task:
    """
    Work on one sequence, which belongs to the engine's thread until the task has ended.

    Args:
        sequence: What to compute.
        on_logits: Called on the engine's thread whenever the logits after the sequence are known.
            May append to it; returns whether to go on.
        idle: Run only while there is nothing else to do.
        spare: Idle, and nobody waits for it: the scheduler may cancel it where there are many.
        hand_over: Called on the engine's thread when a forward pass is about to run, and before
            `on_end`: the moment to wake readers, who then work while the runtime does. Returns whether
            one of them was given its first token.
        on_end: Called on the engine's thread when it is over, however it ended.
    """

    def __init__(
        self,
        sequence: Sequence,
        on_logits: Callable[[], bool],
        *,
        idle: bool = False,
        spare: bool = False,
        hand_over: Callable[[], bool] = lambda: False,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.sequence = sequence
        self.on_logits = on_logits
        self.namespace = sequence.namespace or ""
        assert idle or not spare, "what is spare is idle"
        self.idle = idle
        """Whether it runs only while nothing else does."""
        self.spare = spare
        """Whether nobody waits for it."""
        self.state: TaskState = "waiting"
        self.error: Exception | None = None
        self.restoring = False
        """Whether the disk may have more of it; it is not fed meanwhile."""
        self.restored_tokens = 0
        """Tokens whose KV came from disk for it."""
        self.fed: list[FeedPlan] = []
        """What forward passes were fed with for it, in order."""
        self.hand_over = hand_over
        self._on_end = on_end
        self._cancelled = False
        self._ended = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Return whether the caller wants no more of it."""
        return self._cancelled

    @property
    def ended(self) -> bool:
        """Return whether the sequence is the caller's again."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Ask for the end, after the forward pass under way; from any thread or signal handler."""
        self._cancelled = True

    def wait(self) -> None:
        """
        Wait for the end.

        Raises:
            Exception: What the task failed with.
        """
        self.join()
        if self.error is not None:
            raise self.error

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, whatever it is, or for some seconds; return whether it has come."""
        return self._ended.wait(timeout_s)

    def end(self, state: TaskState, error: Exception | None = None) -> None:
        """Give the sequence back to the caller. For the scheduler."""
        self.state, self.error = state, error
        try:
            self.hand_over()
            self._on_end()
        except Exception as bug:  # noqa: BLE001 - handed to whoever waits
            self.state, self.error = "failed", error or bug
        finally:
            self._ended.set()


def hand_over(tasks: Iterable[Task]) -> None:
    """Give readers what was generated for them, and those of a first token time to wake up."""
    if [task for task in tasks if task.hand_over()]:
        time.sleep(_FIRST_TOKENS_S)


def count_replays(runtime: PagedRuntime, rows: Mapping[Task, Row]) -> int:
    """
    Note for each task what the last pass computed besides its row, and return how many tokens that is.

    None, unless the runtime keeps KV to itself: the plan took for computed what it no longer had.
    """
    if not isinstance(runtime, ReplayingRuntime):
        return 0
    tokens = 0
    for (task, row), start in zip(rows.items(), runtime.started, strict=True):
        if start < row.past:
            task.fed.append(FeedPlan(start, row.past))
            task.sequence.fed_tokens += row.past - start
            tokens += row.past - start
    return tokens

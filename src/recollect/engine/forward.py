"""
Forward passes over the chunks of tasks: run, counted, timed; one that fails hurts no other task.

Knows tasks and the runtime; not the scheduler, and not what becomes of logits.
"""

from time import perf_counter
from typing import Final

from recollect.engine.sequence import FeedPlan
from recollect.engine.task import Task, count_replays
from recollect.runtime.base import Logits, PagedRuntime
from recollect.types import running_average

_TIMED_TOKENS: Final = 32
"""A pass over fewer tokens says little of what prefill costs."""

Chunks = dict[Task, FeedPlan]


class ForwardPasses:
    """
    What runs and counts forward passes.

    Owned by the engine's thread; the counters may be read from any.
    """

    def __init__(self, runtime: PagedRuntime, *, keep_multiple_of: int) -> None:
        self._runtime = runtime
        self._keep_multiple_of = keep_multiple_of
        self.computed_tokens = 0
        """Tokens fed so far."""
        self.count = 0
        """Forward passes so far."""
        self.s_per_token: float | None = None
        """What a prompt's token costs, in seconds; None where no prompt was computed yet."""

    def run(
        self, chunks: Chunks, copies: list[tuple[int, int]]
    ) -> tuple[dict[Task, Logits], dict[Task, Exception]]:
        """
        Copy blocks, then feed the chunks; where that fails, each by itself.

        Args:
            chunks: What to feed; an entry is replaced where it had to begin earlier.
            copies: Blocks to copy first, `(source, target)`.

        Returns:
            The logits of the tasks that reach their end, and what those that failed failed with.
        """
        try:
            if copies:
                self._runtime.copy_blocks(copies)
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the tasks
            return {}, dict.fromkeys(chunks, error)
        try:
            return self._forward(chunks), {}
        except Exception as error:  # noqa: BLE001 - likewise
            if len(chunks) == 1:
                return {}, dict.fromkeys(chunks, error)
        logits: dict[Task, Logits] = {}
        errors: dict[Task, Exception] = {}
        for task, fed in chunks.items():
            start = fed.start // self._keep_multiple_of * self._keep_multiple_of
            chunks[task] = FeedPlan(start, fed.end)  # what failed may have spoilt all of a block
            own_logits, own_errors = self.run({task: chunks[task]}, [])
            logits |= own_logits
            errors |= own_errors
        return logits, errors

    def _forward(self, chunks: Chunks) -> dict[Task, Logits]:
        """Feed the chunks in one forward pass; return the logits of the tasks that reach their end."""
        if not chunks:
            return {}
        rows = {task: task.sequence.row(fed) for task, fed in chunks.items()}
        begun = perf_counter()
        logits = self._runtime.forward(list(rows.values()))
        fed_tokens = sum(len(row.token_ids) for row in rows.values())
        self._time(fed_tokens, perf_counter() - begun)
        self.count += 1
        self.computed_tokens += fed_tokens + count_replays(self._runtime, rows)
        wanting = [task for task, row in rows.items() if row.wants_logits]
        return dict(zip(wanting, logits, strict=True))

    def _time(self, tokens: int, seconds: float) -> None:
        if tokens >= _TIMED_TOKENS:
            self.s_per_token = running_average(self.s_per_token, seconds / tokens)

"""
Room for the next forward pass: which slots it writes, and who gives up blocks for them.

Knows the scheduler, the pool and the cache; runs nothing.
"""

from collections.abc import Callable

from recollect.engine.scheduler import Pass, Scheduler
from recollect.engine.sequence import Sequence
from recollect.engine.task import Task
from recollect.errors import OutOfBlocksError
from recollect.kv.blocks import BlockPool
from recollect.kv.prefix import PrefixCache


class Room:
    """
    What makes the slots of a pass writable.

    Used by the engine's thread, under its lock.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pool: BlockPool,
        cache: PrefixCache,
        *,
        restores: bool,
        fail: Callable[[Task, Exception], None],
    ) -> None:
        """
        Look after the blocks of a scheduler's tasks.

        Args:
            scheduler: Whose tasks run.
            pool: Where blocks come from.
            cache: What gives them up first.
            restores: Whether there is a tier below memory.
            fail: Called with a task that there is no room for; ends it.
        """
        self._scheduler = scheduler
        self._pool = pool
        self._cache = cache
        self._restores = restores
        self._fail = fail
        self.preemptions = 0
        """Running tasks that had to make way so far."""

    def fits(self, task: Task) -> bool:
        """
        Return whether a waiting task has room beside those that run, and what they have still to take.

        Counted are the blocks that it would have to be given for its history and one more token.
        Where they are not there, other tasks that wait give up theirs.
        """
        return self._has_room(task) or (self._park_waiting(but=task) and self._has_room(task))

    def _has_room(self, task: Task) -> bool:
        sequences = [one.sequence for one in (*self._scheduler.running, task)]
        lacking = [self._lacking(sequence) for sequence in sequences]
        room = self._pool.free_blocks + self._cache.evictable_blocks
        # Looking into the cache takes longer, and is rarely needed.
        return sum(lacking) <= room or sum(lacking) - sum(map(self._shared, sequences)) <= room

    def _lacking(self, sequence: Sequence) -> int:
        """Return how many blocks a sequence does not hold for its history and the next token."""
        plan = sequence.plan()
        start = len(sequence) if plan is None else plan.start
        return sequence.kv.plan_write(start, len(sequence) + 1).new_blocks

    def _shared(self, sequence: Sequence) -> int:
        """
        Return how many blocks of those it can take over from the cache without less being evictable.

        These are the ones that somebody holds, or pinned: the rest of what the cache has is room.
        """
        after, size = sequence.kv.last_full, self._pool.block_size
        if after is None:
            return 0
        own = len(sequence.kv.chain)
        match = self._cache.match(after, sequence.tokens(own * size), inside_block=False)
        held = sum(c.pins > 0 or self._pool.is_shared(c.block) for c in match.full)
        # The last block that it holds may be a part of one that is found whole.
        return max(0, own + held - len(sequence.kv.blocks))

    def prepare(self) -> tuple[Pass, list[tuple[int, int]]]:
        """
        Decide on the next pass, and make its slots writable.

        Where blocks run short, gives up what is least needed: first what only the cache holds,
        then the place of the newest task of whoever has the most. A task for which even that is not
        enough fails.

        Returns:
            The pass, which may be empty, and blocks to copy before it.
        """
        while True:
            for task in self._scheduler.running:
                task.sequence.reuse()
            planned = self._scheduler.plan()
            needed = sum(
                task.sequence.kv.plan_write(fed.start, fed.end).new_blocks
                for task, fed in planned.chunks.items()
            )
            short = needed - self._pool.free_blocks
            if short > 0:
                short -= self._cache.evict(short)
            if short <= 0:
                break
            if not self._take_tails_back(planned):
                self._make_way(needed)
        self._scheduler.feed(planned)
        copies: list[tuple[int, int]] = []
        for task, fed in planned.chunks.items():
            task.fed.append(fed)
            copies += task.sequence.kv.prepare_write(fed.start, fed.end)
        return planned, copies

    def _take_tails_back(self, planned: Pass) -> bool:
        """Spare the copy of a block that only the cache holds besides; return whether there was any."""
        return any(task.sequence.kv.take_back(fed.start) for task, fed in planned.chunks.items())

    def _make_way(self, needed: int) -> None:
        """Take the blocks of tasks that wait, else of the newest that runs, else fail the only one."""
        if self._park_waiting():
            return
        if len(self._scheduler.running) > 1:
            newest = self._scheduler.newest()
            self._park(newest)
            self._scheduler.preempt(newest)
            self.preemptions += 1
        else:
            free, total = self._pool.free_blocks, self._pool.num_blocks
            error = OutOfBlocksError(needed=needed, free=free, total=total)
            self._fail(self._scheduler.running[0], error)

    def _park_waiting(self, *, but: Task | None = None) -> bool:
        """Take the blocks of tasks that wait, but for one of them; return whether any had some."""
        holding = [
            one for one in self._scheduler.waiting if one.sequence.computed and one is not but
        ]
        for one in holding:
            self._park(one)
        return bool(holding)

    def _park(self, task: Task) -> None:
        task.sequence.park()
        task.restoring = self._restores  # what it gives up may be on disk

"""
Which tasks the next forward pass feeds, how many tokens of each, and whose blocks make room for it.

The `Scheduler` decides which tasks run and what they are fed, and knows no blocks. `Room` finds the blocks
for that, from the cache and from other tasks. The engine carries out what they decide. All of it happens on
the engine's thread, but for `Scheduler.add`.
"""

from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from recollect.engine.decoder import Task, TaskState
from recollect.engine.sequence import FeedPlan, Memory
from recollect.errors import OutOfBlocksError
from recollect.runtime.base import Pace

MOST_SPARE: Final = 16
"""How many spare tasks may wait. On a server that is never idle each reply leaves one behind, and the KV
of the older ones' conversations is evicted by the time that they could run."""

MOST_CREDIT: Final = 131_072
"""How many prompt tokens a namespace that was quiet may be fed before others take turns with it. That is
a prompt that fills the context of most models: it overtakes all prompts of somebody who sends hundreds,
and nobody waits for ever."""

Chunks = dict[Task, FeedPlan]
"""What one forward pass feeds: a range of each task's history."""


class _Turns:
    """
    How many prompt tokens each namespace was fed lately. The one that was fed least is next.

    A namespace that comes while another runs alone has the full credit, so that its first token waits
    for none of the other's prompts. What it is fed uses the credit up; what others are fed restores it.

    Invariant: no account is beyond `_most`, nor `MOST_CREDIT` or more below it.
    """

    def __init__(self) -> None:
        self._fed: dict[str, int] = {}
        self._most = 0

    def account(self, namespace: str) -> int:
        """Return how many it was; one that was quiet for long has the full credit."""
        return self._fed.get(namespace, self._most - MOST_CREDIT)

    def feed(self, namespace: str, tokens: int, *, alone: bool) -> None:
        """Take note of a part of a prompt; *alone*: nothing of any other namespace runs."""
        before = self._most if alone else self.account(namespace)
        self._fed[namespace] = before + tokens
        self._most = max(self._most, before + tokens)
        least = self._most - MOST_CREDIT
        self._fed = {name: fed for name, fed in self._fed.items() if fed > least}


class Scheduler:
    """
    The tasks that wait and those that run.

    Owned by the engine's thread; `add` is called from any thread, under the lock of `Memory`.

    Invariants:
        1. A task waits or runs, not both, and not twice.
        2. At most `pace.most_rows` run.
        3. An idle task runs only alone.
        4. At most `MOST_SPARE` spare tasks wait that are not cancelled.
        5. The invariant of `_Turns`.
    """

    def __init__(self, block_size: int, pace: Pace, *, has_disk: bool = False) -> None:
        self._block_size = block_size
        self._has_disk = has_disk
        self.pace: Final = pace
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []
        self.preemptions = 0
        """Running tasks that had to wait again so far, so that others could run."""
        self._turns = _Turns()

    def add(self, task: Task) -> None:
        """Let a task wait for its turn; where there are too many spare ones, cancel the oldest."""
        assert task.idle or not task.spare, "what is spare is idle"
        self.waiting.append(task)
        task.state = "submitted"  # last: whoever is interrupted before waits for nothing
        self._cancel_spare()

    def tasks(self) -> list[Task]:
        """Return all tasks, those that run first."""
        return [*self.running, *self.waiting]

    def end(self, task: Task, state: TaskState, error: Exception | None = None) -> None:
        """Remove a task, and tell whoever waits for it how it ended."""
        (self.running if task in self.running else self.waiting).remove(task)
        task.end(state, error)

    def preempt(self, task: Task) -> None:
        """Let a running task wait again, before all others."""
        self.running.remove(task)
        self.waiting.appendleft(task)
        self._cancel_spare()

    def preempt_newest(self) -> Task:
        """Preempt the newest task of the namespace that has the most running; return it."""
        running = self._running_by_namespace()
        most = max(running.values())
        newest = next(one for one in reversed(self.running) if running[one.namespace] == most)
        self.preempt(newest)
        self.preemptions += 1
        return newest

    def admit(self, fits: Callable[[Task], bool]) -> None:
        """
        Let waiting tasks run, those of the namespace with the fewest first, while there is room.

        Where a namespace that has nothing running finds no room, the newest task of the namespace with
        the most running is preempted for it: nobody waits while somebody else runs two. Idle tasks run
        when nothing else is there. One task always runs, whether it fits or not.
        """
        if any(not task.idle for task in self.waiting):
            for idle in [task for task in self.running if task.idle]:
                self.preempt(idle)
        while self.waiting:
            running = self._running_by_namespace()
            task = min(self.waiting, key=lambda one: (one.idle, running[one.namespace]))
            if task.idle and self.running:
                break
            has_place = len(self.running) < self.pace.most_rows
            if not self.running or (has_place and fits(task)):
                self.waiting.remove(task)
                self.running.append(task)
                task.restoring = self._has_disk  # it may have been parked while it waited
            elif not running[task.namespace] and max(running.values()) > 1:
                self.preempt_newest()
            else:
                break

    def plan(self) -> Chunks:
        """
        Return what the next pass feeds.

        Every sequence that lacks only its last token gets it. What is left goes to prompts: first to
        the namespace that was fed least, then in order of arrival. A prompt waits while another in the
        pass computes the same tokens, and finds them in the cache afterwards.
        """
        chunks: Chunks = {}
        plans: Chunks = {}  # of prompts
        for task in self.running:
            if not task.restoring and task.sequence.logits is None:
                plan = task.sequence.plan()
                (chunks if plan.tokens == 1 else plans)[task] = plan
        prompts = list(plans)
        accounts = {task.namespace: self._turns.account(task.namespace) for task in prompts}
        # At least a block: else the prompt of a runtime with larger ones would wait for ever.
        pace = self.pace
        budget = max(self._block_size, pace.shared_chunk if chunks else pace.prefill_chunk)
        while prompts and budget >= self._block_size:
            task = min(prompts, key=lambda one: (accounts[one.namespace], one.namespace))
            prompts.remove(task)
            plan = plans[task]
            if _computed_by_another(task, plan, chunks):
                continue
            if plan.tokens > budget:
                end = (plan.start + budget) // self._block_size * self._block_size
                plan = FeedPlan(plan.start, end)  # up to a full block, which others can share
            chunks[task] = plan
            budget -= plan.tokens
            accounts[task.namespace] += plan.tokens
        return chunks

    def feed(self, chunks: Chunks) -> None:
        """Take note that a pass is run: the namespaces of its prompts come later in the next one."""
        for task, fed in chunks.items():
            if fed.tokens > 1:
                alone = len(self._running_by_namespace()) == 1
                self._turns.feed(task.namespace, fed.tokens, alone=alone)

    def _cancel_spare(self) -> None:
        spare = [task for task in self.waiting if task.spare and not task.cancelled]
        for oldest in spare[:-MOST_SPARE]:
            oldest.cancel()

    def _running_by_namespace(self) -> Counter[str]:
        return Counter(task.namespace for task in self.running)


def _computed_by_another(task: Task, plan: FeedPlan, chunks: Chunks) -> bool:
    """Return whether the pass computes the first token of *plan*, under the same prefix, elsewhere."""
    return any(
        fed.start <= plan.start < fed.end and other.sequence.shares(task.sequence, plan.start + 1)
        for other, fed in chunks.items()
    )


class Room:
    """
    Finds blocks for the tasks of a scheduler.

    Owns no state; used by the engine's thread, under the lock of `Memory`.
    """

    def __init__(self, scheduler: Scheduler, memory: Memory) -> None:
        self._scheduler = scheduler
        self._memory = memory

    def fits(self, task: Task) -> bool:
        """
        Return whether there are blocks for a waiting task beside those that run.

        For each of them, counted are the blocks that it lacks for its history and one more token. The
        task takes over what the cache has of it. Where blocks are short, other waiting tasks are parked.
        """
        return self._has_room(task) or (self._park_waiting(but=task) and self._has_room(task))

    def prepare(self) -> tuple[Chunks, list[tuple[int, int]]]:
        """
        Decide on the next pass, and make its slots writable.

        Where blocks run short, the first of these steps that helps is taken, and the pass is planned
        anew: evict what only the cache holds; guess nothing; take blocks back from the cache, so that
        they need no copy; park tasks that wait; preempt the newest task of the namespace with the most.
        Where none of them helps, only one runs, and it has failed.

        Returns:
            What to feed, which may be nothing, and blocks to copy before it, `(source, target)` each.
        """
        chunks = self._plan()
        while (short := self._short(chunks)) > 0 and (
            self._memory.cache.evict(short) > 0
            or self._guess_nothing(chunks)
            or any(task.sequence.take_back(fed.start) for task, fed in chunks.items())
            or self._park_waiting()
            or self._preempt_newest()
        ):
            chunks = self._plan()
        copies: list[tuple[int, int]] = []
        for task, fed in chunks.items():
            try:
                copies += task.sequence.prepare_write(fed.start, fed.end)
            except OutOfBlocksError as error:
                self._scheduler.end(task, "failed", error)
                return {}, []
        self._scheduler.feed(chunks)
        return chunks, copies

    def _plan(self) -> Chunks:
        for task in self._scheduler.running:
            task.sequence.reuse()
        return self._scheduler.plan()

    def _short(self, chunks: Chunks) -> int:
        """Return how many blocks a pass takes that are not free."""
        needed = sum(
            one.sequence.blocks_to_allocate(at.start, at.end) for one, at in chunks.items()
        )
        return needed - self._memory.pool.free_blocks

    def _guess_nothing(self, chunks: Chunks) -> bool:
        for task in chunks:
            task.sequence.draft = ()
        return any(fed.drafted for fed in chunks.values())

    def _park_waiting(self, *, but: Task | None = None) -> bool:
        """Take the blocks of tasks that wait, but for one of them; return whether any had some."""
        waiting = self._scheduler.waiting
        holding = [one for one in waiting if one.sequence.computed and one is not but]
        for one in holding:
            one.sequence.park()
        return bool(holding)

    def _preempt_newest(self) -> bool:
        if len(self._scheduler.running) == 1:
            return False
        self._scheduler.preempt_newest().sequence.park()
        return True

    def _has_room(self, task: Task) -> bool:
        """Return whether it and those that run get what each lacks for its history and the next token."""
        sequences = [one.sequence for one in (*self._scheduler.running, task)]
        for sequence in sequences:
            sequence.reuse()  # so that what it takes from the cache is not counted as evictable
        lacking = sum(one.blocks_to_allocate(one.plan().start, len(one) + 1) for one in sequences)
        return lacking <= self._memory.pool.free_blocks + self._memory.cache.evictable_blocks

"""
Which sequences the next forward pass feeds, and how many tokens of each.

A pure decision over the tasks at hand; the engine carries it out.

A piece of work for the engine: bring a sequence to its next logits, again and again.

Knows nothing of sampling or text: what is done with the logits is a callback's business.

Room for the next forward pass: which slots it writes, and who gives up blocks for them.

Knows the scheduler, the pool and the cache; runs nothing.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from recollect.engine.sequence import FeedPlan, Sequence
from recollect.errors import OutOfBlocksError
from recollect.kv.blocks import BlockPool
from recollect.kv.prefix import PrefixCache
from recollect.runtime.base import Pace, Row

TaskState = Literal["waiting", "running", "done", "cancelled", "failed"]


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


def hand_over(tasks: Iterable[Task], pause_s: float) -> None:
    """Give readers what was generated for them, and those of a first token *pause_s* to wake up."""
    if [task for task in tasks if task.hand_over()]:
        time.sleep(pause_s)


def count_replays(rows: Mapping[Task, Row], starts: Iterable[int]) -> int:
    """
    Note for each task what a pass computed before its row, and return how many tokens that is.

    None, unless the runtime owns its KV and had lost what the plan took for computed.
    """
    tokens = 0
    for (task, row), start in zip(rows.items(), starts, strict=False):
        if start < row.past:
            task.fed.append(FeedPlan(start, row.past))
            task.sequence.fed_tokens += row.past - start
            tokens += row.past - start
    return tokens


MOST_SPARE: Final = 16
"""Idle tasks that wait and that nobody waits for. On a server that is never idle each reply leaves
one behind; the older ones are for conversations whose KV is evicted by the time that it rests."""


MOST_CREDIT: Final = 131_072
"""Tokens of prompts by which a namespace that was quiet may overtake others, until turns are equal
again: a prompt that fills the context of most models, so that its first token waits for no prompt of
somebody who sends hundreds; and no more, so that nobody waits for ever."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass feeds: a range of each task's history."""

    chunks: dict[Task, FeedPlan]


class _Turns:
    """
    How many tokens of prompts each namespace was fed with, lately: who has the fewest is next.

    Who comes while another runs alone has the full credit, so that its first token waits for none of
    the other's prompts; what it is fed uses that up, and what others are fed gives it back.

    Invariants:
        1. No account is beyond `_most`, nor `MOST_CREDIT` or more below it.
    """

    def __init__(self) -> None:
        self._fed: dict[str, int] = {}
        self._most = 0

    def account(self, namespace: str) -> int:
        """Return how many it was; one that was quiet for long is not known any more."""
        return self._fed.get(namespace, self._most - MOST_CREDIT)

    def feed(self, namespace: str, tokens: int, *, alone: bool) -> None:
        """Take note of a part of a prompt; *alone*: nothing of any other namespace runs."""
        before = self._most if alone else self.account(namespace)
        self._fed[namespace] = before + tokens
        self._most = max(self._most, before + tokens)
        least = self._most - MOST_CREDIT
        self._fed = {name: fed for name, fed in self._fed.items() if fed > least}

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        for fed in self._fed.values():
            assert self._most - MOST_CREDIT < fed <= self._most, "an account is out of range"


class Scheduler:
    """
    The tasks that wait and those that run.

    Owned by the engine's thread.

    Invariants:
        1. A task waits or runs, not both, and not twice.
        2. At most `pace.most_rows` run.
        3. An idle task runs only alone.
        4. At most `MOST_SPARE` spare tasks wait that are not cancelled.
        5. All of `_Turns`.
    """

    def __init__(self, block_size: int, pace: Pace) -> None:
        self._block_size = block_size
        self.pace: Final = pace
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []
        self._turns = _Turns()
        self.parked = 0
        """Tasks that made way for another namespace so far."""

    def add(self, task: Task) -> None:
        """Let a task wait for its turn; where there are too many spare ones, the oldest are cancelled."""
        self.waiting.append(task)
        if task.spare:
            self._cancel_spare()

    def tasks(self) -> list[Task]:
        """Return all tasks, those that run first."""
        return [*self.running, *self.waiting]

    def remove(self, task: Task) -> None:
        """Forget a task that has ended."""
        if task in self.running:
            self.running.remove(task)
        else:
            self.waiting.remove(task)

    def preempt(self, task: Task) -> None:
        """Let a running task wait again, before all others."""
        self.running.remove(task)
        self.waiting.appendleft(task)
        if task.spare:
            self._cancel_spare()

    def newest(self) -> Task:
        """Return the running task that makes way first: the newest of the namespace with the most."""
        running = self._running_by_namespace()
        most = max(running.values())
        return next(one for one in reversed(self.running) if running[one.namespace] == most)

    def admit(self, fits: Callable[[Task], bool]) -> None:
        """
        Let waiting tasks run, those of the namespace with the fewest first, while there is room.

        Where there is none for the first of a namespace, the newest of the namespace with the most
        waits again in its place: nobody waits for the end of what somebody else has a second of.
        Idle ones run when nothing else is there. One task always runs, whether it fits or not.
        """
        if any(not task.idle for task in self.waiting):
            for idle in [task for task in self.running if task.idle]:
                self.preempt(idle)
        while (task := self._next_waiting()) is not None:
            has_place = len(self.running) < self.pace.most_rows
            if not self.running or (has_place and fits(task)):
                self.waiting.remove(task)
                self.running.append(task)
            elif self._has_a_claim(task):
                self.preempt(self.newest())
                self.parked += 1
            else:
                break

    def plan(self) -> Pass:
        """
        Return what the next pass feeds.

        Every sequence that lacks only its last token gets it. What is left goes to prompts: first
        to the namespace that was fed least, then in order of arrival. A prompt waits while another
        in the pass computes the same tokens, and finds them in the cache afterwards.
        """
        plans = {
            task: plan
            for task in self.running
            if not task.restoring and (plan := task.sequence.plan()) is not None
        }
        chunks = {task: plan for task, plan in plans.items() if plan.end - plan.start == 1}
        queues: dict[str, deque[Task]] = {}
        for task in plans:
            if task not in chunks:
                queues.setdefault(task.namespace, deque()).append(task)
        accounts = {name: self._turns.account(name) for name in queues}
        # A block at least: else the prompt of a runtime with larger ones would wait for ever.
        budget = max(
            self._block_size, self.pace.shared_chunk if chunks else self.pace.prefill_chunk
        )
        while queues and budget >= self._block_size:
            name = min(queues, key=lambda name: (accounts[name], name))
            task = queues[name].popleft()
            if not queues[name]:
                del queues[name]
            plan = plans[task]
            if _computed_by_another(task, plan, chunks):
                continue
            chunks[task] = _chunk(plan, budget, self._block_size)
            fed = chunks[task].end - plan.start
            budget -= fed
            accounts[name] += fed
        return Pass(chunks)

    def feed(self, planned: Pass) -> None:
        """Take note that a pass is run: whose prompts are in it, is behind others in the next."""
        alone = len(self._running_by_namespace()) == 1
        for task, fed in planned.chunks.items():
            if fed.end - fed.start > 1:
                self._turns.feed(task.namespace, fed.end - fed.start, alone=alone)

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        tasks = self.tasks()
        assert len(tasks) == len(set(tasks)), "a task is there twice"
        assert len(self.running) <= self.pace.most_rows, "too many run"
        assert len(self.running) <= 1 or not any(task.idle for task in self.running), "idle work"
        assert len(self._spare()) <= MOST_SPARE, "too much spare work waits"
        self._turns.check()

    def _cancel_spare(self) -> None:
        for oldest in self._spare()[:-MOST_SPARE]:
            oldest.cancel()

    def _spare(self) -> list[Task]:
        return [task for task in self.waiting if task.spare and not task.cancelled]

    def _running_by_namespace(self) -> Counter[str]:
        return Counter(task.namespace for task in self.running)

    def _has_a_claim(self, task: Task) -> bool:
        """Return whether nothing of a task's namespace runs, while another has more than one."""
        running = self._running_by_namespace()
        return not running[task.namespace] and max(running.values()) > 1

    def _next_waiting(self) -> Task | None:
        if any(task.idle for task in self.running):
            return None
        busy = [task for task in self.waiting if not task.idle]
        if not busy:
            return self.waiting[0] if self.waiting and not self.running else None
        running = self._running_by_namespace()
        return min(busy, key=lambda task: running[task.namespace])


def _chunk(plan: FeedPlan, budget: int, block_size: int) -> FeedPlan:
    """Return the part of a plan within the budget; it ends with a full block, which others can share."""
    if plan.end - plan.start <= budget:
        return plan
    return FeedPlan(plan.start, (plan.start + budget) // block_size * block_size)


def _computed_by_another(task: Task, plan: FeedPlan, chunks: dict[Task, FeedPlan]) -> bool:
    """Return whether the pass computes the first token of *plan*, under the same prefix, elsewhere."""
    return any(
        fed.start <= plan.start < fed.end and other.sequence.shares(task.sequence, plan.start + 1)
        for other, fed in chunks.items()
    )


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

"""
Which sequences the next forward pass feeds, and how many tokens of each.

A pure decision over the tasks at hand; the engine carries it out.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from recollect.engine.sequence import FeedPlan
from recollect.engine.task import Task

PREFILL_CHUNK: Final = 512
"""Most prompt tokens in one forward pass while nobody waits for a next token, so that a cancel is
never far away. Costs under 5 % of prefill speed against one pass. Source: benchmarks/runtime.py."""

SHARED_CHUNK: Final = 128
"""The same while others are being answered: what they wait between two tokens."""

MOST_RUNNING: Final = 16
"""Sequences in one pass; more wait. Decode gains little beyond, and each holds blocks."""


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
        2. At most `most_running` run.
        3. An idle task runs only alone.
        4. At most `MOST_SPARE` spare tasks wait that are not cancelled.
        5. All of `_Turns`.
    """

    def __init__(self, block_size: int, most_rows: int | None = None) -> None:
        self._block_size = block_size
        self.most_running = min(MOST_RUNNING, most_rows or MOST_RUNNING)
        """Fewer where the runtime would have to compute one of them anew each time."""
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
            has_place = len(self.running) < self.most_running
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
        budget = max(self._block_size, SHARED_CHUNK if chunks else PREFILL_CHUNK)
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
        assert len(self.running) <= self.most_running, "too many run"
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

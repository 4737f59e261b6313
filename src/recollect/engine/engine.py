"""
The engine: one thread that owns a runtime and its KV, and runs and counts forward passes.

Knows token ids and logits; text and conversations are above it.
"""

import atexit
import threading
import weakref
from array import array
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from functools import partial
from typing import Final

from recollect.engine.scheduler import Pass, Scheduler
from recollect.engine.sequence import FeedPlan, Sequence
from recollect.engine.task import Task, TaskState, count_replays
from recollect.errors import MisuseError, OutOfBlocksError, RuntimeFailure
from recollect.kv.blocks import BlockPool, blocks_for
from recollect.kv.cached_table import CachedTable
from recollect.kv.prefix import CachedBlock, Match, PrefixCache
from recollect.runtime.base import Logits, PagedRuntime

_LINGER_S: Final = 2.0
"""How long the thread waits for work before it ends; the next task starts another."""


class Engine:
    """
    A runtime, its blocks, what is known of prefixes, and the sequences over them.

    Any thread may submit tasks and wait for them. Forward passes and the callbacks of tasks run on
    the engine's own thread. Bookkeeping happens under `lock`, which is not held during a forward
    pass, so that a fork or a rewind never waits for one.

    Invariants:
        1. All of `BlockPool`, over the tables of the sequences that are alive and the cache.
        2. All of `PrefixCache`.
        3. All of `Sequence`, for each of them.
        4. All of `Scheduler`.
    """

    def __init__(
        self,
        runtime: PagedRuntime,
        *,
        num_blocks: int,
        eos_token_ids: Collection[int] = (),
        fingerprint: str = "",
    ) -> None:
        self._runtime = runtime
        runtime.allocate(num_blocks)
        self.info = info = runtime.info
        self.block_size = info.block_size
        self.keep_multiple_of = info.block_size if info.whole_blocks_only else 1
        self.eos_token_ids = frozenset(eos_token_ids)
        self.lock = threading.RLock()
        """Held while block tables, pool and cache change."""
        self.computed_tokens = 0
        """Tokens fed so far, counted at the forward pass."""
        self.forward_passes = 0
        self.preemptions = 0
        self._pool = BlockPool(num_blocks, info.block_size)
        self._cache = PrefixCache(self._pool, f"{fingerprint}/{info.name}")
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self._scheduler = Scheduler(info.block_size, info.most_rows)
        self._work = threading.Condition(self.lock)
        self._thread: threading.Thread | None = None
        self._passing = False
        self._closed = False
        # A thread in a forward pass when the interpreter ends would abort the process, and whoever
        # waits for its task would wait for ever.
        self._at_exit = partial(_close_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)
        self._bug: BaseException | None = None

    @property
    def pool(self) -> BlockPool:
        """Return the pool, to look at."""
        return self._pool

    @property
    def cache(self) -> PrefixCache:
        """Return what is known of prefixes, to look at."""
        return self._cache

    def new_sequence(self, namespace: str | None = "") -> Sequence:
        """
        Return an empty sequence.

        Args:
            namespace: Only sequences of the same namespace share KV. None: this one shares with
                nobody, neither finds anything nor leaves anything behind.
        """
        with self.lock:
            root = None if namespace is None else self._cache.root(namespace)
            kv = CachedTable(
                self._pool, self._cache, root, inside_blocks=not self.info.whole_blocks_only
            )
        return self.adopt(Sequence(self, array("q"), kv, namespace))

    def adopt(self, sequence: Sequence) -> Sequence:
        """Count a sequence among those that `check` looks at."""
        with self.lock:
            self._sequences.add(sequence)
        return sequence

    def warm_tokens(self, token_ids: Tokens[int], namespace: str | None = "") -> int:
        """Return how many leading tokens the cache has KV for; counts as a use of it."""
        if namespace is None:
            return 0
        with self.lock:
            match = self._match(token_ids, namespace)
            return len(match.full) * self.block_size + match.partial_tokens

    def pin(self, token_ids: Tokens[int], namespace: str = "") -> list[CachedBlock]:
        """Keep what the cache has of a prefix until `unpin`; return what to unpin."""
        with self.lock:
            match = self._match(token_ids, namespace)
            found = [*match.full[-1:], *([match.partial] if match.partial else [])]
            for cached in found:
                self._cache.pin(cached)
            return found

    def unpin(self, pinned: Tokens[CachedBlock]) -> None:
        """Take back one `pin`."""
        with self.lock:
            for cached in pinned:
                self._cache.unpin(cached)

    def submit(self, task: Task) -> None:
        """
        Have a task worked on; its sequence belongs to the engine's thread until the task has ended.

        Raises:
            MisuseError: The engine is closed, or the sequence is empty or has a task already.
        """
        task.sequence.plan()  # raises where there is nothing to compute
        with self._work:
            self._require_open()
            if task.sequence not in self._sequences:
                raise MisuseError(
                    "a sequence is computed by the engine that made it, and by no other"
                )
            if any(other.sequence is task.sequence for other in self._scheduler.tasks()):
                raise MisuseError("this sequence is being worked on already")
            self._scheduler.add(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="recollect", daemon=True)
                self._thread.start()
            self._work.notify_all()

    def compute(self, sequences: Collection[Sequence]) -> None:
        """
        Wait until the logits after each of the sequences are known.

        One whose logits are known already costs nothing.

        Raises:
            OutOfBlocksError: There is no room for one of them. What was computed is kept.
            RuntimeFailure: A pass failed. What was computed before it is kept, and nothing else.
            MisuseError: The engine is closed, or was meanwhile.
        """
        lacking = [one for one in dict.fromkeys(sequences) if one.plan() is not None]
        if lacking and threading.current_thread() is self._thread:
            raise MisuseError("a task's callback cannot wait for another forward pass")
        tasks = [Task(sequence, lambda: False) for sequence in lacking]
        try:
            with self.lock:  # so that they begin in one pass
                for task in tasks:
                    self.submit(task)
            for task in tasks:
                task.wait()
        finally:
            self.abort(tasks)  # after an interrupt too, the sequences are the caller's again
        if any(task.state == "cancelled" for task in tasks):
            self._require_open()  # nobody else cancels them

    def abort(self, tasks: Collection[Task]) -> None:
        """Cancel tasks, those that were never submitted too, and wait until they have ended."""
        for task in tasks:
            task.cancel()
        with self.lock:
            known = set(self._scheduler.tasks())
        for task in tasks:
            if task in known:
                task.join()

    def check(self) -> None:
        """
        Verify the invariants, between two forward passes.

        Raises:
            AssertionError: One does not hold.
        """
        with self._work:
            while self._passing:
                self._work.wait()
            alive = [sequence for sequence in self._sequences if not sequence.closed]
            tables = [list(sequence.kv.blocks) for sequence in alive]
            self._pool.check([*tables, self._cache.held_blocks()])
            self._cache.check()
            self._scheduler.check()
            for sequence in alive:
                sequence.check()

    def close(self) -> None:
        """Cancel all tasks and give the memory back; histories stay readable. May be called again."""
        with self._work:
            if self._closed:
                return
            self._closed = True
            self._work.notify_all()
        atexit.unregister(self._at_exit)
        if self._thread is not None:
            self._thread.join()
        self._runtime.close()

    def _match(self, token_ids: Tokens[int], namespace: str) -> Match:
        inside = not self.info.whole_blocks_only
        return self._cache.match(self._cache.root(namespace), token_ids, inside_block=inside)

    def _require_open(self) -> None:
        if self._closed:
            raise MisuseError("this engine was closed and cannot be used any more")
        if self._bug is not None:
            raise RuntimeFailure("The engine met a bug: load the model again.") from self._bug

    def _run(self) -> None:
        """Be the engine's thread: a bug ends it, and leaves nobody waiting."""
        try:
            while self._work_once():
                pass  # in a function of its own, so that nothing is kept alive while there is no work
        except BaseException as bug:
            with self._work:
                self._bug, self._passing = bug, False
                for task in self._scheduler.tasks():
                    self._end(task, "failed", RuntimeFailure(f"The engine met a bug: {bug!r}"))
                self._work.notify_all()
            raise

    def _work_once(self) -> bool:
        """Wait for work and run a forward pass; return whether to go on."""
        with self._work:
            self._drop_cancelled()
            while not self._closed and not self._scheduler.tasks():
                if not self._work.wait(_LINGER_S) and not self._scheduler.tasks():
                    self._thread = None  # without a thread, an engine nobody uses can go
                    return False
            if self._closed:
                for task in self._scheduler.tasks():
                    self._end(task, "cancelled")
                return False
            self._scheduler.admit(self._fits)
            planned, copies = self._prepare()
            tasks = self._scheduler.tasks()
        for task in tasks:
            task.hand_over()
        self._pass(planned, copies)
        return True

    def _drop_cancelled(self) -> None:
        for task in self._scheduler.tasks():
            if task.cancelled:
                self._end(task, "cancelled")

    def _end(self, task: Task, state: TaskState, error: Exception | None = None) -> None:
        self._scheduler.remove(task)
        task.end(state, error)

    def _prepare(self) -> tuple[Pass, list[tuple[int, int]]]:
        """
        Decide on the next pass, and make its slots writable.

        Where blocks run short, gives up what is least needed: first what only the cache holds,
        then the place of the task that came last. A task for which even that is not enough fails.

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
        copies: list[tuple[int, int]] = []
        for task, fed in planned.chunks.items():
            task.fed.append(fed)
            copies += task.sequence.kv.prepare_write(fed.start, fed.end)
        self._passing = True
        return planned, copies

    def _take_tails_back(self, planned: Pass) -> bool:
        """Spare the copy of a block that only the cache holds besides; return whether there was any."""
        return any(task.sequence.kv.take_back(fed.start) for task, fed in planned.chunks.items())

    def _make_way(self, needed: int) -> None:
        """Take the blocks of tasks that wait, else of the one that came last, else fail the only one."""
        holding = [task for task in self._scheduler.waiting if task.sequence.computed]
        if holding:
            for task in holding:
                task.sequence.park()
        elif len(self._scheduler.running) > 1:
            last = self._scheduler.running[-1]
            last.sequence.park()
            self._scheduler.preempt(last)
            self.preemptions += 1
        else:
            free, total = self._pool.free_blocks, self._pool.num_blocks
            error = OutOfBlocksError(needed=needed, free=free, total=total)
            self._end(self._scheduler.running[0], "failed", error)

    def _fits(self, task: Task) -> bool:
        """Return whether a waiting task has room beside those that run."""
        room = self._pool.free_blocks + self._cache.evictable_blocks
        return blocks_for(len(task.sequence) + 1, self.block_size) <= room

    def _pass(self, planned: Pass, copies: list[tuple[int, int]]) -> None:
        """Run a forward pass, and hand the logits to the tasks that now have them."""
        logits, errors = self._try(planned.chunks, copies)
        with self._work:
            for task, fed in planned.chunks.items():
                if task in errors:
                    # The slots from fed.start on are undefined now, and those before it in the same
                    # block may be: its copy may not have happened, or a scale has changed.
                    task.sequence.kv.abandon(fed.start // self.block_size * self.block_size)
                    self._end(task, "failed", errors[task])
                else:
                    task.sequence.written(fed, logits.get(task))
            self._passing = False
            self._work.notify_all()
        for task in list(self._scheduler.running):
            if task.sequence.logits is not None:
                self._deliver(task)

    def _try(
        self, chunks: dict[Task, FeedPlan], copies: list[tuple[int, int]]
    ) -> tuple[dict[Task, Logits], dict[Task, Exception]]:
        """Feed the chunks; where that fails, each by itself, so that one cannot hurt the others."""
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
            start = fed.start // self.keep_multiple_of * self.keep_multiple_of
            chunks[task] = FeedPlan(start, fed.end)  # what failed may have spoilt all of a block
            own_logits, own_errors = self._try({task: chunks[task]}, [])
            logits |= own_logits
            errors |= own_errors
        return logits, errors

    def _forward(self, chunks: dict[Task, FeedPlan]) -> dict[Task, Logits]:
        """Feed the chunks in one forward pass; return the logits of the tasks that reach their end."""
        if not chunks:
            return {}
        rows = {task: task.sequence.row(fed) for task, fed in chunks.items()}
        logits = self._runtime.forward(list(rows.values()))
        self.forward_passes += 1
        self.computed_tokens += sum(len(row.token_ids) for row in rows.values())
        self.computed_tokens += count_replays(self._runtime, rows)
        wanting = [task for task, row in rows.items() if row.wants_logits]
        return dict(zip(wanting, logits, strict=True))

    def _deliver(self, task: Task) -> None:
        """Let a task use its logits; whatever its callback raises ends that task and no other."""
        try:
            goes_on = task.on_logits()
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the task
            with self._work:
                self._end(task, "failed", error)
        else:
            if not goes_on:
                with self._work:
                    self._end(task, "done")


def _close_if_alive(engine: "weakref.ref[Engine]") -> None:
    if (alive := engine()) is not None:
        alive.close()

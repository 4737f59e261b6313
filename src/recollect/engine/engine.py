"""
The engine: one thread that runs forward passes for the sequences of a runtime.

`Engine` is what callers have: it makes sequences, takes tasks, and owns the thread, the `Memory` and the
disk tier. It does not know text: what is done with logits is a task's business.
"""

import atexit
import threading
import weakref
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import perf_counter, sleep
from typing import Final

from recollect.engine.audit import check_drafts, check_memory, check_scheduler
from recollect.engine.decoder import Task
from recollect.engine.drafts import Drafts
from recollect.engine.scheduler import Chunks, Room, Scheduler
from recollect.engine.sequence import Memory, Sequence
from recollect.engine.tier import DiskTier, Speed
from recollect.errors import MisuseError, RuntimeFailure
from recollect.kv.blocks import BlockPool
from recollect.kv.disk import DiskStore
from recollect.kv.prefix import PrefixCache
from recollect.kv.record import Identity, Names
from recollect.runtime.base import PagedRuntime, PassResult, Row, allocate

LINGER_S: Final = 2.0
"""The thread ends after so long without work; the next task starts another."""


class Engine:
    """
    A runtime, the KV in its blocks, and the thread that runs forward passes for sequences.

    Any thread may make sequences, submit tasks and wait for them. Forward passes and the callbacks of
    tasks run on the engine's own thread. Bookkeeping happens under `lock`, the one of `memory`. A store,
    where there is one, keeps blocks below memory, and is closed with the engine.

    Invariants: all of `Memory` and of `Scheduler`.
    """

    def __init__(
        self,
        runtime: PagedRuntime,
        *,
        num_blocks: int,
        eos_token_ids: Collection[int] = (),
        fingerprint: str = "",
        store: DiskStore | None = None,
        draft: bool = False,
    ) -> None:
        allocate(runtime, num_blocks)
        self.runtime: Final = runtime
        """What computes; while there are tasks, only the engine's thread may use it."""
        self.info = info = runtime.info
        self.block_size = info.block_size
        self.eos_token_ids = frozenset(eos_token_ids)
        identity = Identity(fingerprint, info.name, info.kv_format)
        self.pool = BlockPool(num_blocks, info.block_size)
        secrets = () if store is None else (store.root_secret, store.chain_secret)
        names = Names(identity.text(), *secrets)
        self.cache = PrefixCache(self.pool, names, info.reuse.parts)
        self.memory = Memory(info, self.pool, self.cache)
        self.lock = self.memory.lock
        """Held while block tables, pool and cache change."""
        self.speed: Final = Speed()
        """What computing and reading from disk cost, as measured here."""
        self.tier = DiskTier.over(store, identity, runtime, self.memory, self.speed)
        """The tier below memory; None: there is none."""
        self.drafts = Drafts.over(info) if draft else None
        """What is guessed for replies; None: nothing is."""
        self.computed_tokens = 0
        """Tokens fed so far, guesses among them, counted at the forward pass."""
        self.forward_passes = 0
        """Forward passes so far, without those that failed."""
        self._scheduler = Scheduler(info.block_size, info.pace, has_disk=self.tier is not None)
        self._room = Room(self._scheduler, self.memory)
        self._work = threading.Condition(self.lock)
        self._thread: threading.Thread | None = None
        self._warm = threading.Event()
        self._round = threading.Lock()  # held while a round is under way, taken before `lock`
        self._closed = False
        self._bug: BaseException | None = None
        self._at_exit = atexit.register(partial(_close_if_alive, weakref.ref(self)))

    def tasks(self) -> list[Task]:
        """Return the tasks that run or wait."""
        with self.lock:
            return self._scheduler.tasks()

    @property
    def preemptions(self) -> int:
        """Return how many running tasks had to wait again for others."""
        return self._scheduler.preemptions

    def new_sequence(self, namespace: str | None = "") -> Sequence:
        """
        Return an empty sequence.

        Args:
            namespace: Only sequences of the same namespace share KV. None: this one shares with
                nobody, neither finds anything nor leaves anything behind.
        """
        return Sequence(self.memory, namespace)

    def warm_tokens(
        self, token_ids: Tokens[int], namespace: str | None = "", *, on_disk: bool = False
    ) -> int:
        """Return how many leading tokens have KV in memory, or there or *on_disk*; counts as a use."""
        match = self.memory.match(token_ids, namespace)
        if on_disk and self.tier is not None and namespace is not None:
            return self.tier.stored_tokens(match, namespace, token_ids)
        return match.tokens

    def forget(self) -> int:
        """Evict all KV that no sequence holds and nobody pinned; return how many blocks."""
        with self.lock:
            self.memory.ends.clear()
            return self.cache.evict(self.pool.num_blocks)

    def start(self) -> None:
        """Let the engine's thread warm the runtime up, if it has not yet; returns at once."""
        with self._work:
            self._wake()

    def wait_until_warm(self) -> None:
        """Wait until the runtime is warm. A first token before that takes a second longer."""
        self.start()
        self._warm.wait()

    def submit(self, task: Task) -> None:
        """
        Queue a task; its sequence belongs to the engine's thread until the task has ended.

        Raises:
            MisuseError: The engine is closed, or the sequence is empty or has a task already.
        """
        task.sequence.plan()  # raises where there is nothing to compute
        with self._work:
            self._wake()
            if task.sequence.memory is not self.memory:
                raise MisuseError("a sequence is computed by no engine but the one that made it")
            if any(other.sequence is task.sequence for other in self._scheduler.tasks()):
                raise MisuseError("this sequence is being worked on already")
            self._scheduler.add(task)

    def compute(self, sequences: Collection[Sequence]) -> None:
        """
        Wait until the logits after each of the sequences are known.

        One whose logits are known already costs nothing.

        Raises:
            OutOfBlocksError: There is no room for one of them. What was computed is kept.
            RuntimeFailure: A pass failed. What was computed before it is kept, and nothing else.
            MisuseError: The engine is closed, or was meanwhile.
        """
        lacking = [one for one in dict.fromkeys(sequences) if one.logits is None]
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
        for task in tasks:
            task.join()

    def check(self) -> None:
        """
        Verify the invariants, between two forward passes.

        Raises:
            AssertionError: One does not hold.
        """
        with self._round, self.lock:
            check_memory(self.memory, [] if self.tier is None else self.tier.leased_blocks)
            check_scheduler(self._scheduler)
            check_drafts(self.drafts)

    def close(self) -> None:
        """
        Cancel all tasks and give the memory back; histories stay readable. May be called again.

        Raises:
            MisuseError: It is called by a task's callback, whose thread cannot wait for its own end.
        """
        with self._work:
            if self._closed:
                return
            thread = self._thread  # it takes itself away when it ends
            if thread is threading.current_thread():
                raise MisuseError("a task's callback cannot close its engine")
            self._closed = True
            for task in self._scheduler.tasks():
                task.cancel()
            self._work.notify_all()
        atexit.unregister(self._at_exit)
        if thread is not None:
            thread.join()
        for owned in (self.tier, self.drafts):
            if owned is not None:
                owned.close()
        self.runtime.close()

    def _require_open(self) -> None:
        if self._closed:
            raise MisuseError("this engine was closed and cannot be used any more")
        if self._bug is not None:
            raise RuntimeFailure("The engine met a bug: load the model again.") from self._bug

    def _wake(self) -> None:
        """Have the engine's thread look for work, once the lock is released."""
        self._require_open()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="recollect", daemon=True)
            self._thread.start()
        self._work.notify_all()

    def _warm_up(self) -> None:
        if not self._warm.is_set():
            with suppress(RuntimeFailure):  # the first pass fails too, and has somebody to tell
                self.runtime.warm_up()
                if self.tier is not None:
                    self.tier.warm_up(self.pool.num_blocks)
            self._warm.set()

    def _run(self) -> None:
        """Be the engine's thread: a bug ends it, and leaves nobody waiting."""
        try:
            self._warm_up()
            while self._work_once():
                pass  # in a function of its own, so that nothing is kept alive while there is no work
        except BaseException as bug:
            with self._work:
                self._bug = bug
                self._warm.set()
                error = RuntimeFailure(f"The engine met a bug: {bug!r}")
                for task in self._scheduler.tasks():
                    self._scheduler.end(task, "failed", error)
            raise

    def _work_once(self) -> bool:
        """Wait for work and run a forward pass; return whether to go on."""
        with self.lock:
            while not self._end_cancelled():
                if self._closed:
                    return False
                if self.tier is not None:
                    self.tier.writer.engine_works(False)
                if not self._work.wait(LINGER_S) and not self._scheduler.tasks():
                    self._thread = None  # without a thread, an engine nobody uses can go
                    return False
            self._scheduler.admit(self._room.fits)
        with self._round:
            if self.tier is not None:
                self.tier.restore_for(self._scheduler.running)
            with self.lock:
                chunks, copies = self._room.prepare()
                tasks = self._scheduler.tasks()
            if [task for task in tasks if task.hand_over()]:
                sleep(self.info.pace.first_token_pause_s)
            self._pass(chunks, copies)
        for task in list(self._scheduler.running):
            if task.sequence.logits is not None:
                self._deliver(task)
        return True

    def _end_cancelled(self) -> bool:
        """End the tasks that were cancelled; return whether there are others."""
        for task in self._scheduler.tasks():
            if task.cancelled:
                self._scheduler.end(task, "cancelled")
        return bool(self._scheduler.running or self._scheduler.waiting)

    def _pass(self, chunks: Chunks, copies: list[tuple[int, int]]) -> None:
        """
        Run a forward pass, and let the sequences take note of it; where it fails, feed each by itself.

        Where KV can only be cut between blocks, a pass that fails may have changed all of one: each is
        then fed from the beginning of its block.

        Args:
            chunks: What to feed. Where a chunk had to begin earlier, its entry is replaced.
            copies: Blocks to copy first, `(source, target)` each.
        """
        if not chunks:
            return
        rows = [task.sequence.row(fed) for task, fed in chunks.items()]
        try:
            if copies:
                self.runtime.copy_blocks(copies)
                copies = []
            result = self._forward(rows)
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the tasks
            if copies or len(chunks) == 1:
                self._failed(chunks, error)
                return
            for task, fed in chunks.items():
                start = self.info.reuse.longest_cut(fed.start)
                self._pass({task: replace(fed, start=start)}, [])
            return
        for task, start in zip(list(chunks), result.starts, strict=False):
            chunks[task] = replace(chunks[task], start=start)
        end = 0
        with self.lock:
            for (task, fed), row in zip(chunks.items(), rows, strict=True):
                begin, end = end, end + row.places
                logits = result.logits[begin:end] if end > begin else None
                task.fed.append(fed)
                task.sequence.written(fed, logits)
                self.computed_tokens += fed.end - fed.start

    def _failed(self, chunks: Chunks, error: Exception) -> None:
        """
        End the tasks of a pass that failed.

        The slots from where one was fed are undefined now, and those before them in the same block may
        be: its copy may not have happened, or a scale has changed.
        """
        with self._work:
            for task, fed in chunks.items():
                task.fed.append(fed)
                task.sequence.truncate(fed.start // self.block_size * self.block_size)
                self._scheduler.end(task, "failed", error)

    def _forward(self, rows: list[Row]) -> PassResult:
        """Run one forward pass, count it and time it."""
        begun = perf_counter()
        result = self.runtime.forward(rows)
        taken = perf_counter() - begun
        self.speed.computed(rows, taken)
        if self.drafts is not None:
            self.drafts.times.note(rows, taken)
        self.forward_passes += 1
        return result

    def _deliver(self, task: Task) -> None:
        """Let a task use its logits; whatever its callback raises ends that task and no other."""
        failure: Exception | None = None
        try:
            goes_on = task.on_logits()
            while goes_on and task.sequence.logits is not None and not task.cancelled:
                goes_on = task.on_logits()  # the token that it chose was guessed
            if goes_on:
                return
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the task
            failure = error
        with self._work:
            self._scheduler.end(task, "failed" if failure else "done", failure)


def _close_if_alive(engine: "weakref.ref[Engine]") -> None:
    """
    Close an engine, for when the interpreter ends.

    A thread that is in a forward pass then would abort the process, and whoever waits for its task would
    wait for ever.
    """
    if (alive := engine()) is not None:
        alive.close()

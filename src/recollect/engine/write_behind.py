"""
Bring computed blocks to disk behind the engine's back: batched, and never on the way of a token.

Knows blocks in memory and the store; not sequences.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from time import monotonic, perf_counter
from typing import Final

from recollect.errors import StoreBusyError, StoreError, StoreFullError
from recollect.kv.blocks import BlockPool, CachedBlock, Key
from recollect.kv.disk import DiskStore, NewBlock, stored_bytes
from recollect.kv.prefix import PrefixCache
from recollect.kv.record import Identity, StoredReply
from recollect.runtime.base import PagedRuntime

_log: Final = logging.getLogger(__name__)

_LINGER_S: Final = 2.0
"""How long the thread waits for more before it ends; the next block starts another."""
_SETTLE_S: Final = 0.2
"""After the engine came to rest: the template's tokens after a reply are computed then, and replace
the block that the reply ended in."""
_OVERDUE_S: Final = 5.0
"""A block that has waited for so long is written although the engine works."""
_RETRY_S: Final = 60.0
"""Before a full store or disk is tried again: somebody may have made room."""
_BATCH_BYTES: Final = 16 << 20
_BATCH_SHARE: Final = 1 / 8
"""Of the store's budget, at most in a batch: what is written at once needs that much room at once."""
_BUSY_BATCH_BYTES: Final = 2 << 20
_BUSY_PAUSE: Final = 40
"""Times a write's own duration, before the next while the engine works: 2.5 % of a core at most."""


class WriteBehind:
    """
    The blocks and replies that are not on disk yet, and the thread that writes them.

    `note` is called under the engine's lock, the rest from any thread. A block may be evicted from
    memory before it is written; it is then not written. While a block is read it has a reference
    of its own, so that nobody writes it; a block in the cache is never changed otherwise.

    Where the store or the disk is full nothing is taken note of for a while, and then it is tried again;
    where the store fails otherwise, that is for good. What is not written stays in memory.

    Invariant: `leased` are the blocks that this holds a reference to.
    """

    def __init__(
        self,
        store: DiskStore,
        identity: Identity,
        runtime: PagedRuntime,
        pool: BlockPool,
        cache: PrefixCache,
        lock: threading.RLock,
    ) -> None:
        self._store = store
        self._identity = identity
        self._runtime = runtime
        self._pool = pool
        self._cache = cache
        self._engine_lock = lock
        self._queue: OrderedDict[CachedBlock, float] = OrderedDict()  # with when it came
        self._used: set[Key] = set()
        self._bad: set[Key] = set()
        self._replies: dict[Key, StoredReply] = {}
        self._lock = threading.RLock()  # taken after the engine's lock, never before it
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._idle_since: float | None = monotonic()
        self._not_before = 0.0
        self._flushing = 0
        self._writing = False
        self.leased: list[int] = []
        self.written_bytes = 0
        """In this process."""
        self.written_blocks = 0
        self.error: StoreError | None = None
        """Why nothing is written, for now or any more; None: it is."""
        self._retry_at = 0.0
        with self._guarded():
            store.env.require_writable()

    def note(self, cached: CachedBlock) -> None:
        """Take note of a block that others may find from now on."""
        if not cached.on_disk and not self._rests():
            with self._lock:
                self._queue.setdefault(cached, monotonic())
                self._wake()

    def note_used(self, keys: Iterable[Key]) -> None:
        """Take note of stored blocks that were used."""
        if not self._rests():
            with self._lock:
                self._used.update(keys)

    def note_bad(self, keys: Iterable[Key]) -> None:
        """Take note of stored blocks that are not what was written; they are removed."""
        if not self._rests():
            with self._lock:
                self._bad.update(keys)
                if self._bad:
                    self._wake()

    def note_reply(self, name: Key, reply: StoredReply) -> None:
        """Take note of a reply that a client may send back as text."""
        if not self._rests():
            with self._lock:
                self._replies[name] = reply
                self._wake()

    def engine_works(self, works: bool) -> None:
        """Take note of whether the engine has anything to do."""
        if works != (self._idle_since is None):
            with self._lock:
                self._idle_since = None if works else monotonic()
                self._work.notify_all()

    def flush(self) -> None:
        """Write all that is there to write, now, and wait for it."""
        with self._lock:
            self._flushing += 1
            try:
                while self._writing or (self._has_work() and not self._rests()):
                    self._wake()
                    self._done.wait()
            finally:
                self._flushing -= 1

    def try_again(self) -> None:
        """Let a store that was full be tried again at once."""
        with self._lock:
            if self._retry_at != inf:
                self._retry_at = 0.0

    def close(self) -> None:
        """Write what is left. The pool and the runtime have to be there still."""
        self.flush()
        if self._used and self.error is None:
            with self._guarded():
                self._store.touch(self._used)

    def _rests(self) -> bool:
        """Return whether nothing is written: until a full store is tried again, or for good."""
        return self.error is not None and monotonic() < self._retry_at

    def _has_work(self) -> bool:
        return bool(self._queue or self._bad or self._replies)

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="recollect-disk", daemon=True)
            self._thread.start()
        self._work.notify()

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                begun = perf_counter()
                with self._guarded():
                    self._write(batch)
                self._not_before = monotonic() + _BUSY_PAUSE * (perf_counter() - begun)
                with self._lock:
                    self._writing = False
                    self._done.notify_all()
        except BaseException:
            self._stop(StoreError("Writing KV to disk met a bug: load the model again."), inf)
            with self._lock:
                self._thread, self._writing = None, False
                self._done.notify_all()
            raise

    def _next_batch(self) -> list[CachedBlock] | None:
        """Wait for blocks that may be written now; None: there were none for a while."""
        with self._lock:
            while True:
                if not self._has_work():
                    if not self._work.wait(_LINGER_S) and not self._has_work():
                        self._thread = None  # without a thread, an engine nobody uses can go
                        return None
                    continue
                wait_s = self._wait_s()
                if wait_s <= 0:
                    self._writing = True
                    return self._take()
                self._work.wait(wait_s)

    def _wait_s(self) -> float:
        if self._flushing:
            return 0.0
        now = monotonic()
        if self._idle_since is not None:
            return self._idle_since + _SETTLE_S - now
        came = next(iter(self._queue.values()), now)
        return max(came + _OVERDUE_S, self._not_before) - now

    def _take(self) -> list[CachedBlock]:
        works = self._idle_since is None and not self._flushing
        most = self._most_blocks(_BUSY_BATCH_BYTES if works else _BATCH_BYTES)
        return [self._queue.popitem(last=False)[0] for _ in range(min(most, len(self._queue)))]

    def _most_blocks(self, most_bytes: int) -> int:
        """Return how many blocks to write at once."""
        most_bytes = min(most_bytes, int(self._store.budget_bytes * _BATCH_SHARE))
        return max(1, most_bytes // stored_bytes(self._runtime.info.bytes_per_block))

    def _write(self, batch: list[CachedBlock]) -> None:
        with self._lock:
            bad, self._bad = self._bad, set()
            used, self._used = self._used, set()
            said, self._replies = self._replies, {}
        if bad:
            self._store.remove(bad)
        if used:
            self._store.touch(used)
        if said:
            with suppress(StoreFullError):  # for a few bytes, KV is not given up
                self._store.remember(said)
        lost = self._write_chains(batch)
        if lost:  # a prefix was evicted from disk meanwhile: once more, with all of it
            with self._engine_lock:
                for cached in lost:
                    for block in cached.path():
                        block.on_disk = False
            self._write_chains(lost)

    def _write_chains(self, batch: list[CachedBlock]) -> list[CachedBlock]:
        """Write blocks with whatever they follow; return those whose prefix was gone from disk."""
        with self._engine_lock:
            alive = [cached for cached in batch if self._cache.holds(cached)]
            wanted = list(dict.fromkeys(block for one in alive for block in _unwritten(one)))
        most = self._most_blocks(_BATCH_BYTES)
        for start in range(0, len(wanted), most):
            self._write_blocks(wanted[start : start + most])
        return [cached for cached in alive if not cached.on_disk]

    def _write_blocks(self, wanted: list[CachedBlock]) -> None:
        with self._leased(wanted) as leased:
            blocks = [self._as_new(cached) for cached in leased]
        if not blocks:
            return
        written = self._store.write(self._identity, blocks)
        self.written_bytes += written.stored_bytes
        self.written_blocks += written.blocks
        self.error = None  # there is room again, where there was none
        with self._engine_lock:
            for cached in leased:
                cached.on_disk = cached.key in written.stored

    @contextmanager
    def _leased(self, wanted: list[CachedBlock]) -> Iterator[list[CachedBlock]]:
        """Hold blocks that are still in the cache, so that nobody writes them."""
        with self._engine_lock:
            held = [cached for cached in wanted if self._cache.holds(cached)]
            self.leased = [cached.block for cached in held]
            self._pool.retain(self.leased)
        try:
            yield held
        finally:
            with self._engine_lock:
                self._pool.release(self.leased)
                self.leased = []

    def _as_new(self, cached: CachedBlock) -> NewBlock:
        payload = bytearray(self._runtime.info.bytes_per_block)
        self._runtime.read_block(cached.block, memoryview(payload))
        parent = cached.parent
        assert parent is not None, "a root is never written"
        return NewBlock(
            key=cached.key,
            parent=parent.key,
            follows_root=parent.parent is None,
            token_ids=cached.token_ids,
            payload=payload,
        )

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Give up writing where the store fails; the one place that turns that into a warning."""
        try:
            yield
        except (StoreFullError, StoreBusyError) as error:
            if self._stop(error, monotonic() + _RETRY_S):
                _log.warning("KV is not kept on disk for now. %s", error)
        except StoreError as error:
            if self._stop(error, inf):
                _log.warning("KV is no longer kept on disk. %s", error)

    def _stop(self, error: StoreError, retry_at: float) -> bool:
        """Write nothing until then, and return whether anything was written before."""
        with self._lock:
            is_first, self.error, self._retry_at = self.error is None, error, retry_at
            self._queue.clear()
            self._replies.clear()
            self._bad.clear()
            self._used.clear()
            self._done.notify_all()
            return is_first


def _unwritten(cached: CachedBlock) -> list[CachedBlock]:
    """Return what has to be written for a block to be found: it, and what it follows up to the disk."""
    blocks: list[CachedBlock] = []
    node = cached
    while node.parent is not None and not node.on_disk:
        blocks.append(node)
        node = node.parent
    return blocks[::-1]

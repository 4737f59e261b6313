"""
Bring computed blocks to disk behind the engine's back: batched, and never on the way of a token.

Knows blocks in memory and the store; not sequences.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic, perf_counter
from typing import Final

from recollect.errors import StoreError, StoreFullError
from recollect.kv import replies
from recollect.kv.blocks import BlockPool
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.names import Key
from recollect.kv.prefix import CachedBlock, PrefixCache
from recollect.kv.record import Identity
from recollect.kv.replies import StoredReply
from recollect.runtime.base import PagedRuntime

_log: Final = logging.getLogger(__name__)

_LINGER_S: Final = 2.0
"""How long the thread waits for more before it ends; the next block starts another."""
_SETTLE_S: Final = 0.2
"""After the engine came to rest: the template's tokens after a reply are computed then, and replace
the block that the reply ended in."""
_OVERDUE_S: Final = 5.0
"""A block that has waited for so long is written although the engine works."""
_BATCH_BYTES: Final = 16 << 20
_BUSY_BATCH_BYTES: Final = 2 << 20
_BUSY_PAUSE: Final = 40
"""Times a write's own duration, before the next while the engine works: 2.5 % of a core at most."""


class WriteBehind:
    """
    The blocks and replies that are not on disk yet, and the thread that writes them.

    `note` is called under the engine's lock, the rest from any thread. A block may be evicted from
    memory before it is written; it is then not written. While a block is read it has a reference
    of its own, so that nobody writes it; a block in the cache is never changed otherwise.

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
        self._state = threading.Condition()  # taken after the engine's lock, never before it
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
        """Why nothing is written any more; None: it is."""

    def note(self, cached: CachedBlock) -> None:
        """Take note of a block that others may find from now on."""
        if self.error is None and not cached.on_disk:
            self._add(cached)

    def note_used(self, keys: Iterable[Key]) -> None:
        """Take note of stored blocks that were used."""
        with self._state:
            self._used.update(keys)

    def note_bad(self, keys: Iterable[Key]) -> None:
        """Take note of stored blocks that are not what was written; they are removed."""
        with self._state:
            self._bad.update(keys)
            if self._bad:
                self._wake()

    def note_reply(self, name: Key, reply: StoredReply) -> None:
        """Take note of a reply that a client may send back as text."""
        if self.error is None:
            with self._state:
                self._replies[name] = reply
                self._wake()

    def engine_works(self, works: bool) -> None:
        """Take note of whether the engine has anything to do."""
        if works != (self._idle_since is None):
            with self._state:
                self._idle_since = None if works else monotonic()
                self._state.notify_all()

    def flush(self) -> None:
        """Write all that is there to write, now, and wait for it."""
        with self._state:
            self._flushing += 1
            if self._has_work():
                self._wake()  # once: whoever waits here too would wake this one, and so on
            try:
                self._state.wait_for(
                    lambda: not self._writing and (self.error is not None or not self._has_work())
                )
            finally:
                self._flushing -= 1

    def close(self) -> None:
        """Write what is left. The pool and the runtime have to be there still."""
        self.flush()
        if self._used and self.error is None:
            with self._guarded():
                self._store.touch(self._used)

    def _add(self, cached: CachedBlock) -> None:
        with self._state:
            self._queue.setdefault(cached, monotonic())
            self._wake()

    def _has_work(self) -> bool:
        return bool(self._queue or self._bad or self._replies)

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="recollect-disk", daemon=True)
            self._thread.start()
        self._state.notify_all()

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                begun = perf_counter()
                with self._guarded():
                    self._write(batch)
                self._not_before = monotonic() + _BUSY_PAUSE * (perf_counter() - begun)
                with self._state:
                    self._writing = False
                    self._state.notify_all()
        except BaseException:
            with self._state:
                self._stop(StoreError("Writing KV to disk met a bug: load the model again."))
                self._thread, self._writing = None, False
                self._state.notify_all()
            raise

    def _next_batch(self) -> list[CachedBlock] | None:
        """Wait for blocks that may be written now; None: there were none for a while."""
        with self._state:
            while True:
                if not self._has_work():
                    if not self._state.wait(_LINGER_S) and not self._has_work():
                        self._thread = None  # without a thread, an engine nobody uses can go
                        return None
                    continue
                wait_s = self._wait_s()
                if wait_s <= 0:
                    self._writing = True
                    return self._take()
                self._state.wait(wait_s)

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
        size = self._runtime.info.bytes_per_block
        most = max(1, (_BUSY_BATCH_BYTES if works else _BATCH_BYTES) // size)
        return [self._queue.popitem(last=False)[0] for _ in range(min(most, len(self._queue)))]

    def _write(self, batch: list[CachedBlock]) -> None:
        with self._state:
            bad, self._bad = self._bad, set()
            used, self._used = self._used, set()
            said, self._replies = self._replies, {}
        if bad:
            self._store.remove(bad)
        if used:
            self._store.touch(used)
        if said:
            with suppress(StoreFullError):  # for a few bytes, KV is not given up
                replies.remember(self._store, said)
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
            chains = [block for cached in alive for block in cached.path() if not block.on_disk]
        wanted = list(dict.fromkeys(chains))
        with self._leased(wanted) as leased:
            blocks = [self._as_new(cached) for cached in leased]
        if not blocks:
            return []
        written = self._store.write(self._identity, blocks)
        self.written_bytes += written.stored_bytes
        self.written_blocks += written.blocks
        with self._engine_lock:
            for cached in leased:
                cached.on_disk = cached.key in written.stored
        return [cached for cached in alive if not cached.on_disk]

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
        except StoreError as error:
            with self._state:
                self._stop(error)
                self._state.notify_all()
            _log.warning("KV is no longer kept on disk. %s", error)

    def _stop(self, error: StoreError) -> None:
        self.error = error
        self._queue.clear()
        self._replies.clear()
        self._bad.clear()

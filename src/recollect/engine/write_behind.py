"""
When to bring blocks and replies to disk: behind the engine's back, batched, never on the way of a token.

Knows the store and how large a block is. What a block is, and how it is read, the tier knows.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from time import monotonic, perf_counter
from typing import Final

from recollect.errors import StoreBusyError, StoreError, StoreFullError
from recollect.kv.blocks import CachedBlock
from recollect.kv.disk import DiskStore, stored_bytes
from recollect.kv.record import Key, StoredReply

_log: Final = logging.getLogger(__name__)

_LINGER_S: Final = 2.0
"""How long the thread waits for work before it ends; the next block starts another."""
_SETTLE_S: Final = 0.2
"""How long to wait after the engine came to rest: the template's tokens after a reply are computed then,
and replace the block that the reply ended in."""
_OVERDUE_S: Final = 5.0
"""A block that has waited for so long is written even while the engine works."""
RETRY_S: Final = 60.0
"""How long to wait before a full store or disk is tried again: somebody may have made room."""
_BATCH_BYTES: Final = 16 << 20
_BATCH_SHARE: Final = 1 / 8
"""Share of the store's budget that a batch may take: a batch needs all its room at once."""
_BUSY_BATCH_BYTES: Final = 2 << 20
_BUSY_PAUSE: Final = 40
"""While the engine works, the pause after a write, in durations of that write: 2.5 % of a core at most."""


class WriteBehind:
    """
    What is not on disk yet, and the thread that writes it. The tier owns it.

    `note` is called under the engine's lock, the rest from any thread.

    Where the store or the disk is full, nothing is noted for a while, and then it is tried again; where
    the store fails otherwise, nothing is noted any more. What is not written stays in memory.
    """

    def __init__(
        self,
        store: DiskStore,
        write: Callable[[list[CachedBlock]], None],
        *,
        bytes_per_block: int,
    ) -> None:
        """
        Take what blocks are written with.

        Args:
            store: Where replies go, and what is told which of its blocks were used or are bad.
            write: Writes the blocks of a batch that are still in the cache; called on this object's
                thread, and raises `StoreError` where it cannot.
            bytes_per_block: How large a block is in memory.
        """
        self._store = store
        self._write_blocks = write
        self._block_bytes = stored_bytes(bytes_per_block)
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
        self.error: StoreError | None = None
        """Why nothing is written, for now or any more; None: it is."""
        self._retry_at = 0.0
        with self._guarded():
            store.env.require_writable()

    def note(self, cached: CachedBlock) -> None:
        """Note a block that others may find from now on, to be written."""
        if not cached.on_disk and not self._rests():
            with self._lock:
                self._queue.setdefault(cached, monotonic())
                self._wake()

    def note_used(self, keys: Iterable[Key]) -> None:
        """Note stored blocks that were used."""
        if not self._rests():
            with self._lock:
                self._used.update(keys)

    def note_bad(self, keys: Iterable[Key]) -> None:
        """Note stored blocks that are not what was written, to be removed."""
        if not self._rests():
            with self._lock:
                self._bad.update(keys)
                if self._bad:
                    self._wake()

    def note_reply(self, name: Key, reply: StoredReply) -> None:
        """Note a reply that a client may send back as text, to be stored."""
        if not self._rests():
            with self._lock:
                self._replies[name] = reply
                self._wake()

    def engine_works(self, works: bool) -> None:
        """Note whether the engine has anything to do; while it has, little is written at a time."""
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

    def most_blocks(self, most_bytes: int = _BATCH_BYTES) -> int:
        """Return how many blocks to write at once."""
        most_bytes = min(most_bytes, int(self._store.budget_bytes * _BATCH_SHARE))
        return max(1, most_bytes // self._block_bytes)

    def close(self) -> None:
        """Write what is left. The runtime has to be open still."""
        self.flush()
        if self._used and self.error is None:
            with self._guarded():
                self._store.touch(self._used)

    def _rests(self) -> bool:
        """Return whether nothing is written, for good or until a full store is tried again."""
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
        most = self.most_blocks(_BUSY_BATCH_BYTES if works else _BATCH_BYTES)
        return [self._queue.popitem(last=False)[0] for _ in range(min(most, len(self._queue)))]

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
        if batch:
            self._write_blocks(batch)
            self.error = None  # there is room again, where there was none

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn a failure of the store into a warning, and write nothing for a while, or any more."""
        try:
            yield
        except (StoreFullError, StoreBusyError) as error:
            if self._stop(error, monotonic() + RETRY_S):
                _log.warning("KV is not kept on disk for now. %s", error)
        except StoreError as error:
            if self._stop(error, inf):
                _log.warning("KV is no longer kept on disk. %s", error)

    def _stop(self, error: StoreError, retry_at: float) -> bool:
        """Drop all work, and write nothing until *retry_at*; return whether this is the first failure."""
        with self._lock:
            is_first, self.error, self._retry_at = self.error is None, error, retry_at
            self._queue.clear()
            self._replies.clear()
            self._bad.clear()
            self._used.clear()
            self._done.notify_all()
            return is_first

"""
The tier below memory, as the engine sees it: what is read before a prompt, what is written behind it.

Knows the store, not the scheduler.
"""

import threading
from dataclasses import dataclass
from typing import Final

from recollect.engine.restore import Restored, Restorer
from recollect.engine.sequence import Sequence
from recollect.engine.write_behind import WriteBehind
from recollect.errors import StoreError
from recollect.kv import accounts
from recollect.kv.blocks import BlockPool
from recollect.kv.disk import DiskStore
from recollect.kv.prefix import CachedBlock, PrefixCache
from recollect.kv.record import Identity
from recollect.runtime.base import PagedRuntime


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """What the tier has done in this process."""

    restored_tokens: int
    restore_s: float
    restore_s_per_block: float | None
    written_bytes: int
    written_blocks: int
    misses: dict[str, int]
    """Stored blocks that were refused, by reason."""
    evicted_blocks: int
    error: str | None
    """Why it was turned off; None: it works."""


class DiskTier:
    """
    A store that the blocks of one engine come from and go to.

    Owned by the engine, which closes it; the store is closed with it.
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
        self.store: Final = store
        self.identity: Final = identity
        self._lock = lock
        self._cache = cache
        self._written = WriteBehind(store, identity, runtime, pool, cache, lock)
        self._restorer = Restorer(store, identity, runtime, pool, cache, lock)
        self._compute_s_per_token = self._known_rate()

    @property
    def leased_blocks(self) -> list[int]:
        """Return the blocks that are held while they are read, for `BlockPool.check`."""
        return self._written.leased

    def note(self, cached: CachedBlock) -> None:
        """Take note of a block that came into the cache; under the engine's lock."""
        self._written.note(cached)

    def engine_works(self, works: bool) -> None:
        """Take note of whether the engine has anything to do."""
        self._written.engine_works(works)

    def restore(
        self, sequence: Sequence, *, compute_s_per_token: float | None, most_s: float | None
    ) -> Restored:
        """Bring what the disk has of a sequence's history; see `Restorer.restore`."""
        if compute_s_per_token is not None:
            self._compute_s_per_token = compute_s_per_token
        restored = self._restorer.restore(
            sequence, compute_s_per_token=self._compute_s_per_token, most_s=most_s
        )
        if self._restorer.used:
            self._written.note_used(self._restorer.used)
            self._restorer.used.clear()
        self._written.note_bad(self.store.take_refused())
        return restored

    def flush(self) -> None:
        """Write all that is in memory and not on disk, and wait for it."""
        self._written.flush()

    def keep(self, cached: CachedBlock) -> None:
        """
        See that a block and the prefix before it are on disk, and wait for it.

        Raises:
            StoreError: They cannot be written.
        """
        with self._lock:
            for block in cached.path():
                self._written.note(block)
        self.flush()
        if self._written.error is not None:
            raise self._written.error
        if not cached.on_disk:
            raise StoreError("This could not be kept on disk: there is no room for it (--kv-disk).")

    def statistics(self) -> TierStatistics:
        """Return what was done so far."""
        error = self._written.error or self._restorer.error
        return TierStatistics(
            restored_tokens=self._restorer.tokens,
            restore_s=self._restorer.seconds,
            restore_s_per_block=self._restorer.restore_s_per_block,
            written_bytes=self._written.written_bytes,
            written_blocks=self._written.written_blocks,
            misses={str(reason): count for reason, count in self.store.misses.items()},
            evicted_blocks=self.store.evicted_blocks,
            error=None if error is None else str(error),
        )

    def saved_s(self) -> float:
        """Return how much longer computing what was restored would have taken, in seconds."""
        rate = self._compute_s_per_token or 0.0
        return max(0.0, rate * self._restorer.tokens - self._restorer.seconds)

    def close(self) -> None:
        """Write what is left, note what was saved, and close the store."""
        try:
            self._written.close()
            if self._written.error is None:
                self._note_savings()
        finally:
            self.store.close()

    def _known_rate(self) -> float | None:
        env = self.store.env
        try:
            with env.reading() as txn:
                return accounts.savings(txn, env, self.identity.digest()).compute_s_per_token
        except StoreError:
            return None  # the first restore tells

    def _note_savings(self) -> None:
        env = self.store.env
        saved = accounts.Savings(self._restorer.tokens, self.saved_s(), self._compute_s_per_token)
        try:
            with env.writing() as txn:
                accounts.add_savings(txn, env, self.identity.digest(), saved)
        except StoreError:
            return  # a count is not worth an error at the end

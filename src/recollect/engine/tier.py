"""
The tier below memory, as the engine sees it: what is read before a prompt, what is written behind it.

Knows the store, not the scheduler.
"""

import threading
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Final

from recollect.engine.restore import Restored, Restorer
from recollect.engine.sequence import Sequence
from recollect.engine.task import Task
from recollect.engine.write_behind import WriteBehind
from recollect.errors import StoreError
from recollect.kv import accounts, pins, replies
from recollect.kv.blocks import BlockPool
from recollect.kv.cached_block import CachedBlock
from recollect.kv.disk import DiskStore
from recollect.kv.names import Key
from recollect.kv.prefix import Match, PrefixCache
from recollect.kv.record import Identity
from recollect.kv.replies import StoredReply
from recollect.runtime.base import PagedRuntime

_MOST_RESTORE_S: Final = 0.05
"""How long others wait while one is read from disk, roughly: less than for a chunk of its prefill."""


_MOST_TOUCHED_BYTES: Final = 256 << 20
"""Of memory that is made ready for what may be restored."""


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
    """Why it was turned off, or writes nothing for now; None: it works."""


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
        self._runtime = runtime
        self._block_size = runtime.info.block_size
        self._inside_blocks = not runtime.info.whole_blocks_only
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

    def note_reply(self, name: Key, reply: StoredReply) -> None:
        """Take note of a reply that a client may send back as text; it is written with the blocks."""
        self._written.note_reply(name, reply)

    def find_reply(self, name: Key) -> StoredReply | None:
        """Return a reply of another time; None where there is none, or nothing can be read."""
        try:
            return replies.recall(self.store, name)
        except StoreError:
            return None  # the next restore tells what is wrong

    def engine_works(self, works: bool) -> None:
        """Take note of whether the engine has anything to do."""
        self._written.engine_works(works)

    def warm_up(self, num_blocks: int) -> None:
        """
        Write to the blocks that what is on disk would go to first, before anything is in them.

        The first write to a page of memory takes several times as long as any other, and is a third
        of what restoring a conversation takes. Source: our own measurement, benchmarks/restart.py.

        Args:
            num_blocks: Of the pool, all of them free; they are taken from the first on.
        """
        env, size = self.store.env, self._runtime.info.bytes_per_block
        try:
            with env.reading() as txn:
                digest = self.identity.digest()
                stored = sum(head.identity == digest for head in accounts.heads(txn, env).values())
        except StoreError:
            return  # the first restore tells
        nothing = memoryview(bytes(size))
        for block in range(min(stored, num_blocks, _MOST_TOUCHED_BYTES // size)):
            self._runtime.write_block(block, nothing)

    def restore_for(self, tasks: Collection[Task], *, compute_s_per_token: float | None) -> None:
        """
        Bring what the disk has of new tasks' histories, a little at a time where others wait.

        Args:
            tasks: Those that run; they belong to the calling thread, which is the engine's.
            compute_s_per_token: As measured; None where nothing was yet.
        """
        most_s = _MOST_RESTORE_S if len(tasks) > 1 else None
        for task in tasks:
            if not task.restoring:
                continue
            if task.sequence.logits is not None:
                task.restoring = False
                continue
            restored = self._restore(task.sequence, compute_s_per_token, most_s)
            task.restored_tokens += restored.tokens
            task.restoring = not restored.is_done

    def _restore(
        self, sequence: Sequence, compute_s_per_token: float | None, most_s: float | None
    ) -> Restored:
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
        path = cached.path()
        self._written.try_again()
        for _ in range(2):
            with self._lock:
                for block in path:
                    self._written.note(block)
            self.flush()
            if self._written.error is not None:
                raise self._written.error
            if cached.on_disk and pins.are_stored(self.store, [block.key for block in path]):
                return
            with self._lock:  # evicted from disk, where nobody told the blocks in memory
                for block in path:
                    block.on_disk = False
        raise StoreError("This could not be kept on disk: there is no room for it (--kv-disk).")

    def read_block(self, cached: CachedBlock, into: memoryview) -> None:
        """Copy a block's bytes from memory; whoever calls holds it there."""
        self._runtime.read_block(cached.block, into)

    def stored_tokens(self, match: Match, root: CachedBlock, token_ids: Tokens[int]) -> int:
        """
        Return how many leading tokens have KV in memory or on disk.

        Args:
            match: What memory has of them.
            root: Of their namespace.
            token_ids: Shape `(n,)`.
        """
        size = self._block_size
        start = len(match.full) * size
        after = match.full[-1] if match.full else root
        try:
            found = self.store.find(
                after.key, token_ids[start:], block_size=size, inside_block=self._inside_blocks
            )
        except StoreError:
            return start + match.partial_tokens  # the next restore tells what is wrong
        on_disk = max(0, len(found.entries) - 1) * size + found.last_tokens
        return start + max(match.partial_tokens, on_disk)

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

    def close(self, *, compute_s_per_token: float | None = None) -> None:
        """
        Write what is left, note what was saved, and close the store.

        Args:
            compute_s_per_token: As measured last; None where nothing was.
        """
        self._compute_s_per_token = compute_s_per_token or self._compute_s_per_token
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

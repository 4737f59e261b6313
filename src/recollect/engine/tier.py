"""
The tier below memory, as the engine sees it: what is read before a prompt, what is written behind it.

Knows the store, not the scheduler.

Bring blocks from disk into the prefix cache before a prompt is computed.

Decides as a value, then does; where anything fails, the engine is as if nobody had tried.
"""

import logging
import threading
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from recollect.engine.scheduler import Task
from recollect.engine.sequence import Sequence
from recollect.engine.write_behind import WriteBehind
from recollect.errors import RuntimeFailure, StoreBusyError, StoreError
from recollect.kv import accounts, pins, replies
from recollect.kv.blocks import BlockPool, CachedBlock, Key
from recollect.kv.disk import DiskStore, Found
from recollect.kv.prefix import Match, PrefixCache
from recollect.kv.record import Buffer, Entry, Identity
from recollect.kv.replies import StoredReply
from recollect.runtime.base import PagedRuntime
from recollect.types import running_average

_log: Final = logging.getLogger(__name__)

_FIRST_BLOCKS: Final = 8
"""Read at once while nothing has been measured and others wait."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What reading and computing cost on this machine, measured; None where nothing was yet."""

    restore_s_per_block: float | None = None
    compute_s_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What to read."""

    entries: list[Entry]
    is_all: bool
    """Whether there is nothing more to read afterwards."""


def plan_restore(
    found: Found, *, have: int, block_size: int, rates: Rates, room: int, most_s: float | None
) -> RestorePlan:
    """
    Return which of the blocks that were found are worth reading, and can be.

    Where computing was measured to be faster, one block is read all the same: so the measurement
    stays fresh, and a disk that was slow once is not slow for ever.

    Args:
        found: What the disk has beyond the last whole block in memory, or enough of it for a step.
        have: Tokens that memory has beyond that block.
        block_size: Tokens in a block.
        rates: As measured.
        room: Blocks that can be had.
        most_s: How long others may wait for it; None: nobody waits.
    """
    count = len(found.entries)
    gained = max(0, count - 1) * block_size + found.last_tokens - have
    if gained <= 0 or room < 1:
        return RestorePlan([], True)
    restore_s, compute_s = rates.restore_s_per_block, rates.compute_s_per_token
    is_slow = (
        restore_s is not None and compute_s is not None and restore_s * count > compute_s * gained
    )
    if is_slow:
        return RestorePlan(found.entries[:1], True)
    most = most_blocks(rates=rates, room=room, most_s=most_s)
    is_all = found.is_all and count <= most
    return RestorePlan(found.entries[:most], is_all or most == room)


def most_blocks(*, rates: Rates, room: int, most_s: float | None) -> int:
    """Return how many blocks one step may read; see `plan_restore`."""
    if most_s is None:
        return room
    restore_s = rates.restore_s_per_block
    return min(room, _FIRST_BLOCKS if restore_s is None else max(1, int(most_s / restore_s)))


@dataclass(frozen=True, slots=True)
class Restored:
    """What one step has brought."""

    tokens: int
    """Tokens of the sequence that have KV now and had none before."""
    is_done: bool
    """Whether there is nothing more to bring."""


_NOTHING: Final = Restored(0, True)


class Restorer:
    """
    Reads blocks for sequences.

    Used by the engine's thread, between forward passes.
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
        self._lock = lock
        self._inside_blocks = not runtime.info.whole_blocks_only
        self.restore_s_per_block: float | None = None
        self.tokens = 0
        """Restored so far."""
        self.seconds = 0.0
        """That this took."""
        self.error: StoreError | None = None
        """Why nothing is read any more; None: it is."""
        self.used: set[bytes] = set()
        """Keys of the last blocks that were read; whoever notes them empties it."""

    def restore(
        self, sequence: Sequence, *, compute_s_per_token: float | None, most_s: float | None
    ) -> Restored:
        """
        Bring what the disk has of a sequence's history beyond what memory has.

        What comes is in the prefix cache then, and taken over by the sequence.

        Args:
            sequence: It belongs to the engine's thread.
            compute_s_per_token: As measured; None where nothing was yet.
            most_s: How long this may take, roughly; None: as long as it takes.
        """
        if self.error is not None or sequence.namespace is None:
            return _NOTHING
        begun = perf_counter()
        try:
            plan = self._plan(sequence, compute_s_per_token, most_s)
            if not plan.entries:
                return Restored(0, plan.is_all)
            gained, count = self._carry_out(sequence, plan)
        except (StoreError, RuntimeFailure) as error:
            self._failed(error)
            return _NOTHING
        self._measured(count, gained, perf_counter() - begun)
        return Restored(gained, plan.is_all or count < len(plan.entries))

    def _failed(self, error: StoreError | RuntimeFailure) -> None:
        """Count it as a miss; where the files are at fault, do without them from now on."""
        self._store.misses["store"] += 1
        if isinstance(error, StoreError) and not isinstance(error, StoreBusyError):
            self.error = error
            _log.warning("KV on disk is not used any more. %s", error)
        else:
            _log.warning("KV on disk was not used this time. %s", error)

    def _plan(
        self, sequence: Sequence, compute_s_per_token: float | None, most_s: float | None
    ) -> RestorePlan:
        with self._lock:
            sequence.reuse()
            after = sequence.last_full
            start = len(sequence.chain) * self._pool.block_size
            have = sequence.computed - start
            # All but the block that the prompt's last token goes to, which is fed in any case.
            room = self._pool.free_blocks + self._cache.evictable_blocks - 1
        assert after is not None, "a sequence with a namespace has a root"
        rates = Rates(self.restore_s_per_block, compute_s_per_token)
        found = self._store.find(
            after.key,
            sequence.tokens(start),
            block_size=self._pool.block_size,
            inside_block=self._inside_blocks,
            most=max(1, most_blocks(rates=rates, room=room, most_s=most_s)),
        )
        return plan_restore(
            found,
            have=have,
            block_size=self._pool.block_size,
            rates=rates,
            room=room,
            most_s=most_s,
        )

    def _carry_out(self, sequence: Sequence, plan: RestorePlan) -> tuple[int, int]:
        """Return how many tokens more have KV now, and how many blocks were right."""
        with self._lock:
            short = len(plan.entries) - self._pool.free_blocks
            if short > 0:
                self._cache.evict(short)
            blocks = self._pool.allocate(min(len(plan.entries), self._pool.free_blocks))
        count = 0
        try:

            def take(number: int, payload: Buffer) -> None:
                self._runtime.write_block(blocks[number], memoryview(payload))

            count = self._store.read(self._identity, plan.entries[: len(blocks)], take)
        except BaseException:
            with self._lock:
                self._pool.release(blocks)
            raise
        with self._lock:
            before = sequence.computed
            after = sequence.last_full
            for entry, block in zip(plan.entries[:count], blocks, strict=False):
                assert after is not None, "a sequence with a namespace has a root"
                after = self._cache.insert(after, entry.token_ids, block, on_disk=True)
            self._pool.release(blocks)  # the cache has its own reference now
            sequence.reuse()
            gained = sequence.computed - before
        if count:
            self.used.add(plan.entries[count - 1].key)
        return gained, count

    def _measured(self, blocks: int, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        if blocks:
            self.restore_s_per_block = running_average(self.restore_s_per_block, seconds / blocks)


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
        full = match.tokens // size
        start = full * size
        after = match.blocks[full - 1] if full else root
        try:
            found = self.store.find(
                after.key, token_ids[start:], block_size=size, inside_block=self._inside_blocks
            )
        except StoreError:
            return match.tokens  # the next restore tells what is wrong
        on_disk = max(0, len(found.entries) - 1) * size + found.last_tokens
        return max(match.tokens, start + on_disk)

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

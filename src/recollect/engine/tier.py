"""
The tier below memory: blocks come from a store before a prompt is computed, and go there afterwards.

What to read is decided as a value, `plan_restore`, which depends on nothing but its arguments. When to
write is decided by the writer in `write_behind`. Where anything fails, the engine is as if nobody had
tried. Knows the store; of a task only its sequence, and whether the disk may have more of it.
"""

import logging
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from recollect.engine.decoder import Task
from recollect.engine.sequence import Memory, Sequence
from recollect.engine.write_behind import WriteBehind
from recollect.errors import RuntimeFailure, StoreBusyError, StoreError
from recollect.kv.blocks import CachedBlock
from recollect.kv.disk import DiskStore, Found, NewBlock
from recollect.kv.prefix import Match
from recollect.kv.record import Buffer, Entry, Identity, Key, StoredReply
from recollect.kv.tables import Savings
from recollect.runtime.base import PagedRuntime, Row
from recollect.types import running_average

_log: Final = logging.getLogger(__name__)

FIRST_BLOCKS: Final = 8
"""Blocks that are read at once while nothing has been measured and others wait."""
MOST_RESTORE_S: Final = 0.05
"""How long others wait at most while one is read from disk: less than for a chunk of its prefill."""
_TIMED_TOKENS: Final = 32
"""Passes over fewer tokens are not timed: they say little about the cost of prefill."""
_MOST_TOUCHED_BYTES: Final = 256 << 20
"""Memory that is made ready at most for what may be restored."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What reading and computing cost on this machine, measured; None where nothing was yet."""

    restore_s_per_block: float | None = None
    compute_s_per_token: float | None = None


class Speed:
    """What computing a token of a prompt and reading a block from disk cost here: running averages."""

    def __init__(self) -> None:
        self.known_s_per_token: float | None = None
        """What computing one cost in a run before; None: nobody knows."""
        self._s_per_token: float | None = None
        self._s_per_block: float | None = None

    def computed(self, rows: Collection[Row], seconds: float) -> None:
        """Take note of what a pass took."""
        tokens = sum([len(row.token_ids) for row in rows])
        if tokens >= _TIMED_TOKENS:
            self._s_per_token = running_average(self._s_per_token, seconds / tokens)

    def restored(self, blocks: int, seconds: float) -> None:
        """Take note of what reading some blocks took, at least one."""
        self._s_per_block = running_average(self._s_per_block, seconds / blocks)

    @property
    def rates(self) -> Rates:
        """Return both, as far as they are known."""
        return Rates(self._s_per_block, self._s_per_token or self.known_s_per_token)


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
    return min(room, FIRST_BLOCKS if restore_s is None else max(1, int(most_s / restore_s)))


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """What the tier of an engine has done so far."""

    restored_tokens: int
    restore_s: float
    restore_s_per_block: float | None
    written_bytes: int
    written_blocks: int
    misses: dict[str, int]
    """Stored blocks that were refused, by reason."""
    evicted_blocks: int
    error: str | None
    """Why it reads or writes nothing, for now or any more; None: it works."""


class DiskTier:
    """
    A store that the blocks of one engine come from and go to.

    Owned by the engine, which closes it, and the store with it. Blocks are restored on the engine's
    thread, between forward passes, and written on the writer's. A block may be evicted from memory
    before it is written; it is then not written. While a block is read to be written it is leased: it
    has one more reference, so that nobody writes into it.

    Invariant: `leased_blocks` are the blocks that this holds a reference to.
    """

    def __init__(
        self,
        store: DiskStore,
        identity: Identity,
        runtime: PagedRuntime,
        memory: Memory,
        speed: Speed,
    ) -> None:
        self.store: Final = store
        self.identity: Final = identity
        self._runtime = runtime
        self._pool, self._cache, self._lock = memory.pool, memory.cache, memory.lock
        self._inside_blocks = runtime.info.reuse.inside_blocks
        self._whole_tails = runtime.info.reuse.whole_tails
        self.leased_blocks: list[int] = []
        self._written_bytes = 0
        self._written_blocks = 0
        self._restored_tokens = 0
        self._restore_s = 0.0
        self._read_error: StoreError | None = None  # why nothing is read any more
        self._speed = speed
        speed.known_s_per_token = self._known_rate()
        self.writer: Final = WriteBehind(
            store, self._write, bytes_per_block=runtime.info.bytes_per_block
        )
        self._cache.on_new = self.writer.note

    @classmethod
    def over(
        cls,
        store: DiskStore | None,
        identity: Identity,
        runtime: PagedRuntime,
        memory: Memory,
        speed: Speed,
    ) -> "DiskTier | None":
        """Return the tier over a store; None where there is none, or blocks cannot be kept as bytes."""
        if store is None:
            return None
        if not runtime.info.reuse.as_bytes:
            store.close()
            return None
        return cls(store, identity, runtime, memory, speed)

    def find_reply(self, name: Key) -> StoredReply | None:
        """Return a reply of another time; None where there is none, or nothing can be read."""
        try:
            return self.store.recall(name)
        except StoreError:
            return None  # the next restore tells what is wrong

    def warm_up(self, num_blocks: int) -> None:
        """
        Write to the blocks that what is on disk would go to first, before anything is in them.

        The first write to a page of memory takes several times as long as any other, and is a third
        of what restoring a conversation takes. Source: our own measurement, benchmarks/restart.py.

        Args:
            num_blocks: Of the pool, all of them free; they are taken from the first on.
        """
        size, digest = self._runtime.info.bytes_per_block, self.identity.digest()
        try:
            with self.store.reading() as tables:
                stored = sum(head.identity == digest for head in tables.heads().values())
        except StoreError:
            return  # the first restore tells
        nothing = memoryview(bytes(size))
        for block in range(min(stored, num_blocks, _MOST_TOUCHED_BYTES // size)):
            self._runtime.write_block(block, nothing)

    def restore_for(self, tasks: Collection[Task]) -> None:
        """
        Bring what the disk has of new tasks' histories, a little at a time where others wait.

        What comes is in the prefix cache then, and taken over by the task's sequence. The engine calls
        this in every round, so the writer is told here that it works.

        Args:
            tasks: Those that run; they belong to the calling thread, which is the engine's.
        """
        self.writer.engine_works(True)
        most_s = MOST_RESTORE_S if len(tasks) > 1 else None
        for task in tasks:
            if task.restoring and task.sequence.logits is not None:
                task.restoring = False
            elif task.restoring:
                tokens, task.restoring = self._restore(task.sequence, most_s)
                task.restored_tokens += tokens
                self.writer.note_bad(self.store.take_refused())

    def _restore(self, sequence: Sequence, most_s: float | None) -> tuple[int, bool]:
        """Return how many tokens more have KV now, and whether there may be more to read."""
        if self._read_error is not None or sequence.namespace is None:
            return 0, False
        begun = perf_counter()
        try:
            plan = self._plan(sequence, most_s)
            if not plan.entries:
                return 0, not plan.is_all
            tokens, blocks = self._carry_out(sequence, plan)
        except (StoreError, RuntimeFailure) as error:
            self._failed(error)
            return 0, False
        self._restored(blocks, tokens, perf_counter() - begun)
        return tokens, not plan.is_all and blocks == len(plan.entries)

    def _failed(self, error: StoreError | RuntimeFailure) -> None:
        """Count a failure as a miss; where the files are at fault, read nothing from now on."""
        self.store.misses["store"] += 1
        if isinstance(error, StoreError) and not isinstance(error, StoreBusyError):
            self._read_error = error
            _log.warning("KV on disk is not used any more. %s", error)
        else:
            _log.warning("KV on disk was not used this time. %s", error)

    def _restored(self, blocks: int, tokens: int, seconds: float) -> None:
        self._restored_tokens += tokens
        self._restore_s += seconds
        if blocks:
            self._speed.restored(blocks, seconds)

    def _plan(self, sequence: Sequence, most_s: float | None) -> RestorePlan:
        size = self._pool.block_size
        with self._lock:
            sequence.reuse()
            after = sequence.last_full
            start = len(sequence.chain) * size
            have = sequence.computed - start
            # The prompt's last token may be fed again, and a reply's first needs a block.
            room = self._pool.free_blocks + self._cache.evictable_blocks - 1
        assert after is not None, "a sequence with a namespace has a root"
        rates = self._speed.rates
        found = self.store.find(
            after.key,
            sequence.tokens(start),
            block_size=size,
            inside_block=self._inside_blocks,
            whole_tails=self._whole_tails,
            most=max(1, most_blocks(rates=rates, room=room, most_s=most_s)),
        )
        return plan_restore(
            found,
            have=have,
            block_size=size,
            rates=rates,
            room=room,
            most_s=most_s,
        )

    def _carry_out(self, sequence: Sequence, plan: RestorePlan) -> tuple[int, int]:
        """Read blocks; return how many tokens more have KV now, and how many blocks were right."""
        with self._lock:
            short = len(plan.entries) - self._pool.free_blocks
            if short > 0:
                self._cache.evict(short)
            blocks = self._pool.allocate(min(len(plan.entries), self._pool.free_blocks))
        count = 0
        try:

            def take(number: int, payload: Buffer) -> None:
                self._runtime.write_block(blocks[number], memoryview(payload))

            count = self.store.read(self.identity, plan.entries[: len(blocks)], take)
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
            self.writer.note_used([plan.entries[count - 1].key])
        return gained, count

    def _write(self, batch: list[CachedBlock]) -> None:
        """
        Write blocks that are still in the cache, with what they follow; the writer calls this.

        Raises:
            StoreError: They cannot be written.
        """
        lost = self._write_chains(batch)
        if lost:  # a prefix was evicted from disk meanwhile: once more, with all of it
            self._not_on_disk([block for cached in lost for block in cached.path()])
            self._write_chains(lost)

    def _write_chains(self, batch: list[CachedBlock]) -> list[CachedBlock]:
        """Write blocks with what they follow; return those whose prefix was gone from disk."""
        with self._lock:
            alive = [cached for cached in batch if cached.in_tree]
            wanted = list(dict.fromkeys(block for one in alive for block in _unwritten(one)))
        most = self.writer.most_blocks()
        for start in range(0, len(wanted), most):
            self._write_blocks(wanted[start : start + most])
        return [cached for cached in alive if not cached.on_disk]

    def _write_blocks(self, wanted: list[CachedBlock]) -> None:
        with self._leased(wanted) as leased:
            blocks = [self._as_new(cached) for cached in leased]
        if not blocks:
            return
        written = self.store.write(self.identity, blocks, keep_parts=self._whole_tails)
        self._written_bytes += written.stored_bytes
        self._written_blocks += written.blocks
        with self._lock:
            for cached in leased:
                cached.on_disk = cached.key in written.stored

    @contextmanager
    def _leased(self, wanted: list[CachedBlock]) -> Iterator[list[CachedBlock]]:
        """Hold blocks that are still in the cache, so that nobody writes into them."""
        with self._lock:
            held = [cached for cached in wanted if cached.in_tree]
            self.leased_blocks = [cached.block for cached in held]
            self._pool.retain(self.leased_blocks)
        try:
            yield held
        finally:
            with self._lock:
                self._pool.release(self.leased_blocks)
                self.leased_blocks = []

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

    def _not_on_disk(self, blocks: list[CachedBlock]) -> None:
        """Note that blocks were evicted from disk, where nobody told those in memory."""
        with self._lock:
            for block in blocks:
                block.on_disk = False

    def flush(self) -> None:
        """Write all that is in memory and not on disk, and wait for it."""
        self.writer.flush()

    def keep(self, cached: CachedBlock) -> None:
        """
        See that a block and the prefix before it are on disk, and wait for it.

        Raises:
            StoreError: They cannot be written.
        """
        path = cached.path()
        self.writer.try_again()
        for _ in range(2):
            with self._lock:
                for block in path:
                    self.writer.note(block)
            self.writer.flush()
            if self.writer.error is not None:
                raise self.writer.error
            if cached.on_disk and self.store.has_blocks([block.key for block in path]):
                return
            self._not_on_disk(path)
        raise StoreError("There is no room on disk for this KV: give the cache more (--kv-disk).")

    def read_block(self, cached: CachedBlock, into: memoryview) -> None:
        """Copy a block's bytes from memory; whoever calls holds it there."""
        self._runtime.read_block(cached.block, into)

    def stored_tokens(self, match: Match, namespace: str, token_ids: Tokens[int]) -> int:
        """
        Return how many leading tokens have KV in memory or on disk.

        Args:
            match: What memory has of them.
            namespace: Whose they are.
            token_ids: Shape `(n,)`.
        """
        size = self._pool.block_size
        full = match.tokens // size
        start = full * size
        with self._lock:
            after = match.blocks[full - 1] if full else self._cache.root(namespace)
        try:
            found = self.store.find(
                after.key,
                token_ids[start:],
                block_size=size,
                inside_block=self._inside_blocks,
                whole_tails=self._whole_tails,
            )
        except StoreError:
            return match.tokens  # the next restore tells what is wrong
        on_disk = max(0, len(found.entries) - 1) * size + found.last_tokens
        return max(match.tokens, start + on_disk)

    def statistics(self) -> TierStatistics:
        """Return what was done so far."""
        error = self.writer.error or self._read_error
        return TierStatistics(
            restored_tokens=self._restored_tokens,
            restore_s=self._restore_s,
            restore_s_per_block=self._speed.rates.restore_s_per_block,
            written_bytes=self._written_bytes,
            written_blocks=self._written_blocks,
            misses={str(reason): count for reason, count in self.store.misses.items()},
            evicted_blocks=self.store.evicted_blocks,
            error=None if error is None else str(error),
        )

    def close(self) -> None:
        """Write what is left, note what was saved, and close the store."""
        try:
            self.writer.close()
            if self.writer.error is None:
                self._note_savings()
        finally:
            self.store.close()

    def _known_rate(self) -> float | None:
        try:
            with self.store.reading() as tables:
                return tables.savings(self.identity.digest()).compute_s_per_token
        except StoreError:
            return None  # the first restore tells

    def _note_savings(self) -> None:
        rate, tokens = self._speed.rates.compute_s_per_token, self._restored_tokens
        seconds = max(0.0, (rate or 0.0) * tokens - self._restore_s)
        try:
            with self.store.writing() as tables:
                tables.add_savings(self.identity.digest(), Savings(tokens, seconds, rate))
        except StoreError:
            return  # a count is not worth an error at the end


def _unwritten(cached: CachedBlock) -> list[CachedBlock]:
    """Return a block and those before it that are not on disk, in order: without them it is not found."""
    blocks: list[CachedBlock] = []
    node = cached
    while node.parent is not None and not node.on_disk:
        blocks.append(node)
        node = node.parent
    return blocks[::-1]

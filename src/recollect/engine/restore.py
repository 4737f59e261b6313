"""
Bring blocks from disk into the prefix cache before a prompt is computed.

Decides as a value, then does; where anything fails, the engine is as if nobody had tried.
"""

import logging
import threading
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from recollect.engine.sequence import Sequence
from recollect.errors import RuntimeFailure, StoreBusyError, StoreError
from recollect.kv.blocks import BlockPool
from recollect.kv.disk import DiskStore, Found
from recollect.kv.prefix import PrefixCache
from recollect.kv.record import Buffer, Entry, Identity
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
            after = sequence.kv.last_full
            start = len(sequence.kv.chain) * self._pool.block_size
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
            after = sequence.kv.last_full
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

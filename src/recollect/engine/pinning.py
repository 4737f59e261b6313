"""
Prefixes that are protected from eviction: on disk under a name, or in memory for everybody.

`pin_on_disk` computes what is missing of a prefix, writes it, and pins it in the store. `PublicPrefixes`
pins prefixes in memory in the namespace `PUBLIC`, in which all others find KV too. Both bring a prefix to
memory with `in_memory`. Knows token ids, but not which text they are nor who may pin them.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from recollect.engine.decoder import Decoder, Task
from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence
from recollect.engine.tier import DiskTier
from recollect.errors import (
    MemoryLimitError,
    MisuseError,
    NameTakenError,
    StoreError,
    StoreFullError,
    TooShortError,
)
from recollect.kv.blocks import PUBLIC, CachedBlock, blocks_for
from recollect.kv.disk import stored_bytes
from recollect.kv.record import Pin
from recollect.types import Progress, no_progress

REFRESH_S: Final = 0.1
"""Between two reports of progress."""
_MOST_PINNED: Final = 3 / 4
"""Share of the store's budget: what is pinned is never evicted, and others need the rest."""
_MOST_PUBLIC: Final = 1 / 2
"""Share of the blocks in memory: what is public is never evicted, and others need the rest."""


@dataclass(frozen=True, slots=True)
class Held:
    """A prefix whose KV is held in memory until the block of `in_memory` ends."""

    blocks: list[CachedBlock]
    """All its blocks in order; the last may hold more tokens than the prefix has."""
    computed_tokens: int
    """How many tokens were computed, because they were neither in memory nor on disk."""


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """A prefix that is pinned on disk."""

    pin: Pin
    computed_tokens: int
    """How many tokens were computed, because they were neither in memory nor on disk."""
    seconds: float
    """How long computing and writing took."""
    stored_bytes: int
    """What its blocks take on disk, those that others share included."""


def require_tier(engine: Engine) -> DiskTier:
    """
    Return the tier below memory.

    Raises:
        StoreError: There is none, or it was turned off.
    """
    require_own_kv(engine)
    if not engine.info.reuse.as_bytes:
        raise StoreError(
            "This model's runtime does not give its KV out, so none can be pinned on disk: run the "
            "model on OpenVINO for that."
        )
    if engine.tier is None:
        raise StoreError(
            "There is no cache on disk here, so nothing can be pinned in it: give it room "
            "(--kv-disk, or `kv_disk` of `load`)."
        )
    return engine.tier


def require_own_kv(engine: Engine) -> None:
    """
    Check that KV is here, where it can be pinned, published and kept.

    Raises:
        StoreError: It is with an engine elsewhere.
    """
    if isinstance(engine, Decoder):
        raise StoreError(
            "The KV is with an engine elsewhere, which pins, publishes and keeps nothing for us: leave this "
            "out, or load the model here, without --engine."
        )


def pin(engine: Engine, token_ids: Tokens[int], namespace: str = "") -> list[CachedBlock]:
    """
    Keep what memory has of a prefix until `unpin`; return what that takes, which may be nothing.

    Raises:
        StoreError: The KV is with an engine elsewhere.
    """
    require_own_kv(engine)
    with engine.lock:
        last = engine.memory.match(token_ids, namespace).blocks[-1:]
        for cached in last:
            engine.cache.pin(cached)
        return last


def unpin(engine: Engine, pinned: Tokens[CachedBlock]) -> None:
    """Take back one `pin`."""
    with engine.lock:
        for cached in pinned:
            engine.cache.unpin(cached)


def pin_on_disk(
    engine: Engine,
    token_ids: Tokens[int],
    namespace: str,
    *,
    name: str,
    about: Mapping[str, Any],
    progress: Progress = no_progress,
) -> PinnedPrefix:
    """
    Pin a prefix on disk under a name, until the pin is dropped.

    Args:
        engine: The engine that computes it; it has a tier.
        token_ids: The prefix, shape `(n,)`, n >= 1.
        namespace: Who shares it.
        name: The name of the pin.
        about: JSON values for whoever lists the pins.
        progress: Called while the prefix is computed.

    Raises:
        NameTakenError: Something else is pinned under that name.
        StoreError: There is no tier, no room, or it cannot be written.
        ContextFullError: It does not fit the context.
            In each case nothing is pinned.
    """
    tier = require_tier(engine)
    _require_room(engine, tier, len(token_ids))
    begun = time.perf_counter()
    with in_memory(engine, token_ids, namespace, progress=progress) as held:
        made = _pin(tier, held.blocks, len(token_ids), name, about)
    return PinnedPrefix(
        pin=made,
        computed_tokens=held.computed_tokens,
        seconds=time.perf_counter() - begun,
        stored_bytes=tier.store.size_of(made).stored_bytes,
    )


@contextmanager
def in_memory(
    engine: Engine,
    token_ids: Tokens[int],
    namespace: str,
    *,
    idle: bool = False,
    progress: Progress = no_progress,
) -> Iterator[Held]:
    """
    Hold the KV of a prefix in memory, after restoring or computing what is not there.

    Args:
        engine: The engine that computes it.
        token_ids: The prefix, shape `(n,)`, n >= 1.
        namespace: Who shares it.
        idle: Whether it is computed only while there is nothing else to do.
        progress: Called while the prefix is computed.

    Yields:
        Its blocks; without the last one where that is not full and the runtime reuses only whole blocks.

    Raises:
        TooShortError: That leaves no block.
        ContextFullError: It does not fit the context.
        OutOfBlocksError: It does not fit the memory.
    """
    sequence = engine.new_sequence(namespace)
    held: list[CachedBlock] = []
    try:
        sequence.append(token_ids)
        with engine.lock:  # without the lock it could be evicted between the two calls
            if sequence.is_warm():
                held = pin(engine, token_ids, namespace)
        if not held:
            compute_watched(engine, sequence, idle=idle, progress=progress)
            with engine.lock:
                sequence.park()
                held = pin(engine, token_ids, namespace)
        if not held:
            raise TooShortError(tokens=len(token_ids), least=engine.info.reuse.unit)
        yield Held(held[-1].path(), sequence.fed_tokens)
    finally:
        unpin(engine, held)
        sequence.release()


def _require_room(engine: Engine, tier: DiskTier, tokens: int) -> None:
    """
    Check that a pin leaves room for others; blocks that it would share are counted as if it did not.

    Raises:
        StoreFullError: It does not.
    """
    store, info = tier.store, engine.info
    room = int(store.budget_bytes * _MOST_PINNED)
    pinned = store.pinned_bytes()
    needed = -(-tokens // info.block_size) * stored_bytes(info.bytes_per_block)
    if pinned + needed > room:
        raise StoreFullError(
            f"This takes {needed:,} bytes on disk, and {pinned:,} of {room:,} that may be pinned are "
            "taken: unpin something (`recollect cache unpin`), or give the cache more (--kv-disk)."
        )


def compute_watched(
    engine: Engine, sequence: Sequence, *, idle: bool = False, progress: Progress = no_progress
) -> None:
    """
    Compute a sequence, and report progress ten times a second; an exception of *progress* cancels it.

    Raises:
        OutOfBlocksError: It does not fit the memory.
        MisuseError: The engine is closed, or was meanwhile.
    """
    task = Task(sequence, lambda: False, idle=idle)
    try:
        engine.submit(task)
        while not task.join(REFRESH_S):
            progress("reading", sequence.computed, len(sequence))
        task.wait()
    finally:
        engine.abort([task])
    if task.state == "cancelled":
        raise MisuseError("this engine was closed and cannot be used any more")


def _pin(
    tier: DiskTier, path: list[CachedBlock], tokens: int, name: str, about: Mapping[str, Any]
) -> Pin:
    """Pin a prefix, and write it afterwards, so that nothing of it is evicted or replaced meanwhile."""
    tail, stored = path[-1], sum(len(block.token_ids) for block in path)
    identity = tier.identity.digest().hex()
    made = Pin(name, tail.key, min(tokens, stored), identity, time.time(), dict(about))
    if not tier.store.add_pin(made):
        raise NameTakenError(
            f"Something is pinned on disk as {name!r} already: take another name, or unpin that "
            "(`recollect cache unpin`)."
        )
    try:
        tier.keep(tail)
    except BaseException:
        tier.store.drop_pin(name)
        raise
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A prefix that is public now."""

    tokens: int
    """Tokens of the prefix, with those that the template puts before it."""
    computed_tokens: int
    """How many of them were computed; 0 where it was public before, or came from disk."""
    seconds: float
    """How long that took."""


class PublicPrefixes:
    """
    The public prefixes of one engine, pinned in memory until they are unpublished.

    Safe from any thread. What is pinned in the namespace `PUBLIC` is public to the cache, and nobody but
    this class computes or pins anything there.

    Invariant: the prefixes take at most half of the blocks; a block counts once for each that shares it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._pinned: dict[tuple[int, ...], list[CachedBlock]] = {}

    def publish(
        self, token_ids: Tokens[int], *, idle: bool = False, progress: Progress = no_progress
    ) -> Published:
        """
        Compute a prefix apart from the KV of others, and let every namespace find it.

        Args:
            token_ids: The prefix, shape `(n,)`, n >= 1.
            idle: Whether it is computed only while there is nothing else to do.
            progress: Called with tokens while they are read.

        Raises:
            MemoryLimitError: It does not fit the context, or what may be public.
            TooShortError: It fills no block of KV, and nothing less can be shared.
            MisuseError: The engine is closed, or was meanwhile.
            StoreError: The KV is with an engine elsewhere.
                In each case what was public still is, and nothing else.
        """
        require_own_kv(self._engine)
        ids, begun = tuple(token_ids), time.perf_counter()
        with self._lock:
            self._require_room(ids)
            self._pinned.setdefault(ids, [])  # from now on others count it
        try:
            with in_memory(self._engine, ids, PUBLIC, idle=idle, progress=progress) as held:
                self._pin(ids)
        except BaseException:
            with self._lock:
                if not self._pinned.get(ids, True):
                    del self._pinned[ids]
            raise
        seconds = time.perf_counter() - begun
        return Published(tokens=len(ids), computed_tokens=held.computed_tokens, seconds=seconds)

    def unpublish(self, token_ids: Tokens[int]) -> bool:
        """
        Let nobody else find a prefix; return whether it was public.

        Conversations that begin with it already keep their KV. The KV of the prefix may be evicted.
        """
        with self._lock:
            pinned = self._pinned.pop(tuple(token_ids), [])
            unpin(self._engine, pinned)
        return bool(pinned)

    def _require_room(self, ids: tuple[int, ...]) -> None:
        size, total = self._engine.block_size, self._engine.pool.num_blocks
        taken = sum(blocks_for(len(one), size) for one in self._pinned if one != ids)
        needed, most = blocks_for(len(ids), size), int(total * _MOST_PUBLIC)
        if taken + needed > most:
            raise MemoryLimitError(
                f"This takes {needed:,} KV blocks, and {taken:,} of {most:,} that may be public are "
                "taken: take a prefix back, or give more memory (--kv-memory)."
            )

    def _pin(self, ids: tuple[int, ...]) -> None:
        """Pin a prefix that is in memory, unless it is pinned already."""
        with self._lock:
            if not self._pinned.get(ids):
                self._pinned[ids] = pin(self._engine, ids, PUBLIC)

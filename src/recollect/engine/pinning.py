"""
Keep a prefix on disk under a name: compute what is not there, see that it is written, and pin it.

Knows token ids; not what they are of.

Prefixes that are public: what begins with one finds its KV, in whatever namespace.

Knows token ids; not what they are of, nor who may mark them.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from recollect.engine.engine import Engine
from recollect.engine.scheduler import Task
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
from recollect.kv import pins
from recollect.kv.accounts import Pin
from recollect.kv.blocks import PUBLIC, CachedBlock, blocks_for
from recollect.kv.disk import stored_bytes
from recollect.types import Progress, no_progress

_REFRESH_S: Final = 0.1
_MOST_PINNED: Final = 3 / 4
"""Of the budget: what is pinned is never given up, and the rest has to go round for all others."""


@dataclass(frozen=True, slots=True)
class Held:
    """A prefix whose KV is in memory and stays there for a while."""

    blocks: list[CachedBlock]
    """From the first on; the last may hold more tokens than the prefix has."""
    computed_tokens: int
    """That were neither in memory nor on disk."""


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """A prefix that was brought to disk."""

    pin: Pin
    computed_tokens: int
    """That were neither in memory nor on disk."""
    seconds: float
    """That computing and writing took."""
    stored_bytes: int
    """That all of it takes, also where others share it."""


def require_tier(engine: Engine) -> DiskTier:
    """
    Return the tier below memory.

    Raises:
        StoreError: There is none, or it was turned off.
    """
    if not engine.info.reuse.as_bytes:
        raise StoreError(
            "This model's runtime keeps its KV to itself, so none can be kept on disk: run the "
            "model on OpenVINO for that."
        )
    if engine.tier is None:
        raise StoreError(
            "No KV is kept on disk here, so nothing can be kept there: give it room (--kv-disk, "
            "or `kv_disk` of `load`)."
        )
    return engine.tier


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
    Keep a prefix on disk until its name is dropped.

    Args:
        engine: Whose KV it is; it has a tier.
        token_ids: The prefix, shape `(n,)`, n >= 1.
        namespace: Who shares it.
        name: Of the pin.
        about: JSON values that whoever looks at the pins wants to know.
        progress: Called while it is computed.

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
        pin = _pin(tier, held.blocks, len(token_ids), name, about)
    return PinnedPrefix(
        pin=pin,
        computed_tokens=held.computed_tokens,
        seconds=time.perf_counter() - begun,
        stored_bytes=pins.stored(tier.store, pin).stored_bytes,
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
    Hold the KV of a prefix in memory, after bringing from disk or computing what is not there.

    Args:
        engine: Whose KV it is.
        token_ids: The prefix, shape `(n,)`, n >= 1.
        namespace: Who shares it.
        idle: Whether it is computed only while there is nothing else to do.
        progress: Called while it is computed.

    Yields:
        Its blocks; where KV inside a block cannot be cut, without the one that is not full.

    Raises:
        TooShortError: That leaves no block.
        ContextFullError: It does not fit the context.
        OutOfBlocksError: It does not fit the memory.
    """
    sequence = engine.new_sequence(namespace)
    held: list[CachedBlock] = []
    try:
        sequence.append(token_ids)
        with engine.lock:  # between the two, others could have it evicted
            if sequence.is_warm():
                held = engine.pin(token_ids, namespace)
        if not held:
            compute_watched(engine, sequence, idle=idle, progress=progress)
            with engine.lock:
                sequence.park()
                held = engine.pin(token_ids, namespace)
        if not held:
            raise TooShortError(tokens=len(token_ids), least=engine.info.reuse.unit)
        yield Held(held[-1].path(), sequence.fed_tokens)
    finally:
        engine.unpin(held)
        sequence.release()


def _require_room(engine: Engine, tier: DiskTier, tokens: int) -> None:
    """Refuse what would leave others next to nothing; shared blocks are counted as if they were not."""
    store, info = tier.store, engine.info
    room = int(store.budget_bytes * _MOST_PINNED)
    pinned = pins.pinned_bytes(store)
    needed = -(-tokens // info.block_size) * stored_bytes(info.bytes_per_block)
    if pinned + needed > room:
        raise StoreFullError(
            f"This takes {needed:,} bytes on disk, and {pinned:,} of {room:,} that may be kept from "
            "eviction are taken: let one go (`recollect cache unpin`), or give more room (--kv-disk)."
        )


def compute_watched(
    engine: Engine, sequence: Sequence, *, idle: bool = False, progress: Progress = no_progress
) -> None:
    """
    Compute a sequence, and tell ten times a second how far that is; what *progress* raises ends it.

    Raises:
        OutOfBlocksError: It does not fit the memory.
        MisuseError: The engine is closed, or was meanwhile.
    """
    task = Task(sequence, lambda: False, idle=idle)
    try:
        engine.submit(task)
        while not task.join(_REFRESH_S):
            progress("reading", sequence.computed, len(sequence))
        task.wait()
    finally:
        engine.abort([task])
    if task.state == "cancelled":
        raise MisuseError("this engine was closed and cannot be used any more")


def _pin(
    tier: DiskTier, path: list[CachedBlock], tokens: int, name: str, about: Mapping[str, Any]
) -> Pin:
    """Pin first and write then: so nothing of it is evicted or replaced meanwhile."""
    tail, stored = path[-1], sum(len(block.token_ids) for block in path)
    identity = tier.identity.digest().hex()
    pin = Pin(name, tail.key, min(tokens, stored), identity, time.time(), dict(about))
    if not pins.add(tier.store, pin):
        raise NameTakenError(
            f"Something is kept on disk as {name!r} already: take another name, or drop that one "
            "(`recollect cache unpin`)."
        )
    try:
        tier.keep(tail)
    except BaseException:
        pins.drop(tier.store, name)
        raise
    return pin


_MOST_PUBLIC: Final = 1 / 2
"""Of the blocks in memory: what is public is never given up, and the rest has to do for everybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A prefix that is public now."""

    tokens: int
    """With what the template puts before it."""
    computed_tokens: int
    """Of these, the ones that had to be read; 0: it was public before, or came from disk."""
    seconds: float
    """That it took."""


class PublicPrefixes:
    """
    What is public of one engine, held in memory until it is taken back.

    Safe from any thread. The cache takes for public what is pinned in the namespace `PUBLIC`, and
    nobody but this class computes or pins anything there.

    Invariant: the prefixes take at most half of the blocks, where shared ones count for each.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._pinned: dict[tuple[int, ...], list[CachedBlock]] = {}

    def publish(
        self, token_ids: Tokens[int], *, idle: bool = False, progress: Progress = no_progress
    ) -> Published:
        """
        Compute a prefix apart from everybody's KV, and let everybody find it.

        Args:
            token_ids: The prefix, shape `(n,)`, n >= 1.
            idle: Whether it is computed only while there is nothing else to do.
            progress: Called with tokens while they are read.

        Raises:
            MemoryLimitError: It does not fit the context, or what may be public.
            TooShortError: It fills no block of KV, and nothing less can be shared.
            MisuseError: The engine is closed, or was meanwhile.
                In each case what was public is, and nothing else.
        """
        ids, begun = tuple(token_ids), time.perf_counter()
        with self._lock:
            self._require_room(ids)
            self._pinned.setdefault(ids, [])  # so that others count it
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
        Let nobody find a prefix any more who has not yet; return whether it was public.

        Who began with it keeps what follows warm. Its KV can be evicted from now on.
        """
        with self._lock:
            pinned = self._pinned.pop(tuple(token_ids), [])
            self._engine.unpin(pinned)
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
        """Keep a prefix that is in memory, once."""
        with self._lock:
            if not self._pinned.get(ids):
                self._pinned[ids] = self._engine.pin(ids, PUBLIC)

"""
Keep a prefix on disk under a name: compute what is not there, see that it is written, and pin it.

Knows token ids; not what they are of.
"""

import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence
from recollect.engine.task import Task
from recollect.engine.tier import DiskTier
from recollect.errors import MisuseError, NameTakenError, StoreError, StoreFullError, TooShortError
from recollect.kv import pins
from recollect.kv.accounts import Pin
from recollect.kv.cached_block import CachedBlock
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
    if not engine.info.has_block_bytes:
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
            raise TooShortError(tokens=len(token_ids), least=engine.keep_multiple_of)
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

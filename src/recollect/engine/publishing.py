"""
Prefixes that are public: what begins with one finds its KV, in whatever namespace.

Knows token ids; not what they are of, nor who may mark them.
"""

import threading
import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Final

from recollect.engine.engine import Engine
from recollect.engine.pinning import in_memory
from recollect.errors import MemoryLimitError
from recollect.kv.blocks import blocks_for
from recollect.kv.cached_block import CachedBlock
from recollect.kv.names import PUBLIC
from recollect.types import Progress, no_progress

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

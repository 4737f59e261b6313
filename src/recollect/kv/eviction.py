"""
Which places of blocks can be given up, how many that are, and which goes first.

Knows the tree; not why a block is held. Each change costs a few steps, and finding what goes next the
logarithm of what may go: nothing here walks the tree.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Final

from recollect.kv.cached_block import CachedBlock

_SPARE: Final = 64
"""Of what is in the heap and gone from the tree: below that, cleaning up is not worth it."""


class EvictionOrder:
    """
    The places in a tree of blocks in the order in which they are given up.

    Owned by the prefix cache, which tells it what comes, goes, and is held.

    Invariants:
        1. A place stays where it is held, or a place that follows it stays; each knows how many of
           its children do.
        2. The staying places of each block are counted.
        3. A place that can go at once, because it does not stay and nothing follows it, is in the heap
           once, under a time no later than its last use.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, CachedBlock]] = []
        self._numbers = itertools.count()  # so that no two blocks are compared
        self._staying: Counter[int] = Counter()  # places, by block
        self._places = 0

    @property
    def staying_blocks(self) -> int:
        """Return how many blocks have a place that cannot be given up."""
        return len(self._staying)

    def add(self, cached: CachedBlock) -> None:
        """Take note of a new place, which somebody holds."""
        self._places += 1
        self.hold(cached, held=True)

    def remove(self, cached: CachedBlock) -> None:
        """Take note of a place that is gone from the tree; nothing followed it."""
        self._places -= 1
        self.hold(cached, held=False)
        if cached.parent is not None:
            self._offer(cached.parent)

    def hold(self, cached: CachedBlock, *, held: bool) -> None:
        """
        Take note of whether a place is held for a reason of its own.

        Goes up as far as that changes what stays: not at all where what it follows stays anyway, as
        under a table, which holds all blocks of a prefix.
        """
        before = cached.stays
        cached.held = held
        node = cached
        while node.stays != before:
            self._count(node.block, stays=node.stays)
            self._offer(node)
            parent = node.parent
            if parent is None or parent.parent is None:
                return  # a root has no block
            before = parent.stays
            parent.staying_children += 1 if node.stays else -1
            node = parent

    def pop(self) -> CachedBlock | None:
        """Return the place that goes next, which the caller removes; None where all stay."""
        while self._heap:
            last_used, _, cached = heapq.heappop(self._heap)
            cached.queued = False
            if not _can_go(cached):
                continue
            if cached.last_used == last_used:
                return cached
            self._offer(cached)  # it was used since
        return None

    def check(self, places: Iterable[CachedBlock], held: Collection[CachedBlock]) -> None:
        """
        Derive everything anew, and compare.

        Args:
            places: All of the tree, parents before children.
            held: Those that are held for a reason of their own.

        Raises:
            AssertionError: An invariant does not hold.
        """
        placed = list(places)
        assert len(placed) == self._places, "the places are not counted right"
        staying: set[CachedBlock] = set()
        children: Counter[CachedBlock | None] = Counter()
        for cached in reversed(placed):
            if cached in held or children[cached]:
                staying.add(cached)
                children[cached.parent] += 1
        for cached in placed:
            assert cached.held == (cached in held), "it is not known who holds a block"
            assert cached.staying_children == children[cached], "what follows stays, or does not"
        assert self._staying == Counter(c.block for c in staying), "what stays is counted wrong"
        queued = Counter(cached for _, _, cached in self._heap)
        assert max(queued.values(), default=1) == 1, "a block may go twice"
        times = {cached: last_used for last_used, _, cached in self._heap}
        for cached in placed:
            assert cached.queued == (cached in queued), "what may go is noted wrong"
            if _can_go(cached):
                assert times.get(cached, cached.last_used + 1) <= cached.last_used, "it never goes"

    def _count(self, block: int, *, stays: bool) -> None:
        self._staying[block] += 1 if stays else -1
        if not self._staying[block]:
            del self._staying[block]

    def _offer(self, cached: CachedBlock) -> None:
        """Put a place into the heap, where it can go and is not there yet."""
        if cached.queued or not _can_go(cached):
            return
        if len(self._heap) > 2 * self._places + _SPARE:
            self._clean_up()
        cached.queued = True
        heapq.heappush(self._heap, (cached.last_used, next(self._numbers), cached))

    def _clean_up(self) -> None:
        """Let go of what is gone from the tree, which may be most of the heap."""
        for _, _, cached in self._heap:
            cached.queued = _can_go(cached)
        self._heap = [one for one in self._heap if one[2].queued]
        heapq.heapify(self._heap)


def _can_go(cached: CachedBlock) -> bool:
    parent = cached.parent
    if parent is None or cached.children or cached.stays:
        return False
    return parent.children.get(cached.token_ids) is cached

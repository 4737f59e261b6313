"""
Blocks of KV in memory: which are free, which prefix each belongs to, and which is evicted first.

`BlockPool` counts the references to each block. `CachedBlock` is a node in the tree of prefixes,
`Siblings` keeps the children of one node in order, and `EvictionOrder` knows which nodes can be evicted.
`kv/prefix` builds the prefix cache from these.

Pure bookkeeping: the KV itself belongs to the runtime, and nothing here knows why a block is held.
"""

import heapq
import itertools
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from recollect.errors import OutOfBlocksError
from recollect.kv.record import Key
from recollect.types import common_prefix_length


def blocks_for(tokens: int, block_size: int) -> int:
    """Return how many blocks hold that many token slots."""
    return -(-tokens // block_size)


class BlockPool:
    """
    A fixed number of blocks with reference counts.

    Used under the lock of the engine's `Memory`. `drop` alone may be called without it, because a
    sequence may be garbage-collected on any thread at any moment.

    Invariants:
        1. A block is on the free list exactly when its reference count is 0.
        2. No block is on the free list twice.
        3. A reference count is the number of times that tables, the cache and leases hold the block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: what was used last may still be in the processor's caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._dropped: deque[list[int]] = deque()
        self._changed: set[int] = set()

    @property
    def free_blocks(self) -> int:
        """Return how many blocks are free."""
        self._collect()
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        """Return how many blocks are not free."""
        return self.num_blocks - self.free_blocks

    def allocate(self, count: int) -> list[int]:
        """
        Take *count* free blocks, each with one reference.

        Raises:
            OutOfBlocksError: There are not as many; nothing was changed.
        """
        if count > (free := self.free_blocks):
            raise OutOfBlocksError(needed=count, free=free, total=self.num_blocks)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        self._changed.update(taken)
        return taken

    def retain(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of the blocks, which are in use."""
        references = self._references
        for block in blocks:
            assert references[block] > 0, f"block {block} is free and cannot be shared"
            references[block] += 1
            self._changed.add(block)

    def release(self, blocks: Iterable[int]) -> None:
        """Take a reference from each of the blocks; one without any becomes free."""
        references = self._references
        for block in blocks:
            assert references[block] > 0, f"block {block} is released more often than it is held"
            references[block] -= 1
            self._changed.add(block)
            if references[block] == 0:
                self._free.append(block)

    def drop(self, blocks: list[int]) -> None:
        """Release the blocks as soon as the pool is next asked for some; safe from any thread."""
        self._dropped.append(blocks)

    def take_changed(self) -> set[int]:
        """Return the blocks whose references have changed since this was last called."""
        self._collect()
        changed, self._changed = self._changed, set()
        return changed

    def references(self, block: int) -> int:
        """Return how many times the block is held."""
        return self._references[block]

    def is_shared(self, block: int) -> bool:
        """Return whether the block is held more than once."""
        return self._references[block] > 1

    def _collect(self) -> None:
        while self._dropped:
            self.release(self._dropped.popleft())


PUBLIC: Final = "*"
"""The namespace of public prefixes, which no client has. What is pinned in it, all others find."""


class Siblings(dict[tuple[int, ...], "CachedBlock"]):
    """
    The blocks after the same one, by their tokens.

    The tokens are also kept in order, in which those that have much in common are neighbours. So a
    search costs a few comparisons, however many blocks there are. Only `[]=`, for tokens that are not in
    it, and `del` change it; each moves pointers in a list, 80 kB for 10,000 blocks.

    Invariant: the order is that of the keys, sorted.
    """

    __slots__ = ("_order",)

    def __init__(self) -> None:
        super().__init__()
        self._order: list[tuple[int, ...]] = []

    def __setitem__(self, token_ids: tuple[int, ...], cached: "CachedBlock") -> None:
        insort(self._order, token_ids)
        super().__setitem__(token_ids, cached)

    def __delitem__(self, token_ids: tuple[int, ...]) -> None:
        super().__delitem__(token_ids)
        del self._order[bisect_left(self._order, token_ids)]

    def nearest(self, token_ids: tuple[int, ...]) -> "tuple[CachedBlock | None, int]":
        """Return the block that begins with the most of these tokens, and how many."""
        best, longest = None, 0
        at = bisect_left(self._order, token_ids)
        for there in self._order[max(0, at - 1) : at + 1]:
            length = common_prefix_length(token_ids, there)
            if length > longest:
                best, longest = self[there], length
        return best, longest

    def cover(self, token_ids: tuple[int, ...]) -> bool:
        """Return whether a block's tokens begin with these, and are more."""
        at = bisect_right(self._order, token_ids)
        return any(later[: len(token_ids)] == token_ids for later in self._order[at : at + 1])

    def parts_of(self, token_ids: tuple[int, ...]) -> "list[CachedBlock]":
        """
        Return the blocks whose tokens begin these, or are these, the longest last.

        Whatever lies in order between such a part and these tokens begins with the part too. So a part
        is no longer than what these tokens have in common with the block before them.
        """
        at = bisect_right(self._order, token_ids)
        most = common_prefix_length(self._order[at - 1], token_ids) if at else 0
        return [self[part] for n in range(1, most + 1) if (part := token_ids[:n]) in self]


@dataclass(eq=False, slots=True)
class CachedBlock:
    """
    A node of the tree of prefixes: a block, and the prefix whose last tokens it holds.

    The root of a namespace is a node too, without tokens and without a block.
    """

    key: Key
    """The name of the prefix."""
    parent: "CachedBlock | None"
    token_ids: tuple[int, ...]
    block: int
    namespace: str = ""
    last_used: int = 0
    """A count of uses, not a time."""
    pins: int = 0
    """How often this node, or one below it, is pinned."""
    on_disk: bool = False
    """Whether the tier below has it, as far as is known."""
    children: Siblings = field(default_factory=Siblings)
    held: bool = False
    """Whether it is pinned or a table holds its block, as far as `EvictionOrder` was told."""
    staying_children: int = 0
    """How many of its children stay."""

    @property
    def stays(self) -> bool:
        """Return whether it cannot be evicted: it is held, or something below it stays."""
        return self.held or self.staying_children > 0

    @property
    def in_tree(self) -> bool:
        """Return whether it was not removed from its parent; a root is in no tree."""
        return self.parent is not None and self.parent.children.get(self.token_ids) is self

    @property
    def can_go(self) -> bool:
        """Return whether it can be evicted now: a leaf of the tree that nothing needs."""
        return not self.children and not self.stays and self.in_tree

    def path(self) -> "list[CachedBlock]":
        """Return the blocks from the first of the prefix to this one, without the root."""
        blocks: list[CachedBlock] = []
        node = self
        while node.parent is not None:
            blocks.append(node)
            node = node.parent
        return blocks[::-1]


_FEW: Final = 64
"""The heap may hold this many stale entries: below that it is not worth cleaning."""


class EvictionOrder:
    """
    The nodes of a tree in the order in which they are evicted: leaves first, the oldest of them first.

    Owned by the prefix cache, which tells it what is inserted, removed and held. Nothing here walks the
    tree: a change costs a few steps, and finding the next node to evict the logarithm of their number.

    Invariants:
        1. Each node knows how many of its children stay.
        2. The staying nodes of each block are counted.
        3. A leaf that does not stay is in the heap, under a time no later than its last use. What else
           is in the heap is skipped when it comes up.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, CachedBlock]] = []
        self._numbers = itertools.count()  # so that no two nodes are compared
        self._most_entries = _FEW
        self.staying: Final = Counter[int]()
        """By block its nodes that cannot be evicted, without those blocks that have none."""

    def hold(self, cached: CachedBlock, *, held: bool) -> None:
        """
        Take note of whether a node is held.

        Walks up the tree only while that changes whether the parent stays. Where a block table holds
        the node, it holds the parent too, so the walk ends at once.
        """
        before = cached.stays
        cached.held = held
        node = cached
        while node.stays != before:
            self.staying[node.block] += 1 if node.stays else -1
            if not self.staying[node.block]:
                del self.staying[node.block]
            self.offer(node)
            parent = node.parent
            if parent is None or parent.parent is None:
                return  # a root has no block
            before = parent.stays
            parent.staying_children += 1 if node.stays else -1
            node = parent

    def offer(self, cached: CachedBlock) -> None:
        """Take note that a node may be one that can be evicted now; it may have been offered before."""
        if not cached.can_go:
            return
        if len(self._heap) > self._most_entries:
            waiting = {one for _, _, one in self._heap if one.can_go}
            self._heap = [(one.last_used, next(self._numbers), one) for one in waiting]
            heapq.heapify(self._heap)
            self._most_entries = 2 * len(waiting) + _FEW
        heapq.heappush(self._heap, (cached.last_used, next(self._numbers), cached))

    def pop(self) -> CachedBlock | None:
        """Return the node to evict next, which the caller removes; None where all stay."""
        while self._heap:
            last_used, _, cached = heapq.heappop(self._heap)
            if cached.can_go:
                if cached.last_used == last_used:
                    return cached
                self.offer(cached)  # it was used since
        return None

"""
Which blocks hold the KV of which prefix, across all sequences: what one has read is free for all.

Pure bookkeeping over the pool: no runtime, no disk. Time is a counter of uses.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from recollect.kv.blocks import BlockPool
from recollect.types import common_prefix_length

Key = bytes


def chained_key(parent: Key, token_ids: Sequence[int]) -> Key:
    """
    Return the name of a prefix: a hash of the prefix before its last block, and that block's tokens.

    The first parent is the name of a namespace, so nothing is shared across namespaces.
    """
    return hashlib.blake2b(parent + _token_bytes(token_ids), digest_size=32).digest()


def chained_keys(root: Key, token_ids: Sequence[int], block_size: int) -> list[Key]:
    """Return the names of a prefix's blocks in order; the last may hold a part of one."""
    keys = [root]
    for start in range(0, len(token_ids), block_size):
        keys.append(chained_key(keys[-1], token_ids[start : start + block_size]))
    return keys[1:]


def namespace_key(fingerprint: str, namespace: str = "", secret: bytes = b"") -> Key:
    """
    Return the first parent of a chain: what KV depends on besides tokens, and who may see it.

    Args:
        fingerprint: Of model, runtime and precision.
        namespace: Who shares.
        secret: At most 64 bytes; with it, the names of prefixes tell nobody else which text they are of.
    """
    content = f"{len(fingerprint)}:{fingerprint}:{namespace}".encode()
    return hashlib.blake2b(content, digest_size=32, key=secret).digest()


@dataclass(eq=False, slots=True)
class CachedBlock:
    """
    A block, and the prefix whose last tokens it holds.

    The root of a namespace is one too, without tokens and without a block.
    """

    key: Key
    parent: "CachedBlock | None"
    token_ids: tuple[int, ...]
    block: int
    last_used: int = 0
    pins: int = 0
    on_disk: bool = False
    """Whether the tier below has it, as far as is known."""
    children: dict[tuple[int, ...], "CachedBlock"] = field(default_factory=dict)

    def path(self) -> list["CachedBlock"]:
        """Return the blocks from the first of the prefix to this one, without the root."""
        return [block for block in _with_prefix(self) if block.parent is not None][::-1]


class HasTokens(Protocol):
    """A block in memory or on disk."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return what it holds."""


BlockT = TypeVar("BlockT", bound=HasTokens)


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix beyond a place: whole blocks, then a part of one more."""

    full: list[CachedBlock]
    partial: CachedBlock | None = None
    partial_tokens: int = 0
    """Leading tokens of `partial` that match; its block has to be copied before it is written."""


class PrefixCache:
    """
    A tree of blocks by token ids, one root for each namespace.

    Owned by the engine, under its lock. The cache holds one reference to each of its blocks, so a
    block that only the cache holds can be evicted.

    Invariants:
        1. A block is in the tree at most once, and the pool counts the cache's reference to it.
        2. A block with children is full; its children are under their own tokens and know it.
        3. A key is the chained hash of the parent's key and the block's tokens.
        4. No partial block's tokens begin a sibling's, unless it is pinned.
        5. Pins of a block >= pins of each child.
    """

    def __init__(
        self,
        pool: BlockPool,
        fingerprint: str,
        *,
        secret: bytes = b"",
        on_new: Callable[[CachedBlock], None] = lambda _: None,
    ) -> None:
        """
        Begin without any prefixes.

        Args:
            pool: Where the blocks are.
            fingerprint: As `namespace_key` takes it.
            secret: Likewise.
            on_new: Called with each block that comes into the tree; does not use the cache.
        """
        self._pool = pool
        self._fingerprint = fingerprint
        self._secret = secret
        self._on_new = on_new
        self._roots: dict[str, CachedBlock] = {}
        self._uses = 0
        self.evicted_blocks = 0
        """Blocks given up for room so far."""

    def root(self, namespace: str = "") -> CachedBlock:
        """Return the root of a namespace."""
        if namespace not in self._roots:
            key = namespace_key(self._fingerprint, namespace, self._secret)
            self._roots[namespace] = CachedBlock(key, None, (), -1)
        return self._roots[namespace]

    def __len__(self) -> int:
        """Return how many blocks the cache holds."""
        return sum(1 for _ in self.blocks())

    def blocks(self) -> Iterator[CachedBlock]:
        """Iterate over all blocks in the cache, parents before children."""
        pending = list(self._roots.values())
        while pending:
            cached = pending.pop()
            if cached.parent is not None:
                yield cached
            pending.extend(cached.children.values())

    @property
    def evictable_blocks(self) -> int:
        """Return how many blocks nobody but the cache holds and nobody pinned."""
        return sum(self._is_evictable(cached) for cached in self.blocks())

    def match(self, after: CachedBlock, token_ids: Sequence[int], *, inside_block: bool) -> Match:
        """
        Return the longest prefix of *token_ids* that is known to follow *after*.

        Counts as a use of what is found.

        Args:
            after: A root or a full block.
            token_ids: What follows it, shape `(n,)`.
            inside_block: Whether a part of a block may be reused.
        """
        self._uses += 1
        size = self._pool.block_size
        full: list[CachedBlock] = []
        node, start = after, 0
        while start + size <= len(token_ids):
            child = node.children.get(tuple(token_ids[start : start + size]))
            if child is None:
                break
            full.append(child)
            node, start = child, start + size
        node.last_used = self._uses
        if not inside_block:
            return Match(full)
        partial, length = longest_common(node.children.values(), token_ids[start : start + size])
        if partial is None:
            return Match(full)
        partial.last_used = self._uses
        return Match(full, partial, length)

    def insert(
        self, after: CachedBlock, token_ids: Sequence[int], block: int, *, on_disk: bool = False
    ) -> CachedBlock:
        """
        Make a computed block findable; return what is in the tree for it.

        That is another block where these tokens are known already; the caller may then use that one
        and give up its own. The cache takes a reference of its own.

        Args:
            after: The block before, which is full, or a root.
            token_ids: What the block holds, shape `(n,)`, 1 <= n <= block size.
            block: Its number; the caller holds it.
            on_disk: Whether it came from the tier below.
        """
        self._uses += 1
        tokens = tuple(token_ids)
        known = after.children.get(tokens) or self._covering(after, tokens)
        if known is not None:
            known.last_used = self._uses
            return known
        key = chained_key(after.key, tokens)
        cached = CachedBlock(key, after, tokens, block, self._uses, on_disk=on_disk)
        for shorter in self._covered_by(after, tokens):
            self._remove(shorter)
        after.children[tokens] = cached
        self._pool.retain([block])
        self._on_new(cached)
        return cached

    def evict(self, count: int) -> int:
        """
        Give up blocks until *count* are free, or none can be given up; return how many were.

        The least recently used first, and always tails before what they follow, so that what
        survives is the longest prefix.
        """
        leaves = [
            (cached.last_used, number, cached)
            for number, cached in enumerate(self.blocks())
            if not cached.children and self._is_evictable(cached)
        ]
        heapq.heapify(leaves)
        evicted, number = 0, len(self)
        while leaves and evicted < count:
            last_used, _, cached = heapq.heappop(leaves)
            parent = cached.parent
            self._remove(cached)
            evicted += 1
            assert parent is not None, "a root is never evicted"
            # A prefix was in use when its tail was.
            parent.last_used = max(parent.last_used, last_used)
            if parent.parent is not None and not parent.children and self._is_evictable(parent):
                number += 1
                heapq.heappush(leaves, (parent.last_used, number, parent))
        self.evicted_blocks += evicted
        return evicted

    def forget(self, after: CachedBlock, block: int) -> bool:
        """
        Give up a block that one table holds besides, unless it is pinned or others follow it.

        Returns:
            Whether it was given up; that table may then write it without a copy.
        """
        for cached in after.children.values():
            if cached.block == block:
                spare = not cached.children and not cached.pins
                if spare and self._pool.references(block) == 2:
                    self._remove(cached)
                    return True
        return False

    def pin(self, cached: CachedBlock) -> None:
        """Keep a block and the prefix before it until `unpin`."""
        for block in _with_prefix(cached):
            block.pins += 1

    def unpin(self, cached: CachedBlock) -> None:
        """Take back one `pin`."""
        for block in _with_prefix(cached):
            assert block.pins > 0, "unpinned more often than pinned"
            block.pins -= 1
        parent = cached.parent
        if parent is not None and not cached.pins and self._is_covered(cached, parent):
            self._remove(cached)  # a longer one came meanwhile

    def holds(self, cached: CachedBlock) -> bool:
        """Return whether a block is still in the tree."""
        parent = cached.parent
        return parent is not None and parent.children.get(cached.token_ids) is cached

    def held_blocks(self) -> list[int]:
        """Return the blocks that the cache holds a reference to, for `BlockPool.check`."""
        return [cached.block for cached in self.blocks()]

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        held = self.held_blocks()
        assert len(held) == len(set(held)), "a block is in the tree twice"
        for cached in self.blocks():
            parent = cached.parent
            assert parent is not None
            assert self._pool.references(cached.block) >= 1, "a free block is in the tree"
            assert parent.children.get(cached.token_ids) is cached, "a block is under other tokens"
            assert cached.key == chained_key(parent.key, cached.token_ids), "a key is wrong"
            full = len(cached.token_ids) == self._pool.block_size
            assert full or not cached.children, "something follows a block that is not full"
            assert cached.pins or not self._is_covered(cached, parent), "a part is there twice"
            assert all(child.pins <= cached.pins for child in cached.children.values()), "pins"

    def _is_evictable(self, cached: CachedBlock) -> bool:
        return cached.pins == 0 and self._pool.references(cached.block) == 1

    def _is_covered(self, cached: CachedBlock, parent: CachedBlock) -> bool:
        """Return whether a sibling begins with all of the block's tokens."""
        length = len(cached.token_ids)
        return any(
            other is not cached and other.token_ids[:length] == cached.token_ids
            for other in parent.children.values()
        )

    def _covering(self, parent: CachedBlock, tokens: tuple[int, ...]) -> CachedBlock | None:
        """Return a child that begins with these tokens."""
        if len(tokens) == self._pool.block_size:
            return parent.children.get(tokens)
        found = (c for c in parent.children.values() if c.token_ids[: len(tokens)] == tokens)
        return next(found, None)

    def _covered_by(self, parent: CachedBlock, tokens: tuple[int, ...]) -> list[CachedBlock]:
        """Return the children whose tokens begin these, and which can be given up for them."""
        return [
            child
            for child in parent.children.values()
            if not child.pins and child.token_ids == tokens[: len(child.token_ids)]
        ]

    def _remove(self, cached: CachedBlock) -> None:
        assert cached.parent is not None, "a root is never removed"
        assert not cached.children, "a block that others follow is never removed"
        del cached.parent.children[cached.token_ids]
        self._pool.release([cached.block])


def _with_prefix(cached: CachedBlock) -> Iterator[CachedBlock]:
    node: CachedBlock | None = cached
    while node is not None:
        yield node
        node = node.parent


def longest_common(
    children: Iterable[BlockT], token_ids: Sequence[int]
) -> tuple[BlockT | None, int]:
    """Return the child that begins with the most of these tokens, and how many."""
    best: BlockT | None = None
    longest = 0
    for child in children:
        length = common_prefix_length(token_ids, child.token_ids)
        if length > longest:
            best, longest = child, length
    return best, longest


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, np.int64).tobytes()

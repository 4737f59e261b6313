"""
Which blocks hold the KV of which prefix: what one sequence has computed, all others of its namespace find.

`PrefixCache` is a tree of blocks by token ids. It is pure bookkeeping over the block pool, and knows
neither sequences nor runtime nor disk. Time is a count of uses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from recollect.kv.accounts import Accounts
from recollect.kv.blocks import PUBLIC, BlockPool, CachedBlock, EvictionOrder, Siblings
from recollect.kv.record import Names
from recollect.types import Parts


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of some tokens."""

    blocks: list[CachedBlock]
    """Whole blocks in order; of the last one maybe only a part."""
    tokens: int
    """How many tokens were found. Where they end inside the last block, that has to be copied before
    it is written."""


class PrefixCache:
    """
    A tree of blocks by token ids, with one root for each namespace.

    The engine owns it, under the lock of its `Memory`. The cache holds one reference for each node, so
    a block that only the cache holds can be evicted.

    A prefix is public where it is pinned below the root of `PUBLIC`. Whoever looks a text up from the
    root of another namespace is given nodes below that root for the public beginning of the text, over
    the same blocks. From there on the text continues in its own namespace, so nothing but what was
    computed as public is ever below the public root, and what was given stays when the pin is gone.

    Invariants:
        1. A block has one node at most below a root. Its nodes below several are of the same prefix.
           The pool counts a reference for each.
        2. A block with children is full; its children are under their own tokens and know it.
        3. A key is the chained hash of the parent's key and the block's tokens.
        4. No partial block's tokens begin a sibling's, unless it is pinned, or tails are reused whole.
        5. Pins of a block >= pins of each child.
        6. All of `EvictionOrder`. A node is held while it is pinned, or something besides the cache has
           a reference to its block.
        7. All of `Accounts`.
    """

    def __init__(self, pool: BlockPool, names: Names, parts: Parts = "cut") -> None:
        """
        Begin without any prefixes.

        Args:
            pool: Where the blocks are.
            names: How prefixes are named.
            parts: What is found of a block besides all of a full one. Where a block that is not full is
                found by all of its tokens only, no longer block stands for it.
        """
        self.names: Final = names
        self.parts: Final = parts
        self.accounts: Final = Accounts(names, pool.block_size)
        self.evicted_blocks = 0
        """Blocks evicted so far."""
        self._pool = pool
        self.on_new: Callable[[CachedBlock], None] = lambda _: None
        """Called with each block that is inserted, so that it is written to disk; must not use the cache."""
        self._roots: dict[str, CachedBlock] = {}
        self._nodes: dict[int, list[CachedBlock]] = {}  # of each block in the tree
        self._pinned: dict[CachedBlock, Siblings] = {}  # of each node's children, those with pins
        self._order = EvictionOrder()
        self._uses = 0

    def root(self, namespace: str = "") -> CachedBlock:
        """Return the root of a namespace."""
        if namespace not in self._roots:
            key = self.names.root(namespace)
            self._roots[namespace] = CachedBlock(key, None, (), -1, namespace)
        return self._roots[namespace]

    def __len__(self) -> int:
        """Return how many blocks the cache holds, each counted once."""
        return len(self._nodes)

    def blocks(self, root: CachedBlock | None = None) -> Iterator[CachedBlock]:
        """Iterate over the nodes below a root, or below all of them, parents before children."""
        pending = list(self._roots.values()) if root is None else [root]
        while pending:
            cached = pending.pop()
            if cached.parent is not None:
                yield cached
            pending.extend(cached.children.values())

    @property
    def evictable_blocks(self) -> int:
        """Return how many blocks `evict` can free."""
        self.settle()
        return len(self._nodes) - len(self._order.staying)

    def match(self, after: CachedBlock, token_ids: Sequence[int]) -> Match:
        """
        Return the longest prefix of *token_ids* that is known to follow *after*.

        Counts as a use of what is found. From a root on, the public beginning of the tokens is first
        given nodes there; further on nothing is looked up twice.

        Args:
            after: A root or a full block.
            token_ids: What follows it, shape `(n,)`.
        """
        if after.parent is None:
            self._adopt_public(after, token_ids)
        self._uses += 1
        size = self._pool.block_size
        node, blocks, tokens = after, list[CachedBlock](), 0
        while tokens + size <= len(token_ids):
            child = node.children.get(tuple(token_ids[tokens : tokens + size]))
            if child is None:
                break
            blocks.append(child)
            node, tokens = child, tokens + size
        node.last_used = self._uses
        part, length = self._part(node.children, tuple(token_ids[tokens : tokens + size]))
        if part is not None and self.parts != "none":
            part.last_used = self._uses
            blocks.append(part)
            tokens += length
        return Match(blocks, tokens)

    def _part(self, found: Siblings, tokens: tuple[int, ...]) -> tuple[CachedBlock | None, int]:
        """
        Return the one of some blocks that goes on with the most of these tokens, and how many.

        That may be a part of a block where blocks can be cut, and is else all of one, full or not.
        """
        if self.parts == "cut":
            return found.nearest(tokens)
        whole = found.parts_of(tokens)[-1:]
        return (whole[0], len(whole[0].token_ids)) if whole else (None, 0)

    def insert(
        self, after: CachedBlock, token_ids: Sequence[int], block: int, *, on_disk: bool = False
    ) -> CachedBlock:
        """
        Make a computed block findable; return what is in the tree for it.

        That is another block where these tokens are known already; the caller may then use that one
        and release its own. The cache takes a reference of its own.

        Args:
            after: The block before, which is full, or a root.
            token_ids: What the block holds, shape `(n,)`, 1 <= n <= block size.
            block: Its number; the caller holds it.
            on_disk: Whether it came from the tier below.
        """
        self._uses += 1
        tokens = tuple(token_ids)
        known, length = self._part(after.children, tokens)
        if known is not None and length == len(tokens):
            known.last_used = self._uses
            return known
        cached = self._add(after, tokens, block)
        cached.on_disk = on_disk
        self.on_new(cached)
        return cached

    def evict(self, count: int) -> int:
        """
        Evict blocks until *count* are free, or none can be; return how many were freed.

        The least recently used first, and always tails before what they follow, so that what survives
        is the longest prefix. A block is free when its last node is gone.
        """
        self.settle()
        freed = 0
        while freed < count and (cached := self._order.pop()) is not None:
            self._remove(cached)
            self.accounts.evicted(cached)
            freed += cached.block not in self._nodes
        self.evicted_blocks += freed
        return freed

    def forget(self, block: int) -> bool:
        """
        Remove a block that one table holds besides, unless it is pinned or others follow it.

        Returns:
            Whether it was removed; that table may then write it without a copy.
        """
        nodes = self._nodes.get(block, ())
        if len(nodes) != 1 or self._pool.references(block) != 2:
            return False
        if nodes[0].children or nodes[0].pins:
            return False
        self._remove(nodes[0])
        return True

    def pin(self, cached: CachedBlock) -> None:
        """Keep a block and the prefix before it until `unpin`; below the public root, publish it."""
        for block in cached.path():
            block.pins += 1
            if block.pins == 1 and block.parent is not None:
                self._pinned.setdefault(block.parent, Siblings())[block.token_ids] = block
                self._note_held(block)

    def unpin(self, cached: CachedBlock) -> None:
        """Take back one `pin`."""
        for block in cached.path():
            assert block.pins > 0, "unpinned more often than pinned"
            block.pins -= 1
            if not block.pins and block.parent is not None:
                del self._pinned[block.parent][block.token_ids]
                if not self._pinned[block.parent]:
                    del self._pinned[block.parent]
                self._note_held(block)
        if cached.pins or cached.parent is None or self.parts == "whole":
            return
        if cached.parent.children.cover(cached.token_ids):
            self._remove(cached)  # a longer one came meanwhile

    def _adopt_public(self, root: CachedBlock, token_ids: Sequence[int]) -> None:
        """Give the public beginning of some tokens nodes below *root*, where it knows less of them."""
        size = self._pool.block_size
        node, public = root, self.root(PUBLIC)
        for start in range(0, len(token_ids), size):
            if (marked := self._pinned.get(public)) is None:
                return
            tokens = tuple(token_ids[start : start + size])
            theirs, length = self._part(marked, tokens)
            if theirs is None:
                return
            own, known = self._part(node.children, tokens)
            if own is None or known < length:
                own = self._add(node, theirs.token_ids, theirs.block)
            if length < size:
                return
            node, public = own, theirs

    def settle(self) -> None:
        """Tell the eviction order which blocks tables took or released since this was last called."""
        for block in self._pool.take_changed():
            for cached in self._nodes.get(block, ()):
                self._note_held(cached)

    def _note_held(self, cached: CachedBlock) -> None:
        """Tell the eviction order whether a node is pinned, or anything but the cache holds its block."""
        in_use = self._pool.references(cached.block) > len(self._nodes[cached.block])
        self._order.hold(cached, held=in_use or cached.pins > 0)

    def _add(self, after: CachedBlock, tokens: tuple[int, ...], block: int) -> CachedBlock:
        """Put a node for a block into the tree, with a reference; it replaces parts of itself."""
        key = self.names.after(after.key, tokens)
        cached = CachedBlock(key, after, tokens, block, after.namespace, self._uses)
        self.accounts.inserted(cached)
        for shorter in after.children.parts_of(tokens):
            if not shorter.pins and self.parts != "whole":
                self._remove(shorter)
        after.children[tokens] = cached
        self._pool.retain([block])
        self._nodes.setdefault(block, []).append(cached)
        self._order.hold(cached, held=True)  # whoever inserts it does
        return cached

    def _remove(self, cached: CachedBlock) -> None:
        """Take a node out of the tree. What it followed was in use when it was."""
        parent = cached.parent
        assert parent is not None, "a root is never removed"
        assert not cached.children, "a block that others follow is never removed"
        del parent.children[cached.token_ids]
        parent.last_used = max(parent.last_used, cached.last_used)
        self.accounts.removed(cached)
        self._pool.release([cached.block])
        self._nodes[cached.block].remove(cached)
        if not self._nodes[cached.block]:
            del self._nodes[cached.block]
        self._order.hold(cached, held=False)
        self._order.offer(parent)

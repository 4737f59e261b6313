"""
Which blocks hold the KV of which prefix, across all sequences: what one has read is free for all.

Pure bookkeeping over the pool: no runtime, no disk. Time is a counter of uses.

The KV of one sequence: a block table whose blocks are found and left behind in the prefix cache.

Does not keep the token history; whoever does passes it in. No runtime.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from recollect.kv.blocks import (
    PUBLIC,
    BlockPool,
    BlockTable,
    CachedBlock,
    EvictionOrder,
    Siblings,
    WritePlan,
    blocks_for,
    chained_key,
    namespace_key,
)


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

    Owned by the engine, under its lock. The cache holds one reference for each place that a block
    has in the tree, so a block that only the cache holds can be evicted.

    What is pinned under the root of `PUBLIC` is found from every other root. A block that is found
    there gets a second place, under the root that it was looked for from. What follows it hangs
    below that place, so nothing but what was computed as public is ever below the public root.

    Invariants:
        1. A block has one place at most below a root. Its places below several are of the same
           prefix. The pool counts a reference for each.
        2. A block with children is full; its children are under their own tokens and know it.
        3. A key is the chained hash of the parent's key and the block's tokens.
        4. No partial block's tokens begin a sibling's, unless it is pinned.
        5. Pins of a block >= pins of each child.
        6. All of `EvictionOrder`, over what is pinned, and what others hold as of `BlockPool.take_changed`.
    """

    def __init__(
        self,
        pool: BlockPool,
        fingerprint: str,
        *,
        secret: bytes = b"",
        chain_secret: bytes = b"",
        on_new: Callable[[CachedBlock], None] = lambda _: None,
    ) -> None:
        """
        Begin without any prefixes.

        Args:
            pool: Where the blocks are.
            fingerprint: As `namespace_key` takes it.
            secret: Likewise.
            chain_secret: As `chained_key` takes it.
            on_new: Called with each block that is inserted; does not use the cache.
        """
        self._pool = pool
        self._fingerprint = fingerprint
        self._secret = secret
        self._chain_secret = chain_secret
        self._on_new = on_new
        self._roots: dict[str, CachedBlock] = {}
        self._public = self.root(PUBLIC)
        self._places: dict[int, list[CachedBlock]] = {}  # in the tree, of each block that is there
        self._pinned: dict[CachedBlock, Siblings] = {}  # of each block's children, those with pins
        self._public_depths: Counter[int] = Counter()  # blocks in each pin below the public root
        self._order = EvictionOrder()
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
        """Return how many blocks the cache holds, each counted once."""
        return len(self._places)

    def blocks(self) -> Iterator[CachedBlock]:
        """Iterate over all places of blocks in the cache, parents before children."""
        return _below(self._roots.values())

    @property
    def evictable_blocks(self) -> int:
        """Return how many blocks `evict` can free: each with all its places, and all that follows."""
        self._settle()
        return len(self._places) - self._order.staying_blocks

    def match(self, after: CachedBlock, token_ids: Sequence[int], *, inside_block: bool) -> Match:
        """
        Return the longest prefix of *token_ids* that is known to follow *after*.

        Counts as a use of what is found, and gives what is public a place of its own here.

        Args:
            after: A root or a full block.
            token_ids: What follows it, shape `(n,)`.
            inside_block: Whether a part of a block may be reused.
        """
        self._uses += 1
        size = self._pool.block_size
        full: list[CachedBlock] = []
        node, start, public = after, 0, self._public_twin(after)
        while start + size <= len(token_ids):
            tokens = tuple(token_ids[start : start + size])
            marked = _pinned_child(public, tokens)
            child = node.children.get(tokens)
            if child is None and marked is not None:
                child = self._place(node, tokens, marked.block)
            if child is None:
                break
            full.append(child)
            node, start, public = child, start + size, marked
        node.last_used = self._uses
        if not inside_block:
            return Match(full)
        partial, length = self._partial(node, public, token_ids[start : start + size])
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
        known = self._covering(after, tokens)
        if known is not None:
            known.last_used = self._uses
            return known
        cached = self._place(after, tokens, block)
        cached.on_disk = on_disk
        self._on_new(cached)
        return cached

    def evict(self, count: int) -> int:
        """
        Give up blocks until *count* are free, or none can be given up; return how many were.

        The least recently used first, and always tails before what they follow, so that what
        survives is the longest prefix. A block is free when its last place is given up.
        """
        self._settle()
        evicted = 0
        while evicted < count and (cached := self._order.pop()) is not None:
            parent = cached.parent
            assert parent is not None, "a root is never evicted"
            # A prefix was in use when its tail was.
            parent.last_used = max(parent.last_used, cached.last_used)
            self._remove(cached)
            evicted += cached.block not in self._places
        self.evicted_blocks += evicted
        return evicted

    def forget(self, after: CachedBlock, block: int) -> bool:
        """
        Give up a block that one table holds besides, unless it is pinned or others follow it.

        Returns:
            Whether it was given up; that table may then write it without a copy.
        """
        for cached in self._places.get(block, ()):
            if cached.parent is after:
                spare = not cached.children and not cached.pins
                if spare and self._pool.references(block) == 2:
                    self._remove(cached)
                    return True
        return False

    def pin(self, cached: CachedBlock) -> None:
        """Keep a block and the prefix before it until `unpin`."""
        self._count_public(cached, 1)
        for block in _with_prefix(cached):
            block.pins += 1
            if block.pins == 1 and block.parent is not None:
                self._pinned.setdefault(block.parent, Siblings())[block.token_ids] = block
                self._note_held(block)

    def unpin(self, cached: CachedBlock) -> None:
        """Take back one `pin`."""
        self._count_public(cached, -1)
        for block in _with_prefix(cached):
            assert block.pins > 0, "unpinned more often than pinned"
            block.pins -= 1
            if not block.pins and block.parent is not None:
                del self._pinned[block.parent][block.token_ids]
                if not self._pinned[block.parent]:
                    del self._pinned[block.parent]
                self._note_held(block)
        parent = cached.parent
        if parent is not None and not cached.pins and self._is_covered(cached, parent):
            self._remove(cached)  # a longer one came meanwhile

    def holds(self, cached: CachedBlock) -> bool:
        """Return whether a block is still in the tree."""
        parent = cached.parent
        return parent is not None and parent.children.get(cached.token_ids) is cached

    def held_blocks(self) -> list[int]:
        """Return the blocks that the cache holds, as often as it does, for `BlockPool.check`."""
        return [cached.block for cached in self.blocks()]

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        for root in self._roots.values():
            held = [cached.block for cached in _below([root])]
            assert len(held) == len(set(held)), "a block is below a root twice"
        placed = Counter(self.blocks())
        assert placed == Counter(c for all_of in self._places.values() for c in all_of), (
            "the places are not counted right"
        )
        prefixes: dict[int, list[tuple[int, ...]]] = {}
        for cached in self.blocks():
            parent = cached.parent
            assert parent is not None
            if len(self._places[cached.block]) > 1:
                prefix = [block.token_ids for block in cached.path()]
                same = prefixes.setdefault(cached.block, prefix) == prefix
                assert same, "a block stands for two prefixes"
            assert self._pool.references(cached.block) >= 1, "a free block is in the tree"
            assert parent.children.get(cached.token_ids) is cached, "a block is under other tokens"
            assert cached.key == chained_key(parent.key, cached.token_ids, self._chain_secret), (
                "a key is wrong"
            )
            full = len(cached.token_ids) == self._pool.block_size
            assert full or not cached.children, "something follows a block that is not full"
            assert cached.pins or not self._is_covered(cached, parent), "a part is there twice"
            assert all(child.pins <= cached.pins for child in cached.children.values()), "pins"
            pinned = self._pinned.get(parent, Siblings()).get(cached.token_ids)
            assert (pinned is cached) == (cached.pins > 0), "what is pinned is noted wrong"
        for node in (*self._roots.values(), *placed):
            node.children.check()
        self._settle()
        staying = {cached for cached in placed if not self._is_evictable(cached)}
        self._order.check(self.blocks(), staying)

    def _is_evictable(self, cached: CachedBlock) -> bool:
        """Return whether nobody but the cache holds the block, and nobody pinned this place."""
        places = len(self._places[cached.block])
        return cached.pins == 0 and self._pool.references(cached.block) == places

    def _settle(self) -> None:
        """Take note of who holds what since this was last called: tables do that behind our back."""
        for block in self._pool.take_changed():
            for cached in self._places.get(block, ()):
                self._note_held(cached)

    def _note_held(self, cached: CachedBlock) -> None:
        self._order.hold(cached, held=not self._is_evictable(cached))

    def _place(self, after: CachedBlock, tokens: tuple[int, ...], block: int) -> CachedBlock:
        """Give a block a place in the tree, and a reference for it."""
        key = chained_key(after.key, tokens, self._chain_secret)
        cached = CachedBlock(key, after, tokens, block, self._uses)
        for shorter in after.children.parts_of(tokens):
            if not shorter.pins:
                self._remove(shorter)
        after.children[tokens] = cached
        self._pool.retain([block])
        self._places.setdefault(block, []).append(cached)
        self._order.add(cached)
        return cached

    def _count_public(self, cached: CachedBlock, change: int) -> None:
        *blocks, root = _with_prefix(cached)
        if root is self._public:
            self._public_depths[len(blocks)] += change
            if not self._public_depths[len(blocks)]:
                del self._public_depths[len(blocks)]

    def _public_twin(self, cached: CachedBlock) -> CachedBlock | None:
        """Return the public root's block of the same prefix; None where not all of it is pinned."""
        deepest = max(self._public_depths, default=0)
        path: list[CachedBlock] = []
        node = cached
        while node.parent is not None:
            if len(path) == deepest:
                return None  # without going up all of a long prefix
            path.append(node)
            node = node.parent
        twin: CachedBlock | None = self._public if deepest else None
        for block in reversed(path):
            twin = _pinned_child(twin, block.token_ids)
        return twin

    def _partial(
        self, after: CachedBlock, public: CachedBlock | None, token_ids: Sequence[int]
    ) -> tuple[CachedBlock | None, int]:
        """Return the child that begins with the most of these tokens, and how many; see `match`."""
        wanted = tuple(token_ids)
        partial, length = after.children.nearest(wanted)
        marked = Siblings() if public is None else self._pinned.get(public, Siblings())
        theirs, more = marked.nearest(wanted)
        if theirs is not None and more > length:
            return self._place(after, theirs.token_ids, theirs.block), more
        return partial, length

    def _is_covered(self, cached: CachedBlock, parent: CachedBlock) -> bool:
        """Return whether a sibling begins with all of the block's tokens."""
        return parent.children.longer_than(cached.token_ids) is not None

    def _covering(self, parent: CachedBlock, tokens: tuple[int, ...]) -> CachedBlock | None:
        """Return a child that begins with these tokens."""
        return parent.children.beginning_with(tokens)

    def _remove(self, cached: CachedBlock) -> None:
        assert cached.parent is not None, "a root is never removed"
        assert not cached.children, "a block that others follow is never removed"
        del cached.parent.children[cached.token_ids]
        self._pool.release([cached.block])
        self._places[cached.block].remove(cached)
        if not self._places[cached.block]:
            del self._places[cached.block]
        self._order.remove(cached)


def _with_prefix(cached: CachedBlock) -> Iterator[CachedBlock]:
    node: CachedBlock | None = cached
    while node is not None:
        yield node
        node = node.parent


def _below(roots: Iterable[CachedBlock]) -> Iterator[CachedBlock]:
    """Iterate over all blocks below some roots, parents before children."""
    pending = list(roots)
    while pending:
        cached = pending.pop()
        if cached.parent is not None:
            yield cached
        pending.extend(cached.children.values())


def _pinned_child(parent: CachedBlock | None, tokens: tuple[int, ...]) -> CachedBlock | None:
    child = None if parent is None else parent.children.get(tokens)
    return child if child is not None and child.pins else None


class CachedTable:
    """
    A block table, how many leading tokens have KV in it, and where its full blocks are in the cache.

    Owned by its sequence; used under the engine's lock. With no root it shares nothing and leaves
    nothing behind.

    Invariants:
        1. The table has exactly the blocks of `[0, length)`.
        2. The chain are the cache's entries for the leading blocks of the table, in order.
        3. With a root, the chain covers all full blocks.
    """

    def __init__(
        self, pool: BlockPool, cache: PrefixCache, root: CachedBlock | None, *, inside_blocks: bool
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._root = root
        self._inside_blocks = inside_blocks
        self._chain: list[CachedBlock] = []
        self.table = BlockTable(pool)
        self.length = 0

    @property
    def blocks(self) -> Sequence[int]:
        """Return the block numbers, in order of position."""
        return self.table.blocks

    @property
    def chain(self) -> Sequence[CachedBlock]:
        """Return the cache's entries for the full blocks, in order of position."""
        return self._chain

    @property
    def last_full(self) -> CachedBlock | None:
        """Return the entry of the last full block, or the root; None where nothing is shared."""
        return self._chain[-1] if self._chain else self._root

    def plan_write(self, start: int, end: int) -> WritePlan:
        """Return what writing the slots `[start, end)` takes; changes nothing."""
        return self.table.plan_write(start, end)

    def prepare_write(self, start: int, end: int) -> list[tuple[int, int]]:
        """
        Make the slots `[start, end)` this table's own; until `written`, only `[0, start)` counts.

        Returns:
            Blocks to copy, `(source, target)`, before the write.

        Raises:
            OutOfBlocksError: There are not enough; nothing was changed.
        """
        copies = self.table.prepare_write(start, end)
        del self._chain[start // self._pool.block_size :]
        self.length = start
        return copies

    def take_back(self, start: int) -> bool:
        """
        Give up what follows *start*, and its block's place in the cache if only we hold it besides.

        Writing from *start* on then needs no copy. For when blocks run short.

        Returns:
            Whether a block was taken back.
        """
        index = start // self._pool.block_size
        if self._root is None or index >= len(self.blocks):
            return False
        after = self._chain[index - 1] if index else self._root
        if not self._cache.forget(after, self.blocks[index]):
            return False
        del self._chain[index:]
        self.abandon(start)
        return True

    def written(self, token_ids: Sequence[int], end: int) -> None:
        """
        Take note that `[length, end)` has KV now, and let others find the blocks that are full.

        A block that another sequence computed meanwhile replaces ours, so that both hold one.

        Args:
            token_ids: The history, shape `(n,)`, n >= end.
            end: How many leading tokens have KV.
        """
        self.length = end
        if self._root is None:
            return
        size = self._pool.block_size
        for index in range(len(self._chain), end // size):
            after = self._chain[-1] if self._chain else self._root
            tokens = token_ids[index * size : (index + 1) * size]
            cached = self._cache.insert(after, tokens, self.blocks[index])
            if cached.block != self.blocks[index]:
                self.table.replace(index, cached.block)
            self._chain.append(cached)

    def reuse(self, token_ids: Sequence[int]) -> int:
        """
        Take over from the cache what it has of this history beyond `length`; return how much.

        Args:
            token_ids: The history, shape `(n,)`, n >= length.
        """
        if self._root is None or self.length >= len(token_ids) - 1:
            return 0  # the last token is fed in any case
        size = self._pool.block_size
        start = len(self._chain) * size
        after = self._chain[-1] if self._chain else self._root
        match = self._cache.match(after, token_ids[start:], inside_block=self._inside_blocks)
        found = start + len(match.full) * size + match.partial_tokens
        if found <= self.length:
            return 0
        gained, self.length = found - self.length, found
        self.table.crop(start)
        self.table.extend([cached.block for cached in match.full])
        if match.partial is not None:
            self.table.extend([match.partial.block])
        self._chain.extend(match.full)
        return gained

    def crop(self, token_ids: Sequence[int], length: int) -> None:
        """
        Keep the KV of the first *length* tokens only; the cache keeps the rest findable.

        Args:
            token_ids: The history that the KV is of, shape `(n,)`, n >= `self.length`.
            length: At most `self.length`.
        """
        self.leave_tail(token_ids)
        self.table.crop(length)
        del self._chain[length // self._pool.block_size :]
        self.length = length

    def leave_tail(self, token_ids: Sequence[int]) -> None:
        """Let others find the last block, though it is not full; who writes on copies it then."""
        size = self._pool.block_size
        start = len(self._chain) * size
        if self._root is None or not self._inside_blocks or start >= self.length:
            return
        after = self._chain[-1] if self._chain else self._root
        self._cache.insert(after, token_ids[start : self.length], self.blocks[len(self._chain)])

    def shares_with(self, other: "CachedTable") -> bool:
        """Return whether the two find each other's blocks."""
        return self._root is not None and self._root is other._root

    def abandon(self, length: int) -> None:
        """Keep the first *length* tokens only; what is in the slots after them is not to be trusted."""
        self.table.crop(length)
        self.length = length

    def fork(self) -> "CachedTable":
        """Return a second table over the same blocks."""
        other = CachedTable(self._pool, self._cache, self._root, inside_blocks=self._inside_blocks)
        other.table.extend(self.blocks)
        other._chain = self._chain[:]
        other.length = self.length
        return other

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        size = self._pool.block_size
        assert len(self.blocks) == blocks_for(self.length, size), (
            "the table does not cover what has KV"
        )
        ours = list(self.blocks[: len(self._chain)])
        assert [cached.block for cached in self._chain] == ours, "the chain is of other blocks"
        if self._root is not None:
            assert len(self._chain) == self.length // size, "a full block is not in the cache"

"""
KV blocks: which are free, which tables hold them, and copy on write.

Pure bookkeeping: the memory itself belongs to the runtime, and nothing here knows token ids.

The names of prefixes: a hash of all token ids up to a block's end, and of who may see them.

Pure: one prefix has one name, in memory, on disk and in files that are carried elsewhere.

A block in memory as a place in the tree of prefixes, and the blocks after the same one in order.

Values and their order; what may be found, pinned or given up is for `PrefixCache` to say.

Which places of blocks can be given up, how many that are, and which goes first.

Knows the tree; not why a block is held. Each change costs a few steps, and finding what goes next the
logarithm of what may go: nothing here walks the tree.
"""

import hashlib
import heapq
import itertools
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from recollect.errors import MisuseError, OutOfBlocksError
from recollect.types import common_prefix_length


def blocks_for(tokens: int, block_size: int) -> int:
    """Return how many blocks hold that many token slots."""
    return -(-tokens // block_size)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """What has to happen before the slots `[start, end)` of a table may be written."""

    keep: int
    """Leading blocks of the table that stay as they are."""
    new_blocks: int
    """Blocks to allocate and put after those."""
    copy_first: bool
    """The first new block takes over the content of the shared block that it replaces."""


class BlockPool:
    """
    A fixed number of blocks with reference counts.

    Owned by the engine; one thread at a time. `drop` alone may be called from any thread, because
    a table may be garbage-collected anywhere.

    Invariants:
        1. A block is on the free list exactly when its reference count is 0.
        2. No block is on the free list twice.
        3. A reference count is the number of times that tables hold the block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(
            range(num_blocks - 1, -1, -1)
        )  # a stack: what was used last is still in cache
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
        """Return how many blocks at least one table holds."""
        return self.num_blocks - self.free_blocks

    def require(self, count: int) -> None:
        """
        Check that *count* blocks are free.

        Raises:
            OutOfBlocksError: They are not; nothing was changed.
        """
        free = self.free_blocks
        if count > free:
            raise OutOfBlocksError(needed=count, free=free, total=self.num_blocks)

    def allocate(self, count: int) -> list[int]:
        """
        Take *count* free blocks, each with one reference.

        Raises:
            OutOfBlocksError: There are not as many; nothing was changed.
        """
        self.require(count)
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
        """Return how many times tables hold the block."""
        return self._references[block]

    def is_shared(self, block: int) -> bool:
        """Return whether more than one table holds the block."""
        return self._references[block] > 1

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """
        Derive all bookkeeping anew from the tables that exist, and compare.

        Raises:
            AssertionError: An invariant does not hold.
        """
        self._collect()
        held = Counter(block for table in tables for block in table)
        for block, references in enumerate(self._references):
            assert references == held[block], (
                f"block {block} counts {references} references and is held {held[block]} times"
            )
        free = sorted(self._free)
        assert free == sorted(set(free)), "a block is on the free list twice"
        expected = [block for block in range(self.num_blocks) if self._references[block] == 0]
        assert free == expected, "the free list is not the set of blocks without references"

    def _collect(self) -> None:
        while self._dropped:
            self.release(self._dropped.popleft())


class BlockTable:
    """
    The blocks of one sequence, in order of position.

    Owned by its sequence. The slots that hold KV, and how many, is for the sequence to know.

    Invariants:
        1. The table holds one reference to each of its blocks.
        2. A block that is written is held by this table alone.
    """

    def __init__(self, pool: BlockPool, blocks: list[int] | None = None) -> None:
        self._pool = pool
        self._blocks = [] if blocks is None else blocks

    @property
    def blocks(self) -> Sequence[int]:
        """Return the block numbers, in order of position; not to be changed by the caller."""
        return self._blocks

    def plan_write(self, start: int, end: int) -> WritePlan:
        """
        Return what writing the slots `[start, end)` takes, 0 <= start < end; changes nothing.

        Slots from *start* on are given up, so only a block that keeps slots before *start* can
        need a copy.
        """
        size = self._pool.block_size
        keep, slots_before = divmod(start, size)
        has_block = keep < len(self._blocks)
        shared = has_block and self._pool.is_shared(self._blocks[keep])
        if has_block and not shared:
            keep += 1
        return WritePlan(
            keep=keep,
            new_blocks=max(0, blocks_for(end, size) - keep),
            copy_first=shared and slots_before > 0,
        )

    def prepare_write(self, start: int, end: int) -> list[tuple[int, int]]:
        """
        Make the slots `[start, end)` this table's own.

        Returns:
            Blocks to copy, `(source, target)`, before the write. Another table holds the source.

        Raises:
            OutOfBlocksError: There are not enough; nothing was changed.
        """
        plan = self.plan_write(start, end)
        new = self._pool.allocate(plan.new_blocks)
        replaced = self._blocks[plan.keep :]
        self._blocks[plan.keep :] = new
        self._pool.release(replaced)
        return [(replaced[0], new[0])] if plan.copy_first else []

    def crop(self, length: int) -> None:
        """Give up all blocks that hold none of the first *length* slots."""
        keep = blocks_for(length, self._pool.block_size)
        given_up = self._blocks[keep:]
        del self._blocks[keep:]
        self._pool.release(given_up)

    def fork(self, length: int) -> "BlockTable":
        """Return a table over the blocks of the first *length* slots, shared."""
        keep = blocks_for(length, self._pool.block_size)
        if keep > len(self._blocks):
            raise MisuseError(f"a table of {len(self._blocks)} blocks holds no {length} slots")
        shared = self._blocks[:keep]
        self._pool.retain(shared)
        return BlockTable(self._pool, shared)

    def replace(self, index: int, block: int) -> None:
        """Hold another block, which holds the same KV, in place of the one at *index*."""
        self._pool.retain([block])
        self._pool.release([self._blocks[index]])
        self._blocks[index] = block

    def extend(self, blocks: Sequence[int]) -> None:
        """Hold more blocks after the last, shared with whoever holds them."""
        self._pool.retain(blocks)
        self._blocks.extend(blocks)

    def drop(self) -> None:
        """Give up all blocks; safe from any thread, takes effect when the pool is next used."""
        blocks, self._blocks = self._blocks, []
        self._pool.drop(blocks)


Key = bytes

PUBLIC: Final = "*"
"""The namespace of what is marked public, which is no client's: what is pinned in it, all others find."""

DIGEST_BYTES: Final = 4
"""Of the digest of one token in its place: two that differ have the same one in 4 billion cases."""
MOST_DIGESTS: Final = 96
"""With a name after them they are a value of LMDB that can be sorted, of at most 511 bytes."""


_CHAIN: Final = b"recollect block"
"""Sets the names of blocks apart from whatever else is hashed with the same secret."""


def chained_key(parent: Key, token_ids: Sequence[int], secret: bytes = b"") -> Key:
    """
    Return the name of a prefix: a hash of the prefix before its last block, and that block's tokens.

    The first parent is the name of a namespace, so nothing is shared across namespaces.

    Args:
        parent: The name of what the block follows.
        token_ids: Its tokens, shape `(n,)`.
        secret: At most 64 bytes; with it nobody else can try which tokens follow *parent*, although
            both names lie on the disk for all to read.
    """
    content = parent + _token_bytes(token_ids)
    person = _CHAIN if secret else b""  # names of plain stores and portable files stay as they were
    return hashlib.blake2b(content, digest_size=32, key=secret, person=person).digest()


def chained_keys(
    root: Key, token_ids: Sequence[int], block_size: int, secret: bytes = b""
) -> list[Key]:
    """Return the names of a prefix's blocks in order; the last may hold a part of one."""
    keys = [root]
    for start in range(0, len(token_ids), block_size):
        keys.append(chained_key(keys[-1], token_ids[start : start + block_size], secret))
    return keys[1:]


def disguised_key(key: Key, secret: bytes) -> Key:
    """
    Return what stands for a name that was given without the secret, and cannot be traced to it.

    It is the name of no block, because each has tokens.
    """
    return chained_key(key, (), secret)


def branch_digests(parent: Key, token_ids: Sequence[int], secret: bytes = b"") -> bytes:
    """
    Return a short digest for each leading part of a block, one after the other: its place in order.

    Two blocks after the same one share as many leading digests as they share leading tokens. So the
    block that has the most in common with some tokens lies next to these in the order of digests.

    Args:
        parent: The name of what the block follows.
        token_ids: Its tokens, shape `(n,)`; those after the first `MOST_DIGESTS` do not count.
        secret: At most 64 bytes; with it, digests tell nobody else which tokens they are of, only
            how many tokens blocks have in common.
    """
    state = hashlib.blake2b(
        parent, digest_size=DIGEST_BYTES, key=secret, person=b"recollect branch"
    )
    digests = bytearray()
    for token in np.asarray(token_ids[:MOST_DIGESTS], np.int64):
        state.update(token.tobytes())
        digests += state.copy().digest()
    return bytes(digests)


def namespace_key(fingerprint: str, namespace: str = "", secret: bytes = b"") -> Key:
    """
    Return the first parent of a chain: what KV depends on besides tokens, and who may see it.

    Args:
        fingerprint: Of model, runtime and precision.
        namespace: Who shares.
        secret: At most 64 bytes; with it, the name tells nobody else whose it is.
    """
    content = f"{len(fingerprint)}:{fingerprint}:{namespace}".encode()
    return hashlib.blake2b(content, digest_size=32, key=secret).digest()


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, np.int64).tobytes()


class Siblings(dict[tuple[int, ...], "CachedBlock"]):
    """
    The blocks after the same one, by their tokens.

    Also knows the order of the tokens, in which those that have much in common are neighbours. So a
    search costs a few comparisons, however many blocks there are; putting one in or taking one out
    moves pointers in a list besides, 80 kB for 10,000 blocks. Only `[]=` and `del` change it.
    """

    __slots__ = ("_order",)

    def __init__(self) -> None:
        super().__init__()
        self._order: list[tuple[int, ...]] = []

    def __setitem__(self, token_ids: tuple[int, ...], cached: "CachedBlock") -> None:
        if token_ids not in self:
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

    def beginning_with(self, token_ids: tuple[int, ...]) -> "CachedBlock | None":
        """Return a block whose tokens begin with these, or are these."""
        return self.get(token_ids) or self.longer_than(token_ids)

    def longer_than(self, token_ids: tuple[int, ...]) -> "CachedBlock | None":
        """Return a block whose tokens begin with these, and are more."""
        at = bisect_right(self._order, token_ids)
        if at < len(self._order) and self._order[at][: len(token_ids)] == token_ids:
            return self[self._order[at]]
        return None

    def parts_of(self, token_ids: tuple[int, ...]) -> "list[CachedBlock]":
        """
        Return the blocks whose tokens begin these, and are fewer.

        What lies in order between such a part and these tokens begins with the part, too: so a part
        is no longer than what these tokens have in common with the block before them.
        """
        at = bisect_left(self._order, token_ids)
        if not at:
            return []
        most = common_prefix_length(self._order[at - 1], token_ids)
        parts = (self.get(token_ids[:length]) for length in range(1, most + 1))
        return [part for part in parts if part is not None]

    def check(self) -> None:
        """
        Verify that the order is that of the blocks.

        Raises:
            AssertionError: It is not.
        """
        assert sorted(self) == self._order, "siblings are out of order"


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
    children: Siblings = field(default_factory=Siblings)
    held: bool = False
    """Whether it stays for a reason of its own, as far as `EvictionOrder` was told."""
    staying_children: int = 0
    """How many of its children stay."""
    queued: bool = False
    """Whether `EvictionOrder` has it among those that may go next."""

    @property
    def stays(self) -> bool:
        """Return whether it cannot be given up: because of itself, or of something that follows it."""
        return self.held or self.staying_children > 0

    def path(self) -> "list[CachedBlock]":
        """Return the blocks from the first of the prefix to this one, without the root."""
        blocks: list[CachedBlock] = []
        node = self
        while node.parent is not None:
            blocks.append(node)
            node = node.parent
        return blocks[::-1]


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

"""
KV blocks: which are free, which tables hold them, and copy on write.

Pure bookkeeping: the memory itself belongs to the runtime, and nothing here knows token ids.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recollect.errors import MisuseError, OutOfBlocksError


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

"""
The KV of one sequence: a block table whose blocks are found and left behind in the prefix cache.

Does not keep the token history; whoever does passes it in. No runtime.
"""

from collections.abc import Sequence

from recollect.kv.blocks import BlockPool, BlockTable, WritePlan, blocks_for
from recollect.kv.cached_block import CachedBlock
from recollect.kv.prefix import PrefixCache


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

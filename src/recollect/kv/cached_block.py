"""
A block in memory as a place in the tree of prefixes, and the blocks after the same one in order.

Values and their order; what may be found, pinned or given up is for `PrefixCache` to say.
"""

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field

from recollect.kv.names import Key
from recollect.types import common_prefix_length


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

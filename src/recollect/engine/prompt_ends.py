"""
The logits after prompts that were read lately, so that another reply to one of them reads nothing.

On its own because the heart, which uses it, is to be read in one evening, and this is a plain store.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from recollect.kv.blocks import CachedBlock
from recollect.kv.record import Key
from recollect.runtime.base import Logits

MOST_END_BYTES: Final = 16 << 20
"""Of the logits after prompts: 27 prompts of a vocabulary of 152,000 tokens."""


class PromptEnds:
    """
    The logits after the prompts that were read last, within `MOST_END_BYTES`.

    Another reply to one of them then begins with the very numbers of the first, and reads nothing. Else the
    last token is fed again, alone, by other kernels than among others: rounded otherwise, so that a greedy
    reply that is generated again would be another one.

    Invariant: `bytes` is that of what is kept, and at most `MOST_END_BYTES`.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Key, tuple[int, ...]], Logits] = OrderedDict()
        self.bytes = 0

    def keep(self, after: CachedBlock | None, tail: Sequence[int], logits: Logits) -> None:
        """
        Keep a copy of the logits after a prompt.

        Args:
            after: Its last full block, or the root; None: it shares with nobody, and nothing is kept.
            tail: The tokens behind that.
            logits: `(vocab_size,)`.
        """
        if after is None:
            return
        name = after.key, tuple(tail)
        self._drop(name)
        self._kept[name] = kept = logits.copy()
        kept.setflags(write=False)  # several replies may have it at once
        self.bytes += kept.nbytes
        while self.bytes > MOST_END_BYTES:
            self._drop(next(iter(self._kept)))

    def of(self, after: CachedBlock | None, tail: Sequence[int]) -> Logits | None:
        """Return the logits after a prompt, see `keep`; None where they are not known. Counts as a use."""
        if after is None:
            return None
        name = after.key, tuple(tail)
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def clear(self) -> None:
        """Forget all; the last tokens of prompts are then fed again."""
        self._kept.clear()
        self.bytes = 0

    def check(self) -> None:
        """
        Verify the invariant.

        Raises:
            AssertionError: It does not hold.
        """
        assert self.bytes == sum(one.nbytes for one in self._kept.values())
        assert self.bytes <= MOST_END_BYTES

    def _drop(self, name: tuple[Key, tuple[int, ...]]) -> None:
        if (dropped := self._kept.pop(name, None)) is not None:
            self.bytes -= dropped.nbytes

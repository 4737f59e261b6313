"""
A token history and the KV that has been computed for it: the heart of the project.

Knows neither text nor conversations. The forward pass itself is run by the engine.
"""

import weakref
from array import array
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from recollect.errors import MisuseError, RewindError
from recollect.kv.blocks import BlockTable
from recollect.runtime.base import Logits

if TYPE_CHECKING:  # the engine makes sequences, so the import would be a circle
    from recollect.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class FeedPlan:
    """The tokens `[start, end)` of a history have to be fed."""

    start: int
    end: int


def plan_feed(length: int, computed: int, *, keep_multiple_of: int = 1) -> FeedPlan:
    """
    Return what to feed so that the logits after a history of *length* tokens are known.

    The one owner of the rule that at least one token is fed: logits need a forward pass. So a
    history whose KV is complete still feeds its last token again.

    Args:
        length: Tokens in the history, >= 1.
        computed: Leading tokens that have KV, <= length.
        keep_multiple_of: The block size where KV inside a block cannot be cut (see
            `RuntimeInfo.whole_blocks_only`), else 1.
    """
    start = computed
    if computed == length:
        start = (length - 1) // keep_multiple_of * keep_multiple_of
    return FeedPlan(start, length)


class Sequence:
    """
    A history of token ids, the blocks that hold its KV, and how many tokens have KV.

    Made by `Engine.new_sequence` or `fork`; used from one thread at a time. What a caller may see
    is always consistent, also after an exception: `token_ids` is the truth, and whatever has no KV
    is computed by the next forward pass, which starts at `computed`.

    Invariants:
        1. 0 <= computed <= len(token_ids).
        2. The table holds exactly the blocks of `[0, computed)`.
        3. Logits, where known, are those after the last token, and all tokens have KV.
    """

    def __init__(
        self, engine: "Engine", token_ids: "array[int]", table: BlockTable, computed: int
    ) -> None:
        self._engine = engine
        self._token_ids = token_ids
        self._table = table
        self._computed = computed
        self._logits: Logits | None = None
        self.fed_tokens = 0
        """Tokens of this sequence that went through a forward pass, counted there."""
        self._finalizer = weakref.finalize(self, table.drop)

    def __len__(self) -> int:
        """Return the length of the history in tokens."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Return a copy of the history."""
        return self._token_ids.tolist()

    @property
    def history(self) -> npt.NDArray[np.int64]:
        """Return the history as an array; copied, because the buffer grows."""
        return np.array(self._token_ids, np.int64)

    @property
    def computed(self) -> int:
        """Return how many leading tokens have KV."""
        return self._computed

    @property
    def logits(self) -> Logits | None:
        """Return the logits after the last token, `(vocab_size,)`, not to be changed; None where unknown."""
        return self._logits

    @property
    def table(self) -> BlockTable:
        """Return the block table, for the engine."""
        return self._table

    @property
    def closed(self) -> bool:
        """Return whether `release` was called."""
        return not self._finalizer.alive

    def tokens(self, start: int, end: int | None = None) -> list[int]:
        """Return the ids in `[start, end)`."""
        return self._token_ids[start:end].tolist()

    def append(self, token_ids: Tokens[int]) -> None:
        """
        Add tokens to the history; nothing is computed yet.

        Raises:
            TokenIdError: There are none, or one is outside the vocabulary. Nothing was changed.
            ContextFullError: They do not fit the context. Nothing was changed.
        """
        self._require_open()
        self._engine.check_append(len(self), token_ids)
        self._token_ids += array("q", token_ids)  # made first: all of them or none
        self._logits = None

    def rewind_to(self, length: int) -> None:
        """
        Forget all tokens from *length* on.

        Exactly there: the next token can be sampled anew at *length*. Costs no forward pass.

        Raises:
            RewindError: *length* is below 0 or beyond the end. Nothing was changed.
        """
        self._require_open()
        if not 0 <= length <= len(self):
            raise RewindError(
                f"Cannot rewind to {length:,}: the history has {len(self):,} tokens; "
                "give a length between 0 and that."
            )
        if length == len(self):
            return
        del self._token_ids[length:]
        self._logits = None
        if length < self._computed:
            self.crop_kv(length // self._engine.keep_multiple_of * self._engine.keep_multiple_of)

    def fork(self) -> "Sequence":
        """Return a second sequence over the same history and blocks; costs no forward pass."""
        self._require_open()
        with self._engine.lock:
            table = self._table.fork(self._computed)
        other = Sequence(self._engine, self._token_ids[:], table, self._computed)
        other._logits = self._logits
        return self._engine.adopt(other)

    def release(self) -> None:
        """Give the blocks back; the sequence cannot be used afterwards. Calling it again does nothing."""
        self._logits = None
        self._computed = 0
        self._finalizer()

    def plan(self) -> FeedPlan | None:
        """Return what to feed for the logits to be known; None where they are."""
        self._require_open()
        if self._logits is not None:
            return None
        if not len(self):
            raise MisuseError("an empty sequence has no next token: append something first")
        return plan_feed(len(self), self._computed, keep_multiple_of=self._engine.keep_multiple_of)

    def crop_kv(self, computed: int) -> None:
        """Give up KV from *computed* on; the history stays. For the engine."""
        with self._engine.lock:
            self._table.crop(computed)
        self._computed = min(self._computed, computed)

    def advance(self, fed: FeedPlan, logits: Logits | None) -> None:
        """Take note of a forward pass that computed the KV of *fed*. For the engine."""
        self.fed_tokens += fed.end - fed.start
        self._computed = fed.end
        self._logits = logits if fed.end == len(self) else None

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        assert 0 <= self._computed <= len(self), "more tokens have KV than there are"
        expected = -(-self._computed // self._engine.block_size)
        assert len(self._table.blocks) == expected, "the table does not cover what is computed"
        assert self._logits is None or self._computed == len(self), "logits of another history"

    def _require_open(self) -> None:
        if self.closed:
            raise MisuseError("this sequence was released and cannot be used any more")

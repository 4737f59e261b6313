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

from recollect.errors import ContextFullError, MisuseError, RewindError, TokenIdError
from recollect.kv.prefix import CachedTable
from recollect.runtime.base import Logits, Reuse, Row, SequenceId

if TYPE_CHECKING:  # the engine makes sequences, so the import would be a circle
    from recollect.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class FeedPlan:
    """The tokens `[start, end)` of a history have to be fed."""

    start: int
    end: int


def plan_feed(length: int, computed: int, reuse: Reuse) -> FeedPlan:
    """
    Return what to feed so that the logits after a history of *length* tokens are known.

    The one owner of the rule that at least one token is fed: logits need a forward pass. So a
    history whose KV is complete still feeds its last token again.

    Args:
        length: Tokens in the history, >= 1.
        computed: Leading tokens that have KV, <= length.
        reuse: Where the runtime can cut a history.
    """
    start = computed
    if computed == length:
        start = reuse.longest_cut(length - 1)
    return FeedPlan(start, length)


class Sequence:
    """
    A history of token ids, and the KV of its leading tokens.

    Made by `Engine.new_sequence` or `fork`; used from one thread at a time, which is the engine's
    while a task runs on it. What a caller may see is always consistent, also after an exception:
    `token_ids` is the truth, and whatever has no KV is computed by the next forward pass, which
    starts at `computed`.

    Invariants:
        1. 0 <= computed <= len(token_ids).
        2. All of `CachedTable`, and the KV in it is that of this history.
        3. Logits, where known, are those after the last token.
    """

    def __init__(
        self, engine: "Engine", token_ids: "array[int]", kv: CachedTable, namespace: str | None
    ) -> None:
        self._engine = engine
        self.namespace = namespace
        """Who shares KV with it; None: nobody."""
        self._token_ids = token_ids
        self._kv = kv
        self._logits: Logits | None = None
        self._id = SequenceId()
        self.fed_tokens = 0
        """Tokens of this sequence that went through a forward pass, counted there."""
        self._finalizer = weakref.finalize(self, kv.table.drop)
        self._finalizer.atexit = False  # the whole pool goes then

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
        return np.frombuffer(self._token_ids, np.int64).copy()

    @property
    def computed(self) -> int:
        """Return how many leading tokens have KV that this sequence holds."""
        return self._kv.length

    @property
    def logits(self) -> Logits | None:
        """Return the logits after the last token, `(vocab_size,)`, not to be changed; None where unknown."""
        return self._logits

    @property
    def kv(self) -> CachedTable:
        """Return the KV, for the engine."""
        return self._kv

    @property
    def closed(self) -> bool:
        """Return whether `release` was called."""
        return not self._finalizer.alive

    def tokens(self, start: int, end: int | None = None) -> list[int]:
        """Return the ids in `[start, end)`."""
        return self._token_ids[start:end].tolist()

    def shares(self, other: "Sequence", length: int) -> bool:
        """Return whether the KV of the first *length* tokens is the same in both, and may be shared."""
        return (
            self._kv.shares_with(other.kv) and self._token_ids[:length] == other._token_ids[:length]
        )

    def common_length(self, other: "Sequence") -> int:
        """Return how many leading tokens the two histories share; also of released sequences."""
        length = min(len(self), len(other))
        differs = self.history[:length] != other.history[:length]
        return int(differs.argmax()) if differs.any() else length

    def append(self, token_ids: Tokens[int]) -> None:
        """
        Add tokens to the history; nothing is computed yet.

        Raises:
            TokenIdError: There are none, or one is outside the vocabulary. Nothing was changed.
            ContextFullError: They do not fit the context. Nothing was changed.
        """
        self._require_open()
        self._check_append(token_ids)
        self._token_ids += array("q", token_ids)  # made first: all of them or none
        self._logits = None

    def rewind_to(self, length: int) -> None:
        """
        Forget all tokens from *length* on.

        Exactly there: the next token can be sampled anew at *length*. Costs no forward pass, and
        what is given up can be found again until it is evicted.

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
        if length < self.computed:
            keep = self._engine.info.reuse.longest_cut(length)
            with self._engine.lock:
                self._kv.crop(self._token_ids, keep)
        del self._token_ids[length:]
        self._id.rewind_to(length)
        self._logits = None

    def fork(self) -> "Sequence":
        """Return a second sequence over the same history and blocks; costs no forward pass."""
        self._require_open()
        with self._engine.lock:
            other = Sequence(self._engine, self._token_ids[:], self._kv.fork(), self.namespace)
        other._logits = self._logits
        other._id = self._id.fork()
        return self._engine.adopt(other)

    def park(self) -> None:
        """
        Hold no blocks until the next forward pass; the history stays.

        The KV stays findable in the cache, where it can be evicted when others need the room.
        """
        self._require_open()
        with self._engine.lock:
            self._kv.crop(self._token_ids, 0)

    def release(self) -> None:
        """Give the blocks back; the sequence cannot be used afterwards. Calling it again does nothing."""
        if not self.closed:
            self.park()
        self._id.release()
        self._logits = None
        self._finalizer()

    def plan(self) -> FeedPlan | None:
        """Return what to feed for the logits to be known; None where they are."""
        self._require_open()
        if self._logits is not None:
            return None
        if not len(self):
            raise MisuseError("an empty sequence has no next token: append something first")
        return plan_feed(len(self), self.computed, self._engine.info.reuse)

    def is_warm(self) -> bool:
        """Return whether all of the history has KV, here or in the cache."""
        return self.computed == len(self) or len(self) == self._engine.warm_tokens(
            self.token_ids, self.namespace
        )

    def reuse(self) -> None:
        """Take over what the cache has of the history; costs no forward pass."""
        with self._engine.lock:
            self._kv.reuse(self._token_ids)

    def row(self, fed: FeedPlan) -> Row:
        """Return the sequence's share of a forward pass that feeds *fed*. For the engine."""
        return Row(
            token_ids=self.tokens(fed.start, fed.end),
            past=fed.start,
            block_table=self._kv.blocks,
            wants_logits=fed.end == len(self),
            sequence=self._id,
        )

    def written(self, fed: FeedPlan, logits: Logits | None) -> None:
        """Take note of a forward pass that computed the KV of *fed*. For the engine."""
        self.fed_tokens += fed.end - fed.start
        self._kv.written(self._token_ids, fed.end)
        self._logits = logits
        if logits is not None and fed.end - fed.start > 1:
            self._kv.leave_tail(self._token_ids)  # the end of a prompt, which others may send too

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        assert 0 <= self.computed <= len(self), "more tokens have KV than there are"
        self._kv.check()
        start = 0
        for cached in self._kv.chain:
            end = start + len(cached.token_ids)
            assert list(cached.token_ids) == self.tokens(start, end), "KV of another history"
            start = end

    def _check_append(self, token_ids: Tokens[int]) -> None:
        info = self._engine.info
        if len(token_ids) == 0:
            raise TokenIdError("There are no tokens to append: give at least one.")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= info.vocab_size:
            wrong = low if low < 0 else high
            raise TokenIdError(
                f"Token id {wrong} is outside the vocabulary: "
                f"ids go from 0 to {info.vocab_size - 1}."
            )
        needed = len(self) + len(token_ids)
        if needed > info.context_length:
            raise ContextFullError(needed=needed, limit=info.context_length)

    def _require_open(self) -> None:
        if self.closed:
            raise MisuseError("this sequence was released and cannot be used any more")

"""
A token history and the KV that has been computed for it: the heart of the project.

`Memory` is what all sequences of one engine share: the block pool, the prefix cache, and the lock over
both. `Sequence` is one history with its block table. Neither knows text, conversations, tasks or the
engine: forward passes are run by the engine, which tells a sequence what they have computed.
"""

import threading
import weakref
from array import array
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recollect.errors import ContextFullError, MisuseError, RewindError, TokenIdError
from recollect.kv.blocks import BlockPool
from recollect.kv.prefix import BlockTable, Match, PrefixCache
from recollect.runtime.base import Logits, Row, RuntimeInfo


@dataclass(frozen=True, slots=True)
class FeedPlan:
    """The tokens `[start, end)` of a history have to be fed."""

    start: int
    end: int


def plan_feed(length: int, computed: int, *, keep_multiple_of: int = 1) -> FeedPlan:
    """
    Return what to feed so that the logits after a history of *length* tokens are known.

    This function alone owns the rule that at least one token is fed: logits need a forward pass, so a
    history whose KV is complete feeds its last token again.

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


class Memory:
    """
    The KV blocks of one runtime, and what is known of prefixes.

    The engine owns it; its sequences and the disk tier use it too. Whoever reads or changes a block
    table, the pool or the cache holds `lock`. Nobody holds it during a forward pass, so that a fork or
    a rewind never waits for one.

    Invariants: all of `BlockPool`, over the tables of the sequences that are alive, the cache, and the
    blocks that are leased for reading; all of `PrefixCache`; all of each `Sequence`.
    """

    def __init__(self, info: RuntimeInfo, pool: BlockPool, cache: PrefixCache) -> None:
        self.info = info
        self.pool = pool
        self.cache = cache
        self.keep_multiple_of = info.block_size if info.whole_blocks_only else 1
        """A rewind keeps a multiple of this many tokens."""
        self.lock = threading.RLock()
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()

    def match(self, token_ids: Tokens[int], namespace: str) -> Match:
        """Return what the cache has of a text from its first token on. Counts as a use of it."""
        with self.lock:
            return self.cache.match(self.cache.root(namespace), token_ids)

    def add(self, sequence: "Sequence") -> None:
        """Count a sequence among those that `check` looks at, for as long as it lives."""
        with self.lock:
            self._sequences.add(sequence)

    def check(self, leased: Tokens[int]) -> None:
        """
        Verify the invariants, between two forward passes.

        Args:
            leased: Blocks that something besides tables and cache has a reference to.

        Raises:
            AssertionError: One does not hold.
        """
        with self.lock:
            alive = [sequence for sequence in self._sequences if not sequence.closed]
            tables = [sequence.kv.blocks for sequence in alive]
            self.pool.check([*tables, self.cache.held_blocks(), leased])
            self.cache.check()
            for sequence in alive:
                sequence.check()


class Sequence:
    """
    A history of token ids, and the KV of its leading tokens.

    Used from one thread at a time, which is the engine's while a task runs on it. What a caller sees is
    always consistent, also after an exception: `token_ids` is the truth, and whatever has no KV is
    computed by the next forward pass, which starts at `computed`.

    Invariants:
        1. 0 <= computed <= len(token_ids).
        2. All of `BlockTable`, and the KV in it is that of this history.
        3. Logits, where known, are those after the last token.
    """

    def __init__(
        self,
        memory: Memory,
        namespace: str | None,
        *,
        token_ids: Tokens[int] = (),
        kv: BlockTable | None = None,
    ) -> None:
        """
        Begin a history.

        Args:
            memory: Where its KV is.
            namespace: Only sequences of the same namespace share KV. None: this one shares with nobody.
            token_ids: What it begins with; they were checked.
            kv: The KV of these tokens, which the sequence takes over; None: there is none yet.
        """
        self.memory = memory
        self.namespace = namespace
        self.fed_tokens = 0
        """Tokens of this sequence that went through a forward pass, counted there."""
        self._token_ids = array("q", token_ids)
        self._logits: Logits | None = None
        with memory.lock:
            root = None if namespace is None else memory.cache.root(namespace)
            self.kv = kv or BlockTable(memory.pool, memory.cache, root)
        self._finalizer = weakref.finalize(self, self.kv.drop)
        self._finalizer.atexit = False  # when the program ends, the whole pool goes
        memory.add(self)

    def __len__(self) -> int:
        """Return the length of the history in tokens."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Return a copy of the history."""
        return self._token_ids.tolist()

    @property
    def history(self) -> npt.NDArray[np.int64]:
        """Return the history as an array of shape `(n,)`; a copy, because the buffer grows."""
        return np.frombuffer(self._token_ids, np.int64).copy()

    @property
    def computed(self) -> int:
        """Return how many leading tokens have KV that this sequence holds."""
        return self.kv.length

    @property
    def logits(self) -> Logits | None:
        """Return the logits after the last token, `(vocab_size,)`, not to be changed; None: unknown."""
        return self._logits

    @property
    def closed(self) -> bool:
        """Return whether `release` was called."""
        return not self._finalizer.alive

    def tokens(self, start: int, end: int | None = None) -> list[int]:
        """Return the ids in `[start, end)`."""
        return self._token_ids[start:end].tolist()

    def shares(self, other: "Sequence", length: int) -> bool:
        """Return whether the first *length* tokens are the same in both, and may share their KV."""
        return (
            self.kv.shares_with(other.kv) and self._token_ids[:length] == other._token_ids[:length]
        )

    def common_length(self, other: "Sequence") -> int:
        """Return how many leading tokens the two histories have in common; also of released ones."""
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

        Exactly there: the next token can be sampled anew at *length*. Costs no forward pass, and the
        cache can find the KV that is given up until it evicts it.

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
            self._crop(length // self.memory.keep_multiple_of * self.memory.keep_multiple_of)
        del self._token_ids[length:]
        self._logits = None

    def fork(self) -> "Sequence":
        """Return a second sequence over the same history and blocks; costs no forward pass."""
        self._require_open()
        with self.memory.lock:
            kv = self.kv.fork()
            other = Sequence(self.memory, self.namespace, token_ids=self._token_ids, kv=kv)
        other._logits = self._logits
        return other

    def park(self) -> None:
        """
        Hold no blocks until the next forward pass; the history stays.

        The cache still finds the KV, and evicts it when others need the room.
        """
        self._require_open()
        self._crop(0)

    def release(self) -> None:
        """Give the blocks back; the sequence cannot be used afterwards. May be called again."""
        if not self.closed:
            self.park()
        self._logits = None
        self._finalizer()

    def plan(self) -> FeedPlan | None:
        """Return what to feed for the logits to be known; None where they are."""
        self._require_open()
        if self._logits is not None:
            return None
        if not len(self):
            raise MisuseError("an empty sequence has no next token: append something first")
        return plan_feed(len(self), self.computed, keep_multiple_of=self.memory.keep_multiple_of)

    def is_warm(self) -> bool:
        """Return whether all of the history has KV, here or in the cache."""
        if self.computed == len(self):
            return True
        if self.namespace is None:
            return False
        return len(self) == self.memory.match(self._token_ids, self.namespace).tokens

    def reuse(self) -> None:
        """Take over what the cache has of the history; costs no forward pass."""
        with self.memory.lock:
            self.kv.reuse(self._token_ids)

    def row(self, fed: FeedPlan) -> Row:
        """Return the sequence's share of a forward pass that feeds *fed*. For the engine."""
        return Row(
            token_ids=self.tokens(fed.start, fed.end),
            past=fed.start,
            block_table=self.kv.blocks,
            wants_logits=fed.end == len(self),
        )

    def written(self, fed: FeedPlan, logits: Logits | None) -> None:
        """Take note of a forward pass that computed the KV of *fed*. For the engine."""
        self.fed_tokens += fed.end - fed.start
        self.kv.written(self._token_ids, fed.end)
        self._logits = logits
        if logits is not None and fed.end - fed.start > 1:
            self.kv.leave_tail(self._token_ids)  # others may send the same prompt

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        assert 0 <= self.computed <= len(self), "more tokens have KV than there are"
        self.kv.check()
        cached = [token for block in self.kv.chain for token in block.token_ids]
        assert cached == self.tokens(0, len(cached)), "KV of another history"

    def _crop(self, length: int) -> None:
        with self.memory.lock:
            self.kv.crop(self._token_ids, length)

    def _check_append(self, token_ids: Tokens[int]) -> None:
        info = self.memory.info
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

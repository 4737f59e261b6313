"""
A token history and the KV that has been computed for it: the heart of the project.

`Memory` is what all sequences of one engine share: the block pool, the prefix cache, and the lock over
both. `Sequence` is one history with its block table, whose blocks are found in the cache and left behind
there. Neither knows text, conversations, tasks or the engine: forward passes are run by the engine, which
tells a sequence what they have computed.
"""

import threading
import weakref
from array import array
from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recollect.engine.prompt_ends import PromptEnds
from recollect.errors import MisuseError, RewindError
from recollect.kv.blocks import BlockPool, CachedBlock, blocks_for
from recollect.kv.prefix import Match, PrefixCache
from recollect.runtime.base import Logits, Reuse, Row, RuntimeInfo, SequenceId
from recollect.types import check_append


@dataclass(frozen=True, slots=True)
class FeedPlan:
    """The tokens `[start, end)` of a history have to be fed."""

    start: int
    end: int
    drafted: int = 0
    """How many of these are guesses, which follow the history and are not in it."""

    @property
    def tokens(self) -> int:
        """Return how many tokens of the history are fed; 1: the next one of a reply is all that is wanted."""
        return self.end - self.start - self.drafted


def plan_feed(length: int, computed: int, reuse: Reuse) -> FeedPlan:
    """
    Return what to feed so that the logits after a history of *length* tokens are known.

    This function alone owns the rule that at least one token is fed where they are not: logits need a
    forward pass, so a history whose KV is complete feeds its last token again.

    Args:
        length: Tokens in the history, >= 1.
        computed: Leading tokens that have KV, <= length.
        reuse: Where the runtime can cut a history.
    """
    start = computed if computed < length else reuse.longest_cut(length - 1)
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
        self.ends = PromptEnds()
        self.lock = threading.RLock()
        self.sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        """Those that are alive; each adds itself."""

    def match(self, token_ids: Tokens[int], namespace: str | None) -> Match:
        """
        Return what the cache has of a text from its first token on. Counts as a use of it.

        Where the namespace is None, nothing is shared and nothing is found.
        """
        if namespace is None:
            return Match([], 0)
        with self.lock:
            return self.cache.match(self.cache.root(namespace), token_ids)


class Sequence:
    """
    A history of token ids, and the blocks with the KV of its leading tokens.

    Used from one thread at a time, which is the engine's while a task runs on it. What a caller sees is
    always consistent, also after an exception: `token_ids` is the truth, and whatever has no KV is
    computed by the next forward pass, which starts at `computed`. What changes blocks is used under the
    lock of its `Memory`.

    Invariants:
        1. 0 <= computed <= len(token_ids).
        2. The table has a reference to each of its blocks, which are those of `[0, computed)`. A block
           that is written is held by this table alone.
        3. The chain is the cache's nodes for the leading blocks of the table, in order, and they are of
           this history. It covers all full blocks, unless the sequence shares with nobody.
        4. Logits, where known, are those after the last token.
        5. While guesses that a pass was fed are to be judged, the table has the blocks for them too, logits
           are known, and all of the history is computed.
    """

    def __init__(self, memory: Memory, namespace: str | None) -> None:
        """
        Begin an empty history.

        Args:
            memory: Where its KV is.
            namespace: Only sequences of the same namespace share KV. None: this one shares with nobody,
                and leaves nothing behind.
        """
        self.memory = memory
        self.namespace = namespace
        self.computed = 0
        """How many leading tokens have KV that this sequence holds."""
        self.blocks: list[int] = []
        """The block table: block numbers in order of position. Only the sequence changes it."""
        self.chain: list[CachedBlock] = []
        """The cache's nodes for the full blocks, in order of position. Only the sequence changes it."""
        self.fed_tokens = 0
        """Tokens of this sequence that went through a forward pass, counted there."""
        self.logits: Logits | None = None
        """The logits after the last token, `(vocab_size,)`, not to be changed; None: unknown."""
        self.draft: Tokens[int] = ()
        """Guesses of what follows, which the pass that computes the last token is fed too."""
        self.drafted_tokens = self.accepted_tokens = 0
        """Guesses that went through a pass, and those of them that the history then had."""
        self.session = ""
        """Which conversation it is of: engines elsewhere keep those with equal ones together."""
        self.branch_point = 0
        """
        A length at which the next turn is known to leave this history. Where KV cannot be cut, it is kept
        there too, for which a pass ends there. 0: nowhere.
        """
        self.closed = False
        """Whether `release` was called."""
        self.moved = False
        """Whether another replica of an engine elsewhere has KV of it that this one lacked."""
        self._token_ids = array("q")
        self._ahead: deque[tuple[int, Logits]] = deque()
        """Guesses to be judged, with the logits after each."""
        self._id = SequenceId()
        self._finalizer = weakref.finalize(self, memory.pool.drop, self.blocks)
        self._finalizer.atexit = False  # when the program ends, the whole pool goes
        with memory.lock:
            self._root = None if namespace is None else memory.cache.root(namespace)
            memory.sequences.add(self)

    def __len__(self) -> int:
        """Return the length of the history in tokens."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Return a copy of the history."""
        return self._token_ids.tolist()

    @property
    def history(self) -> npt.NDArray[np.int64]:
        """
        Return a copy of the history as an array of shape `(n,)`; from any thread.

        The buffer itself is never exported: it could not grow meanwhile, and numpy lets other threads
        run while it copies.
        """
        return np.frombuffer(self._token_ids[:], np.int64)

    def tokens(self, start: int, end: int | None = None) -> list[int]:
        """Return the ids in `[start, end)`."""
        return self._token_ids[start:end].tolist()

    def shares(self, other: "Sequence", length: int) -> bool:
        """Return whether the first *length* tokens are the same in both, and may share their KV."""
        if self._root is None or self._root is not other._root:
            return False
        return self._token_ids[:length] == other._token_ids[:length]

    def append(self, token_ids: Tokens[int]) -> None:
        """
        Add tokens to the history; nothing is computed yet.

        Raises:
            TokenIdError: There are none, or one is outside the vocabulary. Nothing was changed.
            ContextFullError: They do not fit the context. Nothing was changed.
        """
        self._require_open()
        info = self.memory.info
        check_append(token_ids, len(self._token_ids), info.vocab_size, info.context_length)
        self._token_ids += array("q", token_ids)  # made first: all of them or none
        self.logits = None
        if self._ahead:
            self._judge(token_ids)

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
            self.park(self.memory.info.reuse.longest_cut(length))
        del self._token_ids[length:]
        if length < self.branch_point:
            self.branch_point = 0
        self._id.rewind_to(length)
        self.logits = None

    def fork(self) -> "Sequence":
        """Return a second sequence over the same history and blocks; costs no forward pass."""
        self._require_open()
        with self.memory.lock:
            other = type(self)(self.memory, self.namespace)
            other.session, other.branch_point = self.session, self.branch_point
            other._token_ids += self._token_ids
            other._hold(self.blocks[: blocks_for(self.computed, self.memory.info.block_size)])
            other.chain += self.chain
            other.computed = self.computed
        other.logits = self.logits
        other._id = self._id.fork()
        return other

    def park(self, keep: int = 0) -> None:
        """
        Give up the KV after the first *keep* tokens, at most `computed`; the history stays.

        The cache still finds that KV, until it evicts it because others need the room. Logits go with KV:
        who waits for them wants both.
        """
        with self.memory.lock:
            self.leave_tail()
            self.truncate(keep)
            if keep < len(self._token_ids):
                self.logits = None

    def release(self) -> None:
        """Give the blocks back; the sequence cannot be used afterwards. May be called again."""
        self.park()
        self._id.release()
        self.closed = True
        self._finalizer()

    def plan(self) -> FeedPlan:
        """Return what to feed for the logits to be known, or up to a branch point; nothing where they are."""
        self._require_open()
        length, reuse = len(self._token_ids), self.memory.info.reuse
        if self.logits is not None:
            return FeedPlan(length, length)
        if not length:
            raise MisuseError("an empty sequence has no next token: append something first")
        plan = plan_feed(length, self.computed, reuse)
        if reuse.whole_tails and self.computed < self.branch_point < plan.end:
            return FeedPlan(plan.start, self.branch_point)
        if self.draft and plan.tokens == 1:
            return FeedPlan(plan.start, plan.end + len(self.draft), len(self.draft))
        return plan

    def is_warm(self) -> bool:
        """Return whether all of the history has KV, here or in the cache."""
        if self.computed == len(self):
            return True
        return self.memory.match(self._token_ids, self.namespace).tokens == len(self)

    def computed_before(self) -> int:
        """Return how many leading tokens had KV once in the namespace, as far as that is remembered."""
        cache = self.memory.cache
        if self._root is None or not cache.evicted_blocks:
            return 0  # all that was computed in the namespace is there
        with self.memory.lock:
            return cache.accounts.computed_tokens(self._root, self._token_ids)

    def row(self, fed: FeedPlan) -> Row:
        """Return the sequence's share of a forward pass that feeds *fed*. For the engine."""
        return Row(
            token_ids=[*self.tokens(fed.start, fed.end), *self.draft[: fed.drafted]],
            past=fed.start,
            block_table=self.blocks,
            wants_logits=fed.end - fed.drafted == len(self._token_ids),
            sequence=self._id,
            drafted=fed.drafted,
        )

    @property
    def last_full(self) -> CachedBlock | None:
        """Return the node of the last full block, or the root; None where nothing is shared."""
        return self.chain[-1] if self.chain else self._root

    def reuse(self) -> int:
        """
        Take over what the cache has of the history beyond `computed`; return how many tokens.

        Where all is computed then, and it is a prompt whose logits were kept, these are taken over too.
        """
        lacking = len(self._token_ids) - self.computed
        if lacking == 1 or (lacking == 0 and self.logits is not None):
            return 0  # so for most passes of a reply: its last token is fed in any case
        with self.memory.lock:
            after, size = self.last_full, self.memory.info.block_size
            if after is None:
                return 0
            start = len(self.chain) * size
            match = self.memory.cache.match(after, self._token_ids[start:])
            if (gained := start + match.tokens - self.computed) > 0:
                self.truncate(start)
                self._hold([cached.block for cached in match.blocks])
                self.chain += match.blocks[: match.tokens // size]
                self.computed = start + match.tokens
            if self.logits is None and self.computed == len(self._token_ids):
                self.logits = self.memory.ends.of(self.last_full, self._tail())
            return max(0, gained)

    def _tail(self) -> list[int]:
        """Return the tokens behind the full blocks, as far as they are computed."""
        return self.tokens(len(self.chain) * self.memory.info.block_size, self.computed)

    def kept_blocks(self, start: int) -> int:
        """
        Return how many leading blocks stay in the table where slots from *start* on are written.

        The block of *start* does, unless something else holds it too.
        """
        index = start // self.memory.info.block_size
        has_block = index < len(self.blocks)
        return index + (has_block and not self.memory.pool.is_shared(self.blocks[index]))

    def blocks_to_allocate(self, start: int, end: int) -> int:
        """Return how many blocks it takes to write the slots `[start, end)`; changes nothing."""
        return blocks_for(end, self.memory.info.block_size) - self.kept_blocks(start)

    def prepare_write(self, start: int, end: int) -> list[tuple[int, int]]:
        """
        Make the slots `[start, end)` this table's own; until `written`, only `[0, start)` counts.

        Returns:
            Blocks to copy, `(source, target)`, before the write. Something else holds the source.

        Raises:
            OutOfBlocksError: There are not enough; nothing was changed.
        """
        keep, size = self.kept_blocks(start), self.memory.info.block_size
        needed = blocks_for(end, size)
        if needed == keep == len(self.blocks):  # as for most tokens of a reply
            self.computed = start
            return []
        new = self.memory.pool.allocate(needed - keep)
        replaced = self.blocks[keep:]
        self.blocks[keep:] = new
        self.memory.pool.release(replaced)
        del self.chain[start // size :]
        self.computed = start
        has_slots_before = keep * size < start
        return [(replaced[0], new[0])] if replaced and has_slots_before else []

    def take_back(self, start: int) -> bool:
        """
        Give up the KV from *start* on, if the cache holds the only other reference to the block there.

        The cache then forgets the block, so that the next write needs no copy. For when blocks run
        short. Returns whether it was so.
        """
        index = start // self.memory.info.block_size
        if index >= len(self.blocks) or not self.memory.cache.forget(self.blocks[index]):
            return False
        self.truncate(start)
        return True

    def written(self, fed: FeedPlan, logits: Logits | None) -> None:
        """
        Take note of a forward pass that computed the KV of *fed*, and let others find it.

        A block that another sequence computed meanwhile replaces ours, so that both hold one.

        Args:
            fed: What the pass was fed.
            logits: After the history and after each guess, `(1 + drafted, vocab_size)`; None: none.
        """
        self.fed_tokens += fed.end - fed.start
        self.computed = fed.end - fed.drafted
        self.logits = None if logits is None else logits[0]
        if logits is not None and fed.drafted:
            self.drafted_tokens += fed.drafted
            self._ahead.extend(zip(self.draft, logits[1:], strict=True))
        self.draft = ()
        self._share_full_blocks()
        is_prompt = logits is not None and fed.tokens > 1
        if logits is not None and is_prompt:
            self.memory.ends.keep(self.last_full, self._tail(), logits[0])
        if is_prompt or fed.end == self.branch_point:
            self.leave_tail()  # others may send the same prompt, or the next turn may begin here

    def _judge(self, token_ids: Tokens[int]) -> None:
        """Keep the KV of the next guess if that is what the history now has; if not, of no guess."""
        with self.memory.lock:
            guess, logits = self._ahead.popleft()
            if list(token_ids) == [guess]:
                self.accepted_tokens += 1
                self.computed += 1
                self.logits = logits
                self._share_full_blocks()
            else:
                self.truncate(self.computed)
                self._id.rewind_to(self.computed)

    def _share_full_blocks(self) -> None:
        """Put the blocks that are full into the cache."""
        size, pool = self.memory.info.block_size, self.memory.pool
        for index in range(len(self.chain), self.computed // size):
            if (after := self.last_full) is None:
                return
            tokens = self._token_ids[index * size : (index + 1) * size]
            cached = self.memory.cache.insert(after, tokens, self.blocks[index])
            pool.retain([cached.block])
            pool.release([self.blocks[index]])
            self.blocks[index] = cached.block
            self.chain.append(cached)

    def leave_tail(self) -> None:
        """Let others find the last block, though it is not full; who writes on copies it then."""
        cache, after = self.memory.cache, self.last_full
        # Without full blocks that others find, the tail would be all of a private history.
        if after is not None and cache.parts != "none" and (tail := self._tail()):
            cache.insert(after, tail, self.blocks[len(self.chain)])

    def truncate(self, length: int) -> None:
        """Hold the KV of the first *length* tokens only, at most `computed`, and of no guess."""
        self._ahead.clear()
        size = self.memory.info.block_size
        keep = blocks_for(length, size)
        self.memory.pool.release(self.blocks[keep:])
        del self.blocks[keep:]
        del self.chain[length // size :]
        self.computed = length

    def _hold(self, blocks: Tokens[int]) -> None:
        """Add blocks after the last, shared with whoever holds them."""
        self.memory.pool.retain(blocks)
        self.blocks += blocks

    def _require_open(self) -> None:
        if self.closed:
            raise MisuseError("this sequence was released and cannot be used any more")

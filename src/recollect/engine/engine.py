"""
The engine: the one owner of a runtime and its block pool, where forward passes are run and counted.

Knows token ids and logits; text and conversations are above it.
"""

import threading
import weakref
from array import array
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from typing import Final

from recollect.engine.sequence import FeedPlan, Sequence
from recollect.errors import ContextFullError, MisuseError, TokenIdError
from recollect.kv.blocks import BlockPool, BlockTable
from recollect.runtime.base import PagedRuntime, Row

PREFILL_CHUNK: Final = 512
"""Most prompt tokens in one forward pass, so that a stop is never far away. Costs under 5 % of
prefill speed against one pass. Source: benchmarks/runtime.py."""


class Engine:
    """
    A runtime, its blocks, and the sequences over them.

    Thread-safe at this level: each forward pass and each change of a block table happens under
    one lock. A single sequence belongs to one thread at a time.

    Invariants:
        1. All of `BlockPool`, over the tables of the sequences that are alive.
        2. All of `Sequence`, for each of them.
    """

    def __init__(
        self, runtime: PagedRuntime, *, num_blocks: int, eos_token_ids: Collection[int] = ()
    ) -> None:
        self._runtime = runtime
        info = runtime.info
        runtime.allocate(num_blocks)
        self._pool = BlockPool(num_blocks, info.block_size)
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self._closed = False
        self.lock = threading.RLock()
        """Held during a forward pass and while block tables change."""
        self.info = info
        self.block_size = info.block_size
        self.keep_multiple_of = info.block_size if info.whole_blocks_only else 1
        self.eos_token_ids = frozenset(eos_token_ids)
        self.computed_tokens = 0
        """Tokens fed so far, counted at the forward pass."""
        self.forward_passes = 0

    @property
    def pool(self) -> BlockPool:
        """Return the pool, to look at."""
        return self._pool

    def new_sequence(self) -> Sequence:
        """Return an empty sequence."""
        return self.adopt(Sequence(self, array("q"), BlockTable(self._pool), 0))

    def adopt(self, sequence: Sequence) -> Sequence:
        """Count a sequence among those that `check` looks at."""
        self._sequences.add(sequence)
        return sequence

    def check_append(self, length: int, token_ids: Tokens[int]) -> None:
        """
        Check that these tokens can follow a history of *length* tokens.

        Raises:
            TokenIdError: There are none, or one is outside the vocabulary.
            ContextFullError: They do not fit.
        """
        if len(token_ids) == 0:
            raise TokenIdError("There are no tokens to append: give at least one.")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.info.vocab_size:
            wrong = low if low < 0 else high
            raise TokenIdError(
                f"Token id {wrong} is outside the vocabulary: ids go from 0 to {self.info.vocab_size - 1}."
            )
        needed = length + len(token_ids)
        if needed > self.info.context_length:
            raise ContextFullError(needed=needed, limit=self.info.context_length)

    def compute(self, sequences: Collection[Sequence]) -> None:
        """
        Run forward passes until the logits after each of the sequences are known; see `step`.

        One whose logits are known already costs nothing.
        """
        while not self.step(sequences):
            pass

    def step(self, sequences: Collection[Sequence]) -> bool:
        """
        Run one forward pass over the next chunk of each sequence that needs one.

        Returns:
            Whether the logits after each of the sequences are known now.

        Raises:
            OutOfBlocksError: The blocks that all of this takes are not free. Nothing was computed.
            RuntimeFailure: The pass failed. Whole blocks computed before it are kept, nothing else.
            MisuseError: A sequence is empty, released or of another engine.
        """
        with self.lock:
            self._require_open()
            if any(sequence not in self._sequences for sequence in sequences):
                raise MisuseError(
                    "a sequence is computed by the engine that made it, and by no other"
                )
            plans = {
                sequence: plan for sequence in sequences if (plan := sequence.plan()) is not None
            }
            if not plans:
                return True
            self._pool.require(
                sum(
                    sequence.table.plan_write(plan.start, plan.end).new_blocks
                    for sequence, plan in plans.items()
                )
            )
            self._forward(_chunks(plans))
            return all(sequence.logits is not None for sequence in plans)

    def check(self) -> None:
        """
        Verify the invariants of the pool and of every sequence.

        Raises:
            AssertionError: One does not hold.
        """
        with self.lock:
            alive = [sequence for sequence in self._sequences if not sequence.closed]
            self._pool.check(sequence.table.blocks for sequence in alive)
            for sequence in alive:
                sequence.check()

    def close(self) -> None:
        """Release every sequence and give the runtime's memory back. Calling it again does nothing."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            for sequence in list(self._sequences):
                sequence.release()
            self._runtime.close()

    def _require_open(self) -> None:
        if self._closed:
            raise MisuseError("this engine was closed and cannot be used any more")

    def _forward(self, chunks: dict[Sequence, FeedPlan]) -> None:
        """Compute the KV of each sequence's chunk, all in one forward pass."""
        try:
            copies: list[tuple[int, int]] = []
            for sequence, chunk in chunks.items():
                copies += sequence.table.prepare_write(chunk.start, chunk.end)
            if copies:
                self._runtime.copy_blocks(copies)
            rows = [
                Row(
                    token_ids=sequence.tokens(chunk.start, chunk.end),
                    past=chunk.start,
                    block_table=sequence.table.blocks,
                    wants_logits=chunk.end == len(sequence),
                )
                for sequence, chunk in chunks.items()
            ]
            logits = iter(self._runtime.forward(rows))
        except BaseException:
            # The slots from chunk.start on are undefined now, and those before it in the same block
            # may be: its copy may not have happened, or a scale over the block has changed.
            for sequence, chunk in chunks.items():
                sequence.crop_kv(chunk.start // self.block_size * self.block_size)
            raise
        self.forward_passes += 1
        self.computed_tokens += sum(len(row.token_ids) for row in rows)
        for (sequence, chunk), row in zip(chunks.items(), rows, strict=True):
            sequence.advance(chunk, next(logits) if row.wants_logits else None)


def _chunks(plans: dict[Sequence, FeedPlan]) -> dict[Sequence, FeedPlan]:
    """Return the part of each plan that the next forward pass takes, first come first served."""
    budget = PREFILL_CHUNK
    chunks: dict[Sequence, FeedPlan] = {}
    for sequence, plan in plans.items():
        if budget == 0:
            break
        chunks[sequence] = FeedPlan(plan.start, min(plan.end, plan.start + budget))
        budget -= chunks[sequence].end - plan.start
    return chunks

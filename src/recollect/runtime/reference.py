"""
A runtime without weights, on which every mistake in KV bookkeeping changes the output.

A slot holds the token id that was written to it, its position, and a digest of the slot before, because
the KV of a transformer depends on all earlier tokens. The logits are a hash of all slots that the block
table names. So a hole, a stale slot or a block of another history gives other logits, as with a model,
but always and at once.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from recollect.runtime.base import (
    Logits,
    Pace,
    PassResult,
    Reuse,
    Row,
    RuntimeInfo,
    allocated,
    check_block_bytes,
    check_blocks,
    check_rows,
)

_EMPTY = -1
_FIELDS = 4  # token id, position, digest of the context, scale of the block
_SCALE = 3


class ReferenceRuntime:
    """
    The `PagedRuntime` of the tests and of the model named "reference".

    Owned by the engine; one thread at a time.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int = 4096,
        block_size: int = 32,
        whole_blocks_only: bool = False,
        pace: Pace = Pace(),  # noqa: B008 - frozen
    ) -> None:
        self._info = RuntimeInfo(
            name="reference-1",
            block_size=block_size,
            bytes_per_block=block_size * _FIELDS * 8,
            vocab_size=vocab_size,
            context_length=context_length,
            pace=pace,
            reuse=Reuse(unit=block_size if whole_blocks_only else 1),
            kv_format=f"i8x{block_size}x{_FIELDS}",
        )
        self._slots: npt.NDArray[np.int64] | None = None

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is."""
        return self._info

    def allocate(self, num_blocks: int) -> None:
        """Make room for that many blocks, all slots empty."""
        self._slots = np.full((num_blocks, self._info.block_size, _FIELDS), _EMPTY, np.int64)

    def forward(self, rows: Sequence[Row]) -> PassResult:
        """Write the rows' tokens into their slots, and hash the slots of each row's table."""
        check_rows(rows, self._info, len(allocated(self._slots)))
        for row in rows:
            self._write(row)
        wanted = [self._logits(row) for row in rows if row.wants_logits]
        none = np.empty((0, self._info.vocab_size), np.float32)
        return PassResult(np.stack(wanted) if wanted else none)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, `(source, target)` each."""
        slots = allocated(self._slots)
        check_blocks([block for pair in pairs for block in pair], len(slots))
        for source, target in pairs:
            slots[target] = slots[source]

    def warm_up(self) -> None:
        """Do nothing: the first pass is as fast as any."""

    def read_block(self, block: int, into: memoryview) -> None:
        """Copy a block's bytes to *into*."""
        slots = allocated(self._slots)
        check_blocks([block], len(slots))
        check_block_bytes(into, self._info)
        into[:] = slots[block].reshape(-1).view(np.uint8)

    def write_block(self, block: int, content: memoryview) -> None:
        """Make a block hold bytes that `read_block` gave."""
        slots = allocated(self._slots)
        check_blocks([block], len(slots))
        check_block_bytes(content, self._info)
        slots[block].reshape(-1).view(np.uint8)[:] = np.frombuffer(content, np.uint8)

    def close(self) -> None:
        """Free the memory."""
        self._slots = None

    def _context(self, row: Row, length: int) -> npt.NDArray[np.int64]:
        """Return the slots of the first *length* positions, `(length, 4)`."""
        blocks = np.asarray(row.block_table[: -(-length // self._info.block_size)], np.int64)
        return allocated(self._slots)[blocks].reshape(-1, _FIELDS)[:length]

    def _write(self, row: Row) -> None:
        slots, size = allocated(self._slots), self._info.block_size
        for position, token in enumerate(row.token_ids, row.past):
            # From the table and not from a variable: attention reads there, too.
            before = slots[row.block_table[(position - 1) // size], (position - 1) % size]
            digest = _digest(before.tobytes() if position else b"")
            block, slot = row.block_table[position // size], position % size
            slots[block, slot] = (token, position, digest, _EMPTY)
            if (
                not self._info.reuse.inside_blocks
            ):  # as a scale over the block changes all slots before
                slots[block, : slot + 1, _SCALE] = digest

    def _logits(self, row: Row) -> Logits:
        context = self._context(row, row.past + len(row.token_ids))
        seed = int.from_bytes(hashlib.blake2b(context.tobytes(), digest_size=8).digest(), "little")
        noise = np.random.Generator(np.random.Philox(key=seed))
        return noise.standard_normal(self._info.vocab_size, np.float32) * np.float32(4)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)

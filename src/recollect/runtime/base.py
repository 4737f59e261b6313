"""
The contract between the engine and a runtime, which runs the forward pass of a model and keeps its KV; and
the reference runtime, which keeps the contract without weights.

A paged runtime keeps KV in numbered blocks, and reads and writes the blocks that a row's block table
names. It does not know sharing, eviction or conversations. Libraries that keep KV in sequences of their
own are served through `sequences`. docs/runtimes.md shows a whole runtime.
On the reference runtime every mistake in KV bookkeeping changes the output. A slot holds the token id that
was written to it, its position, and a digest of the slot before, because the KV of a transformer depends on
all earlier tokens. The logits are a hash of all slots that the block table names. So a hole, a stale slot or
a block of another history gives other logits, as with a model, but always and at once.
"""

import hashlib
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from recollect.errors import (
    ConfigError,
    MisuseError,
    RuntimeFailure,
)
from recollect.types import Parts

Logits = npt.NDArray[np.float32]
_Memory = TypeVar("_Memory")


@dataclass(eq=False, slots=True, weakref_slot=True)
class SequenceId:
    """
    Which sequence a row is of, for runtimes that keep KV by sequence; paged ones need not look at it.

    The engine has one for each of its sequences, and notes here what becomes of the history. Nothing is
    called and nothing waits: a runtime looks at it in `forward`, for rows and for what it still holds.
    A sequence belongs to one thread at a time, which is the engine's while it has a row.
    """

    kept: int = 0
    """How many leading tokens of what was computed last the history still has; 0 once released."""
    _origin: "weakref.ref[SequenceId] | None" = None

    @property
    def origin(self) -> "SequenceId | None":
        """Return what it was forked from; None: nothing, or that is gone."""
        return None if self._origin is None else self._origin()

    def fork(self) -> "SequenceId":
        """Return the identity of a second sequence with the same history."""
        return SequenceId(_origin=weakref.ref(self))

    def rewind_to(self, length: int) -> None:
        """Take note that the history was cut to its first *length* tokens."""
        self.kept = min(self.kept, length)

    def release(self) -> None:
        """Take note that the sequence is not used any more."""
        self.kept = 0

    def computed_to(self, length: int) -> None:
        """Take note that a pass has computed the first *length* tokens. For runtimes."""
        self.kept = length


@dataclass(frozen=True, slots=True)
class Row:
    """
    One sequence's share of a forward pass.

    The pass writes the KV of `token_ids` at the positions `[past, past + len(token_ids))` of
    `block_table`, and each token attends to the slots `[0, its own position]` of it.
    """

    token_ids: Sequence[int]
    """Shape `(n,)`, n >= 1."""
    past: int
    """Slots that hold KV already, >= 0."""
    block_table: Sequence[int]
    """Block numbers in order of position; at least ceil((past + n) / block_size) of them."""
    wants_logits: bool = True
    """Whether logits are returned: those after the last token, and after guesses."""
    sequence: SequenceId | None = None
    """Which sequence it is of; None: nobody knows it."""
    drafted: int = 0
    """
    How many of its last tokens are guesses. Where logits are wanted they are returned after each of these
    too, so that a guess can be compared with what follows the token before it.
    """

    @property
    def places(self) -> int:
        """Return after how many of its last tokens logits are returned."""
        return 1 + self.drafted if self.wants_logits else 0


@dataclass(frozen=True, slots=True)
class Reuse:
    """Which part of the KV that was computed once can be used again, and where."""

    unit: int = 1
    """
    A sequence can be cut to a multiple of that many tokens: to any length (1), or to whole blocks
    (the block size), where the KV in a block depends on the block's later tokens through a scale.
    """
    whole_tails: bool = False
    """
    Whether a sequence can also go on from a block that is not full, but only after all of its tokens: a
    recurrent state is that after the last of them, and a scale over a block that of all of them.
    """
    as_bytes: bool = True
    """Whether blocks can be read and written as bytes, and so be kept on disk."""
    copies: bool = False
    """Whether a runtime that owns its KV can copy a sequence; of `SequenceRuntime` alone."""
    short_rope_length: int | None = None
    """
    The last length at which a model with LongRoPE uses the factors for short texts, where it changes them
    with the length: KV of one side is wrong on the other. None: there is none. Of `SequenceRuntime` alone.
    """

    @property
    def inside_blocks(self) -> bool:
        """Return whether a part of a block can be used again."""
        return self.unit == 1

    @property
    def parts(self) -> Parts:
        """Return what can be used again of a block besides all of a full one."""
        if self.inside_blocks:
            return "cut"
        return "whole" if self.whole_tails else "none"

    def longest_cut(self, length: int) -> int:
        """Return the largest length up to *length* to which a sequence can be cut."""
        return length // self.unit * self.unit

    def warm_tokens(self, length: int) -> int:
        """
        Return how many of the first *length* tokens can be reused at the most, where all were computed.

        The last has no KV where a reply ended with it, and may be fed again where a prompt does.
        """
        return self.longest_cut(max(0, length - 1))


@dataclass(frozen=True, slots=True)
class Pace:
    """How large passes are and what is between them, which depends on the device that computes them."""

    prefill_chunk: int = 512
    """
    Most prompt tokens in one pass while nobody waits for a next token, so that a cancel is never far
    away. Costs under 5 % of prefill speed against one pass. Source: benchmarks/runtime.py, on a CPU.
    """
    shared_chunk: int = 128
    """The same while others are being answered: what they wait between two tokens."""
    most_rows: int = 16
    """
    Sequences in one pass; more wait. Decode gains little beyond 16 on a CPU, and each holds blocks. A
    runtime that holds fewer sequences at once says how many, after `allocate`: beyond that it would
    compute one of them anew for each pass.
    """
    first_token_pause_s: float = 0.001
    """
    Sleep that long before the pass that follows a first token. On a CPU a pass saturates all cores for
    tens of milliseconds; without the pause readers got their first token 3 ms later (2 cores).
    """


@dataclass(frozen=True, slots=True)
class Lanes:
    """Sequences of a library that hold KV of their own, besides the blocks that it comes from."""

    most: int
    fixed_bytes: float
    """Of the machine's memory that one takes in any case; what is on a graphics card does not count."""
    token_bytes: float
    """The same for each token that it has room for."""
    step: int = 1
    """The library makes that room a multiple of so many tokens."""

    def of_pool(self, tokens: int, context_length: int) -> tuple[int, int]:
        """Return how many there are beside blocks for *tokens*, and how many tokens each has room for."""
        count = max(1, min(self.most, tokens // context_length))
        return count, -(-min(tokens, context_length) // self.step) * self.step


@dataclass(frozen=True, slots=True)
class RuntimeInfo:
    """What the engine needs to know of a runtime; constant after `allocate`."""

    name: str
    """With its version: for people, and part of what KV on disk is found by."""
    block_size: int
    """Token slots per block."""
    bytes_per_block: int
    """KV of one block in all layers."""
    vocab_size: int
    context_length: int
    """Most tokens that one sequence may have."""
    device: str = "CPU"
    """The kind of device that computes, in the runtime's own word."""
    kv_format: str = ""
    """Element types and shapes of a block's bytes: blocks of equal formats can be exchanged."""
    reuse: Reuse = Reuse()
    pace: Pace = Pace()
    lanes: Lanes | None = None
    """What is taken besides the blocks; None: nothing."""
    most_drafted: int = 0
    """
    Most guesses that a row can have (`Row.drafted`); 0: none. The pass that follows may begin at one of them,
    and write others over them.
    """
    alike: int = 0
    """
    A pass over up to so many tokens, each a reply's next one or a guess, gives each bitwise what a pass over
    it alone gives, and wider ones may not; 0: how wide a pass is makes no difference that matters.
    """

    def kv_bytes(self, num_blocks: int) -> int:
        """Return how much of the machine's memory a pool of that many blocks takes, with its lanes."""
        blocks = num_blocks * self.bytes_per_block
        if self.lanes is None:
            return blocks
        count, room = self.lanes.of_pool(num_blocks * self.block_size, self.context_length)
        return blocks + math.ceil(count * (self.lanes.fixed_bytes + room * self.lanes.token_bytes))


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a forward pass gives."""

    logits: Logits
    """New, `(places of all rows, vocab_size)`, in the order of the rows: one each, and more with guesses."""
    starts: Sequence[int] = ()
    """
    From which position each row was computed, at most its `past`: a runtime that owns its KV may have
    lost some of what the row takes for computed. Empty: each from its `past`.
    """


class PagedRuntime(Protocol):
    """
    A forward pass over KV blocks.

    Not thread-safe: the engine calls it from one thread at a time.
    """

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is."""

    def allocate(self, num_blocks: int) -> None:
        """
        Make room for that many blocks, once, before the first forward pass.

        Raises:
            RuntimeFailure: There is not enough memory.
        """

    def forward(self, rows: Sequence[Row]) -> PassResult:
        """
        Run one forward pass over any mix of prefill and decode rows.

        Raises:
            RuntimeFailure: It failed. The KV of the slots being written is then undefined; all
                other slots are as they were.
        """

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the KV of whole blocks, `(source, target)` each."""

    def warm_up(self) -> None:
        """
        Do in advance what makes the first passes slow, such as compiling kernels.

        Called at most once, before the first pass; may leave anything in any block.
        """

    def read_block(self, block: int, into: memoryview) -> None:
        """
        Copy a block's bytes of all layers to *into*, which has `bytes_per_block` bytes.

        The only method that another thread may call during a forward pass, for a block that the pass
        does not write.
        """

    def write_block(self, block: int, content: memoryview) -> None:
        """
        Fill a block with bytes that `read_block` gave, in this process or another.

        Raises:
            RuntimeFailure: They are more or fewer than `bytes_per_block`; nothing was changed.
        """

    def close(self) -> None:
        """Free the model and its KV; the runtime cannot be used afterwards. May be called again."""


@contextmanager
def mapped_errors(doing: str, *, foreign: type[Exception] = RuntimeError) -> Iterator[None]:
    """
    Turn a back end's exceptions into `RuntimeFailure`, with the cause chained.

    Every runtime uses this and nothing else for it.
    """
    try:
        yield
    except (foreign, MemoryError) as cause:
        reason = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
        raise RuntimeFailure(f"The runtime failed while {doing}: {reason}") from cause


def allocated(memory: _Memory | None) -> _Memory:
    """
    Return the KV memory of a runtime, which is None before `allocate` and after `close`.

    Raises:
        MisuseError: It is None.
    """
    if memory is None:
        raise MisuseError(
            "the runtime has no KV memory: allocate() comes first, and nothing after close()"
        )
    return memory


def allocate(runtime: PagedRuntime, num_blocks: int) -> None:
    """
    Have a runtime make room for that many blocks.

    Raises:
        ConfigError: The system does not give as much memory.
        RuntimeFailure: Nor does the device.
    """
    try:
        runtime.allocate(num_blocks)
    except MemoryError as cause:
        raise ConfigError(
            f"There is no memory for {num_blocks:,} blocks of KV: give KV less, or end other programs."
        ) from cause


def check_rows(rows: Sequence[Row], info: RuntimeInfo, num_blocks: int) -> None:
    """
    Refuse rows that are not within the KV memory, the context and the vocabulary.

    A back end in native code would read or write outside its buffers.

    Raises:
        RuntimeFailure: A row is not, or there is none.
    """
    if not rows:
        raise RuntimeFailure("A forward pass needs at least one row.")
    for row in rows:
        count, end = len(row.token_ids), row.past + len(row.token_ids)
        if (
            count == 0
            or row.past < 0
            or end > min(info.context_length, len(row.block_table) * info.block_size)
        ):
            raise RuntimeFailure(f"A row of {count} tokens at {row.past} does not fit its blocks.")
        if not 0 <= row.drafted < min(count, 1 + info.most_drafted):
            raise RuntimeFailure(f"A row of {count} tokens cannot have {row.drafted} guesses here.")
        if min(row.token_ids) < 0 or max(row.token_ids) >= info.vocab_size:
            raise RuntimeFailure(f"A row holds a token id that is not in [0, {info.vocab_size}).")
        check_blocks(row.block_table, num_blocks)


def check_block_bytes(content: memoryview, info: RuntimeInfo) -> None:
    """
    Refuse content that has not the length of one block.

    Raises:
        RuntimeFailure: It has another.
    """
    if content.nbytes != info.bytes_per_block:
        raise RuntimeFailure(
            f"A block has {info.bytes_per_block:,} bytes of KV here, and not {content.nbytes:,}."
        )


def check_blocks(blocks: Sequence[int], num_blocks: int) -> None:
    """
    Refuse block numbers outside `[0, num_blocks)`.

    Raises:
        RuntimeFailure: One is outside.
    """
    if blocks and (min(blocks) < 0 or max(blocks) >= num_blocks):
        raise RuntimeFailure(f"A block number is not in [0, {num_blocks}).")


def copy_slots(slots: npt.NDArray[Any], pairs: Sequence[tuple[int, int]]) -> None:
    """
    Copy whole blocks of an array whose first dimension counts blocks, `(source, target)` each, in order.

    Raises:
        RuntimeFailure: A block number is outside the array; nothing was copied.
    """
    check_blocks([block for pair in pairs for block in pair], len(slots))
    for source, target in pairs:
        slots[target] = slots[source]


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
        whole_tails: bool = False,
        pace: Pace = Pace(),
    ) -> None:
        self._info = RuntimeInfo(
            name="reference-1",
            block_size=block_size,
            bytes_per_block=block_size * _FIELDS * 8,
            vocab_size=vocab_size,
            context_length=context_length,
            pace=pace,
            reuse=Reuse(unit=block_size if whole_blocks_only else 1, whole_tails=whole_tails),
            kv_format=f"i8x{block_size}x{_FIELDS}",
            most_drafted=0 if whole_blocks_only else context_length,
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
        wanted = [
            self._logits(row, end)
            for row in rows
            for end in range(
                row.past + len(row.token_ids) - row.places, row.past + len(row.token_ids)
            )
        ]
        none = np.empty((0, self._info.vocab_size), np.float32)
        return PassResult(np.stack(wanted) if wanted else none)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, `(source, target)` each."""
        copy_slots(allocated(self._slots), pairs)

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

    def _logits(self, row: Row, place: int) -> Logits:
        context = self._context(row, place + 1)
        seed = int.from_bytes(hashlib.blake2b(context.tobytes(), digest_size=8).digest(), "little")
        noise = np.random.Generator(np.random.Philox(key=seed))
        return noise.standard_normal(self._info.vocab_size, np.float32) * np.float32(4)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)

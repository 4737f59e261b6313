"""
How llama.cpp writes the KV of a sequence, learned from a state that it wrote; and how it is fed tokens.

`Layout.learn` finds the arrangement that explains such a state to its last byte, and `Layout.cut` and
`Layout.join` go between a state and blocks: a state has a table of all cells for each layer's keys and
values, and a block has the cells of its tokens of every table. Of recurrent models and hybrids it also has
the recurrent state after the last of its tokens, which cannot be cut. The arrangement is llama.cpp's own
and changes between releases, so nothing is taken for granted: what does not come back as the same bytes is
not understood. Source: `llama_kv_cache::state_write` and `llama_memory_recurrent::state_write` of llama.cpp.

`Batches` fills the arrays that tokens go in.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from recollect.runtime.base import Logits
from recollect.runtime.llama_library import Batch

Bytes = npt.NDArray[np.uint8]

MOST_CACHES: Final = 2
"""Of one model: those of all layers, or one for the layers with a sliding window, and another one."""
_PREFIXES: Final = (8, 4, 0)
"""Bytes before the first cache: a magic number and the number of the sequence."""
_EXTRAS: Final = (0, 8, 12, 16)
"""Bytes of a cell besides its position and sequence: positions in an image, the token's id."""
_ROTATIONS: Final = (8, 0)
"""Bytes of a cache's head for the rotation of quantized KV."""
_CELL_BYTES: Final = 12  # position, number of sequences, sequence
_MOST_TABLES: Final = 4096
_COUNT_BYTES: Final = 4
_AT_POSITION: Final = slice(4, 8)
"""Where a recurrent state has the position of its last token, behind the number of cells, which is 1."""


@dataclass(frozen=True, slots=True)
class Table:
    """The keys or the values of one layer, in a state `(outer, cells, inner)` bytes."""

    head: bytes
    """What is written before them: their type and size."""
    outer: int
    """1; or where values are transposed, their number in a cell."""
    inner: int
    """Bytes that lie together: a whole cell's, or one value's."""


@dataclass(frozen=True, slots=True)
class Cache:
    """One KV cache; its cells lie in order of position."""

    head: bytes
    """What is written between cells and tables."""
    extra: int
    tables: tuple[Table, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """
    The arrangement of a state, and of a block's bytes made of it: table after table.

    Immutable. A state written by a context has as many streams as that has sequences; all are empty but one.
    """

    prefix: bytes
    """Of which the last four bytes are the number of the sequence, where there are eight."""
    streams: int
    caches: tuple[Cache, ...]
    block_size: int
    recurrent: int = 0
    """Bytes of the recurrent state, which come last; 0: the model has none."""

    @classmethod
    def learn(
        cls,
        state: Bytes,
        *,
        sequence: int,
        streams: int,
        cells: int,
        block_size: int,
        is_recurrent: bool = False,
    ) -> Self | None:
        """
        Return the arrangement of a state; None where none that is known explains it.

        Args:
            state: What was written of that *sequence*, whose positions are `[0, cells)`, cells >= 2.
            sequence: Its number.
            streams: How many sequences the context has.
            cells: Tokens that it holds.
            block_size: Tokens of a block.
            is_recurrent: Whether a recurrent state comes behind the caches, of which there may be none.
                One state does not show where it begins: what is returned has to be tried on another.
        """
        for prefix, extra, rotation, has_values, count in product(
            _PREFIXES,
            _EXTRAS,
            _ROTATIONS,
            (True, False),
            range(MOST_CACHES, -1, -1) if is_recurrent else range(1, MOST_CACHES + 1),
        ):
            reader = _Reader(state, prefix)
            try:
                caches = tuple(
                    _read_cache(reader, sequence, streams, cells, (extra, rotation, has_values))
                    for _ in range(count)
                )
            except (_UnlikeError, struct.error):
                continue
            recurrent = len(state) - reader.at
            if (recurrent > 0) is not is_recurrent:
                continue
            layout = cls(bytes(state[:prefix]), streams, caches, block_size, recurrent)
            if layout.explains(state, sequence, cells):
                return layout
        return None

    def explains(self, state: Bytes, sequence: int, length: int) -> bool:
        """Return whether a state of a sequence comes back as the same bytes from its blocks."""
        try:
            blocks = self.cut(state, range(-(-length // self.block_size)), length)
        except (ValueError, _UnlikeError):
            return False
        joined = self.join(blocks, range(len(blocks)), sequence, length)
        return np.array_equal(joined, state)

    def with_streams(self, streams: int) -> Self:
        """Return the same of a context with another number of sequences."""
        return replace(self, streams=streams)

    @property
    def bytes_per_block(self) -> int:
        """Return the size of a block."""
        return self._table_bytes + (self.recurrent + _COUNT_BYTES if self.recurrent else 0)

    @property
    def _table_bytes(self) -> int:
        return sum(place.width for place in self._places())

    def text(self) -> str:
        """Return what two arrangements have in common whose blocks can be exchanged."""
        return ";".join(
            f"{cache.extra}:"
            + ",".join(f"{t.head.hex()}x{t.outer}x{t.inner}" for t in cache.tables)
            for cache in self.caches
        ) + (f";recurrent={self.recurrent}" if self.recurrent else "")

    def state_tokens(self, block: Bytes) -> int:
        """Return after how many of a block's tokens its recurrent state is; 0: it has none."""
        return int(block[-_COUNT_BYTES:].view("<i4")[0])

    def cut(self, state: Bytes, indices: Sequence[int], length: int) -> Bytes:
        """
        Return blocks out of a state of *length* tokens, `(blocks, bytes_per_block)`.

        Args:
            state: Of a sequence that holds exactly the positions `[0, length)`. A cache with a sliding
                window shows only its last cells; slots before them are zero.
            indices: Which blocks, ascending and without gaps: block i has `[i * size, (i + 1) * size)`.
            length: Tokens in the sequence. What a last block lacks is zero, and so is the recurrent state
                of all others.

        Raises:
            ValueError: The state is not of this arrangement and length.
        """
        size, count = self.block_size, len(indices)
        blocks = np.zeros((count, self.bytes_per_block), np.uint8)
        start, stop = indices[0] * size, min((indices[-1] + 1) * size, length)
        views = list(self._views(state, length))
        for (cells, rows), place in zip(views, self._places(), strict=True):
            before = length - cells  # of a window only the last ones are there
            first = max(start, before)
            if first < stop:
                shown = rows[:, (first - before) * place.inner : (stop - before) * place.inner]
                _put(shown, place.slots(blocks), (first - start) * place.inner)
        if self.recurrent and (length - 1) // size == indices[-1]:
            own = state[-self.recurrent :]
            if int(own[_AT_POSITION].view("<i4")[0]) != length - 1:
                raise ValueError("the recurrent state is of another length")
            blocks[-1, self._table_bytes : -_COUNT_BYTES] = own
            blocks[-1, -_COUNT_BYTES:] = np.array([(length - 1) % size + 1], "<i4").view(np.uint8)
        return blocks

    def join(self, memory: Bytes, mine: Sequence[int], sequence: int, length: int) -> Bytes:
        """
        Return the state of a sequence of *length* tokens, made of the bytes of its blocks.

        Each byte is copied twice, the first time within the processor's cache: the state of a long
        conversation is as large as its KV, and is in the way of its next token.

        Args:
            memory: All blocks, `(blocks, bytes_per_block)`.
            mine: Which of them are the sequence's, `ceil(length / block_size)`, in order.
            sequence: Its number.
            length: Tokens, >= 1.
        """
        parts = list(self._parts(memory, mine, sequence, length))
        sizes = [
            len(part) if isinstance(part, bytes) else part.outer * part.inner * length
            for part in parts
        ]
        state = np.empty(sum(sizes), np.uint8)
        at = 0
        for part, size in zip(parts, sizes, strict=True):
            room = state[at : at + size]
            if isinstance(part, bytes):
                room[:] = np.frombuffer(part, np.uint8)
            else:
                _take(part.slots(memory, mine), room.reshape(part.outer, -1))
            at += size
        return state

    def _parts(
        self, memory: Bytes, mine: Sequence[int], sequence: int, length: int
    ) -> "Iterator[bytes | _Place]":
        """Yield what a state consists of: bytes, and the places of tables whose rows come there."""
        yield _numbered(self.prefix, sequence)
        places = self._places()
        for cache in self.caches:
            cells = np.zeros((length, _CELL_BYTES + cache.extra), np.uint8)
            cells[:, :4] = np.arange(length, dtype="<i4").view(np.uint8).reshape(length, 4)
            cells[:, 4] = 1
            cells[:, -4:] = np.frombuffer(struct.pack("<i", sequence), np.uint8)
            if cache.extra:
                own = next(places).slots(memory, mine)
                cells[:, 8:-4] = own.reshape(-1, cache.extra)[:length]
            yield struct.pack("<I", self.streams) + bytes(4 * sequence) + struct.pack("<I", length)
            yield cells.tobytes() + cache.head
            for table in cache.tables:
                yield table.head
                yield next(places)
            yield bytes(4 * (self.streams - 1 - sequence))
        if self.recurrent:
            last = memory[mine[-1], self._table_bytes : -_COUNT_BYTES].copy()
            last[_AT_POSITION] = np.array([length - 1], "<i4").view(np.uint8)
            yield last.tobytes()

    def _places(self) -> "Iterator[_Place]":
        """Yield where each table is in a block; the extra bytes of a cache are one, and come first."""
        at = 0
        for cache in self.caches:
            sizes = [(1, cache.extra)] if cache.extra else []
            for outer, inner in [*sizes, *((table.outer, table.inner) for table in cache.tables)]:
                yield (place := _Place(outer, inner, at, outer * inner * self.block_size))
                at += place.width

    def _views(self, state: Bytes, length: int) -> Iterator[tuple[int, Bytes]]:
        """Yield of each table how many cells a state has, and them, `(outer, cells * inner)`."""
        reader = _Reader(state, len(self.prefix))
        for cache in self.caches:
            if reader.number("<I") != self.streams:
                raise ValueError("the state has another number of streams")
            filled = 0
            for _ in range(self.streams):
                count = reader.number("<I")
                if not count:
                    continue
                filled = count
                if count > length:
                    raise ValueError(f"the state has {count} cells, and not up to {length}")
                cells = reader.take(count * (_CELL_BYTES + cache.extra)).reshape(count, -1)
                places = cells[:, :4].copy().view("<i4")[:, 0]
                if not np.array_equal(places, np.arange(length - count, length)):
                    raise ValueError("the state's cells are not in order of position")
                if cache.extra:
                    yield count, np.ascontiguousarray(cells[:, 8:-4]).reshape(1, -1)
                reader.expect(cache.head)
                for table in cache.tables:
                    reader.expect(table.head)
                    rows = reader.take(table.outer * count * table.inner)
                    yield count, rows.reshape(table.outer, -1)
            if not filled:
                raise ValueError("the state is empty")
        if reader.at != len(state) - self.recurrent:
            raise ValueError("the state is longer than it should be")


class _Place(NamedTuple):
    """Where a block has its part of a table."""

    outer: int
    inner: int
    at: int
    """The first byte."""
    width: int
    """Bytes."""

    def slots(self, memory: Bytes, blocks: Sequence[int] | slice = slice(None)) -> Bytes:
        """Return the part of it that blocks have, `(blocks, outer, bytes of a block)`: of all, a view."""
        part = memory[blocks, self.at : self.at + self.width]
        return part.reshape(len(part), self.outer, self.width // self.outer)


class _UnlikeError(Exception):
    """A state is not arranged in the way that was tried."""


class _Reader:
    """Reads a state from its beginning on."""

    def __init__(self, state: Bytes, at: int) -> None:
        self._state = state
        self.at = at

    def take(self, count: int) -> Bytes:
        if count < 0 or self.at + count > len(self._state):
            raise _UnlikeError
        self.at += count
        return self._state[self.at - count : self.at]

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)).tobytes())[0]
        return value

    def expect(self, expected: bytes) -> None:
        if self.take(len(expected)).tobytes() != expected:
            raise ValueError("the state has another head than the one that was learned")


def _read_cache(
    reader: _Reader, sequence: int, streams: int, cells: int, way: tuple[int, int, bool]
) -> Cache:
    """Read one cache in the way to be tried."""
    if reader.number("<I") != streams:
        raise _UnlikeError
    found: Cache | None = None
    for stream in range(streams):
        count = reader.number("<I")
        if count != (cells if stream == sequence else 0):
            raise _UnlikeError
        if count:
            found = _read_content(reader, sequence, cells, *way)
    if found is None:
        raise _UnlikeError
    return found


def _read_content(
    reader: _Reader, sequence: int, cells: int, extra: int, rotation: int, has_values: bool
) -> Cache:
    meta = reader.take(cells * (_CELL_BYTES + extra)).reshape(cells, -1)
    for place, cell in enumerate(meta):
        if struct.unpack("<iI", cell[:8].tobytes()) != (place, 1):
            raise _UnlikeError
        if struct.unpack("<i", cell[-4:].tobytes()) != (sequence,):
            raise _UnlikeError
    start = reader.at
    transposed, layers = reader.number("<I"), reader.number("<I")
    reader.take(rotation)
    head = _between(reader, start)
    if transposed > 1 or not 0 < layers <= _MOST_TABLES:
        raise _UnlikeError
    tables = [_read_table(reader, cells, transposed=False) for _ in range(layers)]
    for _ in range(layers if has_values else 0):  # some attend to one latent vector and have none
        tables.append(_read_table(reader, cells, transposed=bool(transposed)))
    return Cache(head, extra, tuple(tables))


def _read_table(reader: _Reader, cells: int, *, transposed: bool) -> Table:
    start = reader.at
    reader.number("<i")
    inner = reader.number("<I" if transposed else "<Q")
    outer = reader.number("<I") if transposed else 1
    head = _between(reader, start)
    if not 0 < inner < 1 << 24 or not 0 < outer < 1 << 24:
        raise _UnlikeError
    reader.take(outer * cells * inner)
    return Table(head, outer, inner)


def _between(reader: _Reader, start: int) -> bytes:
    length, reader.at = reader.at - start, start
    return reader.take(length).tobytes()


def _numbered(prefix: bytes, sequence: int) -> bytes:
    """Return a prefix with another sequence's number."""
    return prefix if len(prefix) < 8 else prefix[:4] + struct.pack("<i", sequence)


def _take(slots: Bytes, rows: Bytes) -> None:
    """Fill the rows of a table `(outer, bytes)` with those of blocks, `(blocks, outer, bytes of a block)`."""
    step = slots.shape[2]
    whole = rows.shape[1] // step
    rows[:, : whole * step].reshape(len(rows), whole, step)[...] = slots[:whole].transpose(1, 0, 2)
    if rest := rows.shape[1] - whole * step:
        rows[:, -rest:] = slots[whole, :, :rest]


def _put(rows: Bytes, slots: Bytes, at: int) -> None:
    """Write the rows of a table into blocks, shaped as for `_take`, from byte *at* of each row on."""
    step = slots.shape[2]
    block, begun = divmod(at, step)
    if begun:
        part, rows = rows[:, : step - begun], rows[:, step - begun :]
        slots[block, :, begun : begun + part.shape[1]] = part
        block += 1
    whole, rest = divmod(rows.shape[1], step)
    in_blocks = rows[:, : whole * step].reshape(len(rows), whole, step)
    slots[block : block + whole] = in_blocks.transpose(1, 0, 2)
    if rest:
        slots[block + whole, :, :rest] = rows[:, -rest:]


Part = tuple[int, int, Sequence[int], Logits]
"""
What a lane is fed: its number, the position of the first token, the ids, and where the logits after the last
*n* of them are put, `(n, vocab_size)`.
"""


class Batches:
    """
    A batch whose arrays are filled anew for each call, and live as long as a model.

    Making them takes as long as everything else around a single token. Filling the library's own, token by
    token, takes 3 ms for 512 of them.
    """

    def __init__(self, most: int) -> None:
        """Make the arrays for so many tokens."""
        self._tokens = np.zeros(most, np.int32)
        self._places = np.zeros(most, np.int32)
        self._ones = np.ones(most, np.int32)
        self._lanes = np.zeros(most, np.int32)
        self._outputs = np.zeros(most, np.int8)
        # Of each token the address of its lane's number.
        step = self._lanes.itemsize
        self._owners = self._lanes.ctypes.data + step * np.arange(most, dtype=np.uintp)
        number, small = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int8)
        self._batch = Batch(
            0,
            self._tokens.ctypes.data_as(number),
            None,
            self._places.ctypes.data_as(number),
            self._ones.ctypes.data_as(number),
            self._owners.ctypes.data_as(ctypes.POINTER(number)),
            self._outputs.ctypes.data_as(small),
        )

    def fill(self, parts: Sequence[Part]) -> tuple[Batch, list[range]]:
        """Return the batch of some parts, and where in it logits are wanted, for each of them."""
        wanted: list[range] = []
        at = 0
        for lane, start, ids, into in parts:
            end, places = at + len(ids), len(into)
            self._lanes[at:end] = lane
            if end - at == 1:
                self._tokens[at], self._places[at] = ids[0], start
            else:
                self._tokens[at:end] = ids
                self._places[at:end] = np.arange(start, start + end - at)
            self._outputs[at:end] = 0
            self._outputs[end - places : end] = 1
            wanted.append(range(end - places, end))
            at = end
        self._batch.n_tokens = at
        return self._batch, wanted

"""
llama.cpp: any GGUF file, on any device that the library computes on.

Blocks in host memory are the truth. The library has a few sequences, here called lanes, each a cache of
one row of a pass: what a row's lane lacks is joined from blocks into one state and given to the library;
what a pass computes is newer in its lane until somebody wants the block (it is dirty), and is then cut out
of the lane's state. `LlamaCppRuntime` does that. A recurrent state cannot be cut: each block has that after
the last of its tokens. Where the arrangement of states is not understood, `LlamaSequences` serves the
contract for runtimes that own their KV. `load_llama` says which of the two, and on which device. Does not
know which block belongs to which sequence.
"""

import logging
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from recollect.errors import ConfigError, MisuseError, RuntimeFailure
from recollect.runtime.base import (
    Logits,
    PagedRuntime,
    PassResult,
    Row,
    RuntimeInfo,
    SequenceId,
    allocated,
    check_block_bytes,
    check_blocks,
    check_rows,
)
from recollect.runtime.llama_library import KV_TYPES, QUANTIZED, library
from recollect.runtime.llama_model import MOST_DRAFTED, MOST_FED, LlamaModel, LlamaOptions
from recollect.runtime.llama_state import Layout
from recollect.runtime.sequences import Feed, SequenceAdapter, common_length

_log = logging.getLogger(__name__)

_NEVER_WRITTEN: Final = 0

Marks = npt.NDArray[np.int64]
"""One number for each token whose KV was ever computed or brought in: equal marks are the same bytes."""


@dataclass(eq=False, slots=True)
class _Lane:
    """One of the library's sequences."""

    number: int
    marks: Marks = field(default_factory=lambda: np.empty(0, np.int64))
    """Of the tokens whose KV it holds, in order of position."""
    used: int = 0
    """When, on the runtime's clock; 0: never."""
    owner: "weakref.ref[SequenceId] | None" = None
    """Which of the engine's sequences it computed last."""

    def is_of(self, row: Row) -> bool:
        """Return whether it computed the row's sequence last."""
        return row.sequence is not None and self.owner is not None and self.owner() is row.sequence

    def is_wanted(self, row: Row, keep: int) -> bool:
        """Return whether another sequence goes on from more of it than *keep* tokens."""
        owner = None if self.owner is None else self.owner()
        return owner is not None and owner is not row.sequence and owner.kept > keep


@dataclass(slots=True)
class _Job:
    """A row's share of a pass, and how far it is."""

    row: Row
    lane: _Lane
    blocks: npt.NDArray[np.int64]
    at: int
    """The position of the next token to be computed."""
    logits: Logits = field(init=False)
    """Where its logits are put that are still to come, `(n, vocab_size)`."""

    @property
    def end(self) -> int:
        return self.row.past + len(self.row.token_ids)

    def places(self, end: int) -> int:
        """Return after how many of the last tokens before *end*, where a part of it ends, it wants logits."""
        return max(0, end - max(self.at, self.end - self.row.places))


class LlamaCppRuntime:
    """
    A model whose KV is kept in blocks, over the lanes of a context.

    Owned by the engine; one thread at a time, but for `read_block`.

    Invariants:
        1. Every slot of a block has a mark. Two slots, or a slot and a place in a lane, with the same mark
           hold the same bytes; so a lane serves a row exactly as far as their marks are equal.
        2. A block in `_dirty` is held by that lane, at that index, as far as it was ever written; its own
           bytes are older. A copy that nobody has written on is held by the lane of its source.
        3. With a recurrent state: a block's bytes have that after the token with the mark in `_states`, and
           a lane that after its last token. So a lane serves a row only where it ends with the row's past.
    """

    def __init__(self, model: LlamaModel, layout: Layout, *, context_length: int) -> None:
        self.model, self.layout = model, layout
        self._info = model.information(context_length, layout)
        self._size = layout.block_size
        self._step = _step(model, layout)
        self._lanes: list[_Lane] = []
        self._blocks: npt.NDArray[np.uint8] | None = None
        self._marks = np.empty((0, self._size), np.int64)
        self._states = np.empty(0, np.int64)
        self._dirty: dict[int, tuple[_Lane, int]] = {}
        self._last_mark = _NEVER_WRITTEN
        self._clock = 0

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is."""
        return self._info

    @property
    def lane_lengths(self) -> list[int]:
        """Return how many tokens each lane holds KV of."""
        return [len(lane.marks) for lane in self._lanes]

    def allocate(self, num_blocks: int) -> None:
        """Make room for that many blocks, and for lanes in the device's memory."""
        assert self._info.lanes is not None, "it has a layout"
        # No row is longer than all blocks, so lanes need not be.
        lanes, room = self._info.lanes.of_pool(num_blocks * self._size, self._info.context_length)
        self._open(room, lanes)
        self._blocks = np.zeros((num_blocks, self.layout.bytes_per_block), np.uint8)
        self._marks = np.full((num_blocks, self._size), _NEVER_WRITTEN, np.int64)
        self._states = np.full(num_blocks, _NEVER_WRITTEN, np.int64)
        pace = replace(self._info.pace, most_rows=min(self._info.pace.most_rows, len(self._lanes)))
        held = replace(self._info.lanes, most=len(self._lanes))
        self._info = replace(self._info, pace=pace, lanes=held)

    def forward(self, rows: Sequence[Row]) -> PassResult:
        """Run one forward pass over the rows, or several where there are more than lanes."""
        with self.model.lock:
            check_rows(rows, self._info, len(allocated(self._blocks)))
            places = sum(row.places for row in rows)
            logits = into = np.empty((places, self._info.vocab_size), np.float32)
            for first in range(0, len(rows), len(self._lanes)):
                into = self._pass(rows[first : first + len(self._lanes)], into)
            return PassResult(logits)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, `(source, target)` each."""
        with self.model.lock:
            memory = allocated(self._blocks)
            check_blocks([block for pair in pairs for block in pair], len(memory))
            for source, target in pairs:
                if self.layout.recurrent:
                    self._settle([source])
                self._dirty.pop(target, None)
                if (held := self._dirty.get(source)) is not None:
                    # Not taken out: that takes as long for one block as for the whole lane.
                    self._dirty[target] = held
                else:
                    memory[target] = memory[source]
                self._marks[target] = self._marks[source]
                self._states[target] = self._states[source]

    def warm_up(self) -> None:
        """Run a small prefill and a decode step, for which kernels are compiled and memory is touched."""
        prompt = [0] * self._size
        if len(allocated(self._blocks)) > 1 and self._info.context_length > len(prompt) + 1:
            self.forward([Row(prompt, 0, [0, 1])])
            self.forward([Row([0], len(prompt), [0, 1])])

    def read_block(self, block: int, into: memoryview) -> None:
        """Copy a block's bytes to *into*; where a lane has newer ones, after the pass that runs."""
        memory = allocated(self._blocks)
        check_blocks([block], len(memory))
        check_block_bytes(into, self._info)
        with self.model.lock:
            self._settle([block])
            np.frombuffer(into, np.uint8)[:] = memory[block]

    def write_block(self, block: int, content: memoryview) -> None:
        """Make a block hold bytes that `read_block` gave."""
        memory = allocated(self._blocks)
        check_blocks([block], len(memory))
        check_block_bytes(content, self._info)
        with self.model.lock:
            self._dirty.pop(block, None)
            memory[block] = np.frombuffer(content, np.uint8)
            self._marks[block] = self._new_marks(self._size)
            if self.layout.recurrent:
                count = self.layout.state_tokens(memory[block])
                is_there = 0 < count <= self._size
                self._states[block] = self._marks[block, count - 1] if is_there else _NEVER_WRITTEN

    def close(self) -> None:
        """Free the model and all KV."""
        with self.model.lock:
            self._blocks = None
            self._dirty.clear()
            self._lanes.clear()
            self.model.close()

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        with self.model.lock:
            for block, (lane, index) in self._dirty.items():
                start = index * self._size
                marks = self._marks[block, : self._filled(block)]
                held = lane.marks[start : start + len(marks)]
                assert len(marks), f"block {block} is dirty, and nothing was written to it"
                assert np.array_equal(held, marks), f"block {block} is not in its lane"

    def _open(self, room: int, lanes: int) -> None:
        """Open the context with as many lanes, for *room* tokens each, as there is memory for."""
        wanted = lanes
        while True:
            try:
                self.model.open(room, lanes)
                break
            except RuntimeFailure:
                if lanes > 1:
                    lanes //= 2
                elif self.model.put_less_on_cards():
                    self.layout = self.model.require_layout()
                    self._info = self.model.information(self._info.context_length, self.layout)
                else:
                    raise
        if lanes < wanted:
            _log.warning("There is memory for %d of %d sequences at once only.", lanes, wanted)
        self._lanes = [_Lane(number) for number in range(lanes)]
        self.layout = self.layout.with_streams(lanes)

    def _filled(self, block: int) -> int:
        """Return how many leading slots of a block were ever written."""
        return int(np.count_nonzero(self._marks[block] != _NEVER_WRITTEN))

    def _new_marks(self, count: int) -> Marks:
        self._last_mark += count
        return np.arange(self._last_mark - count, self._last_mark, dtype=np.int64) + 1

    def _pass(self, rows: Sequence[Row], into: Logits) -> Logits:
        """Compute rows that have a lane each, put the logits into places, and return those that are left."""
        jobs: list[_Job] = []
        for row in rows:
            used = [job.lane for job in jobs]
            job = self._place(row, [lane for lane in self._lanes if lane not in used])
            job.logits, into = into[: row.places], into[row.places :]
            jobs.append(job)
        # One row's slots are another row's past nowhere: so marks can be set for all of them first.
        while todo := [job for job in jobs if job.at < job.end]:
            self._advance(todo)
        return into

    def _advance(self, jobs: Sequence[_Job]) -> None:
        """Compute as much of the jobs as one call takes."""
        room, places = MOST_FED, len(self._lanes) + MOST_DRAFTED
        parts: list[tuple[_Job, int]] = []
        # Ascending lanes that follow each other are computed together; others one after another.
        for job in sorted(jobs, key=lambda one: one.lane.number):
            end = min(job.end, job.at + room, (job.at // self._step + 1) * self._step)
            if end > job.at and job.places(end) <= places:
                parts.append((job, end))
                room -= end - job.at
                places -= job.places(end)
        try:
            self.model.decode(
                [
                    (
                        job.lane.number,
                        job.at,
                        job.row.token_ids[job.at - job.row.past : end - job.row.past],
                        job.logits[: job.places(end)],
                    )
                    for job, end in parts
                ]
            )
        except BaseException:
            for job, _ in parts:
                if self.layout.recurrent:
                    self._lose(job.lane)
                else:  # what the lanes held before is still there, and maybe more than is noted
                    with suppress(RuntimeFailure):
                        self._truncate(job.lane, job.at)
            raise
        for job, end in parts:
            job.logits = job.logits[job.places(end) :]
            self._note(job, end)

    def _note(self, job: _Job, end: int) -> None:
        """Take note that a lane now has a job's tokens up to *end*."""
        size = self._size
        marks = np.concatenate([job.lane.marks, self._new_marks(end - job.at)])
        for index in range(job.at // size, -(-end // size)):
            block, start = int(job.blocks[index]), index * size
            first, beyond = max(start, job.at), min(start + size, end)
            self._marks[block, first - start : beyond - start] = marks[first:beyond]
            self._marks[block, beyond - start :] = _NEVER_WRITTEN
            self._dirty[block] = (job.lane, index)
        job.lane.marks = marks
        if job.row.sequence is not None:
            job.row.sequence.computed_to(end)
        job.at = end
        # What leaves the window now, or this recurrent state, is in no lane any more.
        if end % self._step == 0:
            self._settle([block for block, (lane, _) in self._dirty.items() if lane is job.lane])

    def _place(self, row: Row, free: Sequence[_Lane]) -> _Job:
        """Return a job in a lane that holds the KV of exactly the row's past."""
        size, past = self._size, row.past
        count = -(-(past + len(row.token_ids)) // size)
        blocks = np.asarray(row.block_table[:count], np.int64)
        wanted = self._marks[blocks].reshape(-1)[:past]
        lane, keep = _choose(row, free, wanted, in_full=self.layout.recurrent > 0)
        if keep < past and wanted.min() == _NEVER_WRITTEN:
            raise RuntimeFailure("A row reads KV slots that nothing was ever written to.")
        self._clock += 1
        lane.used = self._clock
        lane.owner = None if row.sequence is None else weakref.ref(row.sequence)
        if keep < past:
            self._load(lane, blocks, wanted)
        elif past and self.layout.recurrent:
            of_others = [
                block
                for block, (owner, index) in self._dirty.items()
                if owner is lane and blocks[index] != block
            ]
            self._settle(of_others)  # this state is gone when the lane goes on
        else:
            self._make_room(lane, past, blocks)
        if past % size:
            # Only this row writes that block now. What a lane had of its later slots is gone.
            self._marks[blocks[past // size], past % size :] = _NEVER_WRITTEN
        return _Job(row, lane, blocks, past)

    def _load(self, lane: _Lane, blocks: npt.NDArray[np.int64], marks: Marks) -> None:
        """Give a lane the KV of blocks."""
        mine = blocks[: -(-len(marks) // self._size)]
        self._settle([int(block) for block in mine])
        if self.layout.recurrent and self._states[mine[-1]] != marks[-1]:
            raise RuntimeFailure("A row goes on from where no recurrent state was kept.")
        self._make_room(lane, 0, blocks[:0])
        state = self.layout.join(allocated(self._blocks), mine.tolist(), lane.number, len(marks))
        self.model.set_state(lane.number, state)
        lane.marks = marks.copy()

    def _make_room(self, lane: _Lane, length: int, own: npt.NDArray[np.int64]) -> None:
        """Truncate a lane; first take out what others may still want of its end."""
        if 0 < length == len(lane.marks):
            return
        if length < len(lane.marks):
            lost = [
                block
                for block, (owner, index) in self._dirty.items()
                if owner is lane
                and index * self._size + self._filled(block) > length
                and not (index < len(own) and own[index] == block)
            ]
            self._settle(lost)
        self._truncate(lane, length)

    def _truncate(self, lane: _Lane, length: int) -> None:
        """Have a lane hold *length* tokens, at most as many as it has."""
        if not self.model.truncate(lane.number, length):
            self._lose(lane)
            raise RuntimeFailure("llama.cpp could not truncate a sequence; it is read again.")
        lane.marks = lane.marks[:length]
        for block, (owner, index) in list(self._dirty.items()):
            if owner is lane and index * self._size >= length:
                del self._dirty[block]

    def _lose(self, lane: _Lane) -> None:
        """Give up a lane whose state is undefined, and with it what only that lane has."""
        for block, (owner, _) in list(self._dirty.items()):
            if owner is lane:
                self._marks[block] = _NEVER_WRITTEN
                del self._dirty[block]
        lane.marks = lane.marks[:0]
        self.model.truncate(lane.number, 0)

    def _settle(self, blocks: Sequence[int]) -> None:
        """Take what lanes have newer of these blocks, and of all others of these lanes, into the blocks."""
        for lane in {self._dirty[block][0] for block in blocks if block in self._dirty}:
            held = [
                (block, index) for block, (owner, index) in self._dirty.items() if owner is lane
            ]
            state = self.model.state(lane.number)
            first, last = min(index for _, index in held), max(index for _, index in held)
            try:
                cut = self.layout.cut(state, range(first, last + 1), len(lane.marks))
            except ValueError as cause:
                raise RuntimeFailure(f"llama.cpp's state is not as it was: {cause}.") from cause
            memory = allocated(self._blocks)
            for block, index in held:
                memory[block] = cut[index - first]
                del self._dirty[block]
                if index == last:
                    self._states[block] = lane.marks[-1]


def _choose(row: Row, free: Sequence[_Lane], wanted: Marks, *, in_full: bool) -> tuple[_Lane, int]:
    """
    Return the lane that serves a row, and how much of its past the lane holds.

    One that holds all of it is truncated, unless that would lose more than it keeps, or what another
    sequence still goes on from. Otherwise the blocks are loaded into the lane that was used the longest ago.
    A lane that cannot be truncated serves *in_full* or not at all.
    """
    for lane in free:  # the usual case: a reply goes on where it was
        if lane.is_of(row) and len(lane.marks) == row.past and np.array_equal(lane.marks, wanted):
            return lane, row.past
    keeps = {
        lane.number: 0
        if in_full and len(lane.marks) > row.past
        else common_length(lane.marks, wanted)
        for lane in free
    }
    eldest = min(free, key=lambda lane: (lane.is_wanted(row, keeps[lane.number]), lane.used))
    holding = [lane for lane in free if keeps[lane.number] == row.past]
    if row.past and holding:
        least = min(holding, key=lambda lane: (len(lane.marks), lane.used))
        lost = len(least.marks) - row.past
        if lost <= row.past and not (lost and least.is_wanted(row, row.past)):
            return least, row.past
    return eldest, keeps[eldest.number]


def _step(model: LlamaModel, layout: Layout) -> int:
    """
    Return after how many tokens KV is taken out before it is gone: of a sliding window, or a state.

    Returns:
        0 if no number of whole blocks will do.
    """
    size, window = layout.block_size, model.window
    if not window:
        return size if layout.recurrent else 1 << 30
    steps = [step for step in range(size, window // 2 + 1, size) if window % step == 0]
    return max((one for one in steps if one == size or not layout.recurrent), default=0)


class LlamaSequences:
    """
    A model whose states are arranged in a way that is not understood: what a sequence lacks is replayed.

    A `SequenceRuntime`. Owned by its adapter.
    """

    def __init__(self, model: LlamaModel, *, context_length: int) -> None:
        self.model = model
        self._info = model.information(context_length, None)
        self._lengths: dict[int, int] = {}

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is."""
        return self._info

    def allocate(self, tokens: int) -> int:
        """Make the context; return how many sequences it has."""
        length = self._info.context_length
        lanes = max(1, min(self.model.options.lanes, tokens // length))
        self.model.open(min(length, tokens), lanes)
        return lanes

    def extend(self, feeds: Sequence[Feed]) -> Logits:
        """Append tokens to sequences; see `SequenceRuntime.extend`."""
        wanting = sum(feed.wants_logits for feed in feeds)
        logits = left = np.empty((wanting, self._info.vocab_size), np.float32)
        with self.model.lock:
            for feed in feeds:
                into, left = left[: feed.wants_logits], left[feed.wants_logits :]
                for start in range(0, len(feed.token_ids), MOST_FED):
                    ids = feed.token_ids[start : start + MOST_FED].tolist()
                    is_last = start + len(ids) == len(feed.token_ids)
                    part = feed.sequence, feed.past + start, ids, into[: len(into) * is_last]
                    self.model.decode([part])
        return logits

    def truncate(self, sequence: int, length: int) -> bool:
        """Cut a sequence, if its state can be cut."""
        with self.model.lock:
            return self.model.truncate(sequence, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Refuse: its streams are not copied one by one."""
        raise MisuseError(f"sequence {source} cannot be copied to {target}, up to {length}")

    def close(self) -> None:
        """Free the model and its KV."""
        self.model.close()


def load_llama(path: Path, *, context_length: int, options: LlamaOptions) -> PagedRuntime:
    """
    Return the runtime of a GGUF file, which has no memory for KV yet.

    Raises:
        UnsupportedModelError: The library is missing, or cannot run this file.
        ConfigError: There is no such KV type, or no graphics card for the layers that are asked for.
        RuntimeFailure: There is no memory for it.
    """
    if options.kv_type is not None and options.kv_type not in KV_TYPES:
        raise ConfigError(
            f"There is no KV type {options.kv_type!r}: choose one of {', '.join(KV_TYPES)}."
        )
    if options.profile == "exact" and options.kv_type in QUANTIZED:
        raise ConfigError(
            f"Profile exact has plain attention, and with KV of {options.kv_type} llama.cpp has flash "
            "attention alone: take another --kv-type, or --profile small."
        )
    lib = library()
    model = LlamaModel(lib, path, options)
    try:
        layout = model.learn()
        model.close_context()
        if layout is not None and _step(model, layout):
            return LlamaCppRuntime(model, layout, context_length=context_length)
        return SequenceAdapter(LlamaSequences(model, context_length=context_length))
    except BaseException:
        model.close()
        raise

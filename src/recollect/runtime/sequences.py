"""
Runtimes that own their KV: the protocol for them, and the adapter that puts them behind `PagedRuntime`.

Libraries such as ONNX Runtime GenAI and llama.cpp keep KV to themselves, in sequences that they number.
They append tokens to a sequence, cut its end off, and some copy one. `SequenceAdapter` serves the paged
contract with that: a block's slots hold no KV but the token ids that were written to them, so that the
block table of a row yields its history, and a sequence of the library that holds a beginning of the
history computes the rest. A mistake in a block table changes the output here too.

Does not know which library it is. The adapter owns the note of what each of the library's sequences
holds; the library owns the KV.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from recollect.errors import RuntimeFailure
from recollect.runtime.base import (
    Logits,
    PassResult,
    Row,
    RuntimeInfo,
    SequenceId,
    allocated,
    check_blocks,
    check_rows,
)

TokenArray = npt.NDArray[np.int32]

FAR_MORE: Final = 4
"""
How many times more tokens a cut may lose than it keeps, while there is room for another sequence.

Computing a beginning again costs what a cut keeps, for certain; a cut costs what it loses, if that is
wanted again. So an undo and a short fork cut, and a second conversation that begins with the same
instructions gets a sequence of its own.
"""


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens that a pass appends to one of the library's sequences."""

    sequence: int
    past: int
    """Tokens that the sequence holds already."""
    token_ids: TokenArray
    """Shape `(n,)`, n >= 1."""
    wants_logits: bool


class SequenceRuntime(Protocol):
    """
    A forward pass over sequences whose KV the library keeps; they are numbered from 0.

    Not thread-safe: the engine calls it from one thread at a time. In llama.cpp `extend` is a batch and
    `llama_decode`, `truncate` is `llama_memory_seq_rm(memory, sequence, length, -1)`, `copy` is
    `llama_memory_seq_cp(memory, source, target, 0, length)`, and `allocate` makes the context, with room
    for a full one in each of `n_seq_max` sequences.
    """

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is; `reuse.copies` says whether `copy` works."""

    def allocate(self, tokens: int) -> int:
        """
        Make room for that many tokens of KV, once; return how many sequences that is, at least one.

        Raises:
            RuntimeFailure: The memory cannot be had.
        """

    def extend(self, feeds: Sequence[Feed]) -> Logits:
        """
        Append tokens to sequences, each of them once.

        Returns:
            New logits after the last token of the feeds that want them, `(wanted, vocab_size)`.

        Raises:
            RuntimeFailure: It failed. What these sequences hold is then undefined.
        """

    def truncate(self, sequence: int, length: int) -> bool:
        """
        Cut a sequence to its first *length* tokens; return whether that was possible.

        To 0 always is, also after a failure. Otherwise it holds what it held.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """Make an empty sequence hold the first *length* tokens of another, where `reuse.copies`."""

    def close(self) -> None:
        """Free the model and all KV; the runtime cannot be used afterwards."""


@dataclass(frozen=True, slots=True)
class LiveHistory:
    """What one of the library's sequences holds KV for."""

    token_ids: TokenArray
    is_long: bool = False
    """Whether it was computed with the position encoding of long histories; see `uses_long_rope`."""
    wanted: int = 0
    """Leading tokens of it that another of the engine's sequences still goes on from."""


@dataclass(frozen=True, slots=True)
class ReusePlan:
    """Cut the sequence at `index` to `keep` tokens, or a copy of it; with no index, begin a new one."""

    index: int | None
    keep: int
    copies: bool = False


def uses_long_rope(length: int, short_rope_length: int | None) -> bool:
    """
    Return whether a history of that length is computed with another position encoding.

    LongRoPE has two sets of factors and chooses by the length of the whole history, so that KV of one
    side is wrong on the other.
    """
    return short_rope_length is not None and length > short_rope_length


def common_length(first: TokenArray, second: TokenArray) -> int:
    """Return how many leading ids two histories share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def plan_reuse(
    history: TokenArray,
    past: int,
    live: Sequence[LiveHistory],
    *,
    has_room: bool,
    can_copy: bool = False,
    short_rope_length: int | None = None,
) -> ReusePlan:
    """
    Return the plan for computing `history[past:]`, where it is not known whose history that is.

    The longest common prefix wins; of equals the one that loses the least, then the one used last. Where
    that would take tokens from another sequence, or lose far more than it keeps, it is copied. Where the
    library cannot copy, and there is room, the common part is computed again in a new sequence.

    Args:
        history: All ids up to the end of the row, shape `(n,)`, n > past.
        past: Leading ids that the engine takes for computed. No more than these are kept: the rest could
            be another namespace's.
        live: What there is, the least recently used first.
        has_room: Whether another sequence can begin without evicting one.
        can_copy: Whether the library can copy a sequence.
        short_rope_length: See `Reuse.short_rope_length`.
    """
    is_long = uses_long_rope(len(history), short_rope_length)
    best = ReusePlan(None, 0)
    best_lost, wanted = 0, 0
    for index, held in enumerate(live):
        if held.is_long is not is_long:
            continue
        keep = min(common_length(held.token_ids, history[:past]), past)
        lost = len(held.token_ids) - keep
        if keep and (keep > best.keep or (keep == best.keep and lost <= best_lost)):
            best, best_lost, wanted = ReusePlan(index, keep), lost, held.wanted
    spoils = best_lost > FAR_MORE * best.keep
    if can_copy:
        return replace(best, copies=wanted > 0 or (spoils and has_room))
    if has_room and (spoils or wanted > best.keep):
        return ReusePlan(None, 0)
    return best


@dataclass(eq=False, slots=True)
class _Held:
    """One of the library's sequences, and what it holds."""

    number: int
    token_ids: TokenArray
    is_long: bool = False
    owner: "weakref.ref[SequenceId] | None" = None
    """Which of the engine's sequences it computed last."""

    def is_of(self, *sequences: SequenceId | None) -> bool:
        """Return whether one of these computed it last."""
        owner = None if self.owner is None else self.owner()
        return owner is not None and owner in sequences

    def history(self, sequence: SequenceId | None, used: "Sequence[_Held]") -> LiveHistory:
        """Return what it holds, as *sequence* finds it in a pass for which those in *used* are taken."""
        owner = None if self.owner is None else self.owner()
        wanted = 0 if owner is None or owner is sequence else min(owner.kept, len(self.token_ids))
        if self in used:
            wanted = len(self.token_ids)
        return LiveHistory(self.token_ids, self.is_long, wanted)


class SequenceAdapter:
    """
    A `SequenceRuntime` behind the paged contract.

    Owned by the engine; one thread at a time. By `Row.sequence` a row goes on in the library's sequence that
    computed it last, or a fork in that of its origin, and takes no tokens from those that others still
    want. Where that does not have all of it, as for the next turn of a conversation, which comes as a new
    sequence, all are compared by their token ids.

    Invariants:
        1. A number is free, or held by exactly one entry of `_held`, whose order is that of the last use.
        2. The library's sequence holds the KV of exactly the tokens noted for it: one that failed is given
           up.
    """

    def __init__(self, runtime: SequenceRuntime) -> None:
        self._runtime = runtime
        reuse = replace(runtime.info.reuse, as_bytes=False)  # the library gives no KV away
        self._info = replace(runtime.info, reuse=reuse)
        self._slots: TokenArray | None = None
        self._held: list[_Held] = []
        self._free: list[int] = []

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is."""
        return self._info

    def allocate(self, num_blocks: int) -> None:
        """Make room for the ids of that many blocks, and have the library make room for their KV."""
        count = self._runtime.allocate(num_blocks * self._info.block_size)
        self._slots = np.full((num_blocks, self._info.block_size), -1, np.int32)
        self._free = list(reversed(range(count)))
        pace = self._info.pace
        self._info = replace(self._info, pace=replace(pace, most_rows=min(pace.most_rows, count)))

    def forward(self, rows: Sequence[Row]) -> PassResult:
        """Run one forward pass over the rows, or several where there are more than sequences."""
        slots = allocated(self._slots)
        check_rows(rows, self._info, len(slots))
        histories = [_write(slots, row) for row in rows]
        if any((history < 0).any() for history in histories):
            raise RuntimeFailure("A row reads KV slots that nothing was ever written to.")
        most = len(self._held) + len(self._free)
        parts = [slice(first, first + most) for first in range(0, len(rows), most)]
        results = [self._extend(rows[part], histories[part]) for part in parts]
        if len(results) == 1:
            return results[0]
        logits = np.concatenate([result.logits for result in results])
        return PassResult(logits, [start for result in results for start in result.starts])

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy what is known of whole blocks, `(source, target)` each."""
        slots = allocated(self._slots)
        check_blocks([block for pair in pairs for block in pair], len(slots))
        for source, target in pairs:
            slots[target] = slots[source]

    def warm_up(self) -> None:
        """Do nothing: such a library is ready when it is loaded."""

    def read_block(self, block: int, into: memoryview) -> None:  # noqa: ARG002 - the contract's
        """Refuse: there is no KV in blocks."""
        raise self._no_bytes()

    def write_block(self, block: int, content: memoryview) -> None:  # noqa: ARG002 - the contract's
        """Refuse: there is no KV in blocks."""
        raise self._no_bytes()

    def close(self) -> None:
        """Free the library's model and its KV."""
        self._held.clear()
        self._slots = None
        self._runtime.close()

    def _no_bytes(self) -> RuntimeFailure:
        return RuntimeFailure(
            f"{self._info.name} keeps its KV to itself: it cannot be put on disk (--kv-disk 0)."
        )

    def _extend(self, rows: Sequence[Row], histories: Sequence[TokenArray]) -> PassResult:
        """Compute rows that have a sequence of the library each."""
        used: list[_Held] = []
        feeds: list[Feed] = []
        for row, history in zip(rows, histories, strict=True):
            held = self._place(row, history, used)
            used.append(held)
            past = len(held.token_ids)
            feeds.append(Feed(held.number, past, history[past:], row.wants_logits))
        try:
            logits = self._runtime.extend(feeds)
        except BaseException:  # what they hold is undefined, whatever ended the pass
            for held in used:
                self._drop(held)
            raise
        for row, history, held in zip(rows, histories, used, strict=True):
            held.token_ids = history
            held.is_long = uses_long_rope(len(history), self._info.reuse.short_rope_length)
            if row.sequence is not None:
                row.sequence.computed_to(len(history))
        return PassResult(logits, [feed.past for feed in feeds])

    def _place(self, row: Row, history: TokenArray, used: Sequence[_Held]) -> _Held:
        """Return a sequence of the library that holds a beginning of the history and nothing else."""
        source, plan = self._find(row, history, used)
        held: _Held | None = None
        if source is not None and plan.copies:
            held = self._copied(source, plan.keep, used)
        if source is not None and held is None and source not in used:
            held = self._cut(source, plan.keep)
        if held is None:
            held = self._begun([*used])
            assert held is not None, "a pass has no more rows than there are sequences"
        if row.sequence is not None:
            for former in self._held:
                if former.is_of(row.sequence):
                    former.owner = None
        held.owner = None if row.sequence is None else weakref.ref(row.sequence)
        self._held.remove(held)
        self._held.append(held)
        return held

    def _find(
        self, row: Row, history: TokenArray, used: Sequence[_Held]
    ) -> tuple[_Held | None, ReusePlan]:
        """Return where to go on: in the row's own sequence, its origin's, or the one with the most of it."""
        reuse, sequence = self._info.reuse, row.sequence
        live = [held for held in self._held if reuse.copies or held not in used]
        known = [] if sequence is None else [h for h in live if h.is_of(sequence, sequence.origin)]
        for some in (known, live):
            plan = plan_reuse(
                history,
                row.past,
                [held.history(sequence, used) for held in some],
                has_room=bool(self._free),
                can_copy=reuse.copies,
                short_rope_length=reuse.short_rope_length,
            )
            if plan.keep == row.past:
                break  # nothing has more
        return (None if plan.index is None else some[plan.index]), plan

    def _copied(self, source: _Held, keep: int, used: Sequence[_Held]) -> _Held | None:
        """Return a copy of a sequence's beginning; None where there is no other to put it into."""
        held = self._begun([*used, source])
        if held is not None:
            self._runtime.copy(source.number, held.number, keep)
            held.token_ids, held.is_long = source.token_ids[:keep], source.is_long
        return held

    def _cut(self, held: _Held, keep: int) -> _Held | None:
        """Return a sequence cut to its beginning; None where the library cannot: then it is given up."""
        if keep < len(held.token_ids):
            if not self._runtime.truncate(held.number, keep):
                self._drop(held)
                return None
            held.token_ids = held.token_ids[:keep]
        return held

    def _begun(self, needed: Sequence[_Held]) -> _Held | None:
        """Return an empty sequence, for which the least recently used one that is not needed may go."""
        if not self._free:
            eldest = next((held for held in self._held if held not in needed), None)
            if eldest is None:
                return None
            self._drop(eldest)
        held = _Held(self._free.pop(), np.empty(0, np.int32))
        self._held.append(held)
        return held

    def _drop(self, held: _Held) -> None:
        """Make one of the library's sequences empty and free."""
        self._held.remove(held)
        self._runtime.truncate(held.number, 0)
        self._free.append(held.number)


def _write(slots: TokenArray, row: Row) -> TokenArray:
    """Write a row's ids into their slots, and return what its table then yields up to its end."""
    size = slots.shape[1]
    end = row.past + len(row.token_ids)
    positions = np.arange(row.past, end)
    table = np.asarray(row.block_table[: -(-end // size)], np.int64)
    slots[table[positions // size], positions % size] = row.token_ids
    return slots[table].reshape(-1)[:end]

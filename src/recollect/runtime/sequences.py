"""
Runtimes that own their KV: the protocol, the adapter that puts them behind `PagedRuntime`, and GenAI's.

Libraries such as ONNX Runtime GenAI and llama.cpp keep KV to themselves, in sequences that they number.
They append tokens to a sequence, cut its end off, and some copy one. `SequenceAdapter` serves the paged
contract with that: a block's slots hold no KV but the token ids that were written to them, so that the
block table of a row yields its history, and a sequence of the library that holds a beginning of the
history computes the rest. A mistake in a block table changes the output here too. The adapter does not know
which library it is. It owns the note of what each of the library's sequences holds; the library owns the KV.

`GenAiRuntime` runs folders for ONNX Runtime GenAI. Its generators are the sequences: one appends tokens, is
rewound, and gives logits; it cannot be copied. The library is never asked to sample.
"""

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from recollect.errors import MisuseError, RuntimeFailure, UnsupportedModelError
from recollect.runtime.base import (
    Logits,
    PassResult,
    Reuse,
    Row,
    RuntimeInfo,
    SequenceId,
    allocated,
    check_rows,
    copy_slots,
    mapped_errors,
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


def common_length(first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> int:
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
        copy_slots(allocated(self._slots), pairs)

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


BLOCK_SIZE: Final = 32
"""Token slots per block: any number would do, and this is the other runtimes'."""

MOST_LIVE: Final = 4
"""Live generators: one conversation, and others or its forks. Each has KV for a full context."""

_BYTES_PER_NUMBER: Final = 4
"""Of KV. f32 on the CPU; where a folder has f16, KV takes half of what the budget allows."""

SHORT_ROPE_LENGTHS: Final = {"phi3": 4096, "phimoe": 4096, "phi4mm": 4096, "phi3small": 8192}
"""
The last length with the short factors, by the library's name of the architecture.

Source: the library's own recomputation in `Generator::GenerateNextToken`, which appended prompts
do not get.
"""


class GenAiRuntime:
    """
    A model of ONNX Runtime GenAI, and its generators.

    Owned by the engine; one thread at a time. Where the model is, the library sees a private folder
    with links to its files, and settings of ours.

    Args:
        settings: What genai_config.json would say, checked: `LocalModel.onnx_config`.
        native_library: The operators that the settings name, if they name any.

    Raises:
        UnsupportedModelError: The library is missing, or cannot run this folder.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        context_length: int,
        native_library: Path | None = None,
    ) -> None:
        self._library = _import_library()
        # What the library reads is made of what was checked: the folder may change, and two
        # readers of one text may understand it differently.
        private = _private_folder(folder, settings, native_library)
        self._remove_private = weakref.finalize(self, shutil.rmtree, private, ignore_errors=True)
        try:
            self._model = self._library.Model(str(private))
        except RuntimeError as cause:
            self._remove_private()
            raise UnsupportedModelError(
                f"ONNX Runtime GenAI {self._library.__version__} cannot load {folder} ({cause}): a "
                "folder made for another execution provider needs that vendor's build of the "
                "library; docs/ryzen-ai.md says how to get AMD's."
            ) from cause
        config = settings["model"]
        self._pad_token_id = config.get("pad_token_id")
        self._info = RuntimeInfo(
            name=f"onnxruntime-genai-{self._library.__version__}-{self._model.device_type}",
            block_size=BLOCK_SIZE,
            bytes_per_block=BLOCK_SIZE * _kv_bytes_per_token(config["decoder"]),
            vocab_size=config["vocab_size"],
            context_length=context_length,
            device=self._model.device_type,
            reuse=Reuse(short_rope_length=_short_rope_length(config, context_length)),
        )
        self._generators: dict[int, Any] = {}
        self._max_length = 0

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is."""
        return self._info

    def allocate(self, tokens: int) -> int:
        """Return how many generators these tokens stand for; each has room for a full context."""
        self._max_length = min(self._info.context_length, tokens)
        return max(1, min(MOST_LIVE, tokens // self._info.context_length))

    def extend(self, feeds: Sequence[Feed]) -> Logits:
        """Append tokens to generators, one after another; see `SequenceRuntime.extend`."""
        wanted: list[Logits] = []
        for feed in feeds:
            generator = self._generators.get(feed.sequence) or self._new(feed.sequence)
            with mapped_errors("running the model"):
                generator.append_tokens(feed.token_ids)
                logits = self._logits(generator, int(feed.token_ids[-1]))
            if feed.wants_logits:
                wanted.append(logits)
        return np.stack(wanted) if wanted else np.empty((0, self._info.vocab_size), np.float32)

    def truncate(self, sequence: int, length: int) -> bool:
        """Rewind a generator, which some devices and pipelines cannot, or free it."""
        if length == 0:
            self._generators.pop(sequence, None)
            return True
        try:
            self._generators[sequence].rewind_to(length)
        except RuntimeError:
            return False
        return True

    def copy(self, source: int, target: int, length: int) -> None:
        """Refuse: a generator cannot be copied."""
        raise MisuseError(f"generator {source} cannot be copied to {target}, up to {length}")

    def close(self) -> None:
        """Free the model and its generators."""
        self._generators.clear()
        self._model = None
        self._remove_private()

    def _logits(self, generator: Any, last_token: int) -> Logits:
        """
        Return the logits after the last token.

        `get_logits` takes padding at the end of what was appended for no text, and gives the logits
        of the token before. Where the padding token also ends a turn, as in many chat models, that
        is wrong; the whole output, which is then copied, is right. Source: docs/og.md.
        """
        if last_token == self._pad_token_id:
            logits = generator.get_output("logits")
        else:
            logits = generator.get_logits()
        return np.array(logits, np.float32).reshape(-1, logits.shape[-1])[
            -1, : self._info.vocab_size
        ]

    def _new(self, sequence: int) -> Any:
        with mapped_errors("making room for another conversation"):
            params = self._library.GeneratorParams(self._model)
            params.set_search_options(max_length=self._max_length)
            self._generators[sequence] = self._library.Generator(self._model, params)
        return self._generators[sequence]


_CONFIG_NAME: Final = "genai_config.json"


def _private_folder(folder: Path, settings: Mapping[str, Any], native_library: Path | None) -> Path:
    """Return a folder that only the user can change, which looks like *folder* with other settings."""
    place = None
    try:
        place = Path(tempfile.mkdtemp(prefix="recollect-"))
        (place / _CONFIG_NAME).write_text(json.dumps(settings), "utf-8")
        for file in folder.iterdir():
            if file.name == _CONFIG_NAME:
                continue
            if native_library is not None and file.exists() and file.samefile(native_library):
                # The library takes operators from its own folder alone, and follows links first.
                shutil.copyfile(native_library, place / file.name)
            else:
                _link(file, place / file.name)
    except OSError as cause:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        raise UnsupportedModelError(
            f"{folder} cannot be made ready in {tempfile.gettempdir()} ({cause.strerror or cause}): see "
            "that the temporary folder can be used, on Windows on the model's drive (TEMP)."
        ) from cause
    return place


def _link(source: Path, target: Path) -> None:
    """Link to a file or folder: no bytes are copied."""
    with suppress(OSError, NotImplementedError):  # Windows refuses without developer mode
        target.symlink_to(source.absolute(), target_is_directory=source.is_dir())
        return
    if source.is_file():
        os.link(source.resolve(), target)


def _import_library() -> Any:
    try:
        import onnxruntime_genai  # noqa: PLC0415 - part of an extra
    except ImportError as cause:
        raise UnsupportedModelError(
            'This folder runs on ONNX Runtime GenAI: pip install "recollect-llm[genai]".'
        ) from cause
    # A conversation stays on this machine, and so does when one was held.
    if hasattr(onnxruntime_genai, "disable_telemetry_events"):
        onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai


def _kv_bytes_per_token(decoder: dict[str, Any]) -> int:
    heads = decoder["num_key_value_heads"] * decoder["head_size"]
    return 2 * int(decoder["num_hidden_layers"]) * int(heads) * _BYTES_PER_NUMBER


def _short_rope_length(config: dict[str, Any], context_length: int) -> int | None:
    length = SHORT_ROPE_LENGTHS.get(str(config.get("type")))
    return length if length is not None and context_length > length else None

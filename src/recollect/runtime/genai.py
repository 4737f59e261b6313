"""
ONNX Runtime GenAI: folders that only that library runs.

The library is linear: it keeps KV to itself, and offers to append, to rewind, and to read logits.
Here it serves the paged contract all the same. A block's slots hold no KV but the token ids that
were written to them; a row's history is read from its block table, and computed by the live
generator that has most of it already. So a mistake in a block table changes the output, as it does
where blocks hold KV.

Decide which live generator of a linear runtime serves a row, and how much of it stays.

Pure: token ids in, a plan out. Does not know the library whose generators they are.
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
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from recollect.errors import MisuseError, RuntimeFailure, UnsupportedModelError
from recollect.runtime.base import (
    Logits,
    Pace,
    PassResult,
    Reuse,
    Row,
    RuntimeInfo,
    check_blocks,
    check_rows,
    mapped_errors,
)

TokenArray = npt.NDArray[np.int32]

FAR_MORE: Final = 4
"""A replay costs what is kept, for certain; a rewind costs what is given up, if that is wanted again.
So an undo and a short fork rewind, and a second conversation with the same instructions does not."""


@dataclass(frozen=True, slots=True)
class LiveHistory:
    """What a live generator holds KV for."""

    token_ids: TokenArray
    beyond_turn: bool = False
    """Whether it was computed with the position encoding of long histories; see `is_beyond`."""


@dataclass(frozen=True, slots=True)
class ReusePlan:
    """Rewind the generator at `index` to `keep` tokens; with no index, make a new one."""

    index: int | None
    keep: int


def is_beyond(length: int, turn: int | None) -> bool:
    """
    Return whether a history of that length is computed with another position encoding.

    LongRoPE has two sets of factors and chooses by the length of the whole history, so that KV of
    one side is wrong on the other. `turn` is the last length of the short side; None: there is none.
    """
    return turn is not None and length > turn


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
    turn: int | None = None,
) -> ReusePlan:
    """
    Return the plan for computing `history[past:]`: never more is kept than *past*, and never a wrong token.

    The longest common prefix wins; of equals the one that gives up the least, then the one used last.
    Where a rewind would give up far more than it keeps, another conversation has merely begun alike:
    while there is room it keeps its generator, and a new one replays the common part.

    Args:
        history: All ids up to the end of the row, shape `(n,)`, n > past.
        past: Leading ids that the engine takes for computed. More than those are never kept: they
            could be another namespace's.
        live: The live generators, the least recently used first.
        has_room: Whether another generator may be made without giving one up.
        turn: See `is_beyond`.
    """
    beyond = is_beyond(len(history), turn)
    best = ReusePlan(None, 0)
    best_lost = 0
    for index, held in enumerate(live):
        if held.beyond_turn is not beyond:
            continue
        keep = min(common_length(held.token_ids, history[:past]), past)
        lost = len(held.token_ids) - keep
        if keep and (keep > best.keep or (keep == best.keep and lost <= best_lost)):
            best, best_lost = ReusePlan(index, keep), lost
    if has_room and best_lost > FAR_MORE * best.keep:
        return ReusePlan(None, 0)
    return best


BLOCK_SIZE: Final = 32
"""Token slots per block: any number would do, and this is the other runtimes'."""

MOST_LIVE: Final = 4
"""Live generators: one conversation, and others or its forks. Each has KV for a full context."""

_EMPTY: Final = -1
_NO_BYTES: Final = (
    "ONNX Runtime GenAI keeps its KV to itself: it cannot be put on disk (--kv-disk 0)."
)
_BYTES_PER_NUMBER: Final = 4
"""Of KV. f32 on the CPU; where a folder has f16, KV takes half of what the budget allows."""

LONGROPE_TURNS: Final = {"phi3": 4096, "phimoe": 4096, "phi4mm": 4096, "phi3small": 8192}
"""
The last length with the short factors, by the library's name of the architecture.

Source: the library's own recomputation in `Generator::GenerateNextToken`, which appended prompts
do not get.
"""


@dataclass(eq=False, slots=True)
class _Live:
    """A generator of the library, and the tokens whose KV it holds."""

    generator: Any
    history: LiveHistory


class GenAiRuntime:
    """
    A model of ONNX Runtime GenAI, and its live generators.

    Owned by the engine; one thread at a time. Where the model is, the library sees a private folder
    with links to its files, and settings of ours.

    Args:
        settings: What genai_config.json would say, checked: `LocalModel.onnx_config`.
        native_library: The operators that the settings name, if they name any.

    Invariants:
        1. At most `most_live` generators are live, in the order of their last use.
        2. A generator holds the KV of exactly the tokens noted for it: it never samples, and one
           that failed is given up.

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
        self._turn = _longrope_turn(config, context_length)
        self._info = RuntimeInfo(
            name=f"onnxruntime-genai-{self._library.__version__}-{self._model.device_type}",
            block_size=BLOCK_SIZE,
            bytes_per_block=BLOCK_SIZE * _kv_bytes_per_token(config["decoder"]),
            vocab_size=config["vocab_size"],
            context_length=context_length,
            reuse=Reuse(as_bytes=False),  # the library gives no KV away
        )
        self._slots: npt.NDArray[np.int32] | None = None
        self._live: list[_Live] = []
        self._max_length = 0
        self.most_live = 1

    @property
    def info(self) -> RuntimeInfo:
        """Return what this runtime is."""
        return self._info

    def allocate(self, num_blocks: int) -> None:
        """Make room for the ids of that many blocks; the budget they stand for bounds the generators."""
        self._slots = np.full((num_blocks, BLOCK_SIZE), _EMPTY, np.int32)
        slots = num_blocks * BLOCK_SIZE
        self._max_length = min(self._info.context_length, slots)
        self.most_live = max(1, min(MOST_LIVE, slots // self._info.context_length))
        self._info = replace(self._info, pace=Pace(most_rows=self.most_live))

    def forward(self, rows: Sequence[Row]) -> PassResult:
        """Compute the rows one after another; see `PagedRuntime.forward`."""
        slots = self._memory()
        check_rows(rows, self._info, len(slots))
        histories = [_write(slots, row) for row in rows]
        started: list[int] = []
        wanted: list[Logits] = []
        used: list[_Live] = []  # rows of one pass are conversations that go on side by side
        for row, history in zip(rows, histories, strict=True):
            if (history < 0).any():
                raise RuntimeFailure("A row reads KV slots that nothing was ever written to.")
            live, start, logits = self._compute(history, row.past, used)
            used.append(live)
            started.append(start)
            if row.wants_logits:
                wanted.append(logits)
        none = np.empty((0, self._info.vocab_size), np.float32)
        return PassResult(np.stack(wanted) if wanted else none, started)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy what is known of whole blocks, `(source, target)` each."""
        slots = self._memory()
        check_blocks([block for pair in pairs for block in pair], len(slots))
        for source, target in pairs:
            slots[target] = slots[source]

    def warm_up(self) -> None:
        """Do nothing: the library is ready when it is loaded."""

    def read_block(self, block: int, into: memoryview) -> None:  # noqa: ARG002 - the contract's
        """Refuse: there is no KV in blocks."""
        raise RuntimeFailure(_NO_BYTES)

    def write_block(self, block: int, content: memoryview) -> None:  # noqa: ARG002 - the contract's
        """Refuse: there is no KV in blocks."""
        raise RuntimeFailure(_NO_BYTES)

    def close(self) -> None:
        """Give the model and its generators back."""
        self._live.clear()
        self._slots = None
        self._model = None
        self._remove_private()

    def _memory(self) -> npt.NDArray[np.int32]:
        if self._slots is None:
            raise MisuseError(
                "the runtime has no KV memory: allocate() comes first, and nothing after close()"
            )
        return self._slots

    def _compute(
        self, history: TokenArray, past: int, used: Sequence[_Live]
    ) -> tuple[_Live, int, Logits]:
        """Return the generator that now holds the history, from where it computed, and the logits."""
        free = [live for live in self._live if live not in used]
        plan = plan_reuse(
            history,
            past,
            [live.history for live in free],
            has_room=len(self._live) < self.most_live,
            turn=self._turn,
        )
        live = None if plan.index is None else self._rewound(free[plan.index], plan.keep)
        keep = plan.keep if live is not None else 0
        if live is None:
            self._make_room(used)
            live = self._new()
        else:
            self._live.remove(live)  # until it has succeeded
        with mapped_errors("running the model"):
            live.generator.append_tokens(history[keep:])
            logits = self._logits(live.generator, history)
        live.history = LiveHistory(history, is_beyond(len(history), self._turn))
        self._live.append(live)
        return live, keep, logits

    def _logits(self, generator: Any, history: TokenArray) -> Logits:
        """
        Return the logits after the last token.

        `get_logits` takes padding at the end of what was appended for no text, and gives the logits
        of the token before. Where the padding token also ends a turn, as in many chat models, that
        is wrong; the whole output, which is then copied, is right. Source: docs/og.md.
        """
        if history[-1] == self._pad_token_id:
            logits = generator.get_output("logits")
        else:
            logits = generator.get_logits()
        return np.array(logits, np.float32).reshape(-1, logits.shape[-1])[
            -1, : self._info.vocab_size
        ]

    def _rewound(self, live: _Live, keep: int) -> _Live | None:
        """Return the generator rewound, or None where the library cannot: then it is given up."""
        if keep < len(live.history.token_ids):
            try:
                live.generator.rewind_to(keep)
            except (
                RuntimeError
            ):  # some devices and pipelines cannot: their history is computed anew
                self._live.remove(live)
                return None
        return live

    def _make_room(self, used: Sequence[_Live]) -> None:
        """Give up the least recently used where there are as many as may be, one of this pass at worst."""
        while len(self._live) >= self.most_live:
            eldest = next((live for live in self._live if live not in used), self._live[0])
            self._live.remove(eldest)

    def _new(self) -> _Live:
        with mapped_errors("making room for another conversation"):
            params = self._library.GeneratorParams(self._model)
            params.set_search_options(max_length=self._max_length)
            generator = self._library.Generator(self._model, params)
        return _Live(generator, LiveHistory(np.empty(0, np.int32)))


def _write(slots: npt.NDArray[np.int32], row: Row) -> TokenArray:
    """Write a row's ids into their slots, and return what its table then yields up to its end."""
    end = row.past + len(row.token_ids)
    positions = np.arange(row.past, end)
    table = np.asarray(row.block_table[: -(-end // BLOCK_SIZE)], np.int64)
    slots[table[positions // BLOCK_SIZE], positions % BLOCK_SIZE] = row.token_ids
    return slots[table].reshape(-1)[:end]


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


def _longrope_turn(config: dict[str, Any], context_length: int) -> int | None:
    turn = LONGROPE_TURNS.get(str(config.get("type")))
    return turn if turn is not None and context_length > turn else None

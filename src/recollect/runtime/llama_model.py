"""
A model of llama.cpp with a context: loading it onto what devices there are, computing, taking KV in and out.

`LlamaModel` owns the library's two handles and is the only one that calls with them. Its sequences are called
lanes here. Does not know blocks.
"""

import ctypes
import logging
import math
import re
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import psutil

from recollect.errors import ConfigError, MisuseError, RuntimeFailure, UnsupportedModelError
from recollect.runtime.base import Lanes, Pace, Reuse, RuntimeInfo
from recollect.runtime.llama_library import KV_TYPES, Device, LlamaLibrary, library
from recollect.runtime.llama_state import Batches, Layout, Part
from recollect.runtime.llama_threads import most_threads
from recollect.types import Profile

_log = logging.getLogger(__name__)

BLOCK_SIZE: Final = 32
"""Token slots per block: any number would do, and this is the other runtimes'."""
RECURRENT_BLOCK_SIZE: Final = 256
"""The same where each block also has a recurrent state, which may be as large as the KV of many tokens."""
MOST_LANES: Final = 4
"""Sequences of the library: each has KV for a full context, besides what the blocks have."""
MOST_DRAFTED: Final = 31
"""Guesses in a pass, whose logits take memory: 19 MB where there are 151,936 of them after each."""
MOST_FED: Final = 2048
"""Most tokens in one call; more are several calls."""
_CELL_STEP: Final = 256
"""The library makes the cells of a sequence a multiple of that."""
_LEARNED_CELLS: Final = 3
_CARD_SHARE: Final = 0.85
"""Of a card's free memory that weights may take; the rest is for KV and for what passes compute in."""
_CARD_RESERVE: Final = 512 << 20
"""Bytes on a card that kernels need in any case."""
_CARD_PACE: Final = Pace(prefill_chunk=2048, shared_chunk=512, first_token_pause_s=0)
"""A card computes a chunk in the time in which a processor computes a few tokens."""
_MANY_LAYERS: Final = 1000
_PART: Final = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaOptions:
    """How a model is run; `None` leaves the choice to what is there."""

    profile: Profile = "fast"
    gpu_layers: int | None = None
    """Layers in the memory of a graphics card; None: as many as fit."""
    device: str | None = None
    """`CPU`, `GPU`, a kind such as `CUDA`, or one device by the library's name for it; None: all cards."""
    kv_type: str | None = None
    """A name of `KV_TYPES`; None: as the profile says."""
    lanes: int = MOST_LANES
    """Most sequences that the library holds at once."""
    recurrent_block_size: int = RECURRENT_BLOCK_SIZE
    """Token slots per block of recurrent models and hybrids."""
    threads: int | None = None
    """None: one for each processor that this process may use, at most one for each core."""


class LlamaModel:
    """
    A model and a context of the library.

    Owned by a runtime. All calls that touch KV or compute are made under its lock.
    """

    def __init__(self, lib: LlamaLibrary, path: Path, options: LlamaOptions) -> None:
        self.lib, self.path, self.options = lib, path, options
        self.lock = threading.RLock()
        self._model: int | None = None
        self._context: int | None = None
        self.layers_on_card = 0
        self._batches = Batches(MOST_FED)
        self.state_bytes = 0.0, 0.0
        """Of a sequence's state, in any case and for each token; known once it was learned."""
        self._load_what_fits()
        self.vocab_size: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self.window: int = max(0, lib.llama_model_n_swa(self._model))
        self.is_recurrent = bool(
            lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        )
        if (
            lib.llama_model_has_encoder(self._model)
            or lib.llama_model_is_diffusion(self._model)
            or not lib.llama_model_has_decoder(self._model)
        ):
            self.close()
            raise UnsupportedModelError(
                f"{path.name} does not write a text token by token, as a chat needs it: choose another model."
            )

    def _load_what_fits(self) -> None:
        """Load the weights, as many layers of them into the memory of cards as there is room for."""
        asked, cards = self.options.gpu_layers, self._cards()
        if asked and not cards:
            raise ConfigError(
                f"There is no graphics card that {self.lib.found.origin} can use, for {asked} layers: leave "
                "--gpu-layers out, or install a build of llama-cpp-python for your card."
            )
        uses_cards = bool(cards) and asked != 0
        # Cards need to know how many layers there are before; that takes half as long as a small model.
        self._load(0, vocab_only=uses_cards)
        self.num_layers = self._count_layers()
        if not uses_cards:
            return
        everything = self.num_layers + 1  # the output counts as a layer
        if asked is not None:
            self._load(min(asked, everything))
            return
        size, free = self._weight_bytes(), self._free_on_cards()
        share = (free * _CARD_SHARE - _CARD_RESERVE) / max(1, size)
        self._load_or_less(everything if share >= 1 else max(0, int(share * everything)))

    def _cards(self) -> list[Device]:
        """
        Return the graphics cards that are used.

        Raises:
            ConfigError: There is no device of the name that was asked for.
        """
        devices, asked = self.lib.devices(), self.options.device
        cards = [device for device in devices if device.is_graphics]
        if asked is None or asked.upper() == "CPU":
            return [] if asked else cards
        kinds = [card for card in cards if asked.upper() in ("GPU", card.backend.upper())]
        chosen = kinds or [card for card in cards if asked.upper() == card.name.upper()]
        if not chosen:
            raise ConfigError(
                f"{self.lib.found.origin} has no device {asked!r} here: it has "
                f"{', '.join(one.name for one in devices)}; give one of these, or leave --device out."
            )
        return chosen

    def _weight_bytes(self) -> int:
        return sum(part.stat().st_size for part in _parts(self.path))

    def _free_on_cards(self) -> int:
        return sum(card.free_bytes for card in self._cards())

    def _load_or_less(self, layers: int) -> None:
        """Load with that many layers on cards, or with fewer where there is no memory for them."""
        while True:
            try:
                self._load(layers)
                break
            except UnsupportedModelError:
                if not layers:
                    raise
                layers = layers * 3 // 4
        if layers <= self.num_layers:
            _log.warning(
                "The graphics card has memory for %d of %d layers of %s; the others run on the CPU.",
                layers,
                self.num_layers + 1,
                self.path.name,
            )

    def _count_layers(self) -> int:
        """Return how many layers the file says that there are; a number above any where it does not."""
        # Of a model without weights the library itself says 0.
        architecture = self.lib.field(self._model, "general.architecture")
        count = self.lib.field(self._model, f"{architecture}.block_count")
        return int(count) if count.isdecimal() else _MANY_LAYERS

    def _load(self, layers: int, *, vocab_only: bool = False) -> None:
        self.close()
        params = self.lib.model_params()
        params.n_gpu_layers, params.vocab_only = layers, vocab_only
        handles = [card.handle for card in self._cards()] if layers else []
        only = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)
        if self.options.device is not None and handles:
            params.devices = ctypes.addressof(only)
        self._model = self.lib.load_model(self.path, params)
        if self._model is None:
            raise UnsupportedModelError(self._why_not_loaded(layers))
        self.layers_on_card = layers

    def _why_not_loaded(self, layers: int) -> str:
        if layers:
            size, free = self._weight_bytes(), self._free_on_cards()
            return (
                f"llama.cpp cannot load {self.path.name} with {layers} layers on the graphics card, of whose "
                f"memory {free:,} bytes are free, and all weights take {size:,} ({self.lib.why()}): choose "
                "fewer (--gpu-layers)."
            )
        return (
            f"llama.cpp cannot load {self.path.name} ({self.lib.why()}): choose another file of the model, "
            "or another build of llama.cpp."
        )

    def put_less_on_cards(self) -> bool:
        """Load with fewer layers on cards; return whether that is possible and may be chosen."""
        # A file that was unpacked to be loaded, as in the profile `exact`, is gone by now.
        is_there = self.path.is_file()
        if self.options.gpu_layers is not None or not self.layers_on_card or not is_there:
            return False
        self._load_or_less(self.layers_on_card * 3 // 4)
        return True

    @property
    def flash_attention(self) -> bool:
        """
        Return whether attention is computed in one kernel, as llama-server does.

        On processors a prefill of 512 tokens takes 0.84 to 0.55 of the time; a token takes 0.9 up to 1,000
        tokens and 1.5 after 4,000. Source: LOG.md, 2026-11-27.
        """
        return self.options.profile != "exact"

    @property
    def kv_type(self) -> str:
        """Return the type of keys and values."""
        if self.options.kv_type is not None:
            return self.options.kv_type
        return {"exact": "f32", "fast": "f16", "small": "q8_0"}[self.options.profile]

    def open(self, cells: int, lanes: int) -> None:
        """
        Make the context: *lanes* sequences of *cells* tokens each.

        Raises:
            RuntimeFailure: There is no memory for it.
        """
        self.close_context()
        if self._model is None:
            raise MisuseError("the model was closed")
        params = self.lib.context_params()
        cells = -(-cells // _CELL_STEP) * _CELL_STEP
        params.n_ctx, params.n_seq_max = cells * lanes, lanes
        params.n_batch, params.n_ubatch = MOST_FED, min(512, MOST_FED)
        # By default there is memory for all tokens' logits, which is far more.
        params.n_outputs_max = lanes + MOST_DRAFTED
        params.kv_unified, params.swa_full = False, True
        params.type_k = params.type_v = KV_TYPES[self.kv_type]
        params.flash_attn_type = int(self.flash_attention)
        params.n_threads = params.n_threads_batch = self.options.threads or most_threads()
        self._context = self.lib.new_context(self._model, params)
        if self._context is None:
            sequences = "1 sequence" if lanes == 1 else f"{lanes} sequences"
            fewer = " fewer layers on the card," if self.layers_on_card else ""
            raise RuntimeFailure(
                f"llama.cpp cannot hold {sequences} of {cells:,} tokens with KV of {self.kv_type}, "
                f"{self._needed_and_there(lanes, cells)} ({self.lib.why()}): "
                f"take another --kv-type,{fewer} or a smaller model."
            )

    def _needed_and_there(self, lanes: int, cells: int) -> str:
        """Return how much memory lanes take and how much is free, on cards and elsewhere, as a clause."""
        (fixed, per_token), share = self.state_bytes, self._share_on_cards()
        total = lanes * (fixed + cells * per_token)
        card, host = math.ceil(share * total), math.ceil((1 - share) * total)
        free = psutil.virtual_memory().available
        if not total:  # how large a state is was not learned yet
            return f"and {free:,} bytes of memory are free"
        there = f"{host:,} bytes of memory, of which {free:,} are free"
        if not card:
            return f"which take {there}"
        on_card = f"{card:,} bytes on the card, of which {self._free_on_cards():,} are free"
        return f"which take {on_card}, and {there}"

    def decode(self, parts: Sequence[Part]) -> None:
        """
        Compute parts, `MOST_FED` tokens at most, and put the logits where they are wanted.

        The library lets go of the interpreter's lock meanwhile.

        Raises:
            RuntimeFailure: It failed. What these lanes hold from those positions on is undefined.
        """
        batch, wanted = self._batches.fill(parts)
        code = self.lib.decode(self._context, batch)
        if code:
            lost = (
                f" If {self.device} was lost, load the model again, or run it with --device CPU: what was "
                "said is kept, and so is the KV on disk."
            )
            raise RuntimeFailure(
                f"llama.cpp failed while running the model ({code}: {self.lib.why()})."
                + (lost if self.layers_on_card else "")
            )
        for places, (*_, into) in zip(wanted, parts, strict=True):
            for place, line in zip(places, into, strict=True):
                address = self.lib.llama_get_logits_ith(self._context, place)
                if not address:
                    raise RuntimeFailure("llama.cpp gave no logits for a token that wanted some.")
                ctypes.memmove(line.ctypes.data, address, line.itemsize * self.vocab_size)

    def state(self, lane: int) -> npt.NDArray[np.uint8]:
        """Return the KV of a lane as the library writes it."""
        size = self.lib.llama_state_seq_get_size(self._context, lane)
        state = np.empty(size, np.uint8)
        written = self.lib.llama_state_seq_get_data(
            self._context, state.ctypes.data, state.size, lane
        )
        if not written:
            raise RuntimeFailure(f"llama.cpp failed while taking KV out ({self.lib.why()}).")
        return state[:written]

    def set_state(self, lane: int, state: npt.NDArray[np.uint8]) -> None:
        """Give an empty lane a state."""
        read = self.lib.llama_state_seq_set_data(self._context, state.ctypes.data, state.size, lane)
        if read != state.size:
            self.truncate(lane, 0)
            raise RuntimeFailure(f"llama.cpp failed while taking KV in ({self.lib.why()}).")

    def truncate(self, lane: int, length: int) -> bool:
        """Cut a lane to its first *length* tokens; return whether that was possible."""
        memory = self.lib.llama_get_memory(self._context)
        return bool(self.lib.llama_memory_seq_rm(memory, lane, length, -1))

    def close_context(self) -> None:
        """Free the context and its KV."""
        with self.lock:
            if self._context is not None:
                self.lib.llama_free(self._context)
            self._context = None

    def close(self) -> None:
        """Free everything. May be called again."""
        with self.lock:
            self.close_context()
            if self._model is not None:
                self.lib.llama_model_free(self._model)
            self._model = None

    def learn(self) -> Layout | None:
        """Return how this model's states are arranged, learned from two; None: it is not understood."""
        self.open(_CELL_STEP, 2)
        ids = [min(number + 1, self.vocab_size - 1) for number in range(_LEARNED_CELLS)]
        states, nothing = [], np.empty((0, self.vocab_size), np.float32)
        for past in (0, _LEARNED_CELLS):
            self.decode([(1, past, ids, nothing)])
            states.append(self.state(1))
        per_token = (len(states[1]) - len(states[0])) / _LEARNED_CELLS
        self.state_bytes = len(states[0]) - per_token * _LEARNED_CELLS, per_token
        layout = Layout.learn(
            states[0],
            sequence=1,
            streams=2,
            cells=_LEARNED_CELLS,
            block_size=self.options.recurrent_block_size if self.is_recurrent else BLOCK_SIZE,
            is_recurrent=self.is_recurrent,
        )
        is_right = layout is not None and layout.explains(states[1], 1, 2 * _LEARNED_CELLS)
        return layout if is_right else None

    def require_layout(self) -> Layout:
        """
        Return what `learn` does.

        Raises:
            RuntimeFailure: It is not understood.
        """
        layout = self.learn()
        if layout is None:
            raise RuntimeFailure("llama.cpp writes KV in an arrangement that is not known here.")
        return layout

    def information(self, context_length: int, layout: Layout | None) -> RuntimeInfo:
        """Return what the engine needs to know."""
        arrangement = "" if layout is None else layout.text()
        digest = blake2b(arrangement.encode(), digest_size=8).hexdigest()
        device = self.device
        fixed, per_token = self.state_bytes
        block_size = BLOCK_SIZE if layout is None else layout.block_size
        # Without blocks, what a sequence of the library takes for as many tokens.
        replayed = math.ceil(block_size * (per_token + fixed / context_length))
        host = 1 - self._share_on_cards()
        lanes = Lanes(self.options.lanes, host * fixed, host * per_token, step=_CELL_STEP)
        return RuntimeInfo(
            name=f"llama.cpp-{self.lib.found.build}-{self.options.profile}",
            block_size=block_size,
            bytes_per_block=replayed if layout is None else layout.bytes_per_block,
            vocab_size=self.vocab_size,
            context_length=context_length,
            device=device,
            kv_format=(
                f"{self.kv_type},flash={int(self.flash_attention)},{device},"
                f"layers={self.layers_on_card},{digest}"
            ),
            reuse=(
                Reuse(unit=block_size, whole_tails=True)
                if layout is not None and layout.recurrent
                else Reuse(as_bytes=layout is not None)
            ),
            pace=Pace() if device == "CPU" else _CARD_PACE,
            lanes=None if layout is None else lanes,
            most_drafted=0 if layout is None or layout.recurrent else MOST_DRAFTED,
        )

    def _share_on_cards(self) -> float:
        """Return which part of all layers, and so of their KV, is in the memory of cards."""
        # The output is the layer that goes there first.
        return max(0, min(self.layers_on_card - 1, self.num_layers)) / max(1, self.num_layers)

    @property
    def device(self) -> str:
        """Return the kind of device that computes, by its backend: `CPU`, `CUDA`, `Metal`."""
        cards = self._cards() if self.layers_on_card else []
        return cards[0].backend if cards else "CPU"


class LlamaVocabulary:
    """
    The vocabulary of a file, and how it cuts texts; loaded without the weights.

    Safe to use from several threads: the library only reads.

    Raises:
        UnsupportedModelError: The library is missing, or cannot read it.
    """

    def __init__(self, path: Path) -> None:
        self._lib = lib = library()
        params = lib.model_params()
        params.vocab_only = True
        self._model = lib.load_model(path, params)
        if self._model is None:
            raise UnsupportedModelError(
                f"llama.cpp cannot read the vocabulary of {path.name} ({lib.why()}): choose another file of "
                "the model."
            )
        self._free = weakref.finalize(self, lib.llama_model_free, self._model)
        self._free.atexit = False
        self._table = lib.llama_model_get_vocab(self._model)
        self.count: Final[int] = lib.llama_vocab_n_tokens(self._table)
        if not lib.llama_vocab_type(self._table):
            raise UnsupportedModelError(
                f"{path.name} has no vocabulary, and so no text can be read: choose another file."
            )
        # SentencePiece: a text begins as a word does that has a space before it, unless the file says no.
        self.drops_first_space: Final = (
            lib.field(self._model, "tokenizer.ggml.model") == "llama"
            and lib.field(self._model, "tokenizer.ggml.add_space_prefix") != "false"
        )
        self._attributes: Final = [
            int(lib.llama_vocab_get_attr(self._table, token_id)) for token_id in range(self.count)
        ]
        self._pieces: dict[int, bytes] = {}

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of an id; of a control token its name."""
        if (known := self._pieces.get(token_id)) is not None:
            return known
        length = 64
        while True:
            buffer = ctypes.create_string_buffer(length)
            written = self._lib.llama_token_to_piece(self._table, token_id, buffer, length, 0, True)
            if written >= 0:
                return self._pieces.setdefault(token_id, buffer.raw[:written])
            length = -written

    def is_control(self, token_id: int) -> bool:
        """Return whether an id is no text: a control token, or one that stands for what is unknown."""
        return bool(self._attributes[token_id] & _NO_TEXT)

    def is_added(self, token_id: int) -> bool:
        """Return whether an id's text is that token wherever it is."""
        return bool(self._attributes[token_id] & _USER_DEFINED)

    def cut(self, text: bytes, *, with_control: bool) -> list[int]:
        """Return the ids of a text, nothing added, control tokens recognised or read as text."""
        if len(text) > _MOST_TEXT:
            raise RuntimeFailure(f"A text of {len(text):,} bytes is longer than llama.cpp reads.")
        room = len(text) + 2  # a token is at least a byte, and a space may come before the first
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(
            self._table, text, len(text), ids, room, False, with_control
        )
        if count < 0:
            raise RuntimeFailure("llama.cpp failed while cutting a text into tokens.")
        return ids[:count]


_NO_TEXT: Final = (1 << 0) | (1 << 3)  # unknown, control: `enum llama_token_attr`
_USER_DEFINED: Final = 1 << 4
_MOST_TEXT: Final = 1 << 30


def _parts(path: Path) -> list[Path]:
    """Return the files of a model: one, or all parts of it that lie beside each other."""
    match = _PART.fullmatch(path.name)
    return [path] if match is None else sorted(path.parent.glob(f"{match[1]}-*-of-{match[2]}.gguf"))


def main() -> int:
    """Load the file that is named and compute a few tokens; see `models.prepare`."""
    try:
        LlamaModel(library(), Path(sys.argv[1]), LlamaOptions(gpu_layers=0, threads=1)).learn()
    except (ConfigError, RuntimeFailure, UnsupportedModelError) as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())

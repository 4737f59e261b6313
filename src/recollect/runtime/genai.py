"""
ONNX Runtime GenAI: folders that only that library runs.

Its generators are the sequences of `SequenceRuntime`; `SequenceAdapter` puts them behind the paged
contract. A generator appends tokens, is rewound, and gives logits; it cannot be copied. The library is
never asked to sample.
"""

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from recollect.errors import MisuseError, UnsupportedModelError
from recollect.runtime.base import Logits, Reuse, RuntimeInfo, mapped_errors
from recollect.runtime.sequences import Feed

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

"""
Opens a folder that holds a model for ONNX Runtime GenAI: one with a genai_config.json.

Reads the small files beside the weights, and walks over each .onnx file to see which other files it
names: weights, and what a vendor compiled. These have to lie in the folder. Does not load the model.

Source of the field numbers of .onnx files: onnx.proto of ONNX 1.19.
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from recollect import files
from recollect.errors import UnsupportedModelError
from recollect.files import cached_sha256, combine
from recollect.models import onnx_config
from recollect.models.catalog import LocalModel
from recollect.models.onnx_config import CONFIG_NAME, MOST_CONFIG_BYTES
from recollect.models.openvino_folder import (
    as_ids,
    chat_template,
    read_json,
    read_text,
    special_token,
    warn_of_writers,
)
from recollect.text.file_tokenizers import MOST_TOKENIZER_BYTES, TOKENIZER_NAME
from recollect.types import Progress, no_progress

_MOST_FIELDS: Final = 20_000_000
"""Fields that are looked at, half a minute of work: a graph of 1,000 nodes has about 20,000."""

_VARINT, _LENGTH = 0, 2
_FIXED: Final = {1: 8, 5: 4}
"""Wire types of numbers with a fixed length, to that."""

_MODEL, _GRAPH, _FUNCTION, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _ENTRY = range(8)
_INNER: Final[dict[int, dict[int, int]]] = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _FUNCTION: {7: _NODE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {
        5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE,
    },
    _TENSOR: {13: _ENTRY},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _ENTRY: {},
}  # fmt: skip
"""Message to number of a field to the message in it; all other fields are skipped."""

_NAME, _INTEGER, _TEXT = 1, 3, 4
"""Fields of an attribute; 1 and 2 are key and value of an entry."""
_COMPILED: Final = b"EPContext"
"""The operator that stands for what a vendor compiled: in the file itself, or in one that it names."""


def require_own_files(path: Path, folder: Path) -> None:
    """
    Check that what an .onnx file names lies in its folder.

    ONNX Runtime looks too, in releases of 2026; vendors' builds are older.

    Raises:
        UnsupportedModelError: It names something else, or is damaged.
    """
    try:
        with (
            files.open_regular(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            names = sorted(set(_Walk(view).names()))
    except (OSError, ValueError, RecursionError) as cause:
        raise UnsupportedModelError(
            f"{path} cannot be read, or is no ONNX file ({cause}): get the whole folder again."
        ) from cause
    beside = path.parent.relative_to(folder) if path.is_relative_to(folder) else Path()
    for name in names:
        try:
            files.inside(folder, str(beside / name) if not Path(name).is_absolute() else name)
        except OSError as cause:
            raise UnsupportedModelError(
                f"{path.name} reads {name!r}, which cannot be taken ({cause.strerror or cause}): get "
                "the whole folder again, from somebody you trust."
            ) from cause


class _Walk:
    """
    One walk over a file's bytes.

    Raises:
        ValueError: It ends inside a field, or has too many.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._fields = 0

    def names(self) -> Iterator[str]:
        """Yield the names of other files."""
        return self._inside(_MODEL, 0, len(self._data))

    def _inside(self, message: int, start: int, end: int) -> Iterator[str]:
        """Yield the names in one message, whose bytes are `[start, end)`."""
        if message == _TENSOR:
            yield from self._external(start, end)
            return
        if message == _NODE:
            yield from self._compiled(start, end)
        inner = _INNER[message]
        for number, wire, at, after in self._each(start, end):
            if wire == _LENGTH and number in inner:
                yield from self._inside(inner[number], at, after)

    def _external(self, start: int, end: int) -> Iterator[str]:
        for number, wire, at, after in self._each(start, end):
            if number == 13 and wire == _LENGTH:
                entry = self._texts(at, after)
                if entry.get(1) == b"location":
                    yield entry.get(2, b"").decode("utf-8", "surrogateescape")

    def _compiled(self, start: int, end: int) -> Iterator[str]:
        """Yield the file that an operator of compiled code names, where it holds no code itself."""
        attributes, operator = [], b""
        for number, wire, at, after in self._each(start, end):
            if wire == _LENGTH and number == 4:
                operator = bytes(self._data[at:after])
            elif wire == _LENGTH and number == 5:
                attributes.append((at, after))
        if operator != _COMPILED:
            return
        is_embedded, content = True, b""
        for begin, stop in attributes:
            name, number_in_it, text = b"", 0, b""
            for number, wire, at, after in self._each(begin, stop):
                if number == _NAME and wire == _LENGTH:
                    name = bytes(self._data[at:after])
                elif number == _INTEGER and wire == _VARINT:
                    number_in_it = at
                elif number == _TEXT and wire == _LENGTH:
                    text = bytes(self._data[at : min(after, at + 4096)])
            if name == b"embed_mode":
                is_embedded = bool(number_in_it)
            elif name == b"ep_cache_context":
                content = text
        if not is_embedded and content:
            yield content.decode("utf-8", "surrogateescape")

    def _texts(self, start: int, end: int) -> dict[int, bytes]:
        return {
            number: bytes(self._data[at:after])
            for number, wire, at, after in self._each(start, end)
            if wire == _LENGTH
        }

    def _each(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield number and wire type of each field, and its bytes `[at, after)`; a varint as `at`."""
        at = start
        while at < end:
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise ValueError("it has too many parts")
            key, at = self._varint(at, end)
            number, wire = key >> 3, key & 7
            if wire == _VARINT:
                value, at = self._varint(at, end)
                yield number, wire, value, value
                continue
            if wire == _LENGTH:
                length, at = self._varint(at, end)
            elif wire in _FIXED:
                length = _FIXED[wire]
            else:
                raise ValueError(f"it holds a field of the unknown kind {wire}")
            if length > end - at:
                raise ValueError("it ends inside a part of itself")
            yield number, wire, at, at + length
            at += length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise ValueError("it ends inside a number")
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise ValueError("it holds a number that is too long")


_MOST_FILES: Final = 10_000
"""In a folder: it has ten or so, and AMD's have a few hundred compiled parts."""


def is_onnx_folder(folder: Path) -> bool:
    """Return whether *folder* holds a model for ONNX Runtime GenAI."""
    return (folder / CONFIG_NAME).is_file()


def open_onnx_folder(
    folder: Path,
    *,
    name: str,
    home: Path,
    allow_native_code: str | None = None,
    progress: Progress = no_progress,
) -> LocalModel:
    """
    Return the model in *folder*.

    Args:
        allow_native_code: As `onnx_config.check` takes it.

    Raises:
        UnsupportedModelError: A file is missing, does not say what is needed, or asks for what no
            model needs: native code that was not allowed, files elsewhere.
    """
    path = folder / CONFIG_NAME
    whole = onnx_config.parse(read_text(path, most_bytes=MOST_CONFIG_BYTES), path)
    config = _table(whole.get("model"))
    decoder = _table(config.get("decoder"))
    context_length = config.get("context_length")
    if not isinstance(context_length, int) or context_length < 1 or not decoder:
        raise UnsupportedModelError(
            f"{folder / CONFIG_NAME} describes no language model (it names no decoder and context "
            "length): convert the model again, with `recollect convert MODEL --to onnx-genai OUT`."
        )
    if not (folder / TOKENIZER_NAME).is_file():
        raise UnsupportedModelError(
            f"{folder} holds no {TOKENIZER_NAME}: save the model's fast tokenizer there, with "
            "transformers' `AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)`."
        )
    checked = onnx_config.check(whole, folder, allow_native_code=allow_native_code)
    for file_name in checked.file_names:
        if onnx_config.is_graph(file_name):
            require_own_files(files.inside(folder, file_name), folder)
    warn_of_writers(folder, (CONFIG_NAME, *checked.file_names))
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    added = dict(_added_tokens(folder))
    eos = as_ids(config.get("eos_token_id"))
    return LocalModel(
        name=name,
        format="onnx-genai",
        folder=folder,
        context_length=context_length,
        chat_template=chat_template(folder),
        eos_token_ids=frozenset(eos),
        bos_token=special_token(tokenizer_config, "bos_token")
        or _first(as_ids(config.get("bos_token_id")), added),
        eos_token=special_token(tokenizer_config, "eos_token") or _first(eos, added),
        fingerprint=_fingerprint(folder, home, progress),
        search_defaults=_table(whole.get("search")),
        architecture=str(config.get("type", "")) or None,
        onnx_config=checked.content,
        native_library=checked.native_library,
    )


def onnx_context_length(folder: Path) -> int | None:
    """Return how long the context of the model in *folder* is; None where it does not say so."""
    path = folder / CONFIG_NAME
    config = _table(onnx_config.parse(read_text(path, most_bytes=MOST_CONFIG_BYTES), path))
    length = _table(config.get("model")).get("context_length")
    return length if isinstance(length, int) and length > 0 else None


def _fingerprint(folder: Path, home: Path, progress: Progress) -> str:
    """Return a hash of all files: which of them a graph reads its weights from is its own business."""
    parts = ["onnx genai folder 1"]
    for path in sorted(_visible(folder)):
        file = folder / path
        if file.suffix != ".md" and (file.is_symlink() or file.is_file()):
            try:
                real = files.inside(folder, path.as_posix())
            except OSError as cause:
                raise UnsupportedModelError(
                    f"{file} cannot be taken ({cause.strerror or cause}): copy what it links to into "
                    "the folder, or remove it."
                ) from cause
            parts += [path.as_posix(), cached_sha256(real, home=home, progress=progress)]
    return combine(parts)


def _visible(folder: Path) -> list[Path]:
    """Return what is in the folder and below, relative to it, but for hidden names."""
    found = []
    for number, file in enumerate(folder.rglob("*"), 1):
        if number > _MOST_FILES:
            raise UnsupportedModelError(
                f"{folder} holds more than {_MOST_FILES:,} files: give a folder that holds the model "
                "alone."
            )
        path = file.relative_to(folder)
        if not any(part.startswith(".") for part in path.parts):
            found.append(path)
    return found


def _added_tokens(folder: Path) -> Iterator[tuple[int, str]]:
    added = read_json(folder / TOKENIZER_NAME, most_bytes=MOST_TOKENIZER_BYTES).get("added_tokens")
    for token in added if isinstance(added, list) else ():
        number, content = _table(token).get("id"), _table(token).get("content")
        if isinstance(number, int) and isinstance(content, str):
            yield number, content


def _first(ids: list[int], texts: Mapping[int, str]) -> str | None:
    """Return the text of the first of the ids that has one."""
    return next((texts[number] for number in ids if number in texts), None)


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

"""
Which other files an .onnx file reads when it is loaded.

An ONNX file is a protocol buffer; weights may lie in files that it names, and so may what a vendor
compiled. Walks over the bytes and skips the weights; knows nothing of what a graph computes.
Source of the field numbers: onnx.proto of ONNX 1.19.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from recollect import files
from recollect.errors import UnsupportedModelError

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

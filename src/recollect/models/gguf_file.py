"""
Reads what a GGUF file says about itself: its fields, and where its tensors lie.

Reads the header only. The gguf package's own reader takes seconds for it, because it makes an
array for each of the vocabulary's strings; its constants are used here. Converts nothing.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, TokenType

from recollect import files
from recollect.errors import UnsupportedModelError
from recollect.models.gguf_check import (
    MOST_HEADER_BYTES,
    MOST_ITEMS,
    fault_of_fields,
    fault_of_tensor,
    require_model,
)

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_SWAPPED: Final = tuple(version << 24 for version in _VERSIONS)
_DEFAULT_ALIGNMENT: Final = 32
_MOST_DIMENSIONS: Final = 8  # twice what the format has today; more means that the file is damaged
_SCALARS: Final = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
# Tokens that end a turn in the families above. A file names one; a model may also end with another.
_END_TOKENS: Final = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in a file, and what it is."""

    shape: tuple[int, ...]
    """Outermost dimension first, as numpy has it; the file has it the other way round."""
    kind: GGMLQuantizationType
    start: int
    """Its first byte, counted from the start of the file."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufContent:
    """A file's fields and its table of tensors."""

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]
    """By name, in the file's order."""
    field_places: dict[str, slice]
    """Where each field's bytes lie in the file, its name included."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says about itself."""

    architecture: str
    context_length: int
    chat_template: str | None
    eos_token_ids: frozenset[int]
    bos_token: str | None
    eos_token: str | None
    window: int | None = None
    """How many tokens its layers with a window see; None: it has none."""


def read_content(path: Path) -> GgufContent:
    """
    Return the fields of the file at *path*, and where its tensors lie.

    Raises:
        UnsupportedModelError: It is not a GGUF file of a known version, or it is damaged.
    """
    try:
        with (
            files.open_regular(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _parse(data, path)
    except _DamagedError as cause:
        raise UnsupportedModelError(
            f"{path} is cut short or damaged ({cause}): download it again."
        ) from cause
    except ValueError as cause:  # an empty file cannot be mapped
        raise _not_gguf(path) from cause
    except OSError as cause:
        raise UnsupportedModelError(
            f"{path} cannot be read ({cause.strerror or cause}): check the path and its permissions."
        ) from cause


def read_header(path: Path) -> GgufHeader:
    """
    Return what the file at *path* says about the model in it.

    Raises:
        UnsupportedModelError: It is not a GGUF file of a known version, it is damaged, or it holds
            no language model.
    """
    return describe(read_content(path), path)


class _DamagedError(Exception):
    """The file ends too early, or holds what no writer writes."""


class _Cursor:
    """Walks over the mapped bytes of a file; little-endian, as GGUF is wherever OpenVINO runs."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._items = 0
        self.at = 0

    def skip(self, length: int) -> int:
        start = self.at
        if length > len(self._data) - start:
            raise _DamagedError(f"it ends at byte {len(self._data):,}, inside its header")
        self.at += length
        if self.at > MOST_HEADER_BYTES:
            raise _DamagedError(f"its header has more than {MOST_HEADER_BYTES:,} bytes")
        return start

    def number(self, code: str) -> Any:
        start = self.skip(struct.calcsize(code))
        return struct.unpack_from("<" + code, self._data, start)[0]

    def raw_text(self) -> bytes:
        length = self.number("Q")
        start = self.skip(length)
        return self._data[start : self.at]

    def text(self) -> str:
        # A token can be any bytes; only templates and names have to be text.
        return self.raw_text().decode("utf-8", "replace")

    def value(self) -> Any:
        kind = self.number("I")
        if kind != GGUFValueType.ARRAY:
            return self._single(kind)
        item_kind, count = self.number("I"), self.number("Q")
        self._items += count
        if self._items > MOST_ITEMS:
            raise _DamagedError(f"its header holds more than {MOST_ITEMS:,} values")
        code = _SCALARS.get(item_kind)
        if code is None:
            return [self._single(item_kind) for _ in range(count)]
        start = self.skip(count * struct.calcsize(code))
        return struct.unpack_from(f"<{count}{code}", self._data, start)

    def _single(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        code = _SCALARS.get(kind)
        if code is None:
            raise _DamagedError(f"it holds a value of the unknown type {kind}")
        return self.number(code)


def _parse(data: mmap.mmap, path: Path) -> GgufContent:
    cursor = _Cursor(data)
    if data[:4] != _MAGIC:
        raise _not_gguf(path)
    cursor.skip(4)
    version = cursor.number("I")
    if version in _SWAPPED:
        raise UnsupportedModelError(
            f"{path.name} was made for big-endian processors: get the file for the usual ones."
        )
    if version not in _VERSIONS:
        raise UnsupportedModelError(
            f"{path.name} is GGUF version {version}, and versions {_VERSIONS} can be read: "
            "get a newer file of the model."
        )
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    fields, places = {}, {}
    for _ in range(field_count):
        start = cursor.at
        key = cursor.text()
        if key in fields:  # two readers may each take another one
            raise _DamagedError(f"it says {key[:100]!r} twice")
        fields[key] = cursor.value()
        places[key] = slice(start, cursor.at)
    fault = fault_of_fields(fields)
    if fault is not None:
        raise _DamagedError(fault)
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    tensors = dict(_tensors(cursor, tensor_count, alignment))
    start = -(-cursor.at // alignment) * alignment
    needed = start + max(
        (tensor.start + tensor.size_bytes for tensor in tensors.values()), default=0
    )
    if tensors and needed > len(data):
        raise _DamagedError(f"it has {len(data):,} of {needed:,} bytes")
    placed = {name: replace(tensor, start=start + tensor.start) for name, tensor in tensors.items()}
    return GgufContent(fields, placed, places)


def _tensors(cursor: _Cursor, count: int, alignment: int) -> Iterator[tuple[str, TensorInfo]]:
    """Yield each tensor's name and what it is, with its start counted from the start of the data."""
    names = set()
    for _ in range(count):
        name = cursor.text()
        if name in names:
            raise _DamagedError(f"it holds two tensors {name[:100]!r}")
        names.add(name)
        dimensions = cursor.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _DamagedError(f"it holds a tensor of {dimensions} dimensions")
        shape = [cursor.number("Q") for _ in range(dimensions)]
        raw, offset = cursor.number("I"), cursor.number("Q")
        try:
            kind = GGMLQuantizationType(raw)
        except ValueError as cause:
            raise _DamagedError(f"it holds a tensor of the unknown type {raw}") from cause
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        fault = fault_of_tensor(shape, block_elements, offset, alignment)
        if fault is not None:
            raise _DamagedError(fault)
        size_bytes = math.prod(shape) // block_elements * block_bytes
        yield name, TensorInfo(tuple(reversed(shape)), kind, offset, size_bytes)


def describe(content: GgufContent, path: Path) -> GgufHeader:
    """
    Return what a file's fields say about the model in it.

    Raises:
        UnsupportedModelError: They name no architecture or no context length.
    """
    fields = content.fields
    # The first of several files may have no tensors.
    is_part = isinstance(fields.get("split.count"), int) and fields["split.count"] > 1
    require_model(fields, max(len(content.tensors), is_part), path.name)
    architecture = fields.get("general.architecture")
    context_length = fields.get(f"{architecture}.context_length")
    if not isinstance(architecture, str) or not isinstance(context_length, int):
        raise UnsupportedModelError(
            f"{path.name} does not hold a language model (it names no architecture and context): "
            "choose another file of the model."
        )
    tokens = fields.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    named = fields.get("tokenizer.ggml.eos_token_id"), fields.get("tokenizer.ggml.eot_token_id")
    ids = {number for number in named if isinstance(number, int) and 0 <= number < len(tokens)}
    kinds = fields.get("tokenizer.ggml.token_type")
    kinds = kinds if isinstance(kinds, tuple) else ()
    # The same text can be an ordinary token: "</s>" is also how HTML ends a strike-through.
    ids.update(
        number
        for number, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if text in _END_TOKENS and kind == TokenType.CONTROL
    )
    template = fields.get("tokenizer.chat_template")
    window = fields.get(f"{architecture}.attention.sliding_window")
    return GgufHeader(
        architecture=architecture,
        context_length=context_length,
        chat_template=template if isinstance(template, str) else None,
        eos_token_ids=frozenset(ids),
        bos_token=_token(tokens, fields.get("tokenizer.ggml.bos_token_id")),
        eos_token=_token(tokens, fields.get("tokenizer.ggml.eos_token_id")),
        window=window if type(window) is int and 0 < window < context_length else None,
    )


def _token(tokens: list[Any], number: object) -> str | None:
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _not_gguf(path: Path) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} is not a GGUF file: choose a file that ends in .gguf, or download it again."
    )

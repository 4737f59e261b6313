"""
The header of a GGUF file: its fields, and where its tensors are.

The gguf package's own reader takes seconds for that, because it makes an array for each string of the
vocabulary; only its constants are used here. A file may come from a stranger, and readers in C++ trust its
numbers. So files that hold no model, and numbers that no model has, are refused.
"""

import contextlib
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType, TokenType

from recollect import files
from recollect.errors import UnsupportedModelError
from recollect.types import recommended

MOST_HEADER_BYTES: Final = 128 << 20
"""Most bytes of a header. The largest known one, with 262,144 tokens, has 16 MB."""
MOST_ITEMS: Final = 1 << 22
"""Most items of all arrays in a header. Vocabularies have up to 262,144 tokens and half a million merges."""

_MOST_ALIGNMENT: Final = 1 << 20
"""Largest alignment of tensors in bytes. All known files have 32."""
_MOST_ELEMENTS: Final = 1 << 40
"""Most elements of a tensor: a thousand times as many as the largest known matrix has."""

# Largest values of fields, ten to a thousand times those of the largest models.
_MOST: Final = {
    "context_length": 2**31 - 1,
    "block_count": 10_000,
    "embedding_length": 1 << 20,
    "feed_forward_length": 1 << 24,
    "attention.head_count": 1 << 16,
    "attention.head_count_kv": 1 << 16,
    "attention.key_length": 1 << 16,
    "attention.value_length": 1 << 16,
    "rope.dimension_count": 1 << 16,
    "vocab_size": 1 << 24,
    "expert_count": 1 << 16,
    "expert_used_count": 1 << 16,
}
_MAY_BE_0: Final = ("attention.head_count_kv", "expert_count", "expert_used_count")
_ABOVE_0: Final = (
    "rope.freq_base",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
)
_OTHER_KINDS: Final = {
    "adapter": "an adapter, which changes another model",
    "mmproj": "the part of a model that sees",
    "imatrix": "measurements for making models smaller",
}


def require_model(fields: Mapping[str, Any], tensor_count: int, name: str) -> None:
    """
    Check that a file holds a language model.

    Args:
        fields: The file's fields.
        tensor_count: Number of tensors in the file.
        name: Name of the file, for the error.

    Raises:
        UnsupportedModelError: It holds something else, which the message names.
    """
    kind = fields.get("general.type")
    if isinstance(kind, str) and kind in _OTHER_KINDS:
        raise UnsupportedModelError(
            f"{name} holds {_OTHER_KINDS[kind]}, and no language model: choose another file of the "
            "model."
        )
    if not tensor_count and "tokenizer.ggml.tokens" in fields:
        raise UnsupportedModelError(
            f"{name} holds a vocabulary alone, without weights: choose a file of the model that is "
            "some hundred megabytes or more."
        )


def fault_of_fields(fields: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a file's fields, as a clause; None if nothing is."""
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not _is_power_of_two(alignment):
        return f"its alignment is {alignment!r}"
    architecture = fields.get("general.architecture")
    for key, most in _MOST.items():
        value = fields.get(f"{architecture}.{key}")
        least = 0 if key in _MAY_BE_0 else 1
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            if type(number) is not int or not least <= number <= most:
                return f"its {key} is {number!r}"
    for key, value in fields.items():
        if not key.startswith(f"{architecture}."):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                return f"its {key} is {number}"
    for key in _ABOVE_0:
        value = fields.get(f"{architecture}.{key}")
        if value is not None and not (isinstance(value, float | int) and value > 0):
            return f"its {key} is {value!r}"
    return _fault_of_vocabulary(fields)


def _fault_of_vocabulary(fields: Mapping[str, Any]) -> str | None:
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    if not _is_texts(tokens) or not tokens:
        return "its tokens are no texts"
    for name in ("token_type", "scores"):
        values = fields.get(f"tokenizer.ggml.{name}")
        if values is not None and (not isinstance(values, tuple) or len(values) != len(tokens)):
            return f"its {name} are not one for each of {len(tokens):,} tokens"
    merges = fields.get("tokenizer.ggml.merges")
    return "its merges are no texts" if merges is not None and not _is_texts(merges) else None


def fault_of_tensor(shape: Sequence[int], block: int, offset: int, alignment: int) -> str | None:
    """
    Return what is wrong with the description of a tensor, as a clause; None if nothing is.

    Args:
        shape: Its shape as in the file, innermost dimension first.
        block: Number of elements in a block of its type.
        offset: Where its data begin, in bytes from the start of all tensors' data.
        alignment: Alignment of the file, in bytes.
    """
    if any(size < 1 for size in shape) or math.prod(shape) > _MOST_ELEMENTS:
        return f"it holds a tensor of shape {tuple(shape)}"
    if (shape[0] if shape else 1) % block:
        return f"it holds a tensor of shape {tuple(shape)} in blocks of {block}"
    if offset % alignment:
        return f"a tensor lies at {offset:,}, which is no multiple of {alignment}"
    return None


def _is_power_of_two(number: int) -> bool:
    return 0 < number <= _MOST_ALIGNMENT and number & (number - 1) == 0


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_SWAPPED: Final = tuple(version << 24 for version in _VERSIONS)
_DEFAULT_ALIGNMENT: Final = 32
_MOST_DIMENSIONS: Final = 8
"""Most dimensions of a tensor, twice as many as the format allows; more means that the file is damaged."""
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
# Texts of tokens that end a reply. A file names one such token; a model may also use others.
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
    """Type, shape and place of a tensor."""

    shape: tuple[int, ...]
    """Outermost dimension first, as in numpy; the file has the innermost first."""
    kind: GGMLQuantizationType
    start: int
    """Position of its first byte in the file."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufContent:
    """A file's fields and its table of tensors."""

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]
    """The tensors by name, in the file's order."""
    field_places: dict[str, slice]
    """The bytes of each field in the file, including its name."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says about its model."""

    architecture: str
    context_length: int
    chat_template: str | None
    eos_token_ids: frozenset[int]
    bos_token: str | None
    eos_token: str | None
    window: int | None = None
    """Tokens that layers with a sliding window attend to; None: there are no such layers."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """How its makers recommend to sample, as `types.recommended` has it."""


def read_content(path: Path) -> GgufContent:
    """
    Return the fields of a file, and where its tensors are.

    Raises:
        UnsupportedModelError: It is not a GGUF file of a known version, or it is damaged.
    """
    try:
        with (
            _opened(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _parse(data, path)
    except ValueError as cause:  # an empty file cannot be mapped
        raise _not_gguf(path) from cause


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file; what is wrong with it or its content is an `UnsupportedModelError`."""
    try:
        with files.open_regular(path) as file:
            yield file
    except _DamagedError as cause:
        raise UnsupportedModelError(
            f"{path} is cut short or damaged ({cause}): download it again."
        ) from cause
    except OSError as cause:
        raise UnsupportedModelError(
            f"{path} cannot be read ({cause.strerror or cause}): check the path and its permissions."
        ) from cause


def read_header(path: Path) -> GgufHeader:
    """
    Return what a file says about its model.

    Raises:
        UnsupportedModelError: It is not a GGUF file of a known version, it is damaged, or it holds
            no language model.
    """
    return describe(read_content(path), path)


@dataclass(frozen=True, slots=True)
class GgufGlance:
    """What the first bytes of a GGUF file say about its model."""

    architecture: str
    quantization: str | None
    """Its type in llama.cpp's words, such as `Q4_K_M`; None: the first bytes and the name do not say."""
    context_length: int | None
    sampling: Mapping[str, float]
    """How its makers recommend to sample, as `types.recommended` has it."""


GLANCE_BYTES: Final = (1 << 14, 1 << 18)
"""
How many bytes are read at first, and where the fields do not end or a vocabulary begins in them, at most.

What is looked for comes before the vocabulary, in files of llama.cpp's converter after 1 to 3 kB; a licence
that is written out makes that 20 kB.
"""
_TYPE_IN_A_NAME: Final = re.compile(
    r"(?<![A-Z0-9])(I?Q[1-8]_(?:K_(?:XL|XS|S|M|L)|K|[01]|XXS|XS|NL|S|M)"
    r"|TQ[12]_0|MXFP4|NVFP4|BF16|F16|F32)(?![A-Z0-9])"
)


def glance(path: Path) -> GgufGlance:
    """
    Return what the first bytes of a file say, without reading its vocabulary.

    Raises:
        UnsupportedModelError: It cannot be read, is no GGUF file, is damaged there, or holds no model.
    """
    data, fields = b"", dict[str, Any]()
    with _opened(path) as file:
        for most in GLANCE_BYTES:
            data += file.read(most - len(data))
            fields, is_enough = _first_fields(data, path)
            if is_enough or len(data) < most:
                break
    require_model(fields, 1, path.name)
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise UnsupportedModelError(
            f"{path.name} names no architecture: choose another file of the model."
        )
    length = fields.get(f"{architecture}.context_length")
    return GgufGlance(
        architecture=architecture,
        quantization=_quantization(fields, path.name),
        context_length=length if type(length) is int else None,
        sampling=_sampling(fields),
    )


def _first_fields(data: bytes, path: Path) -> tuple[dict[str, Any], bool]:
    """Return the fields that are whole in the first bytes of a file, and whether no more are needed."""
    cursor = _Cursor(data)
    _, field_count = _counts(cursor, path)
    fields: dict[str, Any] = {}
    with contextlib.suppress(_CutError):
        while len(fields) < field_count:
            key = cursor.text()
            if key.startswith("tokenizer.") and len(fields) > 1:
                return fields, True
            fields[key] = cursor.value()
        return fields, True
    return fields, False


def _quantization(fields: Mapping[str, Any], name: str) -> str | None:
    """Return the type that a file's fields name, or else its name."""
    with contextlib.suppress(ValueError):
        name_of_type: str = LlamaFileType(fields.get("general.file_type")).name
        return name_of_type.removeprefix("MOSTLY_").removeprefix("ALL_")
    found = _TYPE_IN_A_NAME.search(name.upper())
    return found[1] if found else None


class _DamagedError(Exception):
    """The file ends too early, or its header is invalid; the text says why, as a clause."""


class _CutError(_DamagedError):
    """The bytes end inside a value."""


class _Cursor:
    """Reads values from the bytes of a file, one after the other. They are little-endian."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._items = 0
        self.at = 0

    def skip(self, length: int) -> int:
        start = self.at
        if length > len(self._data) - start:
            raise _CutError(f"it ends at byte {len(self._data):,}, inside its header")
        self.at += length
        if self.at > MOST_HEADER_BYTES:
            raise _DamagedError(f"its header has more than {MOST_HEADER_BYTES:,} bytes")
        return start

    def begins_with(self, magic: bytes) -> bool:
        """Return whether these bytes are next, and skip them."""
        start = self.skip(min(len(magic), len(self._data) - self.at))
        return self._data[start : self.at] == magic

    def number(self, code: str) -> Any:
        start = self.skip(struct.calcsize(code))
        return struct.unpack_from("<" + code, self._data, start)[0]

    def raw_text(self) -> bytes:
        length = self.number("Q")
        start = self.skip(length)
        return self._data[start : self.at]

    def text(self) -> str:
        # Tokens can be any bytes, so what is not UTF-8 is replaced and not refused.
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


def _counts(cursor: _Cursor, path: Path) -> tuple[int, int]:
    """Return how many tensors and fields a file says that it has."""
    if not cursor.begins_with(_MAGIC):
        raise _not_gguf(path)
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
    return cursor.number("Q"), cursor.number("Q")


def _parse(data: mmap.mmap, path: Path) -> GgufContent:
    cursor = _Cursor(data)
    tensor_count, field_count = _counts(cursor, path)
    fields, places = {}, {}
    for _ in range(field_count):
        start = cursor.at
        key = cursor.text()
        if key in fields:  # readers differ in which of the two they use
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
    """Yield the name and description of each tensor; `start` is relative to the start of all data here."""
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


_SAMPLING: Final = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""
Names of `types.SAMPLING` by keys after `general.sampling.`.

llama.cpp's converter fills them from generation_config.json.
"""


def describe(content: GgufContent, path: Path) -> GgufHeader:
    """
    Return what the fields of a file say about its model.

    Raises:
        UnsupportedModelError: It holds no language model, or names no architecture or no context length.
    """
    fields = content.fields
    # The first of several files of a model may have no tensors.
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
    # Only control tokens, since ordinary tokens can have such texts: "</s>" also ends an element in HTML.
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
        sampling=_sampling(fields),
    )


def _sampling(fields: Mapping[str, Any]) -> dict[str, float]:
    return recommended(
        {name: fields.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    )


def _token(tokens: list[Any], number: object) -> str | None:
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _not_gguf(path: Path) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} is not a GGUF file: choose a file that ends in .gguf, or download it again."
    )

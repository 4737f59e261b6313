"""
The tensors of a GGUF model, in one file or several, as integers, scales and zero points.

`Shards` maps the files into memory, so that a tensor's bytes are read when they are used. `(number - zero) *
scale` is the value that llama.cpp computes with, within one unit in the last place of f32. Knows neither
architectures nor graphs.
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from recollect.errors import UnsupportedModelError
from recollect.models.gguf import TensorInfo, read_content

Storage = Literal["i4", "i8", "u4", "u8"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the integers, scales and zero points of a tensor type are stored."""

    group: int
    """Number of consecutive weights that share a scale."""
    storage: Storage
    """The smallest element type that holds all integers of the type. Unsigned ones come with zero points."""
    half_scales: bool = False
    """Whether scales are stored as f16, which is exact because the file has them as f16."""

    @property
    def has_zeros(self) -> bool:
        """Return whether groups have zero points, because the type stores a minimum for each."""
        return self.storage in ("u4", "u8")


@dataclass(frozen=True, slots=True)
class Groups:
    """Weights as `(number - zero) * scale`."""

    numbers: np.ndarray
    """Integers, int8, shape `(groups, group)`; those of unsigned types are at most 31."""
    scales: np.ndarray
    """f32, shape `(groups,)`."""
    zeros: np.ndarray | None
    """f32, shape `(groups,)`; None: all are 0."""

    def values(self) -> np.ndarray:
        """Return the weights, f32, shape `(groups, group)`."""
        numbers = self.numbers.astype(np.float32)
        if self.zeros is not None:
            numbers -= self.zeros[:, None]
        numbers *= self.scales[:, None]
        return numbers


@dataclass(frozen=True, slots=True)
class _Patches:
    """
    Bytes to overwrite in each block, so that dequantizing it yields its integers, scales or minima alone.

    A patch is `start:stop=hex`, the hex bytes repeated to fill the range; 003c is 1.0 as f16. The layout of
    blocks is that of ggml-common.h. This way the gguf package unpacks all types, and no bit arithmetic of
    ours can disagree with it.
    """

    numbers: str
    """Sets scales to 1 and minima to 0, so that the values are the integers."""
    scales: str
    """Sets the integers to `one` and minima to 0, so that the values are `one` times the scales."""
    one: int = 1
    minima: str | None = None
    """Sets the integers to 0, so that the values are the minima. None: the type has no minima."""


_K_SCALES: Final = "0:4=003c0000 4:8=01 8:12=00 12:16=01"
"""For Q4_K and Q5_K: sets d to 1, dmin to 0, and every 6-bit scale to 1."""

_BY_PATCHES: Final[Mapping[Kind, tuple[Layout, _Patches]]] = MappingProxyType(
    {
        Kind.Q8_0: (Layout(32, "i8", half_scales=True), _Patches("0:2=003c", "2:34=01")),
        Kind.Q4_0: (Layout(32, "i4", half_scales=True), _Patches("0:2=003c", "2:18=00", -8)),
        Kind.Q5_0: (Layout(32, "i8", half_scales=True), _Patches("0:2=003c", "2:22=00", -16)),
        Kind.IQ4_NL: (Layout(32, "i8", half_scales=True), _Patches("0:2=003c", "2:18=88")),
        Kind.MXFP4: (Layout(32, "i8"), _Patches("0:1=80", "1:17=11")),
        Kind.Q4_1: (
            Layout(32, "u4"),
            _Patches("0:4=003c0000", "2:4=00 4:20=11", minima="4:20=00"),
        ),
        Kind.Q5_1: (
            Layout(32, "u8"),
            _Patches("0:4=003c0000", "2:8=00 8:24=11", minima="4:24=00"),
        ),
        Kind.Q2_K: (
            Layout(16, "u4"),
            _Patches("0:16=01 80:84=003c0000", "16:80=55 82:84=00", minima="16:80=00"),
        ),
        Kind.Q3_K: (
            Layout(16, "i4"),
            _Patches("96:104=11 104:108=aa 108:110=003c", "0:96=00", -4),
        ),
        Kind.Q4_K: (Layout(32, "u4"), _Patches(_K_SCALES, "2:4=00 16:144=11", minima="16:144=00")),
        Kind.Q5_K: (
            Layout(32, "u8"),
            _Patches(_K_SCALES, "2:4=00 16:48=00 48:176=11", minima="16:176=00"),
        ),
        Kind.Q6_K: (Layout(16, "i8"), _Patches("192:208=01 208:210=003c", "0:192=00", -32)),
        Kind.IQ4_XS: (Layout(32, "i8"), _Patches("0:2=003c 2:4=aa 4:8=11", "8:136=88")),
    }
)

_BY_SEARCH: Final[Mapping[Kind, tuple[Layout, tuple[int, ...]]]] = MappingProxyType(
    {
        # The magnitudes that a type's numbers can have, in a unit that makes them integers. The types take
        # numbers from a table, most of them eight at a time; values are such numbers times a scale.
        Kind.TQ1_0: (Layout(256, "i8"), (1,)),
        Kind.TQ2_0: (Layout(256, "i8"), (1, 2)),
        Kind.NVFP4: (Layout(16, "i8"), (12, 8, 6, 4, 3, 2, 1)),
        Kind.IQ1_S: (Layout(32, "i8"), (9, 7, 1)),
        Kind.IQ1_M: (Layout(8, "i8"), (9, 7, 1)),
        Kind.IQ2_XXS: (Layout(32, "i8"), (43, 25, 8)),
        Kind.IQ2_XS: (Layout(16, "i8"), (43, 25, 8)),
        Kind.IQ2_S: (Layout(16, "i8"), (43, 25, 8)),
        Kind.IQ3_XXS: (Layout(32, "i8"), (62, 52, 44, 36, 28, 20, 12, 4)),
        Kind.IQ3_S: (Layout(32, "i8"), (15, 13, 11, 9, 7, 5, 3, 1)),
    }
)

PLAIN_KINDS: Final = (Kind.F32, Kind.F16, Kind.BF16)
"""Types that are stored as they are, without scales."""

LAYOUTS: Final[Mapping[Kind, Layout]] = MappingProxyType(
    {kind: layout for table in (_BY_PATCHES, _BY_SEARCH) for kind, (layout, _) in table.items()}
)
"""How each of the other readable types is stored."""

READABLE_KINDS: Final = frozenset({*PLAIN_KINDS, *LAYOUTS})


def take_apart(blocks: np.ndarray, kind: Kind) -> Groups:
    """
    Return the integers, scales and zero points of blocks.

    Args:
        blocks: Whole blocks, bytes, shape `(n, bytes per block)`; they are not changed.
        kind: A key of `LAYOUTS`.

    Raises:
        ValueError: A scale or a minimum is not finite, or a value is not one that the type can have, because
            the file is damaged. The text is a noun phrase.
    """
    with np.errstate(invalid="ignore"):  # NaN is detected below
        groups = _by_patches(blocks, kind) if kind in _BY_PATCHES else _by_search(blocks, kind)
    _require_finite("scale", groups.scales)
    if groups.zeros is not None:
        _require_finite("minimum", groups.zeros)
    return groups


def values_of(blocks: np.ndarray, kind: Kind) -> np.ndarray:
    """Return the values of blocks as the gguf package computes them, f32, shape `(n,)`."""
    # As one row, because the package loops over groups of 16 rows in Python.
    values: np.ndarray = dequantize(np.ascontiguousarray(blocks).reshape(1, -1), kind)
    return values.reshape(-1).astype(np.float32, copy=False)


def _require_finite(what: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"a {what} that is infinite or no number")


def _by_patches(blocks: np.ndarray, kind: Kind) -> Groups:
    layout, patches = _BY_PATCHES[kind]
    numbers = _patched(blocks, patches.numbers, kind).astype(np.int8).reshape(-1, layout.group)
    first = slice(None, None, layout.group)
    scales = _patched(blocks, patches.scales, kind)[first] / np.float32(patches.one)
    if patches.minima is None:
        return Groups(numbers, scales, None)
    minima = _patched(blocks, patches.minima, kind)[first]
    # A group with a scale of 0 has the minimum as all its values. (number - zero) * 0 cannot express that, so
    # it is stored as (0 - -minimum) * 1. Real Q4_K files have such groups.
    flat = scales == 0
    numbers[flat] = 0
    scales[flat] = 1
    return Groups(numbers, scales, -minima / scales)


def _patched(blocks: np.ndarray, patches: str, kind: Kind) -> np.ndarray:
    """Return the values of blocks of which some bytes were overwritten, f32, shape `(n,)`."""
    changed = blocks.copy()
    for patch in patches.split():
        place, _, content = patch.partition("=")
        start, stop = map(int, place.split(":"))
        changed[:, start:stop] = np.resize(
            np.frombuffer(bytes.fromhex(content), np.uint8), stop - start
        )
    return values_of(changed, kind)


def _by_search(blocks: np.ndarray, kind: Kind) -> Groups:
    """
    Find a scale for each group that makes all its values integers.

    The largest magnitude in a group is one of a few integers times the scale. The first of these integers for
    which all other values are integers, too, is taken; if several fit, they give the same values.
    """
    layout, magnitudes = _BY_SEARCH[kind]
    values = values_of(blocks, kind).reshape(-1, layout.group)
    largest = np.abs(values).max(axis=1)
    _require_finite("scale", largest)
    scales = np.zeros_like(largest)
    numbers = np.zeros(values.shape, np.int8)
    open_groups = np.flatnonzero(largest > 0)
    for magnitude in magnitudes:
        scale = largest[open_groups] / np.float32(magnitude)
        found = values[open_groups] / scale[:, None]
        whole = np.rint(found)
        # Integers are at most 62, so rounding errors of f32 are far below 1e-3.
        fits = (np.abs(found - whole) < 1e-3).all(axis=1)
        chosen = open_groups[fits]
        numbers[chosen], scales[chosen] = whole[fits], scale[fits]
        open_groups = open_groups[~fits]
    if len(open_groups) > 0:
        raise ValueError(f"numbers that {kind.name} does not have")
    return Groups(numbers, scales, None)


assert all(GGML_QUANT_SIZES[kind][0] % layout.group == 0 for kind, layout in LAYOUTS.items())


_PART: Final = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE
)
"""Names of parts that llama.cpp's gguf-split writes. Source: its `llama_split_path`."""
_MOST_PARTS: Final = 1000
"""Most parts of a model. A file's name can claim 99,999, and each would be looked for."""


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a model; *name* is the name or the path of one of them."""
    part = _PART.fullmatch(name)
    if part is None or not 1 < int(part["count"]) <= _MOST_PARTS:
        return [name]
    count = int(part["count"])
    return [
        f"{part['stem']}-{number:05}-of-{count:05}{part['suffix']}"
        for number in range(1, count + 1)
    ]


def parts_of(path: Path) -> list[Path]:
    """
    Return all files of the model whose only file or first part is *path*.

    Raises:
        UnsupportedModelError: *path* is a later part, or a part is missing beside it.
    """
    parts = [path.with_name(name) for name in part_names(path.name)]
    if path != parts[0]:
        raise UnsupportedModelError(
            f"{path.name} is one of {len(parts)} files of a model: name the first, {parts[0].name}."
        )
    for part in parts[1:]:
        if not part.is_file():
            raise UnsupportedModelError(
                f"{path.name} is the first of {len(parts)} files, and {part.name} is not beside it: "
                "download all of them into one folder."
            )
    return parts


class Shards:
    """
    The fields and tensors of a model, from all of its files.

    Args:
        path: The only file, or the first part.

    Raises:
        UnsupportedModelError: A file is missing or damaged, or the files do not belong together.
    """

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self.fields: Final[dict[str, Any]] = {}
        self.tensors: Final[dict[str, TensorInfo]] = {}
        self._file_of: Final[dict[str, np.ndarray]] = {}
        parts = parts_of(path)
        for number, part in enumerate(parts):
            content = read_content(part)
            if number == 0:
                self.fields.update(content.fields)
            self._require_place(part, number, len(parts), content.fields)
            mapped = np.memmap(part, np.uint8, "r")
            for name, tensor in content.tensors.items():
                if name in self.tensors:
                    raise UnsupportedModelError(
                        f"{part.name} holds the tensor {name} a second time: the file is damaged, or "
                        "parts of two models lie beside each other; download it again."
                    )
                self.tensors[name] = tensor
                self._file_of[name] = mapped

    @property
    def total_bytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def kind(self, name: str) -> GGMLQuantizationType:
        """Return a tensor's type."""
        return self.tensors[name].kind

    def blocks(self, name: str) -> np.ndarray:
        """Return a tensor's blocks, read-only bytes, shape `(blocks, bytes per block)`."""
        tensor = self.tensors[name]
        stored = self._file_of[name][tensor.start : tensor.start + tensor.size_bytes]
        return stored.reshape(-1, GGML_QUANT_SIZES[tensor.kind][1])

    def rows(self, name: str) -> np.ndarray:
        """
        Return a matrix's rows, read-only bytes, shape `(rows, bytes per row)`.

        Raises:
            UnsupportedModelError: The tensor is not a matrix whose rows are whole blocks.
        """
        tensor = self.tensors[name]
        width = tensor.shape[-1] if tensor.shape else 1
        block = GGML_QUANT_SIZES[tensor.kind][0]
        if width % block or len(tensor.shape) > 2:
            raise UnsupportedModelError(
                f"{self.path.name} holds {name} of shape {tensor.shape}, which is no matrix of "
                f"{tensor.kind.name}: the file is damaged; download it again."
            )
        rows = 1 if len(tensor.shape) < 2 else tensor.shape[0]
        return self.blocks(name).reshape(rows, -1)

    def _require_place(self, part: Path, number: int, count: int, fields: dict[str, Any]) -> None:
        """Check that the file's fields name the same part of the model as its name."""
        said = fields.get("split.no", 0), fields.get("split.count", 1) or 1
        if count == 1 and said[1] > 1:
            raise UnsupportedModelError(
                f"{part.name} is one of {said[1]} files of a model and was renamed: give the parts "
                "their names back, which end in -00001-of-00002.gguf and so on."
            )
        if count > 1 and said != (number, count):
            raise UnsupportedModelError(
                f"{part.name} says that it is part {said[0] + 1} of {said[1]}: download the model's "
                "files again."
            )


def iterate_rows(rows: np.ndarray, most_bytes: int) -> Iterator[slice]:
    """Yield slices that cover all rows, each of at most *most_bytes* bytes, but of at least one row."""
    step = max(1, most_bytes // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, min(len(rows), start + step))


_ALIGNMENT: Final = 32
"""Of tensors in a file that is written here."""
_SECTION_BYTES: Final = 64 << 20


def f32_bytes(shards: Shards) -> int:
    """Return how many bytes the tensors of a model have as f32; a file of several parts counts whole."""
    return sum(4 * math.prod(tensor.shape) for tensor in shards.tensors.values())


def is_f32(shards: Shards) -> bool:
    """Return whether all tensors of a model are f32 already."""
    return all(tensor.kind is Kind.F32 for tensor in shards.tensors.values())


def write_as_f32(shards: Shards, target: Path) -> None:
    """
    Write a model's file anew with the same values as f32, all parts in one.

    llama.cpp quantizes activations where weights are quantized, and not where they are f32.

    Args:
        shards: The model, opened.
        target: Where the new file is written.

    Raises:
        UnsupportedModelError: The file is damaged, or has a tensor of a type that cannot be read.
        OSError: It cannot be written.
    """
    content = read_content(shards.path)
    kept = [name for name in content.fields if not name.startswith(("split.", "general.alignment"))]
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(shards.tensors), len(kept)))
    with shards.path.open("rb") as file:
        for name in kept:
            place = content.field_places[name]
            file.seek(place.start)
            head += file.read(place.stop - place.start)
    at = 0
    for name, tensor in shards.tensors.items():
        text, shape = name.encode(), tuple(reversed(tensor.shape))
        head += struct.pack("<Q", len(text)) + text + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *shape, Kind.F32, at)
        at += _padded(4 * math.prod(shape))
    with target.open("wb") as out:
        out.write(head + bytes(_padded(len(head)) - len(head)))
        for name in shards.tensors:
            blocks, written = shards.blocks(name), 0
            for part in iterate_rows(blocks, _SECTION_BYTES):
                values = values_of(blocks[part], shards.kind(name)).astype("<f4")
                written += out.write(values.tobytes())
            out.write(bytes(_padded(written) - written))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

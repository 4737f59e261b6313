"""
The tensors of a GGUF model, in one file or in several that lie beside each other.

Maps the files; a tensor's bytes are read from the disk when they are used. Knows no architecture.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from recollect.errors import UnsupportedModelError
from recollect.models.gguf_file import TensorInfo, read_content

_PART: Final = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE
)
"""How llama.cpp's gguf-split names parts. Source: its `llama_split_path`."""
_MOST_PARTS: Final = 1000  # a number in a name is not to make us try a hundred thousand files


def part_names(name: str) -> list[str]:
    """Return the names of all files of a model, of which *name* is one; it may begin with folders."""
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
    Return the files of the model that *path* is, or is the first part of.

    Raises:
        UnsupportedModelError: It is another part than the first, or a part is not beside it.
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
    A model's fields and tensors, over all of its files.

    Raises:
        UnsupportedModelError: A file is missing or damaged, or the files are not of one model.
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
        """Return the size of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def kind(self, name: str) -> GGMLQuantizationType:
        """Return a tensor's type."""
        return self.tensors[name].kind

    def blocks(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, read-only, shape `(blocks, bytes of a block)`."""
        tensor = self.tensors[name]
        stored = self._file_of[name][tensor.start : tensor.start + tensor.size_bytes]
        return stored.reshape(-1, GGML_QUANT_SIZES[tensor.kind][1])

    def rows(self, name: str) -> np.ndarray:
        """
        Return a matrix's bytes, read-only, shape `(rows, bytes of a row)`.

        Raises:
            UnsupportedModelError: Its rows are no whole blocks.
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
        """Check that a file is the part that its name says."""
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
    """Yield slices that cover all rows, each of at most so many bytes, and of one row at least."""
    step = max(1, most_bytes // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, min(len(rows), start + step))

"""
Folders with a model for ONNX Runtime GenAI and its genai_config.json: opened, or converted from other models.

To open one, the small files beside the weights are read, and each .onnx file is searched for the names of
other files, which hold weights or a vendor's compiled code: these must be in the folder. No model is loaded.
GGUF files and Hugging Face folders are converted in processes of their own, which give their memory back.

Source of the field numbers of .onnx files: onnx.proto of ONNX 1.19.
"""

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from recollect import files
from recollect.errors import ConfigError, UnsupportedModelError
from recollect.files import cached_sha256, combine
from recollect.models import onnx_config
from recollect.models.catalog import LocalModel
from recollect.models.gguf import read_header
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
from recollect.types import Progress, no_progress, recommended

_MOST_FIELDS: Final = 20_000_000
"""Most fields of an .onnx file that are read, which takes half a minute. 1,000 nodes have about 20,000."""

_VARINT, _LENGTH = 0, 2
"""Wire types of protobuf: a number of variable length, and bytes after their length."""
_FIXED: Final = {1: 8, 5: 4}
"""Wire types of protobuf for numbers of a fixed length, with their lengths in bytes."""

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
"""For each kind of message the numbers of fields that hold messages, and their kinds. Others are skipped."""

_NAME, _INTEGER, _TEXT = 1, 3, 4
"""Numbers of fields of an attribute."""
_COMPILED: Final = b"EPContext"
"""The operator for a vendor's compiled code, which an attribute holds or names the file of."""


def require_own_files(path: Path, folder: Path) -> None:
    """
    Check that all files that an .onnx file names are in its folder.

    ONNX Runtime checks that itself since 2026, but vendors' builds are older.

    Args:
        path: The .onnx file.
        folder: The model's folder, which has the file directly or further below.

    Raises:
        UnsupportedModelError: It names a file elsewhere, or is damaged.
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
    Searches the bytes of an .onnx file, which are protobuf messages inside each other.

    Methods raise a `ValueError` if the file ends inside a field or has more than `_MOST_FIELDS`.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._fields = 0

    def names(self) -> Iterator[str]:
        """Yield the names of all other files that the file names."""
        return self._inside(_MODEL, 0, len(self._data))

    def _inside(self, message: int, start: int, end: int) -> Iterator[str]:
        """Yield the names in a message of that kind, whose bytes are `[start, end)`."""
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
        """Yield the file with compiled code that a node names, if it is `_COMPILED` and does not embed it."""
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
        """
        Yield (number, wire type, at, after) of each field in `[start, end)`.

        The field's bytes are `[at, after)`; for a varint both are its value.
        """
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
"""Most files of a folder. A folder has about ten, and AMD's have a few hundred compiled parts."""


def is_onnx_folder(folder: Path) -> bool:
    """Return whether *folder* has a genai_config.json."""
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
        folder: A folder with a genai_config.json.
        name: Name of the model, as the user gave it.
        home: The data folder, in which the hashes of files are remembered.
        allow_native_code: As for `onnx_config.check`.
        progress: Called while files are hashed.

    Raises:
        UnsupportedModelError: A file is missing or damaged, does not say what is needed, or names a file
            elsewhere; or native code would be loaded that is not allowed.
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
        sampling=recommended(read_json(folder / "generation_config.json")),
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
    """Return the hex sha256 of all files in the folder, since a graph may read its weights from any."""
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
    """Return the paths in the folder and below, relative to it, without hidden ones."""
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
    """Return the text of the first id that has one; None: none has."""
    return next((texts[number] for number in ids if number in texts), None)


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


Precision = Literal["int8", "fp32"]
"""
Precision of the weights.

Four bits are not offered, because a GGUF file's weights have been rounded to about four bits already.
"""

LIBRARIES: Final = ("torch", "transformers", "accelerate", "onnx_ir", "onnxruntime_genai")
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

_NO_CODE: Final = ("--extra_options", "hf_remote=false")
"""Forbids the builder to run Python code from the source folder, whatever the default of its release is."""


_WRITE_FLOATS: Final = f"from {__name__} import write_floats; write_floats()"
"""The program that writes float weights, in a process of its own because they take much memory."""


def convert_to_onnx(
    source: Path,
    folder: Path,
    *,
    precision: Precision = "int8",
    progress: Progress = no_progress,
) -> None:
    """
    Convert a model into a folder for ONNX Runtime GenAI on the CPU.

    Args:
        source: A GGUF file, or a folder that transformers' `save_pretrained` wrote.
        folder: The folder to be made; it must be empty or not exist.
        precision: Precision of the weights. Activations and KV are f32 in both.
        progress: Called with the number of steps that are done.

    Raises:
        ConfigError: *folder* is not empty, or cannot be written.
        UnsupportedModelError: A library is missing, or the model cannot be converted.
    """
    require_convertible(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            made = _convert(source, Path(scratch), precision, progress)
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
    except OSError as cause:
        raise ConfigError(
            f"{folder} cannot be written ({cause.strerror or cause}): name another place, with room "
            "for five times the model."
        ) from cause
    progress("writing ONNX", 2, 2)


def require_convertible(folder: Path) -> None:
    """
    Check that `convert_to_onnx` can make a folder; called before a model is downloaded.

    Raises:
        ConfigError: *folder* is not empty, or a path above it is not a folder.
        UnsupportedModelError: A library is missing.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UnsupportedModelError(
            f'Converting needs {", ".join(missing)}: pip install "recollect-llm[convert,genai]".'
        )
    above = next(way for way in folder.absolute().parents if way.exists())
    if not above.is_dir():
        raise ConfigError(f"{folder} cannot be made, because {above} is no folder: name another.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: name a folder that is not, or remove it.")


def _convert(source: Path, scratch: Path, precision: Precision, progress: Progress) -> Path:
    """Convert *source* inside *scratch*, and return the finished folder."""
    original = source
    if source.is_file():
        header = read_header(source)
        progress("writing ONNX", 0, 2)
        original = scratch / "original"
        ids = [str(number) for number in sorted(header.eos_token_ids)]
        _run(["-c", _WRITE_FLOATS, str(source), str(original), *ids], source)
    elif not (source / "config.json").is_file() or is_onnx_folder(source):
        raise UnsupportedModelError(
            f"{source} is no Hugging Face folder with float weights: give one, or a .gguf file."
        )
    progress("writing ONNX", 1, 2)
    made = scratch / "model"
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", str(original), "-o", str(made)]
    options = ["-p", precision, "-e", "cpu", "-c", str(scratch / "cache")]
    _run([*builder, *options, *_NO_CODE], source)
    if not (made / CONFIG_NAME).is_file():
        raise _failed(source, f"no {CONFIG_NAME} was written")
    return made


def _run(arguments: list[str], source: Path) -> None:
    """Run Python with these arguments, and no use of the hub; an error quotes its last line on stderr."""
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-P", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env={**os.environ, **_OFFLINE},
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise _failed(source, lines[-1].strip().rstrip("."))


def _failed(source: Path, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source} could not be converted ({reason}): the model's architecture or tensor types may "
        "be unknown to transformers or to ONNX Runtime GenAI's builder; try the original model."
    )


def write_floats() -> None:
    """
    Write a GGUF file as a Hugging Face folder with float weights.

    The arguments are in `sys.argv`: the file, the folder, and then the ids of the tokens that end a reply.
    """
    import torch  # noqa: PLC0415 - takes seconds, and only this program needs it
    import transformers  # noqa: PLC0415

    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    eos_token_ids = [int(number) for number in sys.argv[3:]]
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(
        transformers, "GgufConfig"
    ):  # these releases keep the file's blocks unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # The weights are floats now. Settings that call them quantized would keep them from being saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    if (
        eos_token_ids
    ):  # transformers reads the one that the file names; a chat may end with others, too
        model.generation_config.eos_token_id = eos_token_ids
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)

"""
Folders that hold a model for ONNX Runtime GenAI, with a genai_config.json: opened, and made of other models.

Reads the small files beside the weights, and walks over each .onnx file to see which other files it
names: weights, and what a vendor compiled. These have to lie in the folder. Does not load the model.
A GGUF file or a Hugging Face folder is converted by programs of their own, in a process each, because the
memory is given back.

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


Precision = Literal["int8", "fp32"]
"""Four bits are not offered: they would be taken of weights that had been cut to four bits before."""

_LIBRARIES: Final = ("torch", "transformers", "accelerate", "onnx_ir", "onnxruntime_genai")
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

_NO_CODE: Final = ("--extra_options", "hf_remote=false")
"""A folder's own Python does not run: said here, and not left to what a release takes for granted."""


_WRITE_FLOATS: Final = f"from {__name__} import write_floats; write_floats()"
"""A program for a process of its own, which gives the memory back: all weights are f32 in it."""


def convert_to_onnx(
    source: Path,
    folder: Path,
    *,
    precision: Precision = "int8",
    progress: Progress = no_progress,
) -> None:
    """
    Make *folder* a folder for ONNX Runtime GenAI on the CPU.

    Args:
        source: A GGUF file, or a folder as transformers' `save_pretrained` writes it.
        folder: Is made; must not be there, or be empty.
        precision: Of the weights. Activations and KV are f32 in both.

    Raises:
        ConfigError: There is something at *folder* already, or it cannot be written there.
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
    Check, before anything is fetched, that a folder can be made of a model.

    Raises:
        ConfigError: There is something at *folder* already, or something above it is no folder.
        UnsupportedModelError: A library is missing.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
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
    """Return the finished folder inside *scratch*."""
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
    """Run a program of Python's without a network; say with its last line why it failed."""
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
    Write the GGUF file in `sys.argv[1]` as a Hugging Face folder with float weights.

    Its place is in `sys.argv[2]`; the ids of tokens that end a reply follow.
    """
    import torch  # noqa: PLC0415 - seconds, which only this program is to wait for
    import transformers  # noqa: PLC0415

    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    eos_token_ids = [int(number) for number in sys.argv[3:]]
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer releases would keep the blocks as they are
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # The weights are plain numbers now; what says otherwise would keep them from being saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    if eos_token_ids:  # a GGUF file names one; a chat can also end with another
        model.generation_config.eos_token_id = eos_token_ids
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)

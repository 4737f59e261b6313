"""
Folders with an OpenVINO model, which recollect converted or another tool exported: read and checked.

Reads the small files beside the weights. A converted folder has a `Manifest`, from which it can be opened
without its GGUF file. Loads no model and converts nothing. The readers of settings and templates serve
folders for ONNX Runtime GenAI as well.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self
from xml.etree import ElementTree

from recollect import files
from recollect.errors import UnsupportedModelError
from recollect.files import cached_sha256, combine
from recollect.models.catalog import LocalModel
from recollect.models.gguf import GgufHeader, read_header
from recollect.text.file_tokenizers import MOST_TOKENIZER_BYTES
from recollect.types import Progress, no_progress, recommended

_log: Final = logging.getLogger(__name__)

MOST_TEXT_BYTES: Final = 16 * files.MIB
"""Most bytes of a settings file. The largest known one, which lists added tokens, has 1.2 MB."""


def read_text(path: Path, *, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """
    Return the content of a text file in a model's folder.

    Raises:
        UnsupportedModelError: It cannot be read, is too large, or lies outside the folder.
    """
    try:
        files.inside(path.parent, path.name)
        return files.read_text(path, most_bytes=most_bytes)
    except UnicodeDecodeError as cause:
        raise UnsupportedModelError(
            f"{path} cannot be read (it is not UTF-8 text): export the model again."
        ) from cause
    except OSError as cause:
        raise UnsupportedModelError(
            f"{path} cannot be read ({cause.strerror or cause}): export the model again."
        ) from cause


def read_json(path: Path, *, most_bytes: int = MOST_TEXT_BYTES) -> Mapping[str, Any]:
    """
    Return the object in a JSON file; an empty one if there is no file, or no object in it.

    Raises:
        UnsupportedModelError: It cannot be read, or is not JSON.
    """
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        content: Any = json.loads(read_text(path, most_bytes=most_bytes))
    except (ValueError, RecursionError) as cause:  # ValueError: also for a number of 5,000 digits
        raise UnsupportedModelError(f"{path} is not valid JSON: export the model again.") from cause
    return content if isinstance(content, dict) else {}


def warn_of_writers(folder: Path, names: Iterable[str]) -> None:
    """Log one warning if other users can change the folder or one of its files."""
    for path in (folder, *(folder / name for name in names)):
        who = files.others_may_write(path) if path.exists() else None
        if who is not None:
            _log.warning(
                "%s can be changed by others (%s): they can change what the model says, or read "
                "into it; keep models in a folder of your own.",
                path,
                who,
            )
            return


def chat_template(folder: Path) -> str | None:
    """
    Return the folder's chat template, from the first of three files that has one; None: none has.

    Raises:
        UnsupportedModelError: A file cannot be read, or is not JSON.
    """
    file = folder / "chat_template.jinja"
    if file.exists() or file.is_symlink():
        return read_text(file)
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _default_template(read_json(folder / name).get("chat_template"))
        if template:
            return template
    return None


def special_token(tokenizer_config: Mapping[str, Any], name: str) -> str | None:
    """Return the text of `bos_token` or `eos_token` in a tokenizer_config.json; None if it is not there."""
    found = tokenizer_config.get(name)
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else None


_MOST_IDS_TEXT: Final = 4096
"""Most characters that are read of a list of ids, some hundred ids; models have up to ten end tokens."""
_MOST_DIGITS: Final = 10
MOST_ID: Final = 2**31 - 1
"""Largest token id: ids are stored as int32."""


def as_ids(value: object) -> list[int]:
    """Return the token ids in a number, a list, or the text of either; what is not an id is left out."""
    if isinstance(value, str):
        parts = value[:_MOST_IDS_TEXT].replace(",", " ").split()
        value = [int(part) for part in parts if is_id(part)]
    items = value if isinstance(value, list) else [value]
    return [item for item in items if type(item) is int and 0 <= item <= MOST_ID]


def is_id(text: str) -> bool:
    """Return whether a text is a token id in decimal digits."""
    return text.isdecimal() and len(text) <= _MOST_DIGITS and int(text) <= MOST_ID


def _default_template(found: object) -> str | None:
    """Return a template that is a text, or the one named `default` in a list of named ones; else None."""
    if isinstance(found, list):
        found = next(
            (
                item.get("template")
                for item in found
                if isinstance(item, dict) and item.get("name") == "default"
            ),
            None,
        )
    return found if isinstance(found, str) else None


MANIFEST_NAME: Final = "recollect.json"
FORMAT_VERSION: Final = 3
_INEXACT_VERSION: Final = 2
"""
Version of folders whose weights were rounded by OpenVINO GenAI's reader, which also left RoPE unscaled.

Such a folder is still used if its GGUF file cannot be downloaded again. It has the same fields.
"""
_MOST_BYTES: Final = 4 * files.MIB
"""Most bytes of a manifest: a hundred times what is written, most of which is the chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What recollect.json in a converted folder says: all that is needed to open it without the GGUF file."""

    name: str
    """Name of the model when it was converted."""
    source_sha256: str
    """Hex sha256 of the GGUF file; of several parts, that of their sha256s."""
    architecture: str
    context_length: int
    chat_template: str | None
    eos_token_ids: list[int]
    bos_token: str | None
    eos_token: str | None
    fingerprint: str
    library_versions: dict[str, str]
    """Versions of the packages that wrote the folder, by name."""
    file_bytes: dict[str, int]
    """Sizes of the folder's files by name, from which an incomplete folder is recognised."""
    window: int | None = None
    """Tokens that layers with a sliding window attend to; None: there are none, or the version that wrote the
    manifest did not note it."""
    sampling: dict[str, float] | None = None
    """How the GGUF file says that its makers recommend to sample; empty: it does not say; None: the version
    that wrote the manifest did not look."""
    format_version: int = FORMAT_VERSION

    @property
    def is_exact(self) -> bool:
        """Return whether the weights have exactly the values of the GGUF file."""
        return self.format_version == FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write the manifest into *folder*."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / MANIFEST_NAME).write_text(text + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the manifest in *folder*; None if there is none of a known version, or it is damaged."""
        try:
            path = files.inside(folder, MANIFEST_NAME)
            fields: Any = json.loads(files.read_text(path, most_bytes=_MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        known = (FORMAT_VERSION, _INEXACT_VERSION)
        if not isinstance(fields, dict) or fields.get("format_version") not in known:
            return None
        fields.pop("source_bytes", None)  # earlier versions wrote it, and nothing used it
        try:
            return cls(**fields) if _is_sound(fields) else None
        except TypeError:  # an unknown field, or one that is missing
            return None


_MOST_NUMBER: Final = 2**31 - 1  # positions and token ids are stored as int32
_TEXTS: Final = ("name", "source_sha256", "architecture", "fingerprint")
_TABLES: Final = ("library_versions", "file_bytes")
_OPTIONAL: Final = ("chat_template", "bos_token", "eos_token")


def _is_sound(fields: dict[str, Any]) -> bool:
    """Return whether all fields have the right types and ranges; the file may have been edited."""
    ends = fields.get("eos_token_ids")
    return (
        all(isinstance(fields.get(name), str) for name in _TEXTS)
        and _is_number(fields.get("context_length"))
        and 1 <= fields["context_length"] <= _MOST_NUMBER
        and all(isinstance(fields.get(name), str | None) for name in _OPTIONAL)
        and all(isinstance(fields.get(name), dict) for name in _TABLES)
        and isinstance(fields.get("sampling") or {}, dict)
        and (fields.get("window") is None or _is_number(fields["window"]))
        and isinstance(ends, list)
        and all(_is_number(token_id) and token_id <= _MOST_NUMBER for token_id in ends)
    )


def _is_number(value: object) -> bool:
    return type(value) is int and value >= 0


MODEL_FILES: Final = ("openvino_model.xml", "openvino_model.bin")
TEXT_HALF_FILES: Final = (
    "openvino_language_model.xml",
    "openvino_language_model.bin",
    "openvino_text_embeddings_model.xml",
    "openvino_text_embeddings_model.bin",
)
"""The files of a model that also takes images: the language model, and the embedding as a second graph."""
TOKENIZER_FILES: Final = (
    "openvino_tokenizer.xml",
    "openvino_tokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_detokenizer.bin",
)
CONVERTER: Final = "openvino-genai"
"""The package whose release year must not change: it wrote the tokenizer, and OpenVINO of that year pages the
graph."""
MODELS_FOLDER: Final = "models"
"""Name of the folder, in the data folder, that has a folder for each converted model."""
_MOST_GRAPH_BYTES: Final = 16 * files.MIB
"""Most bytes of a tokenizer's graph; the largest known one has 40 KB."""
_START_BYTES: Final = 256
_MOST_CONTEXT: Final = 2**31 - 1
_EXPORT: Final = "`optimum-cli export openvino --model ORG/NAME FOLDER`"


def find_converted(folder: Path, sha256: str | None) -> Manifest | None:
    """
    Return the manifest of a folder that can be used, with the exact weights of its GGUF file; else None.

    A folder cannot be used if it was converted from another file, if an earlier version rounded its weights,
    if a release of OpenVINO of another year wrote it, or if a file does not have the size that it had.

    Args:
        folder: The converted folder; it may not exist.
        sha256: The sha256 of the file that it must have been converted from; None: any.
    """
    manifest = find_inexact(folder, sha256)
    return manifest if manifest is not None and manifest.is_exact else None


def find_inexact(folder: Path, sha256: str | None) -> Manifest | None:
    """Return the manifest of a folder that can be used, also if its weights are rounded; else None."""
    manifest = Manifest.read(folder)
    if manifest is None or (sha256 is not None and manifest.source_sha256 != sha256):
        return None
    made_with = manifest.library_versions.get(CONVERTER, "")
    if _year(made_with) != _year(version(CONVERTER)):
        return None
    return manifest if manifest.file_bytes == converted_bytes(folder) else None


def converted_bytes(folder: Path) -> dict[str, int]:
    """Return the sizes in bytes, by name, of those files of a converted model that a folder has."""
    paths = [folder / name for name in (*MODEL_FILES, *TOKENIZER_FILES)]
    return {path.name: path.stat().st_size for path in paths if path.is_file()}


def _year(release: str) -> str:
    return release.partition(".")[0]


def open_folder(
    folder: Path, *, name: str, home: Path, progress: Progress = no_progress
) -> LocalModel:
    """
    Return the model in *folder*.

    Args:
        folder: A converted folder, or an export.
        name: Name of the model, as the user gave it.
        home: The data folder, in which the hashes of files are remembered.
        progress: Called while files are hashed.

    Raises:
        UnsupportedModelError: A file is missing or damaged, or does not say what is needed.
    """
    names = model_files(folder)
    _require_files(folder, names)
    warn_of_writers(folder, (*names, *TOKENIZER_FILES))
    manifest = Manifest.read(folder)
    if manifest is None:
        return _Export(folder).describe(name, home, progress)
    if not manifest.is_exact:
        _log.warning(
            "%s runs with rounded weights, as an earlier recollect converted it: name the model, "
            "or its GGUF file, in place of the folder.",
            folder,
        )
    model = from_manifest(manifest, folder, name)
    if folder.resolve().is_relative_to((home / MODELS_FOLDER).resolve()):
        return model
    # The manifest of a folder elsewhere may come from a stranger. With the fingerprint of another model in
    # it, its KV would be taken for that model's. So the fingerprint is computed from the files.
    fingerprint = _fingerprint(folder, model.chat_template, home, progress)
    return replace(model, fingerprint=fingerprint)


def openvino_context_length(folder: Path) -> int:
    """
    Return how long the context of the model in *folder* is, which need not be whole.

    Raises:
        UnsupportedModelError: It does not say so.
    """
    manifest = Manifest.read(folder)
    return _Export(folder).context_length() if manifest is None else manifest.context_length


def from_manifest(manifest: Manifest, folder: Path, name: str) -> LocalModel:
    """Return the model in a folder that recollect converted."""
    return LocalModel(
        name=name,
        format="openvino",
        folder=folder,
        context_length=manifest.context_length,
        chat_template=manifest.chat_template,
        eos_token_ids=frozenset(manifest.eos_token_ids),
        bos_token=manifest.bos_token,
        eos_token=manifest.eos_token,
        fingerprint=manifest.fingerprint,
        architecture=manifest.architecture,
        boundaries=() if manifest.window is None else (manifest.window,),
        source_sha256=manifest.source_sha256,
        sampling=recommended(manifest.sampling or {}),
    )


def model_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the graph's file and the weights' file, in this order."""
    is_half = (folder / TEXT_HALF_FILES[0]).exists() and not (folder / MODEL_FILES[0]).exists()
    return TEXT_HALF_FILES if is_half else MODEL_FILES


def _require_files(folder: Path, model_names: Sequence[str]) -> None:
    for names, remedy in (
        (model_names, f"export the model with {_EXPORT}"),
        (TOKENIZER_FILES, f"export the model with its tokenizer, with {_EXPORT}"),
    ):
        for name in names:
            try:
                path = files.inside(folder, name)
            except FileNotFoundError as cause:
                raise UnsupportedModelError(f"{folder} holds no {name}: {remedy}.") from cause
            except OSError as cause:
                raise UnsupportedModelError(
                    f"{folder / name} cannot be taken ({cause.strerror or cause}): copy the file into "
                    "the folder."
                ) from cause
            _require_sound(path, name)


def _require_sound(path: Path, name: str) -> None:
    """Check the size of a file that is read completely, and that a graph has OpenVINO's own format."""
    is_graph = name.endswith(".xml")
    if name in TOKENIZER_FILES:
        most = _MOST_GRAPH_BYTES if is_graph else MOST_TOKENIZER_BYTES
        if path.stat().st_size > most:
            raise UnsupportedModelError(
                f"{path} has {path.stat().st_size:,} bytes, and {most:,} are read: export the model "
                "with its tokenizer again."
            )
    if is_graph:
        with files.open_regular(path) as file:
            start = file.read(_START_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        # OpenVINO detects a format by the content, and some of its formats can name files elsewhere.
        if not start.startswith((b"<?xml", b"<net")):
            raise UnsupportedModelError(
                f"{path} is not a graph of OpenVINO: export the model again with {_EXPORT}."
            )


def _fingerprint(folder: Path, template: str | None, home: Path, progress: Progress) -> str:
    """Return the hex sha256 of the folder's graph, weights, tokenizer and template."""
    parts = ["openvino folder 1"]
    for name in (*model_files(folder), *TOKENIZER_FILES):
        parts += [name, cached_sha256(folder / name, home=home, progress=progress)]
    return combine([*parts, template or ""])


class _Export:
    """A folder that another tool exported, whose facts are spread over several files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = read_json(folder / "config.json")
        nested = config.get("text_config")  # models that take images describe their text part there
        self._config = {**config, **(nested if isinstance(nested, dict) else {})}
        self._generation = read_json(folder / "generation_config.json")
        self._tokenizer = read_json(folder / "tokenizer_config.json")
        self._runtime = _runtime_info(folder / "openvino_tokenizer.xml")
        self._source = self._read_source()

    def describe(self, name: str, home: Path, progress: Progress) -> LocalModel:
        """Return the model; arguments and errors are those of `open_folder`."""
        if self._source is not None:
            _log.warning(
                "%s runs with weights that OpenVINO GenAI rounded: name the .gguf file in it in place "
                "of the folder.",
                self._folder,
            )
        template = self._chat_template()
        longest, first = self._context_length(), self._first_context_length()
        fingerprint = _fingerprint(self._folder, template, home, progress)
        if first is not None:
            # Earlier versions chose LongRoPE's factors in each pass. Their stored KV may have either kind.
            fingerprint = combine([fingerprint, "longrope, first context"])
        return LocalModel(
            name=name,
            format="openvino",
            folder=self._folder,
            graph=model_files(self._folder)[0],
            source=self._folder,
            context_length=longest if first is None else first,
            long_context_length=None if first is None else longest,
            boundaries=self._boundaries(first),
            chat_template=template,
            eos_token_ids=self._eos_token_ids(),
            bos_token=self._special_token("bos_token"),
            eos_token=self._special_token("eos_token"),
            fingerprint=fingerprint,
            sampling=recommended(self._generation),
            architecture=self._architecture(),
        )

    def context_length(self) -> int:
        """Return the length up to which the model has one kind of factors, that of `LocalModel`."""
        return self._first_context_length() or self._context_length()

    def _architecture(self) -> str | None:
        if self._source is not None:
            return self._source.architecture
        found = self._config.get("model_type")
        return found if isinstance(found, str) else None

    def _read_source(self) -> GgufHeader | None:
        """Return the header of the GGUF file in the folder, which OpenVINO GenAI has converted beside it."""
        files = [] if self._config else list(self._folder.glob("*.gguf"))
        return read_header(files[0]) if len(files) == 1 else None

    def _context_length(self) -> int:
        for key in ("max_position_embeddings", "n_positions", "seq_length"):
            length = self._length(key)
            if length is not None:
                return length
        if self._source is not None:
            return self._source.context_length
        raise UnsupportedModelError(
            f"{self._folder} does not say how long the model's context is: copy the original "
            "model's config.json, which holds max_position_embeddings, into it."
        )

    def _first_context_length(self) -> int | None:
        """
        Return the length of the context that a model with LongRoPE was trained on first, in tokens.

        Up to this length it has other factors than beyond. None: it has no LongRoPE.
        """
        for name in ("rope_scaling", "rope_parameters"):  # as transformers 4 and 5 write it
            scaling = self._config.get(name)
            if not isinstance(scaling, dict):
                continue
            if (scaling.get("rope_type") or scaling.get("type")) in ("longrope", "su"):
                first = scaling.get("original_max_position_embeddings")
                if first is None:
                    first = self._length("original_max_position_embeddings")
                if type(first) is int and 0 < first < self._context_length():
                    return first
        return None

    def _boundaries(self, first_context: int | None) -> tuple[int, ...]:
        window = self._length("sliding_window")
        found = {length for length in (window, first_context) if length is not None}
        return tuple(sorted(found))

    def _length(self, key: str) -> int | None:
        """Return a number of tokens in config.json; None if it is not there or out of range."""
        length = self._config.get(key)
        return length if type(length) is int and 0 < length <= _MOST_CONTEXT else None

    def _chat_template(self) -> str | None:
        return chat_template(self._folder) or self._runtime.get("chat_template") or None

    def _eos_token_ids(self) -> frozenset[int]:
        """Return the union of the end tokens in all files, since each may name one that the others lack."""
        ids = {
            *as_ids(self._generation.get("eos_token_id")),
            *as_ids(self._config.get("eos_token_id")),
            *as_ids(self._runtime.get("eos_token_id")),
            *(self._source.eos_token_ids if self._source else ()),
        }
        text = self._special_token("eos_token")
        ids.update(number for number, content in self._added_tokens() if content == text)
        return frozenset(ids)

    def _special_token(self, name: str) -> str | None:
        """Return the text of `bos_token` or `eos_token`."""
        found = special_token(self._tokenizer, name)
        if found is not None:
            return found
        if self._source is not None:
            return self._source.bos_token if name == "bos_token" else self._source.eos_token
        ids = as_ids(self._runtime.get(f"{name}_id"))
        known = dict(self._added_tokens())
        return next((known[number] for number in ids if number in known), None)

    def _added_tokens(self) -> Iterator[tuple[int, str]]:
        added = self._tokenizer.get("added_tokens_decoder")
        for number, token in added.items() if isinstance(added, dict) else ():
            content = token.get("content") if isinstance(token, dict) else None
            if is_id(number) and isinstance(content, str):
                yield int(number), content


def _runtime_info(path: Path) -> Mapping[str, str]:
    """Return the `rt_info` entries of a tokenizer's graph: template and special tokens."""
    try:
        root = ElementTree.parse(path).getroot()  # noqa: S314 - expat itself bounds entities
    except (OSError, ElementTree.ParseError) as cause:
        raise UnsupportedModelError(f"{path} cannot be read: export the model again.") from cause
    info = root.find("rt_info")
    return {} if info is None else {item.tag: item.get("value", "") for item in info}

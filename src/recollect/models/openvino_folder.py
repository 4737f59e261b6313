"""
Open a folder that holds an OpenVINO model: one that recollect converted, or an export.

Reads the small files beside the weights, among them `Manifest`, the note that a converted folder has
with all that is needed to use it again. Loads no model and converts nothing.
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
from recollect.types import Progress, no_progress

_log: Final = logging.getLogger(__name__)

MOST_TEXT_BYTES: Final = 16 * files.MIB
"""Of a settings file. The largest known, with a vocabulary's added tokens, has 1.2 MB."""


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
    Return the object in a JSON file; empty where there is no file, or no object in it.

    Raises:
        UnsupportedModelError: It cannot be read, or is not JSON.
    """
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        content: Any = json.loads(read_text(path, most_bytes=most_bytes))
    except (ValueError, RecursionError) as cause:  # ValueError: also a number of 5,000 digits
        raise UnsupportedModelError(f"{path} is not valid JSON: export the model again.") from cause
    return content if isinstance(content, dict) else {}


def warn_of_writers(folder: Path, names: Iterable[str]) -> None:
    """Say in one line who else may change the folder or one of its files, if anybody may."""
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
    """Return the chat template from whichever of three files holds it, or None."""
    file = folder / "chat_template.jinja"
    if file.exists() or file.is_symlink():
        return read_text(file)
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _default_template(read_json(folder / name).get("chat_template"))
        if template:
            return template
    return None


def special_token(tokenizer_config: Mapping[str, Any], name: str) -> str | None:
    """Return the text of `bos_token` or `eos_token` in a tokenizer_config.json, or None."""
    found = tokenizer_config.get(name)
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else None


_MOST_IDS_TEXT: Final = 4096  # some hundred ids; models have up to ten ends
_MOST_DIGITS: Final = 10  # of an id
MOST_ID: Final = 2**31 - 1
"""Token ids are kept as int32."""


def as_ids(value: object) -> list[int]:
    """Return the ids in a number, a list, or the text of either, as runtime info has it."""
    if isinstance(value, str):
        parts = value[:_MOST_IDS_TEXT].replace(",", " ").split()
        value = [int(part) for part in parts if is_id(part)]
    items = value if isinstance(value, list) else [value]
    return [item for item in items if type(item) is int and 0 <= item <= MOST_ID]


def is_id(text: str) -> bool:
    """Return whether a text is a token id in digits."""
    return text.isdecimal() and len(text) <= _MOST_DIGITS and int(text) <= MOST_ID


def _default_template(found: object) -> str | None:
    """Return the template, or of several named ones the default."""
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
Of folders whose weights OpenVINO GenAI's reader rounded, and whose RoPE it left unscaled. Such a
folder runs as it did where the file cannot be fetched again; its fields are the same.
"""
_MOST_BYTES: Final = 4 * files.MIB
"""A hundred times what is written; the chat template is most of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was known of a model when it was converted."""

    name: str
    """What the model was called when it was converted."""
    source_sha256: str
    source_bytes: int
    architecture: str
    context_length: int
    chat_template: str | None
    eos_token_ids: list[int]
    bos_token: str | None
    eos_token: str | None
    fingerprint: str
    library_versions: dict[str, str]
    """Package to version, of those that wrote the folder."""
    file_bytes: dict[str, int]
    """File name to size: a quick look shows whether the folder is still whole."""
    window: int | None = None
    """How many tokens its layers with a window see; None: it has none, or a version did not note it."""
    format_version: int = FORMAT_VERSION

    @property
    def is_exact(self) -> bool:
        """Return whether the folder's weights have the values of the file that they came from."""
        return self.format_version == FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write the note into *folder*."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / MANIFEST_NAME).write_text(text + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the note in *folder*, or None where there is none that can be understood."""
        try:
            path = files.inside(folder, MANIFEST_NAME)
            fields: Any = json.loads(files.read_text(path, most_bytes=_MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        known = (FORMAT_VERSION, _INEXACT_VERSION)
        if not isinstance(fields, dict) or fields.get("format_version") not in known:
            return None
        try:
            return cls(**fields) if _is_sound(fields) else None
        except TypeError:  # a field too many or too few
            return None


_MOST_NUMBER: Final = 2**31 - 1  # positions and token ids are kept as int32
_TEXTS: Final = ("name", "source_sha256", "architecture", "fingerprint")
_NUMBERS: Final = ("source_bytes", "context_length")
_TABLES: Final = ("library_versions", "file_bytes")
_OPTIONAL: Final = ("chat_template", "bos_token", "eos_token")


def _is_sound(fields: dict[str, Any]) -> bool:
    """Return whether the fields hold what their types say: the file can have been edited."""
    ends = fields.get("eos_token_ids")
    return (
        all(isinstance(fields.get(name), str) for name in _TEXTS)
        and all(_is_number(fields.get(name)) for name in _NUMBERS)
        and 1 <= fields["context_length"] <= _MOST_NUMBER
        and all(isinstance(fields.get(name), str | None) for name in _OPTIONAL)
        and all(isinstance(fields.get(name), dict) for name in _TABLES)
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
"""In place of those, where a model also takes images: the language model, and its embeddings apart."""
TOKENIZER_FILES: Final = (
    "openvino_tokenizer.xml",
    "openvino_tokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_detokenizer.bin",
)
CONVERTER: Final = "openvino-genai"
"""Whose release year counts: it makes the tokenizer, and the graph is paged by OpenVINO of its year."""
MODELS_FOLDER: Final = "models"
"""In the home: where folders lie that recollect made, one each."""
_MOST_GRAPH_BYTES: Final = 16 * files.MIB
"""Of a tokenizer's graph; the largest known has 40 KB."""
_START_BYTES: Final = 256
_MOST_CONTEXT: Final = 2**31 - 1
_EXPORT: Final = "`optimum-cli export openvino --model ORG/NAME FOLDER`"


def find_converted(folder: Path, sha256: str | None) -> Manifest | None:
    """
    Return the manifest of a folder that can be used as it is, or None.

    A folder is of no use when it came from another file, when its weights are not the file's own
    because an earlier recollect made it, when a release of another year made it, or when its files
    have not the size that they had.

    Args:
        sha256: Of the file that it must have come from; None takes any.
    """
    manifest = find_inexact(folder, sha256)
    return manifest if manifest is not None and manifest.is_exact else None


def find_inexact(folder: Path, sha256: str | None) -> Manifest | None:
    """Return the manifest of a folder that can be used, also where its weights are not the file's own."""
    manifest = Manifest.read(folder)
    if manifest is None or (sha256 is not None and manifest.source_sha256 != sha256):
        return None
    made_with = manifest.library_versions.get(CONVERTER, "")
    if _year(made_with) != _year(version(CONVERTER)):
        return None
    return manifest if manifest.file_bytes == converted_bytes(folder) else None


def converted_bytes(folder: Path) -> dict[str, int]:
    """Return the sizes in bytes of the files of a converted model that are in a folder, by name."""
    paths = [folder / name for name in (*MODEL_FILES, *TOKENIZER_FILES)]
    return {path.name: path.stat().st_size for path in paths if path.is_file()}


def _year(release: str) -> str:
    return release.partition(".")[0]


def open_folder(
    folder: Path, *, name: str, home: Path, progress: Progress = no_progress
) -> LocalModel:
    """
    Return the model in *folder*.

    Raises:
        UnsupportedModelError: A file is missing, or does not say what is needed.
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
    # Whoever made the folder wrote the note in it: taken at its word it could name another model,
    # and have its own KV taken for that one's.
    fingerprint = _fingerprint(folder, model.chat_template, home, progress)
    return replace(model, fingerprint=fingerprint)


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
    )


def model_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files with graph and weights, the graph first."""
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
    """Check what is read whole for its size, and graphs for being OpenVINO's own format."""
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
        # OpenVINO goes by the content, and reads formats that name other files.
        if not start.startswith((b"<?xml", b"<net")):
            raise UnsupportedModelError(
                f"{path} is no graph of OpenVINO: export the model again with {_EXPORT}."
            )


def _fingerprint(folder: Path, template: str | None, home: Path, progress: Progress) -> str:
    """Return a hash of what the folder holds."""
    parts = ["openvino folder 1"]
    for name in (*model_files(folder), *TOKENIZER_FILES):
        parts += [name, cached_sha256(folder / name, home=home, progress=progress)]
    return combine([*parts, template or ""])


class _Export:
    """The facts in a folder that another tool wrote, wherever it may have put them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = read_json(folder / "config.json")
        nested = config.get("text_config")  # where models that also see keep what is about text
        self._config = {**config, **(nested if isinstance(nested, dict) else {})}
        self._generation = read_json(folder / "generation_config.json")
        self._tokenizer = read_json(folder / "tokenizer_config.json")
        self._runtime = _runtime_info(folder / "openvino_tokenizer.xml")
        self._source = self._read_source()

    def describe(self, name: str, home: Path, progress: Progress) -> LocalModel:
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
            # Before, the factors were chosen anew in each pass, so what was kept may be of either.
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
            architecture=self._architecture(),
        )

    def _architecture(self) -> str | None:
        if self._source is not None:
            return self._source.architecture
        found = self._config.get("model_type")
        return found if isinstance(found, str) else None

    def _read_source(self) -> GgufHeader | None:
        """Return the header of the one GGUF file that OpenVINO GenAI saved this folder beside."""
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
        Return how long the context is that a model with LongRoPE was trained on first.

        Up to there it has other factors than beyond. None: it has one kind of them, for all lengths.
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
        """Return a number of tokens that the configuration names."""
        length = self._config.get(key)
        return length if type(length) is int and 0 < length <= _MOST_CONTEXT else None

    def _chat_template(self) -> str | None:
        return chat_template(self._folder) or self._runtime.get("chat_template") or None

    def _eos_token_ids(self) -> frozenset[int]:
        """Return the union: each file may know an end that the others lack."""
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
    """Return what the tokenizer's own file says of template and special tokens."""
    try:
        root = ElementTree.parse(path).getroot()  # noqa: S314 - expat itself bounds entities
    except (OSError, ElementTree.ParseError) as cause:
        raise UnsupportedModelError(f"{path} cannot be read: export the model again.") from cause
    info = root.find("rt_info")
    return {} if info is None else {item.tag: item.get("value", "") for item in info}

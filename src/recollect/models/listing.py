"""
Which models are on this disk, and what came of comparing them with their files.

`installed` lists what is here, and `look_into` says of what other programs keep what would run it. What came
of comparing a model with its file is noted in the home: one small JSON file for each model and profile.
`prune` deletes GGUF files that a model was converted from. Fetches, converts and loads nothing.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

from recollect import files
from recollect.errors import ConfigError, UnknownModelError, UnsupportedModelError
from recollect.models import stores
from recollect.models.catalog import CATALOG, REFERENCE_NAME, CatalogEntry, reference_model
from recollect.models.fetch import as_name, source_path
from recollect.models.gguf import glance
from recollect.models.gguf_decoder import FAMILIES
from recollect.models.openvino_folder import Manifest, find_inexact, model_files, read_json
from recollect.models.prepare import Llama, kept_folder, models_folder
from recollect.models.stores import Stored
from recollect.types import Profile

_COMPARED_FOLDER: Final = "compared"
_MOST_BYTES: Final = 1 << 16
"""A hundred times what is written."""
_MOST_NOTES: Final = 256
"""Three for each of 85 models; older ones are deleted, which costs a line in `recollect models`."""
_STRICTEST_FIRST: Final[tuple[Profile, ...]] = ("exact", "fast", "small")

Stamps = dict[str, list[int]]
"""By name of a file with graph or weights, its size in bytes and the nanosecond of its last change."""


def stamps_of(folder: Path) -> Stamps:
    """
    Return what would show that a model's graph or weights are no longer the same bytes.

    Bytes that change under the same size and time, as a failing disk does it, are not seen.
    """
    stats = ((name, (folder / name).stat()) for name in model_files(folder))
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What came of comparing a model with its file in one profile, and when."""

    outcome: str
    """PASS or FAIL."""
    profile: Profile
    largest: float | None
    """Difference of a logit; None: it was no finite number."""
    files: Stamps
    """Of the bytes that were loaded."""
    reason: str = ""
    at: str = ""
    """ISO 8601, UTC."""

    def write(self, home: Path, fingerprint: str) -> None:
        """
        Note this for the model of that fingerprint, in place of what was noted of it in this profile.

        Raises:
            OSError: It cannot be written.
        """
        folder = home / _COMPARED_FOLDER
        files.make_private(folder, home)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        temporary = (path := _note_path(home, fingerprint, self.profile)).with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self) | {"at": now}) + "\n", encoding="utf-8")
        temporary.replace(path)
        files.keep_newest(folder, _MOST_NOTES)

    @classmethod
    def read(cls, home: Path, fingerprint: str, folder: Path) -> Self | None:
        """
        Return the note of the strictest profile; None where there is none.

        A note that cannot be understood, or is of other bytes than those in the model's *folder* now,
        counts as none.
        """
        for profile in _STRICTEST_FIRST:
            try:
                text = files.read_text(
                    _note_path(home, fingerprint, profile), most_bytes=_MOST_BYTES
                )
                said: Any = json.loads(text)
                datetime.fromisoformat(said["at"])
                is_known = said["outcome"] in ("PASS", "FAIL") and said["profile"] == profile
                largest = said["largest"]
                is_number = isinstance(largest, float) and math.isfinite(largest)
                is_plain = isinstance(said["reason"], str) and (largest is None or is_number)
                if is_known and is_plain and said["files"] == stamps_of(folder):
                    return cls(**said)
            except (OSError, ValueError, TypeError, KeyError, RecursionError):
                continue
        return None


def _note_path(home: Path, fingerprint: str, profile: Profile) -> Path:
    return home / _COMPARED_FOLDER / f"{as_name(fingerprint)}-{profile}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One line of `recollect models`."""

    name: str
    """What `prepare` and `recollect.load` take."""
    description: str
    licence: str | None
    """None where we do not know it: a file of the user's own."""
    download_bytes: int | None
    """None where there is nothing to download."""
    is_installed: bool
    """Whether it can be loaded now, without a network and without converting it."""
    is_exact: bool
    """Whether what is installed has the weights of its file: an earlier recollect rounded them."""
    disk_bytes: int
    """What it takes on this disk, the GGUF file included that was kept."""
    source_bytes: int
    """What of it is that GGUF file; 0 where it is only a link to a file that lies elsewhere, too."""
    path: Path | None
    """Its folder, or None where there is none."""
    compared: Compared | None = None
    """What came of comparing it with its file, in the strictest profile; None: nobody has."""


def installed(home: Path, *, catalog: Mapping[str, CatalogEntry] = CATALOG) -> list[ModelStatus]:
    """Return every model of the catalog, in its order, then the others that are on this disk."""
    entries = [_entry_status(entry, home) for entry in catalog.values()]
    folders = models_folder(home)
    found = sorted(folders.iterdir()) if folders.is_dir() else []
    others = [_folder_status(folder, home) for folder in found if folder.name not in catalog]
    return entries + [status for status in others if status is not None]


@dataclass(frozen=True, slots=True)
class Runs:
    """What would run a model."""

    runtime: str | None
    """None: nothing here."""
    reason: str | None = None
    """Why nothing would, or what it takes."""


def what_runs(form: str, architecture: str | None, llama: Llama) -> Runs:
    """
    Return what would run a model.

    Args:
        form: `gguf`, `openvino` or `onnx-genai`.
        architecture: As the model names it; None: it is not known.
        llama: Whether llama.cpp is here, and whether it is the quicker one.
    """
    if form == "onnx-genai":
        if find_spec("onnxruntime_genai") is None:
            return Runs(None, "to run it: pip install 'recollect-llm[genai]'")
        return Runs("ONNX Runtime GenAI")
    if form == "gguf" and (architecture not in FAMILIES or llama == "quicker"):
        if llama == "missing":
            return Runs(None, f"to run {architecture}: pip install 'recollect-llm[llama]'")
        return Runs("llama.cpp")
    return Runs("OpenVINO")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptElsewhere:
    """A model that another program keeps, with what its first bytes or its settings say."""

    stored: Stored
    architecture: str | None
    quantization: str | None
    runs: Runs


def look_into(one: Stored, llama: Llama) -> KeptElsewhere:
    """
    Return what a model of another program says of itself; of one that cannot be used the reason.

    At most `gguf.GLANCE_BYTES` are read of it.

    Args:
        one: The model.
        llama: Whether llama.cpp is here, and whether it is the quicker one.
    """
    architecture, quantization, fault = None, one.quantization, one.fault
    try:
        if fault is None and one.format == "gguf":
            seen = glance(one.path)
            architecture, quantization = seen.architecture, quantization or seen.quantization
        elif fault is None:
            architecture = _architecture(one.path, one.format)
    except UnsupportedModelError as error:
        fault = str(error)
    return KeptElsewhere(
        stored=one,
        architecture=architecture,
        quantization=quantization,
        runs=what_runs(one.format, architecture, llama) if fault is None else Runs(None, fault),
    )


def _architecture(folder: Path, form: str) -> str | None:
    """Return the architecture that a folder's settings name; None: they do not say."""
    if form == "onnx-genai":
        model = read_json(folder / "genai_config.json").get("model")
        found = model.get("type") if isinstance(model, dict) else None
    else:
        found = read_json(folder / "config.json").get("model_type")
    return found if isinstance(found, str) else None


def is_here(reference: str, home: Path) -> bool:
    """Return whether a model can be loaded without fetching anything."""
    known = any(status.name == reference and status.is_installed for status in installed(home))
    known = known or stores.find(reference) is not None
    return known or reference == REFERENCE_NAME or Path(reference).expanduser().exists()


def names_by_fingerprint(home: Path) -> dict[str, str]:
    """Return what the models on this disk are called, by their fingerprints."""
    folder = models_folder(home)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    manifests = [manifest for path in found if (manifest := Manifest.read(path)) is not None]
    reference = reference_model()
    return {manifest.fingerprint: manifest.name for manifest in manifests} | {
        reference.fingerprint: reference.name
    }


def prune(reference: str, home: Path, *, catalog: Mapping[str, CatalogEntry] = CATALOG) -> int:
    """
    Delete the GGUF file that an installed model was converted from; return how many bytes it had.

    The model stays as it is. A later recollect that converts in another way fetches the file again.

    Raises:
        UnknownModelError: No model of that name is installed.
        ConfigError: The file cannot be deleted.
    """
    for status in installed(home, catalog=catalog):
        if status.name == reference and status.is_installed and status.path is not None:
            files = _sources(status.path, home, catalog.get(reference))
            size = sum(file.stat().st_size for file in files)
            try:
                for file in files:
                    file.unlink()
            except OSError as cause:
                raise ConfigError(
                    f"{cause.filename} cannot be deleted ({cause.strerror}): see to its permissions."
                ) from cause
            return size
    raise UnknownModelError(
        f"There is no model {reference!r} on this disk: `recollect models` lists what there is."
    )


def _sources(folder: Path, home: Path, entry: CatalogEntry | None) -> list[Path]:
    """Return the GGUF files that are kept of a model."""
    own = kept_folder(folder, home)
    files = sorted(own.iterdir()) if own.is_dir() else []
    if entry is not None and (fetched := source_path(entry, home)).is_file():
        files.append(fetched)
    return files


def _entry_status(entry: CatalogEntry, home: Path) -> ModelStatus:
    folder = models_folder(home) / entry.name
    source_bytes = _own_bytes(_sources(folder, home, entry))
    manifest = find_inexact(folder, entry.sha256)
    return ModelStatus(
        name=entry.name,
        description=entry.description,
        licence=entry.licence,
        download_bytes=entry.bytes,
        is_installed=manifest is not None,
        is_exact=manifest is not None and manifest.is_exact,
        disk_bytes=size_bytes(folder) + source_bytes,
        source_bytes=source_bytes,
        path=folder if folder.is_dir() else None,
        compared=None if manifest is None else Compared.read(home, manifest.fingerprint, folder),
    )


def _folder_status(folder: Path, home: Path) -> ModelStatus | None:
    manifest = Manifest.read(folder)
    if manifest is None:
        return None
    source_bytes = _own_bytes(_sources(folder, home, None))
    return ModelStatus(
        name=manifest.name,
        description=f"{manifest.architecture}, {manifest.context_length:,} tokens of context",
        licence=None,
        download_bytes=None,
        is_installed=find_inexact(folder, None) is not None,
        is_exact=manifest.is_exact,
        disk_bytes=size_bytes(folder) + source_bytes,
        source_bytes=source_bytes,
        path=folder,
        compared=Compared.read(home, manifest.fingerprint, folder),
    )


def _own_bytes(files: Iterable[Path]) -> int:
    """Return the size of files that have no other name: what deleting them would free."""
    stats = [file.stat() for file in files]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder; 0 where there is nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())

"""
What models there are, and which of them are on this disk.

Reads folders and notes; changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recollect.models.catalog import CATALOG, CatalogEntry
from recollect.models.convert import find_converted
from recollect.models.fetch import source_path
from recollect.models.manifest import Manifest
from recollect.models.prepare import models_folder
from recollect.models.reference import REFERENCE_NAME, reference_model


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
    disk_bytes: int
    """What it takes on this disk, its download included."""
    path: Path | None
    """Its folder, or None where there is none."""


def installed(home: Path, *, catalog: Mapping[str, CatalogEntry] = CATALOG) -> list[ModelStatus]:
    """Return every model of the catalog, in its order, then the others that are on this disk."""
    entries = [_entry_status(entry, home) for entry in catalog.values()]
    folders = models_folder(home)
    found = sorted(folders.iterdir()) if folders.is_dir() else []
    others = [_folder_status(folder) for folder in found if folder.name not in catalog]
    return entries + [status for status in others if status is not None]


def is_here(reference: str, home: Path) -> bool:
    """Return whether a model can be loaded without fetching anything."""
    known = any(status.name == reference and status.is_installed for status in installed(home))
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


def _entry_status(entry: CatalogEntry, home: Path) -> ModelStatus:
    folder = models_folder(home) / entry.name
    return ModelStatus(
        name=entry.name,
        description=entry.description,
        licence=entry.licence,
        download_bytes=entry.bytes,
        is_installed=find_converted(folder, entry.sha256) is not None,
        disk_bytes=size_bytes(folder) + size_bytes(source_path(entry, home)),
        path=folder if folder.is_dir() else None,
    )


def _folder_status(folder: Path) -> ModelStatus | None:
    manifest = Manifest.read(folder)
    if manifest is None:
        return None
    return ModelStatus(
        name=manifest.name,
        description=f"{manifest.architecture}, {manifest.context_length:,} tokens of context",
        licence=None,
        download_bytes=None,
        is_installed=find_converted(folder, None) is not None,
        disk_bytes=size_bytes(folder),
        path=folder,
    )


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder; 0 where there is nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())

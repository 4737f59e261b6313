"""
Decides what a model reference means.

The decision is a value; nothing is downloaded or opened. Asks the disk only what is there.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recollect.errors import UnknownModelError
from recollect.models.catalog import CATALOG, CatalogEntry, HubFile
from recollect.models.reference import REFERENCE_NAME

# org/repo:file, where the file may lie in a folder of the repository
_HUB: Final = re.compile(r"([\w.-]+/[\w.-]+):([^:\\]+\.gguf)", re.IGNORECASE)
_HUB_WITHOUT_FILE: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+:?")


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """The model without weights."""


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A GGUF file of the user's own; the path is absolute."""

    path: Path


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder that may hold an OpenVINO or an ONNX GenAI model; the path is absolute."""

    path: Path


Source = ReferenceModel | CatalogEntry | GgufSource | FolderSource | HubFile


def resolve(reference: str, *, catalog: Mapping[str, CatalogEntry] = CATALOG) -> Source:
    """
    Return what *reference* names.

    A name of the catalog goes before a file or folder that happens to be called the same: write
    `./name` for that.

    Raises:
        UnknownModelError: Nothing goes by it; the message names near misses.
    """
    if reference == REFERENCE_NAME:
        return ReferenceModel()
    if reference in catalog:
        return catalog[reference]
    path = Path(reference).expanduser()
    if reference and path.is_dir():
        return FolderSource(path.resolve())
    if path.is_file():
        return GgufSource(path.resolve())
    hub = _HUB.fullmatch(reference)
    if hub:
        return HubFile(hub[1], hub[2])
    raise UnknownModelError(_explain(reference, catalog))


def _explain(reference: str, catalog: Mapping[str, CatalogEntry]) -> str:
    start = f"There is no model {reference!r}"
    if reference.lower().endswith((".gguf", ".xml")) or reference.startswith(("/", ".", "~")):
        return f"{start}: that file or folder does not exist; check the path."
    if _HUB_WITHOUT_FILE.fullmatch(reference):
        return f"{start}: name a file of the hub's repository as org/repo:file.gguf."
    names = [*catalog, REFERENCE_NAME]
    lowered = reference.lower()
    near = [name for name in names if lowered and (lowered in name or name in lowered)]
    near = near or difflib.get_close_matches(lowered, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"{start}: {hint}`recollect models` lists the names; a path to a .gguf file or to an "
        "OpenVINO folder works too."
    )

"""
Which models a server offers: what clients call them, and what they weigh.

Reads folders and notes; loads nothing.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from recollect.errors import ConfigError, UnknownModelError
from recollect.models.catalog import CATALOG, DEFAULT_MODEL, REFERENCE_NAME, resolve
from recollect.models.listing import installed, size_bytes


def public_names(references: Iterable[str]) -> dict[str, str]:
    """
    Return models by what clients call them, which need not know where they lie.

    A file is called by its name without the ending, a folder by its name. Where two would be called
    the same, the ending stays, and then the folder that it lies in comes before it.

    Args:
        references: As `recollect.load` takes them; what comes twice is one.

    Raises:
        ConfigError: Two are called the same with all that.
    """
    given = {_identity(reference): _names(reference) for reference in references}
    chosen = dict.fromkeys(given, 0)
    while True:
        called: dict[str, list[str]] = {}
        for reference, names in given.items():
            called.setdefault(names[chosen[reference]], []).append(reference)
        clashes = [group for group in called.values() if len(group) > 1]
        if not clashes:
            return {name: group[0] for name, group in called.items()}
        more = [one for group in clashes for one in group if chosen[one] + 1 < len(given[one])]
        if not more:
            raise ConfigError(
                f"Two models would be called the same: {' and '.join(clashes[0])}. Rename one."
            )
        for one in more:
            chosen[one] += 1


def default_references(home: Path) -> list[str]:
    """Return what is offered where nothing is named: the default, and what is installed and still there."""
    names = [one.name for one in installed(home) if one.is_installed]
    return [DEFAULT_MODEL, *(name for name in names if _leads_somewhere(name))]


def _leads_somewhere(name: str) -> bool:
    try:
        resolve(name)
    except UnknownModelError:  # converted from a file that is gone since
        return False
    return True


def weight_bytes(reference: str, home: Path) -> int:
    """Return what a model takes on disk, which is about what its weights take in memory."""
    path = _path(reference)
    name = reference if path is None else str(path)
    status = next((one for one in installed(home) if one.name == name), None)
    if status is not None and status.is_installed:
        return status.disk_bytes - status.source_bytes
    if path is not None:
        return size_bytes(path)
    return 0 if status is None else status.download_bytes or 0


def _path(reference: str) -> Path | None:
    """Return where a model lies that was given by its place; None for one that has a name."""
    if reference in {*CATALOG, REFERENCE_NAME}:
        return None
    path = Path(reference).expanduser()
    return path.resolve() if path.exists() else None


def _identity(reference: str) -> str:
    path = _path(reference)
    return reference if path is None else str(path)


def _names(reference: str) -> list[str]:
    path = _path(reference)
    if path is None:
        return [reference]
    short = path.name if path.is_dir() else path.stem
    return [short, path.name, f"{path.parent.name}/{path.name}"]


def aliases(given: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """
    Return other names of models, from `ALIAS` (of the first) or `ALIAS=MODEL`.

    Raises:
        ConfigError: There is no such model.
    """
    first = next(iter(names))
    found = {}
    for text in given:
        alias, _, name = text.partition("=")
        if (name or first) not in names:
            raise ConfigError(
                f"--alias {text}: there is no model {name!r} among {', '.join(names)}."
            )
        found[alias] = name or first
    return found

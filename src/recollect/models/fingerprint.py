"""
Names a model by its content, so that KV is shared only where it means the same.

Hashes files and remembers the hash of a file that has not changed since. Does not know KV
precision or runtimes: the engine adds those.
"""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from recollect.models.scratch import make_private
from recollect.types import Progress, no_progress

_CHUNK_BYTES: Final = 4 << 20  # large enough to keep the hash busy, small enough to show progress
_CACHE_NAME: Final = "hashes"


def combine(parts: Iterable[str]) -> str:
    """Return the hex sha256 of a list of texts; where one text ends is part of what is hashed."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def sha256_file(path: Path, *, what: str = "", progress: Progress = no_progress) -> str:
    """
    Return the hex sha256 of a file, reading all of it.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(what or f"checking {path.name}", done, total)
    return digest.hexdigest()


def cached_sha256(path: Path, *, home: Path, progress: Progress = no_progress) -> str:
    """
    Return the hex sha256 of a file, remembered under *home* while its size and time stay the same.

    Raises:
        OSError: It cannot be read.
    """
    path = path.resolve()
    stat = path.stat()
    key = {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = home / _CACHE_NAME / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
    known = _read_note(note)
    if all(known.get(name) == value for name, value in key.items()):
        digest = known.get("sha256")
        if isinstance(digest, str):
            return digest
    digest = sha256_file(path, progress=progress)
    _write_note(note, home, key | {"sha256": digest})
    return digest


def _read_note(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_note(path: Path, home: Path, content: dict[str, object]) -> None:
    """Write through a name of our own, so that another process never reads half a note."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")
    # Without the note the file is hashed again next time, which is slow and right.
    with contextlib.suppress(OSError):
        make_private(path.parent, home)
        temporary.write_text(json.dumps(content), "utf-8")
        temporary.replace(path)

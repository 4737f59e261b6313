"""
Files: strangers' files opened safely, private folders for unfinished ones, and hashes of content.

Files that may come from strangers have to be regular, of a bounded size and inside their folder. Every
refusal is an `OSError` whose `strerror` can end a sentence, so that callers report it like any other.
Unfinished files are made in a private scratch folder on the disk of the finished ones. Nothing uses them
there; when they are complete, one rename moves them to their place.
The hash of a file is remembered while its size and its time of modification stay the same.
Nothing here knows what is in a file.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, Final

from recollect.errors import ConfigError
from recollect.types import Progress, no_progress

MIB: Final = 1 << 20

# O_NONBLOCK: opening a named pipe that nobody writes to would block. Some flags exist on some systems only.
_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_HUB_SNAPSHOTS: Final = "snapshots"
_HUB_BLOBS: Final = "blobs"
_ABANDONED_AFTER_S: Final = 24 * 3600.0
"""Age in seconds from which a scratch folder counts as left behind by a killed process."""
_CHUNK_BYTES: Final = 4 << 20
"""Bytes that are hashed between two reports of progress."""
_HASHES: Final = "hashes"
"""Folder in the data folder with the remembered hashes, a JSON file each."""


def open_regular(path: Path) -> BinaryIO:
    """
    Open a regular file for reading, without ever waiting for another program.

    Raises:
        OSError: It cannot be opened, or is a pipe, a device or a folder.
    """
    descriptor = os.open(path, _FLAGS)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise _not_regular(path, mode)


def require_regular(path: Path) -> None:
    """
    Check that *path* is a regular file, before a library opens it by its name.

    Raises:
        OSError: It does not exist, or is a pipe, a device or a folder.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise _not_regular(path, mode)


def read_bytes(path: Path, *, most_bytes: int) -> bytes:
    """
    Return the content of a regular file.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger than *most_bytes*.
    """
    with open_regular(path) as file:
        data = b""
        if os.fstat(file.fileno()).st_size <= most_bytes:
            data = file.read(most_bytes + 1)  # one more than allowed: the file may have grown
            if len(data) <= most_bytes:
                return data
        raise OSError(errno.EFBIG, f"it is larger than {_size(most_bytes)}", str(path))


def read_text(path: Path, *, most_bytes: int, encoding: str = "utf-8") -> str:
    """
    Return the text in a regular file, with all line ends as `\\n`.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger than *most_bytes*.
        UnicodeDecodeError: It is not text in that encoding.
    """
    text = read_bytes(path, most_bytes=most_bytes).decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def inside(folder: Path, name: str) -> Path:
    """
    Return the path, without links, of the file *name* in a folder.

    It must be a regular file in the folder or below it. Links may lead out of the folder in one case only: a
    snapshot in the Hugging Face cache links to the `blobs` folder beside `snapshots`.

    Raises:
        OSError: It does not exist, is not a regular file, or lies outside.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or "\0" in name or posix.is_absolute() or windows.drive or windows.root:
        raise OSError(errno.EACCES, "it is not a name inside the folder", name)
    if ".." in windows.parts:
        raise OSError(errno.EACCES, "it leads out of the folder", name)
    try:
        path = (folder / name).resolve(strict=True)
    except RuntimeError as cause:  # how Python before 3.13 reports a circle of links
        raise OSError(errno.ELOOP, "it is a link that leads to itself", name) from cause
    if not any(path.is_relative_to(root) for root in _roots(folder)):
        raise OSError(errno.EACCES, f"it is a link that leads out of the folder, to {path}", name)
    require_regular(path)
    return path


def others_may_write(path: Path) -> str | None:
    """
    Return who besides the user and the administrator may change a file or folder, as a clause; None: nobody.

    Always None on Windows, whose access control lists Python does not read.

    Raises:
        OSError: The file or folder cannot be looked at.
    """
    if os.name == "nt":
        return None
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return f"it belongs to {_user_name(found.st_uid)}"
    if found.st_mode & stat.S_IWOTH and not (
        stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    ):
        return "everybody on this machine may write to it"
    if found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid):
        return f"the group {_group_name(found.st_gid)} may write to it"
    return None


def _roots(folder: Path) -> list[Path]:
    """Return the folders, without links, that files of *folder* may lie in or below."""
    real = folder.resolve(strict=True)
    for above in real.parents:
        blobs = above.parent / _HUB_BLOBS
        # A `blobs` that is a link may have come with the folder, and lead anywhere.
        if above.name == _HUB_SNAPSHOTS and blobs.is_dir() and not blobs.is_symlink():
            return [real, blobs]
    return [real]


def _not_regular(path: Path, mode: int) -> OSError:
    kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
    return OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def _size(count: int) -> str:
    return f"{count // MIB} MiB" if count >= MIB else f"{count:,} bytes"


def _is_own_group(group: int) -> bool:
    """Return whether a group is the user's own, as most Linux systems create one for each user."""
    import grp  # noqa: PLC0415 - not on Windows
    import pwd  # noqa: PLC0415

    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return group == user.pw_gid and set(found.gr_mem) <= {user.pw_name}


def _user_name(number: int) -> str:
    import pwd  # noqa: PLC0415 - as above

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _group_name(number: int) -> str:
    import grp  # noqa: PLC0415 - as above

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


@contextlib.contextmanager
def scratch_folder(home: Path) -> Iterator[Path]:
    """
    Yield a new empty folder under *home* that only the user may read, and delete it at the end.

    Raises:
        ConfigError: *home* cannot be written to.
    """
    parent = home / "tmp"
    try:
        make_private(parent, home)
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(dir=parent))
    except OSError as cause:
        raise ConfigError(
            f"The data folder {home} cannot be written to ({cause.strerror}): "
            "set RECOLLECT_HOME to a folder of yours."
        ) from cause
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_private(folder: Path, home: Path) -> None:
    """
    Create *home* and a folder directly in it, which only the user may read, unless they exist.

    Raises:
        OSError: They cannot be created.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def keep_newest(folder: Path, most: int) -> None:
    """
    Delete all files in *folder* but the *most* that were changed last; another process may do so, too.

    Raises:
        OSError: The folder cannot be read, or a file cannot be deleted.
    """
    changed: dict[Path, int] = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            changed[path] = path.stat().st_mtime_ns
    for path in sorted(changed, key=changed.__getitem__)[:-most]:
        path.unlink(missing_ok=True)


def _sweep(parent: Path) -> None:
    """Delete scratch folders that killed processes have left behind."""
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)


def combine(parts: Iterable[str]) -> str:
    """Return the hex sha256 of a list of texts, which depends on where one text ends and the next begins."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def sha256_file(path: Path, *, what: str = "", progress: Progress = no_progress) -> str:
    """
    Return the hex sha256 of a file.

    Args:
        path: The file.
        what: What is being done, for *progress*; empty: "checking" with the file's name.
        progress: Called with the bytes that were read so far.

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
    Return the hex sha256 of a file, which is remembered while its size and modification time stay the same.

    Args:
        path: The file.
        home: The data folder, in which the hash is remembered.
        progress: Called with the bytes that were read so far, if the file has to be hashed.

    Raises:
        OSError: It cannot be read.
    """
    known = remembered_sha256(path, home=home)
    if known is not None:
        return known
    note, key = _note_of(path, home)  # before it is read: what changes meanwhile is hashed again
    digest = sha256_file(path, progress=progress)
    _write_note(note, home, key | {"sha256": digest})
    return digest


def remembered_sha256(path: Path, *, home: Path) -> str | None:
    """
    Return the hex sha256 that `cached_sha256` would give without reading the file, or None.

    Raises:
        OSError: There is no such file.
    """
    note, key = _note_of(path, home)
    known = _read_note(note)
    digest = known.get("sha256")
    is_same = all(known.get(name) == value for name, value in key.items())
    return digest if is_same and isinstance(digest, str) else None


def _note_of(path: Path, home: Path) -> tuple[Path, dict[str, object]]:
    """Return where a file's hash is noted, and what tells whether the note is of its bytes."""
    path = path.resolve()
    stat = path.stat()
    note = home / _HASHES / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
    return note, {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_note(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_note(path: Path, home: Path, content: dict[str, object]) -> None:
    """Write a note by one rename, so that another process never reads an incomplete one."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")
    # If the note cannot be written, the file is hashed again next time.
    with contextlib.suppress(OSError):
        make_private(path.parent, home)
        temporary.write_text(json.dumps(content), "utf-8")
        temporary.replace(path)

"""
Opens files that may come from strangers: regular ones, of a bounded size, and inside their folder.

Does not know what is in them. Every refusal is an `OSError` whose `strerror` ends a sentence, so
that those who open files for a user tell it as they tell any other.
"""

import errno
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, Final

MIB: Final = 1 << 20

# Windows has neither; a pipe that nobody writes to would otherwise be waited for for ever.
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


def open_regular(path: Path) -> BinaryIO:
    """
    Return the file, open for reading; never waits for another program.

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
    Check that *path* is a file with an end, for a library that opens it by its name.

    Raises:
        OSError: It is not there, or is a pipe, a device or a folder.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise _not_regular(path, mode)


def read_bytes(path: Path, *, most_bytes: int) -> bytes:
    """
    Return what is in a regular file.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger than *most_bytes*.
    """
    with open_regular(path) as file:
        data = b""
        if os.fstat(file.fileno()).st_size <= most_bytes:
            data = file.read(most_bytes + 1)  # it may have grown since
            if len(data) <= most_bytes:
                return data
        raise OSError(errno.EFBIG, f"it is larger than {_size(most_bytes)}", str(path))


def read_text(path: Path, *, most_bytes: int, encoding: str = "utf-8") -> str:
    """
    Return the text in a regular file, line ends as Python's text files have them.

    Raises:
        OSError: As `read_bytes`.
        UnicodeDecodeError: It is no text in that encoding.
    """
    text = read_bytes(path, most_bytes=most_bytes).decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def inside(folder: Path, name: str) -> Path:
    """
    Return where the file that a folder calls *name* really lies.

    It has to be a regular file in the folder or below it. A link may lead out in one case: a
    snapshot of the Hugging Face cache links to the `blobs` folder two levels above it.

    Raises:
        OSError: It is not there, is no regular file, or lies outside.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or "\0" in name or posix.is_absolute() or windows.drive or windows.root:
        raise OSError(errno.EACCES, "it is not a name inside the folder", name)
    if ".." in windows.parts:
        raise OSError(errno.EACCES, "it leads out of the folder", name)
    try:
        path = (folder / name).resolve(strict=True)
    except RuntimeError as cause:  # what Python before 3.13 says of it
        raise OSError(errno.ELOOP, "it is a link that leads to itself", name) from cause
    if not any(path.is_relative_to(root) for root in _roots(folder)):
        raise OSError(errno.EACCES, f"it is a link that leads out of the folder, to {path}", name)
    require_regular(path)
    return path


def others_may_write(path: Path) -> str | None:
    """
    Return who besides the user and the administrator may change a file or folder; None: nobody.

    On Windows None: permissions are lists there, which Python does not read.
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
    """Return what files of *folder* may lie below, without links."""
    real = folder.resolve(strict=True)
    above = real.parent
    blobs = above.parent / _HUB_BLOBS
    # One that is a link itself may have come with the folder, and lead anywhere.
    if above.name == _HUB_SNAPSHOTS and blobs.is_dir() and not blobs.is_symlink():
        return [real, blobs]
    return [real]


def _not_regular(path: Path, mode: int) -> OSError:
    kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
    return OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def _size(count: int) -> str:
    return f"{count // MIB} MiB" if count >= MIB else f"{count:,} bytes"


def _is_own_group(group: int) -> bool:
    """Return whether a group is the user's alone, as most Linux systems give one to each user."""
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

"""
Settings: where data lives, and how much memory KV may take.

Reads the environment, and asks the system for free memory and disk space. Knows no models and no runtimes.
"""

import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Final

import platformdirs
import psutil

from recollect.errors import ConfigError
from recollect.types import Profile

PROFILES: Final[tuple[Profile, ...]] = ("exact", "fast", "small")
DEFAULT_PROFILE: Final[Profile] = "fast"

HISTORY_NAME: Final = "history"
"""Name of the file in `home()` that holds the lines typed into chats."""
REQUESTS_NAME: Final = "requests"
"""Name of the file in `home()` that holds a line about each request to a server."""
OFFLINE_VARIABLE: Final = "RECOLLECT_OFFLINE"
LEAST_KV_DISK_BYTES: Final = 1 << 20
"""Smallest budget for KV on disk: LMDB needs this much for its own pages while it rewrites them."""

_SWITCH: Final = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("", "0", "false", "no", "off"), False),
}
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE: Final = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)


def home() -> Path:
    """
    Return the data folder: `RECOLLECT_HOME`, or the platform's user data folder. It may not exist yet.

    Raises:
        ConfigError: It cannot be a folder.
    """
    chosen = os.environ.get("RECOLLECT_HOME")
    return _named(chosen or platformdirs.user_data_dir("recollect", False), "RECOLLECT_HOME")


def data_folder(given: str | os.PathLike[str] | None) -> Path:
    """
    Return the data folder that a caller gives, or `home()` for None. It may not exist yet.

    Raises:
        ConfigError: It cannot be a folder.
    """
    return home() if given is None else _named(os.fspath(given), "home")


def _named(text: str, what: str) -> Path:
    """Return the folder that *text* names, which is said as *what* where it cannot be one."""
    try:
        folder = Path(text).expanduser()
    except RuntimeError as cause:  # `~name` of a user that does not exist
        raise ConfigError(f"{what} is {text!r} ({cause}): name a folder.") from cause
    return require_folder(folder)


def require_folder(folder: Path) -> Path:
    """
    Return *folder* if it exists or could be created.

    Raises:
        ConfigError: It, or something above it, is not a folder or cannot be accessed.
    """
    try:
        there = _first_there(folder)
        if there.is_dir():
            return folder
    except OSError as cause:
        raise ConfigError(
            f"The data folder {folder} cannot be reached ({cause.strerror}): set RECOLLECT_HOME to "
            "a folder of yours."
        ) from cause
    raise ConfigError(
        f"The data folder cannot be {folder}, because {there} is no folder: set RECOLLECT_HOME to "
        "another."
    )


def _first_there(path: Path) -> Path:
    """Return *path* if it exists, else the nearest path above it that does."""
    ways = (path.absolute(), *path.absolute().parents)
    return next(way for way in ways if way.is_symlink() or way.exists())


def is_offline() -> bool:
    """
    Return whether `RECOLLECT_OFFLINE` forbids downloads; unset, it does not.

    Raises:
        ConfigError: Its value means neither yes nor no.
    """
    text = os.environ.get(OFFLINE_VARIABLE, "")
    value = _SWITCH.get(text.strip().lower())
    if value is None:
        raise ConfigError(f"{OFFLINE_VARIABLE} is {text!r}: set it to 1 or 0, or remove it.")
    return value


def parse_size(text: str) -> int:
    """
    Return a size like `2GB` (10**9), `512 MiB` (2**20) or `100000` in bytes.

    Raises:
        ConfigError: *text* is not a size above 0.
    """
    match = _SIZE.fullmatch(text)
    size = int(Fraction(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if size <= 0:
        raise ConfigError(
            f"{text!r} is not a size: write a number with a unit, such as 2GB or 512MiB."
        )
    return size


def parse_disk_size(text: str) -> int:
    """
    Return a budget for KV on disk in bytes; `0` and `off` are 0.

    Raises:
        ConfigError: *text* is not a size, or smaller than `LEAST_KV_DISK_BYTES`.
    """
    if text.strip().lower() in ("0", "off"):
        return 0
    return require_disk_size(parse_size(text))


def require_disk_size(size: int) -> int:
    """
    Return *size*, a budget for KV on disk in bytes, if it is 0 or large enough.

    Raises:
        ConfigError: It is smaller than `LEAST_KV_DISK_BYTES`.
    """
    if size and size < LEAST_KV_DISK_BYTES:
        raise ConfigError(
            f"{size:,} bytes on disk hold no KV: give at least {LEAST_KV_DISK_BYTES:,}, or 0 to do "
            "without."
        )
    return size


def parse_profile(text: str) -> Profile:
    """
    Return the profile of that name.

    Raises:
        ConfigError: There is no such profile.
    """
    for profile in PROFILES:
        if text == profile:
            return profile
    raise ConfigError(f"There is no profile {text!r}: choose one of {', '.join(PROFILES)}.")


def default_kv_memory_bytes() -> int:
    """Return the default budget for KV in memory, in bytes: a quarter of what is free now."""
    return psutil.virtual_memory().available // 4


def machine_memory_bytes() -> int:
    """Return how much memory the machine has, in bytes."""
    return int(psutil.virtual_memory().total)


def default_kv_disk_bytes(folder: Path) -> int:
    """
    Return the default budget for KV on disk in bytes: 10 GB or a tenth of the free space, if that is less.

    Args:
        folder: Where the KV is stored; it may not exist yet.

    Returns:
        0 if that is less than `LEAST_KV_DISK_BYTES`.

    Raises:
        ConfigError: The free space cannot be read.
    """
    try:
        free = psutil.disk_usage(str(_first_there(require_folder(folder)))).free
    except OSError as cause:
        raise ConfigError(
            f"What is free on the disk of {folder} cannot be read ({cause.strerror}): say how much "
            "KV may take there, with --kv-disk or `kv_disk` of `load`."
        ) from cause
    size = min(10 * 10**9, free // 10)
    return size if size >= LEAST_KV_DISK_BYTES else 0

"""
Settings: where data lives, and how much memory KV may take.

Reads the environment and the machine's free memory; does not know models or runtimes.
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
"""Of the file in `home()` that holds what was typed into chats."""
OFFLINE_VARIABLE: Final = "RECOLLECT_OFFLINE"
LEAST_KV_DISK_BYTES: Final = 1 << 20
"""Below that LMDB has no room for its own pages while it replaces them."""

_SWITCH: Final = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("", "0", "false", "no", "off"), False),
}
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE: Final = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)


def home() -> Path:
    """Return where models and conversations are: `RECOLLECT_HOME`, or the platform's user data folder."""
    chosen = os.environ.get("RECOLLECT_HOME")
    return (
        Path(chosen).expanduser()
        if chosen
        else Path(platformdirs.user_data_dir("recollect", False))
    )


def is_offline() -> bool:
    """
    Return whether nothing may be fetched: what `RECOLLECT_OFFLINE` says.

    Raises:
        ConfigError: It says neither yes nor no.
    """
    text = os.environ.get(OFFLINE_VARIABLE, "")
    value = _SWITCH.get(text.strip().lower())
    if value is None:
        raise ConfigError(f"{OFFLINE_VARIABLE} is {text!r}: set it to 1 or 0, or remove it.")
    return value


def parse_size(text: str) -> int:
    """
    Return the bytes that a size like `2GB`, `512 MiB` or `100000` means.

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
    Return the bytes that KV may take on disk; `0` and `off` are none.

    Raises:
        ConfigError: *text* is no size, or one that holds next to nothing.
    """
    if text.strip().lower() in ("0", "off"):
        return 0
    return require_disk_size(parse_size(text))


def require_disk_size(size: int) -> int:
    """
    Return a budget in bytes that can be kept to.

    Raises:
        ConfigError: It is smaller than what the database itself needs.
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
        ConfigError: There is none.
    """
    for profile in PROFILES:
        if text == profile:
            return profile
    raise ConfigError(f"There is no profile {text!r}: choose one of {', '.join(PROFILES)}.")


def default_kv_memory_bytes() -> int:
    """Return a quarter of the memory that is free now, in bytes."""
    return psutil.virtual_memory().available // 4


def default_kv_disk_bytes(folder: Path) -> int:
    """Return 10 GB or a tenth of what is free where *folder* is or will be, whichever is smaller."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    size = min(10 * 10**9, psutil.disk_usage(str(there)).free // 10)
    return size if size >= LEAST_KV_DISK_BYTES else 0

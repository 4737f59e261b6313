"""
A text that an option names by its file.
"""

from pathlib import Path
from typing import Final

from recollect import files
from recollect.errors import ConfigError

MOST_BYTES: Final = 64 * files.MIB
"""Sixteen million tokens: more than any context holds."""


def read_text(file: Path) -> str:
    """
    Return what is in a file, without the line ends after it.

    Raises:
        ConfigError: It cannot be read, is no file or too large, is not UTF-8 text, or has nothing in it.
    """
    try:
        text = files.read_text(file, most_bytes=MOST_BYTES, encoding="utf-8-sig").rstrip()
    except OSError as cause:
        raise ConfigError(f"{file} cannot be read ({cause.strerror}): check the path.") from cause
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{file} is not UTF-8 text: convert it first.") from cause
    if not text:
        raise ConfigError(f"{file} has no text in it: give another file.")
    return text

"""
The file of what was typed into chats: its entries, and how some of them are forgotten.

The format is that of prompt_toolkit's `FileHistory`, which appends to it: a line `# TIME`, then each
line of an entry after a `+`. Knows no terminal.
"""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from recollect import files
from recollect.errors import StoreError

QUOTES: Final = '"""'
_COMMAND: Final = "/"
_TEXT: Final = b"+"


def is_open(text: str) -> bool:
    """Return whether a message is still inside a block that `\"\"\"` began."""
    start = text.lstrip()
    if not start.startswith(QUOTES):
        return False
    return not start[len(QUOTES) :].rstrip().endswith(QUOTES)


def unquote(text: str) -> str:
    """Return what is inside the block, or the text as it is where there is none."""
    inner = text.strip()
    if not inner.startswith(QUOTES) or is_open(text):
        return text
    return inner[len(QUOTES) : -len(QUOTES)].strip("\n")


def forget(path: Path, messages: Iterable[str]) -> int:
    """
    Remove the entries that said one of the messages, by a command too; return how many went.

    The file is replaced as a whole, or left as it is. A line that another chat appends in the same
    moment may be lost.

    Raises:
        StoreError: It cannot be read or replaced. It is as it was.
    """
    try:
        with files.open_regular(path) as file:
            entries = list(_entries(file))
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _unusable(path, error) from error
    # What UTF-8 cannot spell was written as a question mark.
    said = {text.strip().encode("utf-8", "replace").decode() for text in messages}
    kept = [lines for lines in entries if said.isdisjoint(_said_by(lines))]
    if len(kept) < len(entries):
        _replace(path, b"".join(line for lines in kept for line in lines))
    return len(entries) - len(kept)


def remove(home_file: Path) -> None:
    """
    Delete the file, with what a rewrite that was killed has left beside it.

    Raises:
        OSError: One cannot be deleted.
    """
    for path in (home_file, *home_file.parent.glob(f"{home_file.name}.new-*")):
        path.unlink(missing_ok=True)


def _entries(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines of each entry, with the time and blank lines before its text."""
    entry: list[bytes] = []
    for line in lines:
        if entry and entry[-1].startswith(_TEXT) and not line.startswith(_TEXT):
            yield entry
            entry = []
        entry.append(line)
    if entry:
        yield entry


def _said_by(lines: Iterable[bytes]) -> set[str]:
    """Return what an entry may have said: its text, or what follows a command such as `/edit 2`."""
    text = b"".join(line[1:] for line in lines if line.startswith(_TEXT)).decode("utf-8", "replace")
    said = {unquote(text).strip()}
    if text.startswith(_COMMAND):
        rest = text.partition(" ")[2].strip()
        said |= {rest, rest.partition(" ")[2].strip()}
    return said - {""}


def _replace(path: Path, content: bytes) -> None:
    """Give the file other content, all of it or nothing, for its owner alone."""
    new = path.with_name(f"{path.name}.new-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise _unusable(path, error) from error
    finally:
        with suppress(OSError):
            new.unlink()


def _unusable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be changed ({error.strerror}), and it shows what was typed: allow it, or "
        "delete that file; nothing was changed."
    )

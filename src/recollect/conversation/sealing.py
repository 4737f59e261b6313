"""
How values lie in the journal's tables: as they are, or sealed where they tell what was said.

Knows the cipher and the mark that an encrypted journal bears; nothing of what the values mean.
"""

import json
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Final

from recollect import encryption
from recollect.conversation.database import corrupt_error
from recollect.encryption import OVERHEAD_BYTES, Cipher
from recollect.errors import ConfigError, StoreCorruptError, StoreEncryptedError

Place = tuple[str | int | None, ...]
"""Table, column, and what of the row can be read. A value opens only where all of that is the same."""

_MARK: Final = b"recollect journal"


class Sealing:
    """
    What one journal seals with.

    Without a cipher all values stay as they are. With one, each is bound to its place: swapped with
    another, or its row changed, it does not open.
    """

    def __init__(self, path: Path, cipher: Cipher | None) -> None:
        self._path = path
        self._cipher = None if cipher is None else cipher.for_purpose("journal")
        self._mark: bytes | None = None  # as the journal bore it when it was opened

    @property
    def is_on(self) -> bool:
        """Return whether values are sealed."""
        return self._cipher is not None

    @property
    def overhead_bytes(self) -> int:
        """Return by how much a value is longer in the file."""
        return 0 if self._cipher is None else OVERHEAD_BYTES

    def seal(self, value: str | bytes, place: Place) -> str | bytes:
        """Return a text or bytes as they are kept."""
        if self._cipher is None:
            return value
        data = value.encode() if isinstance(value, str) else value
        return self._cipher.seal(data, context=_context(place))

    def read_text(self, kept: str | bytes, place: Place, what: str) -> str:
        """
        Return a text that was kept.

        Args:
            kept: As it is in the table.
            place: As when it was written.
            what: Whose text it is, for the error.

        Raises:
            StoreCorruptError: It is not what was written there.
        """
        if self._cipher is not None:
            return self.read_bytes(kept, place, what).decode()
        if isinstance(kept, str):
            return kept
        raise self.not_as_written(what)

    def read_bytes(self, kept: str | bytes, place: Place, what: str) -> bytes:
        """Return bytes that were kept; as `read_text` in all else."""
        if isinstance(kept, bytes):
            if self._cipher is None:
                return kept
            with suppress(StoreCorruptError):  # which names neither the file nor the place
                return self._cipher.open(kept, context=_context(place))
        raise self.not_as_written(what)

    def not_as_written(self, what: str) -> StoreCorruptError:
        """Return the error for something in the journal that is not what was written."""
        return corrupt_error(self._path, f"{what} is not as it was written")

    def mark(self, connection: sqlite3.Connection) -> None:
        """Have the journal say that it is encrypted, and by which key."""
        assert self._cipher is not None, "there is a key"
        self._mark = self._cipher.seal(_MARK, context=_MARK)
        connection.execute("INSERT INTO encryption (mark, is_clean) VALUES (?, 0)", (self._mark,))

    def read_mark(self, connection: sqlite3.Connection) -> bool:
        """
        Return whether the journal is encrypted, with this key.

        Raises:
            ConfigError: It is encrypted, and there is no key or another one, or the file is missing
                that says which.
        """
        self._mark = _mark(connection)
        if self._mark is None:
            return False
        if self._cipher is None:
            if not encryption.is_encrypted(self._path.parent):
                raise encryption.missing(self._path.parent)
            raise ConfigError(
                f"{self._path} is encrypted: give its key, by recollect.unlock() or "
                "RECOLLECT_PASSPHRASE."
            )
        try:
            self._cipher.open(self._mark, context=_MARK)
        except StoreCorruptError:
            raise ConfigError(
                f"{self._path} is encrypted with another key than the folder that it is in: put "
                "the folder's own encryption.json back, from a backup."
            ) from None
        return True

    def require_unchanged(self, connection: sqlite3.Connection) -> None:
        """
        Check that the journal is as encrypted as when it was opened.

        Raises:
            StoreEncryptedError: Somebody has encrypted it since; what would be written now could be read.
        """
        if _mark(connection) != self._mark:
            raise StoreEncryptedError(
                f"{self._path} has been encrypted by another program meanwhile: start again, with "
                "the key."
            )


def _mark(connection: sqlite3.Connection) -> bytes | None:
    row = connection.execute("SELECT mark FROM encryption").fetchone()
    return None if row is None else row[0]


def _context(place: Place) -> bytes:
    return json.dumps(place).encode()

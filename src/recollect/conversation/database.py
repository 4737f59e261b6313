"""
A SQLite file that several threads and processes share, and that survives `kill -9`.

Knows transactions, locks and what can be wrong with a file; nothing of what the tables hold.
"""

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, Self

from recollect.conversation import schema
from recollect.errors import (
    MisuseError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreVersionError,
)

BUSY_TIMEOUT_S: Final = 5.0
"""A turn is written in milliseconds: whoever holds the file for this long is stuck."""
_RETRY_S: Final = 0.01
_BUSY: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_CORRUPT: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_UNUSABLE: Final = {
    sqlite3.SQLITE_READONLY: "it may not be written: allow that, or set RECOLLECT_HOME elsewhere",
    sqlite3.SQLITE_PERM: "it may not be used: allow that, or set RECOLLECT_HOME elsewhere",
    sqlite3.SQLITE_AUTH: "it may not be used: allow that, or set RECOLLECT_HOME elsewhere",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: allow that, or set RECOLLECT_HOME elsewhere",
    sqlite3.SQLITE_FULL: "the disk is full: make room and try again",
    sqlite3.SQLITE_IOERR: "the disk reports an error: check it and the room on it",
    sqlite3.SQLITE_TOOBIG: "the text is too long for it: shorten it",
}

_opening = threading.Lock()
"""
Held while a file is created and first connected to.

A process that closes any descriptor of a file loses its POSIX locks on all others, SQLite's too.
So nothing but SQLite opens an existing one, and this lock makes sure that a new one has no
connection yet. Source: "How To Corrupt An SQLite Database File", section 2.2.
"""


class Database:
    """
    One connection, which the threads of this process take in turn.

    One with a lock and not one for each thread: SQLite has one writer at a time anyway and a
    transaction takes milliseconds, while connections of threads that have ended would stay open
    until somebody finds them. Other processes have connections of their own; WAL lets them read
    while one writes. It must not be carried across `os.fork`.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.path: Final = path
        self._timeout_s = busy_timeout_s
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        with translated(path), _opening:
            _create_private(path)
            self._inspect()
            self._connection = self._connect()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """
        Show one state of the file, whatever others write meanwhile.

        Raises:
            StoreError: It cannot be read; the subclass says why.
        """
        with self._transaction("BEGIN DEFERRED") as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """
        Write all or nothing; what is written is on the disk when this returns.

        Raises:
            StoreError: It cannot be written; nothing was changed, and the subclass says why.
        """
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    def empty_log(self) -> None:
        """Move what was written into the main file where nobody is in the way, and cut the log."""
        with self._taken() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def rewrite(self) -> None:
        """
        Write the file anew, without anything that was overwritten or deleted in it, and cut the log.

        Raises:
            StoreBusyError: Somebody still reads what was there before, so it cannot go.
        """
        with self._taken() as connection:
            connection.execute("VACUUM")
            is_busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if is_busy:
            raise _busy_error(self.path)

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _taken(self) -> Iterator[sqlite3.Connection]:
        """Take the connection for this thread."""
        if not self._lock.acquire(timeout=self._timeout_s):
            raise _busy_error(self.path)
        try:
            if self._connection is None:
                raise MisuseError(f"{self.path.name} has been closed.")
            with translated(self.path):
                yield self._connection
        finally:
            self._lock.release()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._taken() as connection:
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite ends some failed ones itself
                    connection.execute("ROLLBACK")
                raise

    def _inspect(self) -> None:
        """Refuse a file that cannot be used, through a connection that cannot change it."""
        try:
            self._inspect_through("ro")
        except sqlite3.OperationalError as error:
            # Only a file whose making was cut short has something to roll back: with WAL on there
            # is nothing of the kind any more. SQLite makes it empty again, which is a change.
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
            self._inspect_through("rw")

    def _inspect_through(self, mode: str) -> None:
        with closing(self._open(mode)) as connection:
            version, newest = schema.version(connection), len(schema.MIGRATIONS)
            if version > newest:
                raise StoreVersionError(
                    f"{self.path} has version {version} and this recollect knows {newest} at most: "
                    "take a newer recollect, or set RECOLLECT_HOME elsewhere."
                )
            if schema.is_foreign(connection):
                raise corrupt_error(self.path, "it is no journal of recollect")
            # Not all of integrity_check: comparing indexes with tables takes several times as long.
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise corrupt_error(self.path, found)

    def _connect(self) -> sqlite3.Connection:
        connection = self._open("rw")
        try:
            if schema.version(connection) == 0:
                self._turn_wal_on(connection)
            connection.execute("PRAGMA synchronous = FULL")  # each commit reaches the disk
            connection.execute("PRAGMA fullfsync = ON")  # through the drive's cache, on macOS
            connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
            schema.migrate(connection)
            # Only now: a migration may have to replace tables that others refer to.
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _turn_wal_on(self, connection: sqlite3.Connection) -> None:
        """Have readers and a writer at once; SQLite does not wait its timeout for this itself."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
            except sqlite3.OperationalError as error:
                if _primary_code(error) not in _BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)
            else:
                return

    def _open(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=self._timeout_s,
            isolation_level=None,  # transactions are begun and ended here, never by the module
            check_same_thread=False,
        )
        # Damaged text must come back, to fail its checksum, and not as an error of the module.
        connection.text_factory = lambda text: text.decode(errors="replace")
        return connection


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """
    Raise what SQLite and the system say about a file as an error of ours.

    Raises:
        StoreError: The subclass says what kind; the cause is chained.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = _primary_code(error)
        if code in _BUSY:
            raise _busy_error(path) from error
        if code in _CORRUPT:
            raise corrupt_error(path, str(error)) from error
        if code in _UNUSABLE:
            raise StoreError(f"{path} cannot be used ({error}): {_UNUSABLE[code]}.") from error
        raise  # a constraint or a statement of ours: a bug
    except OSError as error:
        raise StoreError(
            f"{path} cannot be used ({error.strerror}): allow it, or set RECOLLECT_HOME elsewhere."
        ) from error


def corrupt_error(path: Path, found: str) -> StoreCorruptError:
    """Return the error for a file in which *found* is wrong."""
    return StoreCorruptError(
        f"{path} is damaged ({found}) and was left as it is: put a backup in its place, or move "
        "it away to begin a new one."
    )


def _busy_error(path: Path) -> StoreBusyError:
    return StoreBusyError(
        f"{path} is being used by another program and did not come free: close that program, or "
        "try again."
    )


def _primary_code(error: sqlite3.DatabaseError) -> int | None:
    """Return SQLite's result code without its details; None for an error of Python's module."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _create_private(path: Path) -> None:
    """Create an empty file that only its owner may read, in such a folder, where there is none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        if path.is_dir():  # which SQLite calls a disk error
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
        return
    if os.name == "posix":  # so that the file's name survives a power cut, as its content does
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

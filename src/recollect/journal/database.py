"""
A SQLite file in WAL mode that several threads and processes share, and that survives `kill -9`.

Handles connections, transactions, locks and damaged files. It does not know what the tables hold.
"""

import errno
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from recollect.errors import (
    MisuseError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StoreVersionError,
)
from recollect.journal import schema

BUSY_TIMEOUT_S: Final = 5.0
"""How long to wait for a lock. A turn is written in milliseconds, so a program that holds the file for
longer hangs."""
_RETRY_S: Final = 0.01
"""Pause between two attempts to begin a transaction while another program holds the lock."""
_LEAST_ROOM_BYTES: Final = 2**16
"""Free disk space below which a file in WAL mode cannot be opened: the shared index of the log takes 32 KiB,
and the log itself a page with its header."""
_BUSY: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_CORRUPT: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_AS_DAMAGED: Final = {
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_INTERNAL,
    sqlite3.SQLITE_NOTFOUND,
    sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_RANGE,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_CONSTRAINT,
}
"""
Errors that our statements cannot cause while the tables and indexes are as we made them.

They are reported as damage. `quick_check` reads the pages alone and does not find it: one flipped bit in the
SQL text that describes a table is enough.
"""
_UNUSABLE: Final = {
    sqlite3.SQLITE_READONLY: "it may not be written: allow that, or set RECOLLECT_HOME elsewhere",
    sqlite3.SQLITE_PERM: "it may not be used: allow that, or set RECOLLECT_HOME elsewhere",
    sqlite3.SQLITE_AUTH: "it may not be used: allow that, or set RECOLLECT_HOME elsewhere",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: allow that, or set RECOLLECT_HOME elsewhere",
    sqlite3.SQLITE_IOERR: "the disk reports an error: check it and the room on it",
    sqlite3.SQLITE_TOOBIG: "the text is too long for it: shorten it",
}

_opening = threading.Lock()
"""
Held while a file is created and first connected to.

A process that closes one descriptor of a file loses its POSIX locks on all other descriptors of that file,
SQLite's included. So only SQLite opens a file that exists, and this lock ensures that no thread has a
connection to a file that is being created. Source: "How To Corrupt An SQLite Database File", section 2.2.
"""


class Database:
    """
    One connection to the file, which the threads of this process use in turn, under a lock.

    A connection for each thread would gain nothing, since SQLite allows one writer at a time and a
    transaction takes milliseconds; and the connection of a thread that has ended would stay open. Other
    processes have connections of their own; in WAL mode they can read while one writes. A `Database` must
    not be used in a process that `os.fork` made.

    A file that cannot be written, for example on a full or a read-only disk, is opened for reading. Each
    attempt to write tries again to open it for writing.

    Raises:
        StoreError: The file can be opened neither for writing nor for reading; the subclass says why.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.path: Final = path
        self._timeout_s = busy_timeout_s
        self._lock = threading.Lock()
        self._is_closed = False
        self._connection: sqlite3.Connection | None = None
        self._refusal: StoreError | None = None  # why the file is open for reading only
        try:
            self._connection = self._opened()
        except (StoreBusyError, StoreCorruptError, StoreVersionError):
            raise
        except StoreError as refusal:
            self._connection = self._opened_to_read(refusal)
            self._refusal = refusal

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """
        Yield a connection inside a transaction that reads one state of the file, whatever others write.

        Raises:
            StoreError: The file cannot be read; the subclass says why.
        """
        # A deferred transaction begins with its first read. Reading here makes a lock that is held by
        # another program appear here, where it is waited for.
        begin = ("BEGIN DEFERRED", "SELECT 1 FROM sqlite_master LIMIT 1")
        with self._transaction(begin, self._deadline(), to_write=False) as connection:
            yield connection

    @contextmanager
    def writing(self, deadline: float | None = None) -> Iterator[sqlite3.Connection]:
        """
        Yield a connection inside a transaction, which is on the disk when the block ends.

        An exception in the block rolls everything back.

        Args:
            deadline: Until when to wait for other threads and other programs, in seconds of
                `time.monotonic`; None: `busy_timeout_s` from now.

        Raises:
            StoreError: The file cannot be written. Nothing was changed; the subclass says why.
        """
        if deadline is None:
            deadline = self._deadline()
        with self._transaction(("BEGIN IMMEDIATE",), deadline, to_write=True) as connection:
            yield connection

    def empty_log(self) -> None:
        """
        Move the log's content into the main file and truncate the log.

        While another program reads or writes, as much is moved as that allows.
        """
        with self._taken(self._deadline(), to_write=True) as connection, self._patient(connection):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def rewrite(self) -> None:
        """
        Rewrite the file without the remains of deleted and overwritten rows, and truncate the log.

        Raises:
            StoreBusyError: Another program still reads an earlier state, so the log could not be truncated.
        """
        with self._taken(self._deadline(), to_write=True) as connection, self._patient(connection):
            connection.execute("VACUUM")
            is_busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if is_busy:
            raise _busy_error(self.path)

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        with self._lock:
            self._is_closed = True
            self._let_go()

    def _let_go(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    @contextmanager
    def _taken(self, deadline: float, *, to_write: bool) -> Iterator[sqlite3.Connection]:
        """Yield the connection to this thread alone, opened again if it could not be written before."""
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise _busy_error(self.path)
        try:
            if self._is_closed:
                raise MisuseError(f"{self.path.name} has been closed.")
            if self._refusal is not None or self._connection is None:
                self._open_again(to_write=to_write)
            assert self._connection is not None, "it has just been opened"
            with translated(self.path):
                yield self._connection
        finally:
            self._lock.release()

    @contextmanager
    def _transaction(
        self, begin: Sequence[str], deadline: float, *, to_write: bool
    ) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a transaction; the lock is free between attempts to begin it."""
        while True:
            with self._taken(deadline, to_write=to_write) as connection:
                if self._has_begun(connection, begin, deadline):
                    try:
                        yield connection
                        connection.execute("COMMIT")
                    except BaseException:
                        if (
                            connection.in_transaction
                        ):  # after some errors SQLite has rolled back itself
                            connection.execute("ROLLBACK")
                        raise
                    return
            time.sleep(_RETRY_S)

    def _has_begun(
        self, connection: sqlite3.Connection, begin: Sequence[str], deadline: float
    ) -> bool:
        """Begin a transaction; return False if another program holds the lock and *deadline* is ahead."""
        try:
            for statement in begin:
                connection.execute(statement).fetchall()
        except sqlite3.OperationalError as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if _primary_code(error) not in _BUSY or time.monotonic() >= deadline:
                raise
            return False
        return True

    @contextmanager
    def _patient(self, connection: sqlite3.Connection) -> Iterator[None]:
        """Let SQLite itself wait for locks inside the block, for statements that cannot be retried here."""
        connection.execute(f"PRAGMA busy_timeout = {int(self._timeout_s * 1000)}")
        try:
            yield
        finally:
            connection.execute("PRAGMA busy_timeout = 0")

    def _opened(self) -> sqlite3.Connection:
        """
        Return a connection that can write; the file is created or migrated first if needed.

        Raises:
            StoreError: The file cannot be opened for writing; the subclass says why.
        """
        with translated(self.path), _opening:
            _create_private(self.path)
            self._inspect()
            connection = self._connect()
        connection.execute(
            "PRAGMA busy_timeout = 0"
        )  # `_transaction` waits, without holding the lock
        return connection

    def _opened_to_read(self, refusal: StoreError) -> sqlite3.Connection:
        """
        Return a connection that only reads, to a file that cannot be written.

        In WAL mode SQLite needs an index file beside the main file, even to read. If the index cannot be
        created and the log is empty, nobody can be writing, and the file is opened as immutable.

        Raises:
            StoreVersionError: The file has another version.
            StoreError: *refusal*, if the file cannot be read either.
        """
        log = self.path.with_name(f"{self.path.name}-wal")
        modes = ["ro"]
        with suppress(OSError):
            if not log.exists() or not log.stat().st_size:
                modes.append("ro&immutable=1")
        for mode in modes:
            with suppress(StoreFullError, StoreUnavailableError), translated(self.path):
                connection = self._open(mode)
                try:
                    self._require_current(connection, refusal)
                except BaseException:
                    connection.close()
                    raise
                connection.execute("PRAGMA busy_timeout = 0")  # as in `_opened`
                return connection
        raise refusal

    def _require_current(self, connection: sqlite3.Connection, refusal: StoreError) -> None:
        """
        Check that a file that cannot be written has the newest version, since it cannot be migrated.

        Raises:
            StoreVersionError: Its version is older or newer.
            StoreError: *refusal*, if it has no tables yet.
        """
        version, newest = schema.version(connection), len(schema.MIGRATIONS)
        if version == 0:
            raise refusal
        if version != newest:
            raise StoreVersionError(
                f"{self.path} has version {version}, this recollect reads {newest}, and it cannot be "
                "converted where nothing can be written: make room, or allow writing."
            )

    def _open_again(self, *, to_write: bool) -> None:
        """Open a file again that could not be written before; the reason may be gone by now."""
        self._let_go()
        if not to_write:
            assert self._refusal is not None, "else it would be open"
            self._connection = self._opened_to_read(self._refusal)
            return
        try:
            self._connection = self._opened()
        except StoreError as refusal:
            self._refusal = refusal
            raise
        self._refusal = None

    def _inspect(self) -> None:
        """
        Check that the file can be used, through a connection that cannot change it.

        Raises:
            StoreVersionError: A newer version wrote it.
            StoreCorruptError: It is damaged, or not a journal.
        """
        try:
            self._inspect_through("ro")
        except sqlite3.OperationalError as error:
            # The file was being created when its process was killed, before WAL was on: SQLite has to
            # roll that back, which makes the file empty again and needs a connection that can write.
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
            self._inspect_through("rw")

    def _inspect_through(self, mode: str) -> None:
        with closing(self._open(mode)) as connection:
            # In one transaction, because another process may be creating the tables at this moment.
            connection.execute("BEGIN DEFERRED")
            version, newest = schema.version(connection), len(schema.MIGRATIONS)
            if version > newest:
                raise StoreVersionError(
                    f"{self.path} has version {version} and this recollect knows {newest} at most: "
                    "take a newer recollect, or set RECOLLECT_HOME elsewhere."
                )
            if schema.is_foreign(connection):
                raise corrupt_error(self.path, "it is no journal of recollect")
            if schema.has_index(connection) and not schema.can_index():
                raise StoreUnavailableError(
                    f"{self.path} has an index for searches, and the SQLite of this Python "
                    f"({sqlite3.sqlite_version}) was built without FTS5, which the index "
                    "needs: use a Python that has it."
                )
            # Not integrity_check, which also compares indexes with tables and takes several times as long.
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
            # After the migrations, which may replace tables that foreign keys refer to.
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _turn_wal_on(self, connection: sqlite3.Connection) -> None:
        """Turn WAL mode on, and wait for others here: SQLite ignores its busy timeout in this statement."""
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
            isolation_level=None,  # this class begins and ends transactions, not the sqlite3 module
            check_same_thread=False,
        )
        # Damaged text is decoded to something, so that its checksum fails and not the sqlite3 module.
        connection.text_factory = lambda text: text.decode(errors="replace")
        return connection


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """
    Turn errors of SQLite and of the system inside the block into ours.

    Raises:
        StoreError: The subclass says which kind; the cause is chained.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = _primary_code(error)
        if code in _BUSY:
            raise _busy_error(path) from error
        if code in _CORRUPT:
            raise corrupt_error(path, str(error)) from error
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _has_no_room(path)):
            raise _full_error(path, str(error)) from error
        if code in _UNUSABLE:
            raise StoreUnavailableError(
                f"{path} cannot be used ({error}): {_UNUSABLE[code]}."
            ) from error
        if code in _AS_DAMAGED:
            raise corrupt_error(path, str(error)) from error
        raise  # the sqlite3 module refused a call: a bug of ours
    except UnicodeDecodeError as error:
        # SQLite quotes the damaged SQL text of a table in its message, which Python cannot decode.
        raise corrupt_error(path, "the description of its tables is not text") from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _full_error(path, str(error.strerror)) from error
        raise StoreUnavailableError(
            f"{path} cannot be used ({error.strerror}): allow it, or set RECOLLECT_HOME elsewhere."
        ) from error


def corrupt_error(path: Path, found: str) -> StoreCorruptError:
    """Return the error for a damaged file; *found* says what is wrong, without a full stop."""
    return StoreCorruptError(
        f"{path} is damaged ({found}) and was left as it is: put a backup in its place, or move "
        "it away to begin a new one."
    )


def _has_no_room(path: Path) -> bool:
    """Return whether the disk is too full to open a file, which SQLite reports as SQLITE_IOERR."""
    try:
        return shutil.disk_usage(path.parent).free < _LEAST_ROOM_BYTES
    except OSError:
        return False


def _full_error(path: Path, found: str) -> StoreFullError:
    return StoreFullError(
        f"{path} cannot be written ({found}), the disk is full: make room and try again. What was "
        "said before can be read."
    )


def _busy_error(path: Path) -> StoreBusyError:
    return StoreBusyError(
        f"{path} is being used by another program and did not come free: close that program, or "
        "try again."
    )


def _primary_code(error: sqlite3.DatabaseError) -> int | None:
    """Return SQLite's primary result code; None if the error comes from the sqlite3 module itself."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _create_private(path: Path) -> None:
    """Create an empty file that only its owner may read, and its folder alike; an existing file stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        if path.is_dir():  # SQLite would report a disk error
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
        return
    if os.name == "posix":  # the folder's entry must survive a power cut, as the content does
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

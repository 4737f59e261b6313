"""
A SQLite file that several threads and processes share, and that survives `kill -9`.

Knows transactions, locks and what can be wrong with a file; nothing of what the tables hold.
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
"""A turn is written in milliseconds: whoever holds the file for this long is stuck."""
_RETRY_S: Final = 0.01
_LEAST_ROOM_BYTES: Final = 2**16
"""The shared index of the log takes half of that, and the log a page and its head."""
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
"""What SQLite says of statements that are right where the tables are those that we made, and the indexes
say what they do. So that is not so, which a check of the pages alone does not see: a flipped bit in the
text that describes a table is enough."""
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
        self._is_closed = False
        self._connection: sqlite3.Connection | None = None
        self._refusal: StoreError | None = None  # why it can be read only
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
        Show one state of the file, whatever others write meanwhile.

        Raises:
            StoreError: It cannot be read; the subclass says why.
        """
        # The second statement takes the state that is shown, so that what is in its way shows here.
        begin = ("BEGIN DEFERRED", "SELECT 1 FROM sqlite_master LIMIT 1")
        with self._transaction(begin, self._deadline(), to_write=False) as connection:
            yield connection

    @contextmanager
    def writing(self, deadline: float | None = None) -> Iterator[sqlite3.Connection]:
        """
        Write all or nothing; what is written is on the disk when this returns.

        Args:
            deadline: When not to wait for others any longer, by `time.monotonic`, be they threads
                of this process or other programs; None: after the time that the database was told.

        Raises:
            StoreError: It cannot be written; nothing was changed, and the subclass says why.
        """
        if deadline is None:
            deadline = self._deadline()
        with self._transaction(("BEGIN IMMEDIATE",), deadline, to_write=True) as connection:
            yield connection

    def empty_log(self) -> None:
        """Move what was written into the main file where nobody is in the way, and cut the log."""
        with self._taken(self._deadline(), to_write=True) as connection, self._patient(connection):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def rewrite(self) -> None:
        """
        Write the file anew, without anything that was overwritten or deleted in it, and cut the log.

        Raises:
            StoreBusyError: Somebody still reads what was there before, so it cannot go.
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
        """Take the connection for this thread."""
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
        """Show a transaction; the threads of this process go on while another program is in its way."""
        while True:
            with self._taken(deadline, to_write=to_write) as connection:
                if self._has_begun(connection, begin, deadline):
                    try:
                        yield connection
                        connection.execute("COMMIT")
                    except BaseException:
                        if connection.in_transaction:  # SQLite ends some failed ones itself
                            connection.execute("ROLLBACK")
                        raise
                    return
            time.sleep(_RETRY_S)

    def _has_begun(
        self, connection: sqlite3.Connection, begin: Sequence[str], deadline: float
    ) -> bool:
        """Begin a transaction; return False where another program is in its way, and there is time."""
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
        """Have SQLite itself wait for others, in statements that cannot be tried again."""
        connection.execute(f"PRAGMA busy_timeout = {int(self._timeout_s * 1000)}")
        try:
            yield
        finally:
            connection.execute("PRAGMA busy_timeout = 0")

    def _opened(self) -> sqlite3.Connection:
        """
        Return a connection that can write, to a file that is made or brought up to date if needed.

        Raises:
            StoreError: The subclass says why there is none.
        """
        with translated(self.path), _opening:
            _create_private(self.path)
            self._inspect()
            connection = self._connect()
        connection.execute("PRAGMA busy_timeout = 0")  # see `_transaction`
        return connection

    def _opened_to_read(self, refusal: StoreError) -> sqlite3.Connection:
        """
        Return a connection to a file that cannot be written, such as one on a full or a read-only disk.

        SQLite needs a file beside one in WAL mode, of what others write. Where it cannot have that and
        the log is empty nobody can be writing, and it is told so.

        Raises:
            StoreError: *refusal*, where it cannot be read either.
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
                connection.execute("PRAGMA busy_timeout = 0")  # see `_transaction`
                return connection
        raise refusal

    def _require_current(self, connection: sqlite3.Connection, refusal: StoreError) -> None:
        """
        Check that a file that cannot be written can be read as it is.

        Raises:
            StoreVersionError: A newer version wrote it, or an older one, and it cannot be converted.
            StoreError: *refusal*, where nothing has been written to it yet.
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
        """Open a file anew that could not be written before: what was in the way may be gone."""
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
            # One state of the file: another process may be making its tables at this moment.
            connection.execute("BEGIN DEFERRED")
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
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _has_no_room(path)):
            raise _full_error(path, str(error)) from error
        if code in _UNUSABLE:
            raise StoreUnavailableError(
                f"{path} cannot be used ({error}): {_UNUSABLE[code]}."
            ) from error
        if code in _AS_DAMAGED:
            raise corrupt_error(path, str(error)) from error
        raise  # a call that Python's module refuses: a bug
    except UnicodeDecodeError as error:
        # SQLite says what is wrong with the text of a table, and Python cannot read that.
        raise corrupt_error(path, "what describes its tables is no text") from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _full_error(path, str(error.strerror)) from error
        raise StoreUnavailableError(
            f"{path} cannot be used ({error.strerror}): allow it, or set RECOLLECT_HOME elsewhere."
        ) from error


def corrupt_error(path: Path, found: str) -> StoreCorruptError:
    """Return the error for a file in which *found* is wrong."""
    return StoreCorruptError(
        f"{path} is damaged ({found}) and was left as it is: put a backup in its place, or move "
        "it away to begin a new one."
    )


def _has_no_room(path: Path) -> bool:
    """Return whether the disk is too full even to open a file; SQLite calls that an error of the disk."""
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

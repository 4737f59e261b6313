"""
The LMDB file of a store: opened, shared, written, put aside where it is damaged, replaced, shrunk, deleted.

Several stores of a process and several processes share one. Knows transactions, sizes and what can go
wrong with the files; nothing of what is in the tables. The one place that opens LMDB files, apart from
the new file that `upgrade` writes.
"""

import errno
import logging
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any, Final, Protocol

import lmdb

from recollect.errors import (
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
)
from recollect.kv.pages import DamagedPagesError, walk

try:
    import fcntl
except ImportError:  # Windows, which lets nobody replace a file that is open
    fcntl = None  # type: ignore[assignment]

Transaction = Any  # lmdb.Transaction: the library has no types

_log: Final = logging.getLogger(__name__)

_MOST_READERS: Final = 1024
_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""Errors of a disk without room; LMDB reports a write that was cut short as EIO."""
_NOT_WRITABLE: Final = {errno.EROFS, errno.EACCES, errno.EPERM}
_UNREADABLE: Final = (
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    DamagedPagesError,
)
_MAP_BYTES: Final = 1 << 40
"""Address space, which costs nothing. A map that never grows need not be moved while others read."""
DATA: Final = "data.mdb"
ASIDE: Final = ".damaged-"
"""Between the name of a store and the time in the name of a damaged one that was put aside."""
DAMAGED: Final = "damaged"
"""Name of the file that tells whoever opens the store next that it is damaged."""
_SORTED_VALUES: Final = {"siblings"}
"""Tables that have several values for a key."""
_WALKS: Final = 100
"""Tries to find the state that a transaction shows while other processes write."""

WAIT_S: Final = 5.0
"""How long to wait for others to close a file that has to be replaced; a command that reads takes less."""
_PAUSE_S: Final = 0.05
"""Between two tries."""

_LOCK: Final = "lock.mdb"
_MOST_TABLES: Final = 16
"""More than any version has had."""
_SPARE_BYTES: Final = 1 << 20
"""Address space beyond the file, for the transactions that end a copy."""
_SCRATCH: Final = "compact-"
"""Begins the name of the folder of a new file; a process that is killed leaves it behind."""

_open: dict[Path, "Environment"] = {}
"""Process-wide, because LMDB forbids to open a file twice in a process. Source: lmdb.h, mdb_env_open."""
_open_lock: Final = threading.Lock()


class Upgrade(Protocol):
    """Replaces the file of an earlier version by one of this version."""

    def is_needed(self, env: "Environment") -> bool:
        """Return whether an open file is of an earlier version."""

    def run(self, folder: Path) -> bool:
        """Replace a file that this process does not have open; return False where another has."""


class Environment:
    """
    One open LMDB file with its named tables.

    Shared by all who open the same folder; the last `close` closes it. Any thread may read, and writers
    take turns, also those of other processes. Must not be carried across `os.fork`. A file on a disk
    that cannot be written is opened for reading. Once the file was found damaged it is not touched any
    more: LMDB follows what is in it, and could crash the process.
    """

    def __init__(self, folder: Path, least_bytes: int, tables: Sequence[str]) -> None:
        self.folder: Final = folder
        self._users = 1
        self._may_be_written = False
        self._damage: str | None = None
        self._env, self.is_read_only = _opened(folder, least_bytes, len(tables) + 1)
        try:
            self._walk_pages()
            self._env.reader_check()  # a killed process leaves its place taken
            self.tables: Final[Mapping[str, Any]] = open_tables(
                self._env, tables, create=not self.is_read_only
            )
            """Handles by name; of a file of an earlier version that cannot be written, one may be missing."""
        except BaseException:
            self._env.close()
            raise

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        least_bytes: int,
        tables: Sequence[str],
        upgrade: Upgrade | None = None,
    ) -> "Environment":
        """
        Return the environment in a folder, which is created where there is none.

        A file that is no database, or a damaged one, is put aside under another name: what was in it
        can be computed again.

        Args:
            folder: Where the file is.
            least_bytes: How large the file has to be able to become.
            tables: Names of its tables.
            upgrade: Replaces a file of an earlier version; not used where this process has it open.

        Raises:
            StoreBusyError: It has to be replaced, and another process has it open.
            StoreError: It cannot be opened.
        """
        with _open_lock, translated(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = folder.resolve()
            found = _open.get(folder)
            if found is not None:
                found._users += 1
                return found
            if (folder / DAMAGED).exists():
                _put_aside(folder, "as was found when it was last used")
            try:
                opened = cls._up_to_date(folder, least_bytes, tables, upgrade)
            except _UNREADABLE as cause:
                _put_aside(folder, str(cause))
                opened = cls(folder, least_bytes, tables)
            _open[folder] = opened
            return opened

    @classmethod
    def _up_to_date(
        cls, folder: Path, least_bytes: int, tables: Sequence[str], upgrade: Upgrade | None
    ) -> "Environment":
        """Open a file, after replacing one of an earlier version."""
        deadline = monotonic() + WAIT_S
        while True:
            opened = cls(folder, least_bytes, tables)
            try:
                if upgrade is None or opened.is_read_only or not upgrade.is_needed(opened):
                    return opened
            except BaseException:
                opened._env.close()
                raise
            opened._env.close()
            if upgrade.run(folder):
                continue
            if monotonic() > deadline:
                raise StoreBusyError(
                    f"Another program has the KV store in {folder} open, which has to be rewritten "
                    "once for this version: close it, or do without the store (--kv-disk 0)."
                )
            sleep(_PAUSE_S)  # another process may be replacing it at this moment

    def close(self) -> None:
        """Give the environment back; the caller must not use it afterwards."""
        with _open_lock:
            self._users -= 1
            if not self._users:
                del _open[self.folder]
                self._env.close()

    @property
    def file_bytes(self) -> int:
        """
        Return how large the file is.

        Raises:
            StoreError: The file is not there any more.
        """
        with translated(self.folder):
            return (self.folder / DATA).stat().st_size

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """
        Show one state of the tables; values are views that end with the block.

        Raises:
            StoreError: They cannot be read.
        """
        with self._noting_damage():
            txn = self.begin(write=False)
            try:
                yield txn
            finally:
                txn.abort()

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """
        Write all or nothing; what was written is on the disk when this returns.

        Raises:
            StoreFullError: There is no room; nothing was changed.
            StoreError: It cannot be written; nothing was changed.
        """
        self.require_writable()
        with self._noting_damage():
            self._look_before_writing()
            with self.begin(write=True) as txn:
                yield txn

    def require_writable(self) -> None:
        """
        Check that the file can be written.

        Raises:
            StoreError: It can only be read.
        """
        if self.is_read_only:
            raise StoreError(
                f"The KV store in {self.folder} can be read and not written: allow that, or set "
                "RECOLLECT_HOME elsewhere."
            )

    def replace_table(self, txn: Transaction, name: str, value: bytes) -> None:
        """
        Put a plain value where an earlier version has a table, which goes.

        That version then refuses to open the file, and changes nothing in it.
        """
        try:
            table = self._env.open_db(name.encode(), txn=txn, create=False)
        except lmdb.NotFoundError:
            pass
        else:
            txn.drop(table)
        txn.put(name.encode(), value)

    def _walk_pages(self, *, values: bool = False) -> None:
        """Check the pages that LMDB will follow, in a state that nobody can change meanwhile."""
        for _ in range(_WALKS):
            with self._env.begin() as txn:
                if walk(self.folder / DATA, txn.id(), values=values):
                    return

    def _look_before_writing(self) -> None:
        """Check what LMDB follows when it writes, before the first write, since that is a read a value."""
        if not self._may_be_written:
            self._walk_pages(values=True)
            self._may_be_written = True

    @contextmanager
    def _noting_damage(self) -> Iterator[None]:
        """Raise errors of this package; mark a damaged file, so that whoever opens it next puts it aside."""
        if self._damage is not None:
            raise StoreCorruptError(self._damage)
        try:
            with translated(self.folder):
                yield
        except StoreCorruptError as error:
            # LMDB panics after a write that failed, although the file is sound.
            if not isinstance(error.__cause__, lmdb.PanicError):
                self._damage = str(error)
                with suppress(OSError):
                    (self.folder / DAMAGED).touch()
            raise

    def begin(self, *, write: bool) -> Transaction:
        """Begin a transaction of LMDB; `reading` and `writing` translate the exceptions."""
        return self._env.begin(write=write, buffers=True)


def open_tables(env: lmdb.Environment, names: Iterable[str], *, create: bool) -> dict[str, Any]:
    """Return the handles of tables by name; without *create* those that are missing are left out."""
    tables = {}
    for name in names:
        with suppress(lmdb.NotFoundError):
            tables[name] = env.open_db(name.encode(), dupsort=name in _SORTED_VALUES, create=create)
    return tables


def is_open(folder: Path) -> bool:
    """Return whether this process has the environment in a folder open."""
    with _open_lock:
        return folder.resolve() in _open


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    """Turn exceptions of LMDB into those of this package, with the cause chained; nothing else does."""
    try:
        yield
    except (lmdb.MapFullError, lmdb.TxnFullError) as cause:
        raise StoreFullError(
            f"The KV store in {folder} is full: give it more room (--kv-disk)."
        ) from cause
    except lmdb.ReadersFullError as cause:
        raise StoreBusyError(
            f"Too many threads and processes read {folder}: close some of them."
        ) from cause
    except lmdb.MapResizedError as cause:  # where a map of `_MAP_BYTES` could not be had
        raise StoreBusyError(
            f"Another program has given the KV store in {folder} more room than there is here: give "
            "the same --kv-disk in both, or close one of them."
        ) from cause
    except (*_UNREADABLE, lmdb.PanicError) as cause:
        raise StoreCorruptError(
            f"The KV store in {folder} is damaged ({cause}): `recollect cache clear` begins anew, "
            "and so does the next start."
        ) from cause
    except (lmdb.Error, OSError) as cause:
        code = getattr(cause, "code", None) or getattr(cause, "errno", None)
        if isinstance(cause, lmdb.DiskError) or code in _NO_ROOM:
            raise StoreFullError(
                f"The disk of {folder} is full or fails: make room on it, or check it."
            ) from cause
        raise StoreError(
            f"The KV store in {folder} cannot be used ({cause}): allow that, set RECOLLECT_HOME "
            "elsewhere, or do without it (--kv-disk 0)."
        ) from cause


def _opened(folder: Path, least_bytes: int, tables: int) -> tuple[lmdb.Environment, bool]:
    """Return the file, open, and whether it can only be read."""
    try:
        return _mapped(folder, least_bytes, tables, readonly=False), False
    except lmdb.Error as cause:
        code = getattr(cause, "code", None)
        if not (isinstance(cause, lmdb.ReadonlyError) or code in _NOT_WRITABLE):
            raise
        try:
            return _mapped(folder, least_bytes, tables, readonly=True), True
        except lmdb.Error:
            raise cause from None  # the user has to mend why it cannot be written


def _mapped(folder: Path, least_bytes: int, tables: int, *, readonly: bool) -> lmdb.Environment:
    """Open the file, with as much address space as can be had."""
    # Windows makes the file as large as the map.
    map_bytes = least_bytes if os.name == "nt" else max(_MAP_BYTES, least_bytes)
    while True:
        try:
            return lmdb.open(
                str(folder),
                map_size=map_bytes,
                max_dbs=tables,
                max_readers=_MOST_READERS,
                mode=0o600,
                readonly=readonly,
                # Sync without metasync: a power cut may cost the last transaction, never the file.
                metasync=False,
            )
        except lmdb.MemoryError:  # the process may have little address space
            if map_bytes <= least_bytes:
                raise
            map_bytes = max(least_bytes, map_bytes // 2)


def _put_aside(folder: Path, cause: str) -> None:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    kept = folder.with_name(f"{folder.name}{ASIDE}{stamp}")
    folder.rename(kept)
    folder.mkdir(mode=0o700)
    _log.warning("The KV store in %s is damaged (%s); it was kept as %s.", folder, cause, kept)


def replace_file(folder: Path, write: Callable[[lmdb.Environment, Path], object]) -> bool:
    """
    Put a new file in the place of a store's, in one step; return False where somebody has it open.

    A process that is killed meanwhile leaves the file as it was. LMDB never shortens its file, and pages
    that it gave up keep what was in them; a new file is the only way to change that.

    Args:
        folder: Of the store, which this process does not have open.
        write: Called with the store, open for reading, and a folder for the new file.

    Raises:
        lmdb.Error, OSError: It cannot be read or written; it is as it was.
    """
    with sole_access(folder) as alone:
        if not alone:
            return False
        for left in folder.glob(f"{_SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
        try:
            # Without LMDB's own lock: that would, when it is closed, let go of ours.
            with lmdb.open(str(folder), readonly=True, lock=False, max_dbs=_MOST_TABLES) as env:
                write(env, scratch)
                last = env.info()["last_txnid"]
            _continue_from(scratch, last)
            (scratch / DATA).chmod(0o600)
            try:
                (scratch / DATA).replace(folder / DATA)
            except PermissionError:  # Windows: it is open
                return False
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return True


def _continue_from(folder: Path, last: int) -> None:
    """
    Add a transaction to a copy, or two, so that its last number is even where *last* is, else odd.

    LMDB keeps two states, those of the last even and the last odd transaction. A process that opens the
    file alone asks the file which is newer. One that waited for the lock takes the number from the lock
    file, where it is that of the former file, and would find the older state.
    Source: lmdb, mdb.c, mdb_txn_renew0.
    """
    room = (folder / DATA).stat().st_size + _SPARE_BYTES
    with lmdb.open(str(folder), lock=False, map_size=room, max_dbs=1) as env:
        info = env.open_db(b"info", create=False)
        while True:
            with env.begin(write=True) as txn:
                # A change, or LMDB would not count the transaction.
                count = env.info()["last_txnid"]
                txn.put(b"compacted", struct.pack("<dQ", time(), count), db=info)
            if (env.info()["last_txnid"] - last) % 2 == 0:
                return


@contextmanager
def sole_access(folder: Path) -> Iterator[bool]:
    """
    Keep other processes from opening the environment until the end of the block.

    Yields:
        Whether none has it open.

    A process that has it open holds a shared lock on the first byte of the lock file, and one that opens
    it waits for an exclusive lock to end. The lock file itself is never replaced, so all agree on it.
    Source: lmdb, mdb.c, mdb_env_excl_lock.
    """
    if fcntl is None:
        yield True
        return
    # Closing any descriptor of the file releases all locks that this process has on it. So callers make
    # sure that it does not have the environment open.
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            alone = True
        except OSError:  # somebody has it, or nobody can tell
            alone = False
        yield alone
    finally:
        os.close(lock)


def shrink(folder: Path) -> int | None:
    """
    Make the file of a store as small as what is in it; return how many bytes that gave back.

    Returns:
        None where somebody has it open, and it was left as it is.

    Raises:
        StoreError: It cannot be read or written; it is as it was.
    """
    if is_open(folder):
        return None
    with translated(folder):
        before = (folder / DATA).stat().st_size
        if not replace_file(folder, lambda env, scratch: env.copy(str(scratch), compact=True)):
            return None
        return before - (folder / DATA).stat().st_size


def discard(folder: Path) -> bool:
    """
    Delete the file of a store that is damaged; return False where somebody has it open.

    Raises:
        StoreError: It cannot be deleted.
    """
    if is_open(folder):
        return False
    with translated(folder), sole_access(folder) as alone:
        if alone:
            try:
                (folder / DATA).unlink(missing_ok=True)
                (folder / DAMAGED).unlink(missing_ok=True)
            except PermissionError:  # Windows: it is open
                return False
        return alone


def damaged_stores(folder: Path) -> list[Path]:
    """Return the folders to which damaged stores of a folder were moved."""
    return sorted(folder.parent.glob(f"{folder.name}{ASIDE}*"))


def remove_damaged(folder: Path) -> int:
    """
    Delete the damaged stores that were put aside, in which replies can be read; return how many.

    Raises:
        OSError: One cannot be deleted.
    """
    found = damaged_stores(folder)
    for aside in found:
        shutil.rmtree(aside)
    return len(found)

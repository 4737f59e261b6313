"""
An LMDB environment that several stores of a process and several processes share.

Knows transactions, sizes and what can go wrong with the files; nothing of what is in them.
"""

import errno
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import lmdb

from recollect.errors import (
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
)

Transaction = Any  # lmdb.Transaction: the library has no types

_log: Final = logging.getLogger(__name__)

_MOST_READERS: Final = 1024
_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""EIO: what LMDB makes of a write that was cut short."""
_UNREADABLE: Final = (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError)

_open: dict[Path, "Environment"] = {}
"""Process-wide, because LMDB forbids to open a file twice in a process. Source: lmdb.h, mdb_env_open."""
_open_lock: Final = threading.Lock()


class Environment:
    """
    One LMDB file, open, with its named tables.

    Shared by all who open the same folder; the last `close` closes it. Any thread may read, and
    writers take turns, those of other processes too. Must not be carried across `os.fork`.
    """

    def __init__(self, folder: Path, map_bytes: int, tables: Sequence[str]) -> None:
        self.folder: Final = folder
        self._users = 1
        self._env = lmdb.open(
            str(folder),
            map_size=map_bytes,
            max_dbs=len(tables),
            max_readers=_MOST_READERS,
            mode=0o600,
            # Sync without metasync: a power cut may cost the last transaction, never the file.
            metasync=False,
        )
        self._env.reader_check()  # a killed process leaves its place taken
        self._tables = {
            name: self._env.open_db(name.encode(), dupsort=name == "children") for name in tables
        }

    @classmethod
    def open(cls, folder: Path, *, map_bytes: int, tables: Sequence[str]) -> "Environment":
        """
        Return the environment in a folder, which is created where there is none.

        A file that is no database, or a damaged one, is put aside under another name: what is kept
        in these files can be computed again.

        Raises:
            StoreError: It cannot be opened.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        with _open_lock, translated(folder):
            found = _open.get(folder)
            if found is not None:
                found._users += 1
                return found
            try:
                opened = cls(folder, map_bytes, tables)
            except _UNREADABLE as cause:
                _put_aside(folder, cause)
                opened = cls(folder, map_bytes, tables)
            _open[folder] = opened
            return opened

    def close(self) -> None:
        """Give it back; nobody may use it afterwards through whoever called this."""
        with _open_lock:
            self._users -= 1
            if not self._users:
                del _open[self.folder]
                self._env.close()

    @property
    def file_bytes(self) -> int:
        """Return how large the file is."""
        return (self.folder / "data.mdb").stat().st_size

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """
        Show one state of the tables; values are views that end with the block.

        Raises:
            StoreError: They cannot be read.
        """
        with translated(self.folder):
            txn = self._begin(write=False)
        try:
            with translated(self.folder):
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
        with translated(self.folder), self._begin(write=True) as txn:
            yield txn

    def table(self, name: str) -> Any:
        """Return the handle of a named table."""
        return self._tables[name]

    def _begin(self, *, write: bool) -> Transaction:
        try:
            return self._env.begin(write=write, buffers=True)
        except lmdb.MapResizedError:
            # Another process has made it larger: take its size over.
            self._env.set_mapsize(0)
            return self._env.begin(write=write, buffers=True)


def is_open(folder: Path) -> bool:
    """Return whether this process has the environment in a folder open."""
    with _open_lock:
        return folder.resolve() in _open


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    """Turn the library's exceptions into ours, with the cause chained; the one place where that happens."""
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
    except (*_UNREADABLE, lmdb.PageNotFoundError, lmdb.PanicError) as cause:
        raise StoreCorruptError(
            f"The KV store in {folder} is damaged ({cause}): `recollect cache clear` begins anew."
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


def _put_aside(folder: Path, cause: Exception) -> None:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    kept = folder.with_name(f"{folder.name}.damaged-{stamp}")
    folder.rename(kept)
    folder.mkdir(mode=0o700)
    _log.warning("The KV store in %s is damaged (%s); it was kept as %s.", folder, cause, kept)

"""
Put another file in the place of a store's, where no process has it open.

To give the disk space back to others: LMDB reuses pages that were given up, and never shortens its
file. To write it anew: pages that were given up keep what was in them.
"""

import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import lmdb

from recollect.kv.environment import ASIDE, DAMAGED, DATA, is_open, translated

try:
    import fcntl
except ImportError:  # Windows, which lets nobody replace a file that is open
    fcntl = None  # type: ignore[assignment]

_LOCK: Final = "lock.mdb"
_MOST_TABLES: Final = 16
"""More than any version has had."""
_SPARE_BYTES: Final = 1 << 20
_SCRATCH: Final = "compact-"
"""Begins the name of a folder for the new file; of a process that was killed it is left."""


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


def replace_file(folder: Path, write: Callable[[lmdb.Environment, Path], object]) -> bool:
    """
    Put a new file in the place of a store's, in one step; return False where somebody has it open.

    Whoever is killed meanwhile leaves the file as it was.

    Args:
        folder: Of the store, which this process has not open.
        write: Called with the store, open for reading, and a folder for the new file.

    Raises:
        lmdb.Error, OSError: It cannot be read or written; it is as it was.
    """
    with _alone(folder) as alone:
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


def discard(folder: Path) -> bool:
    """
    Delete the file of a store that is damaged; return False where somebody has it open.

    Raises:
        StoreError: It cannot be deleted.
    """
    if is_open(folder):
        return False
    with translated(folder), _alone(folder) as alone:
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


def _continue_from(folder: Path, last: int) -> None:
    """
    Let the newest state of a copy lie where whoever waits for the lock will look for it.

    LMDB keeps two states, of even and of odd transactions. Who opens the file alone asks the file
    which is newer; who comes while another holds the lock takes the number of the last transaction
    from the lock file, which is that of the file before. Source: lmdb, mdb.c, mdb_txn_renew0.
    """
    room = (folder / DATA).stat().st_size + _SPARE_BYTES
    with lmdb.open(str(folder), lock=False, map_size=room, max_dbs=1) as env:
        info = env.open_db(b"info", create=False)
        while True:
            with env.begin(write=True) as txn:
                # A change, or LMDB would not count the transaction.
                count = env.info()["last_txnid"]
                txn.put(b"compacted", struct.pack("<dQ", time.time(), count), db=info)
            if (env.info()["last_txnid"] - last) % 2 == 0:
                return


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """
    Keep other processes from opening the environment until the end of the block.

    Yields:
        Whether none has it open.

    Whoever has it open holds a shared lock on the first byte of the lock file, and whoever opens it
    waits for an exclusive one to end. The lock file itself stays, so all agree on it.
    Source: lmdb, mdb.c, mdb_env_excl_lock.
    """
    if fcntl is None:
        yield True
        return
    # Closing any descriptor of the file lets go of all locks that this process has on it: is_open.
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

"""
Write an encrypted store of an earlier version anew, under names that tell nothing without its secret.

Up to format 2 the secret was in the name of the root alone. Whoever had the file read what a block
follows, and could try which tokens give its name.

Put another file in the place of a store's, where no process has it open.

To give the disk space back to others: LMDB reuses pages that were given up, and never shortens its
file. To write it anew: pages that were given up keep what was in them.
"""

import logging
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import lmdb

from recollect.kv import accounts
from recollect.kv.accounts import (
    FORMAT,
    TABLES,
    Pin,
    digests_of,
    format_of,
    names_are_open,
    note_format,
)
from recollect.kv.blocks import Key, chained_key, disguised_key
from recollect.kv.environment import (
    ASIDE,
    DAMAGED,
    DATA,
    SORTED_VALUES,
    Environment,
    Transaction,
    is_open,
    translated,
)
from recollect.kv.pages import DamagedPagesError, walk
from recollect.kv.record import (
    Entry,
    Refused,
    Sealer,
    pack_block,
    pack_entry,
    pack_reply,
    reply_last_used,
    unpack_block,
    unpack_entry,
    unpack_reply,
)

try:
    import fcntl
except ImportError:  # Windows, which lets nobody replace a file that is open
    fcntl = None  # type: ignore[assignment]

_LOCK: Final = "lock.mdb"
_MOST_TABLES: Final = 16
"""More than any version has had."""
_COMPACTION_SPARE_BYTES: Final = 1 << 20
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
    room = (folder / DATA).stat().st_size + _COMPACTION_SPARE_BYTES
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


_log: Final = logging.getLogger(__name__)

_BATCH_BYTES: Final = 16 << 20
"""Of new values that are in memory at a time."""
_SPARE_BYTES: Final = 64 << 20
"""Of address space, beyond twice what the file has: entries of format 1 get digests."""
_LONG_BYTES: Final = 256 << 20
"""From here on somebody waits, and is told why: a GiB takes 10 s. Source: benchmarks/resealing.py."""
_COPIED: Final = ("identities", "info")
"""Tables in which nothing is named by its content; of `info` format and bytes are written last."""
_NAMED: Final = ("entries", "pins", "replies")


class Resealing:
    """
    Replaces the file of an encrypted store of an earlier version.

    A block that does not open under the key, or finds no room beside the old file, is left out. A pin
    stays, also without its blocks.
    """

    def __init__(self, sealer: Sealer, free_bytes: Callable[[], int]) -> None:
        """
        Take what the store is encrypted with.

        Args:
            sealer: Of the store.
            free_bytes: Returns how much of the disk may be taken; the old file is there until the new one is
                whole.
        """
        self._sealer = sealer
        self._free_bytes = free_bytes

    def is_needed(self, env: Environment) -> bool:
        """Return whether an open file has, or had, names that are no secret."""
        with env.reading() as txn:
            return 0 < format_of(txn, env) < FORMAT or names_are_open(txn, env)

    def run(self, folder: Path) -> bool:
        """
        Write the file anew; return False where others have it open, and it was left as it is.

        Raises:
            lmdb.Error, OSError: It cannot be read or written; it is as it was.
            DamagedPagesError: Nothing can be made of it; it is as it was.
        """
        begun = time.perf_counter()
        copies: list[_Copy] = []

        def write(source: lmdb.Environment, scratch: Path) -> None:
            file_bytes = (folder / DATA).stat().st_size
            if file_bytes > _LONG_BYTES:
                _log.warning(
                    "The KV store in %s is rewritten for this version, once: %d MiB.",
                    folder,
                    file_bytes >> 20,
                )
            map_bytes = 2 * file_bytes + _SPARE_BYTES
            with lmdb.open(
                str(scratch),
                map_size=map_bytes,
                max_dbs=len(TABLES),
                lock=False,
                sync=False,  # of no use before it is whole
                mode=0o600,
            ) as target:
                copy = _Copy(source, target, self._sealer, self._free_bytes())
                with source.begin(buffers=True) as txn:
                    walk(folder / DATA, txn.id(), values=True)
                    copy.run(txn)
                target.sync(True)
                copies.append(copy)

        is_done = replace_file(folder, write)
        if is_done:
            _tell(folder, copies[0], time.perf_counter() - begun)
        return is_done


def _tell(folder: Path, copy: "_Copy", seconds: float) -> None:
    _log.info(
        "The KV store in %s was rewritten with names that are no clue to its tokens: %d blocks, %.1f s.",
        folder,
        copy.copied,
        seconds,
    )
    if copy.lost:
        _log.warning(
            "The KV store in %s was rewritten for this version, and %d of its blocks were dropped: "
            "they did not open, or there was no room on the disk. They are computed again.",
            folder,
            copy.lost,
        )


class _Tables:
    """The tables of a file that nobody else has open."""

    def __init__(self, env: lmdb.Environment, *, create: bool) -> None:
        self._handles = {}
        for name in TABLES:
            try:
                self._handles[name] = env.open_db(
                    name.encode(), dupsort=name in SORTED_VALUES, create=create
                )
            except lmdb.NotFoundError:
                continue  # an earlier version had none

    def table(self, name: str) -> object:
        return self._handles[name]

    def __contains__(self, name: str) -> bool:
        return name in self._handles


class _Copy:
    """One copy of a store, block after block, each after what it follows."""

    def __init__(
        self,
        source: lmdb.Environment,
        target: lmdb.Environment,
        sealer: Sealer,
        room: int,
    ) -> None:
        self.copied = 0
        """Blocks."""
        self.lost = 0
        """Blocks that are not in the copy."""
        self._txn: Transaction = None
        self._old = _Tables(source, create=False)
        self._target = target
        self._new = _Tables(target, create=True)
        self._sealer = sealer
        self._room = room
        self._taken = 0
        self._opens = False
        """Whether anything has opened, so that the key is the right one."""
        self._renamed: dict[Key, Key] = {}
        """What pins may name: the last blocks of what is pinned, and their leading parts."""
        self._rows: list[tuple[str, bytes, bytes | bytearray]] = []
        self._row_bytes = 0

    def run(self, txn: Transaction) -> None:
        """Copy everything that can be of what a transaction shows."""
        self._txn = txn
        for name in _COPIED:
            for key, value in self._rows_of(name):
                self._put(name, key, value)
        self._copy_blocks()
        self._copy_replies()
        self._flush()
        kept = accounts.pins(self._txn, self._old, self._sealer)
        has_names = any(self._count(name) for name in _NAMED)
        if has_names and not (self._opens or kept):
            raise DamagedPagesError("nothing in it opens with the key of this folder")
        names = {former.hex(): new.hex() for former, new in self._renamed.items()}
        with self._writing() as out:
            for pin in kept:
                accounts.add_pin(out, self._new, self._renamed_pin(pin, names), self._sealer)
            accounts.recount(out, self._new)
            note_format(out, self._new)

    def _copy_blocks(self) -> None:
        heads = accounts.heads(self._txn, self._old)
        pinned = accounts.pinned_tails(self._txn, self._old)
        given_up = self._given_up(sum(head.stored_bytes for head in heads.values()))
        followers: dict[Key, list[Key]] = {}
        for key, head in heads.items():
            followers.setdefault(head.parent, []).append(key)
        pending = [
            (key, root)
            for root, keys in followers.items()
            if not self._is_block(root)  # but the root of a namespace, whose name stays
            for key in keys
        ]
        orphans: set[Key] = set()  # by new names: what they follow has a name, and no block
        while pending:
            key, parent = pending.pop()
            entry = self._opened(key)
            if entry is None:
                continue  # nor can anybody say what follows it
            new = replace(
                entry, key=chained_key(parent, entry.token_ids, self._secret), parent=parent
            )
            new = replace(new, digests=digests_of(new, self._sealer))
            if key in pinned:
                self._note_names(entry, new)
            if key in given_up or parent in orphans or not self._copy_block(entry, new):
                orphans.add(new.key)
            pending += [(follower, new.key) for follower in followers.get(key, ())]
        self.lost = self._count("entries") - self.copied

    def _copy_replies(self) -> None:
        for name, value in self._rows_of("replies"):
            try:
                reply = unpack_reply(name, value, self._sealer)
            except Refused:
                continue
            self._opens = True
            new_name, last_used = disguised_key(name, self._secret), reply_last_used(value)
            self._put("replies", new_name, pack_reply(new_name, reply, last_used, self._sealer))

    def _is_block(self, key: Key) -> bool:
        """Return whether a name is that of a block, also where its entry is damaged."""
        return self._txn.get(key, db=self._old.table("entries")) is not None

    def _count(self, table: str) -> int:
        rows: int = self._txn.stat(self._old.table(table))["entries"] if table in self._old else 0
        return rows

    def _rows_of(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        if table in self._old:
            for key, value in self._txn.cursor(self._old.table(table)):
                yield bytes(key), bytes(value)

    @property
    def _secret(self) -> bytes:
        return self._sealer.name_secret

    def _given_up(self, total: int) -> set[Key]:
        """Return the blocks that go first, where there is not room for all."""
        gone: set[Key] = set()
        if total > self._room:
            for key, size in accounts.tails_first(self._txn, self._old):
                gone.add(key)
                total -= size
                if total <= self._room:
                    break
        return gone

    def _opened(self, key: Key) -> Entry | None:
        try:
            stored = self._txn.get(key, db=self._old.table("entries"))
            entry = unpack_entry(key, stored, self._sealer)
        except Refused:
            return None
        self._opens = True
        return entry if chained_key(entry.parent, entry.token_ids) == key else None

    def _copy_block(self, entry: Entry, new: Entry) -> bool:
        """Seal a block for its new name; return False where there is no room, or it does not open."""
        stored = self._txn.get(entry.key, db=self._old.table("blocks"))
        if stored is None or self._taken + new.stored_bytes > self._room:
            return False
        tokens = len(entry.token_ids)
        try:
            payload = unpack_block(entry.key, entry.identity, tokens, stored, self._sealer)
        except Refused:
            return False
        packed = pack_block(new.key, new.identity, tokens, payload, self._sealer)
        self._put("blocks", new.key, packed)
        self._put("entries", new.key, pack_entry(new, self._sealer))
        self._put("siblings", new.parent, new.digests + new.key)
        self._taken += new.stored_bytes
        self.copied += 1
        return True

    def _note_names(self, entry: Entry, new: Entry) -> None:
        for count in range(1, len(entry.token_ids) + 1):
            part = entry.token_ids[:count]
            former = chained_key(entry.parent, part)
            self._renamed[former] = chained_key(new.parent, part, self._secret)

    def _renamed_pin(self, pin: Pin, names: Mapping[str, str]) -> Pin:
        """Return a pin with the new names of what it names, in hex; its block may not be here."""
        tail = self._renamed.get(pin.tail) or disguised_key(pin.tail, self._secret)
        about = {
            fact: names.get(value, value) if isinstance(value, str) else value
            for fact, value in pin.about.items()
        }
        return replace(pin, tail=tail, about=about)

    def _put(self, table: str, key: bytes, value: bytes | bytearray) -> None:
        self._rows.append((table, key, value))
        self._row_bytes += len(value)
        if self._row_bytes > _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        with self._writing() as out:
            for table, key, value in self._rows:
                out.put(key, value, db=self._new.table(table))
        self._rows.clear()
        self._row_bytes = 0

    @contextmanager
    def _writing(self) -> Iterator[Transaction]:
        with self._target.begin(write=True, buffers=True) as out:
            yield out

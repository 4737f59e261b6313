"""
Give a store that an earlier version wrote the layout of this version.

A plain store is changed in place, in one transaction. An encrypted one is copied into a new file with
other names: up to format 2 the secret was in the name of the root alone, so that whoever had the file
could read what a block follows and try which tokens give its name. Does not know budgets.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import lmdb

from recollect.errors import StoreBusyError, StoreVersionError
from recollect.kv.environment import DATA, Environment, open_tables, replace_file
from recollect.kv.pages import DamagedPagesError, walk
from recollect.kv.record import (
    Entry,
    Key,
    Pin,
    Refused,
    Sealer,
    chained_key,
    disguised_key,
    entry_head,
    pack_block,
    pack_entry,
    pack_reply,
    reply_last_used,
    unpack_block,
    unpack_entry,
    unpack_reply,
)
from recollect.kv.tables import FORMAT, PLAIN_FORMAT, TABLES, Tables

_log: Final = logging.getLogger(__name__)

_EARLIER_TABLE: Final = "children"
"""Format 1 had this table in the place of `siblings`."""
_LATER: Final = b"KV store of a later format"
"""A plain value in the place of that table; versions that know format 1 alone then refuse the file."""
_UNORDERED: Final = b"unordered"
"""Noted by versions that knew format 2, where tokens could not be opened."""

_BATCH_BYTES: Final = 16 << 20
"""New values in one transaction of a copy, which keeps them in memory."""
_SPARE_BYTES: Final = 64 << 20
"""Address space beyond twice the file: entries of format 1 get digests."""
_LONG_BYTES: Final = 256 << 20
"""From here on a copy takes so long that the log says why: 10 s a GiB. Source: benchmarks/resealing.py."""
_COPIED: Final = ("identities", "info")
"""Tables in which nothing is named by its content."""
_NAMED: Final = ("entries", "pins", "replies")


def bring_up_to_date(env: Environment, sealer: Sealer | None) -> None:
    """
    Give a store the layout of this version, in one transaction; all blocks stay.

    A store that cannot be written stays as it is: whole blocks are found in any layout. One that is
    encrypted is copied by `Resealing` before, unless this process had it open already.

    Raises:
        StoreVersionError: A later version wrote it; nothing was changed.
        StoreBusyError: It is encrypted, of an earlier version, and open in this process without the
            key, so that it could not be copied; nothing was changed.
        StoreError: It cannot be written; nothing was changed.
    """
    wanted = PLAIN_FORMAT if sealer is None else FORMAT
    with env.reading() as txn:
        tables = Tables(txn, env.tables, sealer)
        is_done = _known_format(tables, env.folder) >= wanted
        has_names = sealer is not None and tables.names_are_open()
        has_plain_pins = sealer is not None and tables.has_plain_pins()
    if env.is_read_only or (is_done and not has_plain_pins):
        return
    if has_names and not is_done:
        raise StoreBusyError(
            f"The KV store in {env.folder} has to be rewritten once for this version, and is open "
            "in this program: close it there first."
        )
    with env.writing() as txn:
        tables = Tables(txn, env.tables, sealer)
        found = _known_format(tables, env.folder)
        if found < wanted:  # another process may have been faster
            if not found:
                _order_all(tables)
                env.replace_table(txn, _EARLIER_TABLE, _LATER)
            tables.set_format(wanted)
        if has_plain_pins:
            tables.seal_pins()


def _known_format(tables: Tables, folder: Path) -> int:
    """
    Return the number of a store's layout.

    Raises:
        StoreVersionError: It is a later one than this version knows.
    """
    found = tables.format()
    if found > FORMAT:
        raise StoreVersionError(
            f"A newer version of recollect wrote the KV store in {folder}: use that one, set "
            "RECOLLECT_HOME elsewhere, or do without it (--kv-disk 0)."
        )
    return found


def _order_all(tables: Tables) -> None:
    """Note for each block what it follows, and its place among siblings unless its tokens are sealed."""
    for key, stored in [(key, bytes(stored)) for key, stored in tables.rows("entries")]:
        try:
            parent = entry_head(key, stored).parent
        except Refused:
            continue  # it is found to be damaged, and removed, when it is next asked for
        digests = b""
        try:
            entry = unpack_entry(key, stored, None)
        except Refused:
            pass
        else:
            digests = tables.digests(parent, entry.token_ids)
            tables.put("entries", key, pack_entry(replace(entry, digests=digests), None))
        tables.put("siblings", parent, digests + key)


class Resealing:
    """
    Replaces the file of an encrypted store of an earlier version by a copy with names of this one.

    A block that does not open, or finds no room beside the old file, is left out. A pin stays, also
    without its blocks.
    """

    def __init__(self, sealer: Sealer, free_bytes: Callable[[], int]) -> None:
        """
        Take what the store is encrypted with.

        Args:
            sealer: Of the store.
            free_bytes: Returns how much of the disk may be taken; the old file is there until the new
                one is whole.
        """
        self._sealer = sealer
        self._free_bytes = free_bytes

    def is_needed(self, env: Environment) -> bool:
        """Return whether an open file has, or had, names that are no secret."""
        with env.reading() as txn:
            tables = Tables(txn, env.tables, self._sealer)
            return 0 < _known_format(tables, env.folder) < FORMAT or tables.names_are_open()

    def run(self, folder: Path) -> bool:
        """
        Copy the file and replace it; return False where others have it open, and it was left as it is.

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
            handles = open_tables(source, TABLES, create=False)
            with (
                lmdb.open(
                    str(scratch),
                    map_size=2 * file_bytes + _SPARE_BYTES,
                    max_dbs=len(TABLES),
                    lock=False,
                    sync=False,  # of no use before it is whole
                    mode=0o600,
                ) as target,
                source.begin(buffers=True) as txn,
            ):
                walk(folder / DATA, txn.id(), values=True)
                old = Tables(txn, handles, self._sealer)
                copy = _Copy(old, target, self._sealer, self._free_bytes())
                copy.run()
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


class _Copy:
    """One copy of a store, block after block, each after what it follows."""

    def __init__(
        self, old: Tables, target: lmdb.Environment, sealer: Sealer, room_bytes: int
    ) -> None:
        self.copied = 0
        """Blocks that are in the copy."""
        self.lost = 0
        """Blocks that are not."""
        self._sealer = sealer
        self._secret = sealer.name_secret
        self._old = old
        self._target = target
        self._handles = open_tables(target, TABLES, create=True)
        self._new = self._begun()
        self._new_bytes = 0  # written since that transaction began
        self._room_bytes = room_bytes
        self._taken_bytes = 0
        self._opens = False  # whether anything has opened, so that the key is the right one
        # Former names that pins may use, and the new ones: the last blocks of what is pinned, and
        # their leading parts.
        self._renamed: dict[Key, Key] = {}

    def run(self) -> None:
        """
        Copy everything that opens and has room.

        Raises:
            DamagedPagesError: Nothing opens with this key.
        """
        try:
            for name in _COPIED:
                for key, value in self._old.rows(name):
                    self._put(name, key, bytes(value))
            self._copy_blocks()
            self._copy_replies()
            pins = self._old.pins()
            if any(self._old.count(name) for name in _NAMED) and not (self._opens or pins):
                raise DamagedPagesError("nothing in it opens with the key of this folder")
            names = {former.hex(): new.hex() for former, new in self._renamed.items()}
            for pin in pins:
                self._new.add_pin(self._renamed_pin(pin, names))
            self._new.recount()
            self._new.delete("info", _UNORDERED)
            self._new.set_format(FORMAT)
            self._new.txn.put(_EARLIER_TABLE.encode(), _LATER)
            self._new.txn.commit()
        finally:
            self._new.txn.abort()  # does nothing after a commit

    def _copy_blocks(self) -> None:
        heads = self._old.heads()
        pinned = self._old.pinned_tails()
        excess = sum(head.stored_bytes for head in heads.values()) - self._room_bytes
        given_up = {key for key, _ in self._old.to_evict(excess)}  # there is not room for all
        followers: dict[Key, list[Key]] = {}
        for key, head in heads.items():
            followers.setdefault(head.parent, []).append(key)
        pending = [
            (key, root)
            for root, keys in followers.items()
            if not self._old.has_block(root)  # but the root of a namespace, whose name stays
            for key in keys
        ]
        orphans: set[Key] = set()  # by new names: what they follow has a name, and no block
        while pending:
            key, parent = pending.pop()
            entry = self._opened(key)
            if entry is None:
                continue  # nor can anybody say what follows it
            new = replace(
                entry,
                key=chained_key(parent, entry.token_ids, self._secret),
                parent=parent,
                digests=self._new.digests(parent, entry.token_ids),
            )
            if key in pinned:
                self._note_names(entry, new)
            if key in given_up or parent in orphans or not self._copy_block(entry, new):
                orphans.add(new.key)
            pending += [(follower, new.key) for follower in followers.get(key, ())]
        self.lost = self._old.count("entries") - self.copied

    def _copy_replies(self) -> None:
        for name, stored in self._old.rows("replies"):
            try:
                reply = unpack_reply(name, stored, self._sealer)
            except Refused:
                continue
            self._opens = True
            new_name, last_used = disguised_key(name, self._secret), reply_last_used(stored)
            self._put("replies", new_name, pack_reply(new_name, reply, last_used, self._sealer))

    def _opened(self, key: Key) -> Entry | None:
        """Return an entry that opens and has the name that its tokens give; None for any other."""
        try:
            entry = self._old.entry(key)
        except Refused:
            return None
        self._opens = True
        if entry is None or chained_key(entry.parent, entry.token_ids) != key:
            return None
        return entry

    def _copy_block(self, entry: Entry, new: Entry) -> bool:
        """Seal a block for its new name; return False where there is no room, or it does not open."""
        stored = self._old.get("blocks", entry.key)
        if stored is None or self._taken_bytes + new.stored_bytes > self._room_bytes:
            return False
        tokens = len(entry.token_ids)
        try:
            payload = unpack_block(entry.key, entry.identity, tokens, stored, self._sealer)
        except Refused:
            return False
        packed = pack_block(new.key, new.identity, tokens, payload, self._sealer)
        self._new.put_block(new, packed)
        self._wrote(len(packed))
        self._taken_bytes += new.stored_bytes
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

    def _begun(self) -> Tables:
        txn = self._target.begin(write=True, buffers=True)
        return Tables(txn, self._handles, self._sealer)

    def _put(self, table: str, key: bytes, value: bytes) -> None:
        self._new.put(table, key, value)
        self._wrote(len(value))

    def _wrote(self, size: int) -> None:
        """Begin another transaction after a batch."""
        self._new_bytes += size
        if self._new_bytes > _BATCH_BYTES:
            self._new.txn.commit()
            self._new, self._new_bytes = self._begun(), 0

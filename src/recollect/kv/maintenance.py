"""
What a user does with a whole store: see what is in it, check it, repair it, shrink it, delete it.

Works on a store that is there already, without knowing with which budget it was made, and adds
nothing. Slow where there is much. The budget and eviction are the business of `disk`.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recollect import config
from recollect.kv.disk import DiskStore
from recollect.kv.environment import (
    ASIDE,
    DAMAGED,
    DATA,
    is_open,
    replace_file,
    sole_access,
    translated,
)
from recollect.kv.record import KEY_BYTES, Identity, Key, Refused, Sealer, chained_key, unpack_block
from recollect.kv.tables import Savings, Tables

_SPARE_BYTES: Final = 16 << 20
"""Room beyond the file: LMDB writes new pages before it gives up old ones, also to remove a block."""


def is_there(folder: Path) -> bool:
    """Return whether there is a store in a folder."""
    return (folder / DATA).is_file()


def open_existing(folder: Path, sealer: Sealer | None) -> DiskStore:
    """
    Return the store in a folder; the caller closes it.

    Raises:
        StoreError: It cannot be opened.
    """
    with translated(folder):
        room = (folder / DATA).stat().st_size + _SPARE_BYTES
        budget = max(config.default_kv_disk_bytes(folder), room)
    return DiskStore(folder, budget_bytes=budget, sealer=sealer)


@dataclass(frozen=True, slots=True)
class Holding:
    """What a store has of one model, runtime and precision."""

    identity: Identity
    blocks: int
    tokens: int
    stored_bytes: int
    last_used: float
    """Unix time in seconds; 0 where there are no blocks."""
    savings: Savings


def holdings(store: DiskStore) -> list[Holding]:
    """
    Return what is stored by model, the last used first.

    Raises:
        StoreError: The files cannot be read.
    """
    found = []
    with store.reading() as tables:
        heads = tables.heads().values()
        for digest, identity in tables.identities().items():
            own = [head for head in heads if head.identity == digest]
            found.append(
                Holding(
                    identity=identity,
                    blocks=len(own),
                    tokens=sum(head.tokens for head in own),
                    stored_bytes=sum(head.stored_bytes for head in own),
                    last_used=max((head.last_used for head in own), default=0.0),
                    savings=tables.savings(digest),
                )
            )
    return sorted(found, key=lambda holding: -holding.last_used)


def problems(store: DiskStore) -> Iterator[tuple[Key, str]]:
    """
    Yield (key, sentence) for each block that is not as it was written, and (b"", …) for wrong counts.

    Verifies the invariants of `DiskStore`. Reads everything.

    Raises:
        StoreError: The files cannot be read.
    """
    with store.reading() as tables:
        known = {key for key, _ in tables.rows("entries")}
        total = sum(head.stored_bytes for head in tables.heads().values())
        for key in sorted(known):
            wrong = _block_problem(store, tables, key)
            if wrong is not None:
                yield key, wrong
        for key, _ in tables.rows("blocks"):
            if key not in known:
                yield key, "a block that nothing is known of"
        for _, row in tables.rows("siblings"):
            if (child := bytes(row)[-KEY_BYTES:]) not in known:
                yield child, "is known to follow another block, and is not there"
        counted = tables.total_bytes()
        if counted != total:
            yield b"", f"{counted:,} bytes are counted, and there are {total:,}"


def _block_problem(store: DiskStore, tables: Tables, key: Key) -> str | None:
    try:
        entry = tables.entry(key)
        assert entry is not None, "the key is one of the table's"
        if chained_key(entry.parent, entry.token_ids, store.chain_secret) != key:
            return "its tokens do not give its name"
        stored = tables.get("blocks", key)
        if stored is None:
            return "has no block"
        unpack_block(key, entry.identity, len(entry.token_ids), stored, store.sealer)
    except Refused as refused:
        return f"is not as it was written ({refused.reason})"
    if entry.digests not in (b"", tables.digests(entry.parent, entry.token_ids)):
        return "its place among those after the same block is wrong"
    # A store of format 1 that cannot be written has no such table.
    if "siblings" in tables and not tables.follows(entry):
        return "is not known to the block before it"
    return None


def remove_wrong(store: DiskStore, keys: Iterable[Key]) -> int:
    """
    Remove blocks with all that follows them, and count all bytes anew; return how many were removed.

    What follows a block that is gone could not be found any more.

    Args:
        store: What to repair.
        keys: Of what is wrong, as `problems` yields them; the empty one stands for the counts.

    Raises:
        StoreError: The files cannot be written; nothing was changed.
    """
    removed = store.remove({key for key in keys if key})
    with store.writing() as tables:
        tables.recount()
    return removed


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

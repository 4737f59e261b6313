"""
Which layout a store has, and how one of an earlier version gets that of this one.

Knows entries and what follows what; neither budgets nor what is pinned.
"""

from dataclasses import replace
from typing import Final

from recollect.errors import StoreVersionError
from recollect.kv.environment import Environment, Transaction
from recollect.kv.names import Key, branch_digests
from recollect.kv.record import Entry, Refused, Sealer, entry_head, pack_entry, unpack_entry

FORMAT: Final = 2
"""Of the tables; 1 had no order among the blocks that follow the same one."""
_FORMAT: Final = b"format"
_UNORDERED: Final = b"unordered"
"""Noted where tokens could not be opened, so that the order of their blocks is not known yet."""
_EARLIER_TABLE: Final = "children"
"""Of format 1, in the place of `siblings`."""


def digests_of(entry: Entry, sealer: Sealer | None) -> bytes:
    """Return the place of a block among those that follow the same one."""
    secret = b"" if sealer is None else sealer.name_secret
    return branch_digests(entry.parent, entry.token_ids, secret)


def bring_up_to_date(env: Environment, sealer: Sealer | None) -> None:
    """
    Give a store the layout of this version, in one transaction; all blocks stay.

    One that cannot be written stays as it is: whole blocks are found in any layout.

    Raises:
        StoreVersionError: A later version wrote it; nothing was changed.
        StoreError: It cannot be written; nothing was changed.
    """
    with env.reading() as txn:
        is_done = _is_done(txn, env, sealer)
    if is_done or env.is_read_only:
        return
    with env.writing() as txn:
        if not _is_done(txn, env, sealer):  # another process may have been faster
            _order_all(txn, env, sealer)


def _is_done(txn: Transaction, env: Environment, sealer: Sealer | None) -> bool:
    info = env.table("info")
    found = int.from_bytes(txn.get(_FORMAT, b"", db=info), "little")
    if found > FORMAT:
        raise StoreVersionError(
            f"A newer version of recollect wrote the KV store in {env.folder}: use that one, set "
            "RECOLLECT_HOME elsewhere, or do without it (--kv-disk 0)."
        )
    waits_for_key = sealer is not None and txn.get(_UNORDERED, db=info) is not None
    return found == FORMAT and not waits_for_key


def _order_all(txn: Transaction, env: Environment, sealer: Sealer | None) -> None:
    """Note for each block that has no place yet what it follows, and where among its siblings."""
    entries, siblings, info = env.table("entries"), env.table("siblings"), env.table("info")
    unordered = False
    stored = [(bytes(key), bytes(value)) for key, value in txn.cursor(entries)]
    for key, value in stored:
        try:
            head = entry_head(key, value)
        except Refused:
            continue  # it is found to be damaged, and goes, when it is next asked for
        if head.digests:
            continue
        ordered = _ordered(key, value, sealer)
        if ordered is None:
            unordered = True
        else:
            txn.delete(head.parent, key, db=siblings)  # it may have been unordered so far
            txn.put(key, pack_entry(ordered, sealer), db=entries)
        digests = b"" if ordered is None else ordered.digests
        txn.put(head.parent, digests + key, db=siblings, dupdata=True)
    if txn.get(_FORMAT, db=info) is None:
        env.replace_table(txn, _EARLIER_TABLE, b"KV store of a later format")
    txn.put(_FORMAT, FORMAT.to_bytes(8, "little"), db=info)
    if unordered:
        txn.put(_UNORDERED, b"", db=info)
    else:
        txn.delete(_UNORDERED, db=info)


def _ordered(key: Key, stored: bytes, sealer: Sealer | None) -> Entry | None:
    """Return an entry with its digests; None where its tokens cannot be opened."""
    try:
        entry = unpack_entry(key, stored, sealer)
    except Refused:
        return None
    return replace(entry, digests=digests_of(entry, sealer))

"""
Which layout a store has, and how a plain one of an earlier version gets that of this one.

Knows entries and what follows what; neither budgets nor what is pinned. An encrypted one is written
anew, by `resealing`.
"""

from dataclasses import replace
from typing import Final

from recollect.errors import StoreBusyError, StoreVersionError
from recollect.kv.environment import Environment, Tables, Transaction
from recollect.kv.names import Key, branch_digests
from recollect.kv.record import Entry, Refused, Sealer, entry_head, pack_entry, unpack_entry

TABLES: Final = ("blocks", "entries", "siblings", "pins", "identities", "info", "replies")
FORMAT: Final = 3
"""Of the tables; up to 2 the names of blocks in an encrypted store were hashes without its secret."""
PLAIN_FORMAT: Final = 2
"""Of a store that is not encrypted; 1 had no order among the blocks that follow the same one."""
_FORMAT: Final = b"format"
_UNORDERED: Final = b"unordered"
"""Noted by versions that knew format 2, where tokens could not be opened."""
_EARLIER_TABLE: Final = "children"
"""Of format 1, in the place of `siblings`."""
_LATER: Final = b"KV store of a later format"


def digests_of(entry: Entry, sealer: Sealer | None) -> bytes:
    """Return the place of a block among those that follow the same one."""
    secret = b"" if sealer is None else sealer.name_secret
    return branch_digests(entry.parent, entry.token_ids, secret)


def names_are_open(txn: Transaction, env: Tables) -> bool:
    """Return whether there are names of blocks that anybody can try tokens against."""
    named = sum(txn.stat(env.table(name))["entries"] for name in ("entries", "pins"))
    return bool(named) and format_of(txn, env) < FORMAT


def note_format(txn: Transaction, env: Tables) -> None:
    """Note in a new file that it has this layout, and let versions that know format 1 refuse it."""
    txn.put(_EARLIER_TABLE.encode(), _LATER)
    txn.delete(_UNORDERED, db=env.table("info"))
    txn.put(_FORMAT, FORMAT.to_bytes(8, "little"), db=env.table("info"))


def bring_up_to_date(env: Environment, sealer: Sealer | None) -> None:
    """
    Give a store the layout of this version, in one transaction; all blocks stay.

    One that cannot be written stays as it is: whole blocks are found in any layout.

    Raises:
        StoreVersionError: A later version wrote it; nothing was changed.
        StoreBusyError: It is encrypted, of an earlier version, and open in this process without the
            key, so that it could not be written anew; nothing was changed.
        StoreError: It cannot be written; nothing was changed.
    """
    wanted = PLAIN_FORMAT if sealer is None else FORMAT
    with env.reading() as txn:
        is_done = format_of(txn, env) >= wanted
        has_names = sealer is not None and names_are_open(txn, env)
    if is_done or env.is_read_only:
        return
    if has_names:
        raise StoreBusyError(
            f"The KV store in {env.folder} has to be rewritten once for this version, and is open "
            "in this program: close it there first."
        )
    with env.writing() as txn:
        found = format_of(txn, env)
        if found < wanted:  # another process may have been faster
            if not found:
                _order_all(txn, env)
                env.replace_table(txn, _EARLIER_TABLE, _LATER)
            txn.put(_FORMAT, wanted.to_bytes(8, "little"), db=env.table("info"))


def format_of(txn: Transaction, env: Tables) -> int:
    """
    Return the number of a store's layout; 0: the first, or nothing was written yet.

    Raises:
        StoreVersionError: It is a later one than is known here.
    """
    found = int.from_bytes(txn.get(_FORMAT, b"", db=env.table("info")), "little")
    if found > FORMAT:
        where = f" in {env.folder}" if isinstance(env, Environment) else ""
        raise StoreVersionError(
            f"A newer version of recollect wrote the KV store{where}: use that one, set "
            "RECOLLECT_HOME elsewhere, or do without it (--kv-disk 0)."
        )
    return found


def _order_all(txn: Transaction, env: Environment) -> None:
    """Note for each block what it follows, and where among its siblings, unless that is sealed."""
    entries, siblings = env.table("entries"), env.table("siblings")
    stored = [(bytes(key), bytes(value)) for key, value in txn.cursor(entries)]
    for key, value in stored:
        try:
            head = entry_head(key, value)
        except Refused:
            continue  # it is found to be damaged, and goes, when it is next asked for
        ordered = _ordered(key, value)
        if ordered is not None:
            txn.put(key, pack_entry(ordered, None), db=entries)
        digests = b"" if ordered is None else ordered.digests
        txn.put(head.parent, digests + key, db=siblings, dupdata=True)


def _ordered(key: Key, stored: bytes) -> Entry | None:
    """Return an entry with its digests; None where its tokens are sealed."""
    try:
        entry = unpack_entry(key, stored, None)
    except Refused:
        return None
    return replace(entry, digests=digests_of(entry, None))

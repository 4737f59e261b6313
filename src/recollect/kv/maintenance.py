"""
Look through a store: what is in it, and whether anything is not as it was written.

Reads only; slow where there is much.

Remove from a store what is not as it was written.

Decides nothing itself: what is wrong is for `disk_audit` to say.

A store that is there already, opened without knowing with which budget it was made.

For what looks at it or takes from it; nothing is added.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recollect import config
from recollect.kv import accounts
from recollect.kv.accounts import Pin, Savings, digests_of
from recollect.kv.blocks import Key, chained_key
from recollect.kv.disk import DiskStore
from recollect.kv.environment import Environment, Transaction, translated
from recollect.kv.record import Identity, Refused, Sealer, unpack_block, unpack_entry

_KEY_BYTES: Final = 32
"""Of the name of a block, which ends what is noted of its place."""


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
    Return what is stored, by model, the last used first.

    Raises:
        StoreError: The files cannot be read.
    """
    env = store.env
    with env.reading() as txn:
        read = (
            (bytes(d), _identity(bytes(text))) for d, text in txn.cursor(env.table("identities"))
        )
        named = {digest: identity for digest, identity in read if identity is not None}
        heads = accounts.heads(txn, env).values()
        found = []
        for digest, identity in named.items():
            own = [head for head in heads if head.identity == digest]
            found.append(
                Holding(
                    identity=identity,
                    blocks=len(own),
                    tokens=sum(head.tokens for head in own),
                    stored_bytes=sum(head.stored_bytes for head in own),
                    last_used=max((head.last_used for head in own), default=0.0),
                    savings=accounts.savings(txn, env, digest),
                )
            )
    return sorted(found, key=lambda holding: -holding.last_used)


def pins(store: DiskStore) -> list[Pin]:
    """
    Return what is kept from eviction, by name.

    Raises:
        StoreError: The files cannot be read.
    """
    with store.env.reading() as txn:
        return accounts.pins(txn, store.env, store.sealer)


def problems(store: DiskStore) -> Iterator[tuple[Key, str]]:
    """
    Yield (key, sentence) for each block that is not as it was written, and for wrong accounts.

    Raises:
        StoreError: The files cannot be read.
    """
    env = store.env
    with env.reading() as txn:
        keys = [bytes(key) for key, _ in txn.cursor(env.table("entries"))]
        known = set(keys)
        total = sum(head.stored_bytes for head in accounts.heads(txn, env).values())
        for key in keys:
            wrong = _block_problem(store, txn, key)
            if wrong is not None:
                yield key, wrong
        for key, _ in txn.cursor(env.table("blocks")):
            if bytes(key) not in known:
                yield bytes(key), "a block that nothing is known of"
        for _, row in _rows(txn, env):
            if (child := bytes(row)[-_KEY_BYTES:]) not in known:
                yield child, "is known to follow another block, and is not there"
        counted = accounts.total_bytes(txn, env)
        if counted != total:
            yield b"", f"{counted:,} bytes are counted, and there are {total:,}"


def _identity(text: bytes) -> Identity | None:
    """Return what a digest stands for; None: that is damaged."""
    try:
        return Identity(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None


def _block_problem(store: DiskStore, txn: Transaction, key: Key) -> str | None:
    env = store.env
    try:
        entry = unpack_entry(key, txn.get(key, db=env.table("entries")), store.sealer)
        if chained_key(entry.parent, entry.token_ids, store.chain_secret) != key:
            return "its tokens do not give its name"
        stored = txn.get(key, db=env.table("blocks"))
        if stored is None:
            return "has no block"
        unpack_block(key, entry.identity, len(entry.token_ids), stored, store.sealer)
    except Refused as refused:
        return f"is not as it was written ({refused.reason})"
    if entry.digests not in (b"", digests_of(entry, store.sealer)):
        return "its place among those after the same block is wrong"
    if env.has_table("siblings"):  # one of an earlier version that cannot be written has none
        cursor = txn.cursor(env.table("siblings"))
        if not cursor.set_key_dup(entry.parent, entry.digests + key):
            return "is not known to the block before it"
    return None


def _rows(txn: Transaction, env: Environment) -> Iterable[tuple[memoryview, memoryview]]:
    """Return what follows what."""
    return txn.cursor(env.table("siblings")) if env.has_table("siblings") else ()


def remove_wrong(store: DiskStore, keys: Iterable[Key]) -> int:
    """
    Remove blocks with all that follows them, and derive the accounts anew; return how many went.

    What follows a block that is gone could not be found any more.

    Args:
        store: What to repair.
        keys: Of what is wrong, as `disk_audit.problems` yields them; the empty one stands for the
            accounts.

    Raises:
        StoreError: The files cannot be written; nothing was changed.
    """
    env = store.env
    removed = store.remove({key for key in keys if key})
    with env.writing() as txn:
        accounts.recount(txn, env)
    return removed


_SPARE_BYTES: Final = 16 << 20
"""Beyond what the file has: LMDB replaces pages before it gives them up, also to remove a block."""


def is_there(folder: Path) -> bool:
    """Return whether any KV was ever kept in a folder."""
    return (folder / "data.mdb").is_file()


def open_existing(folder: Path, sealer: Sealer | None) -> DiskStore:
    """
    Return the store in a folder; whoever calls closes it.

    Raises:
        StoreError: It cannot be opened.
    """
    with translated(folder):
        room = (folder / "data.mdb").stat().st_size + _SPARE_BYTES
        budget = max(config.default_kv_disk_bytes(folder), room)
    return DiskStore(folder, budget_bytes=budget, sealer=sealer)

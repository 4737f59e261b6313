"""
What is pinned in a store, by name; each operation is a transaction of its own.

Knows prefixes and their blocks; not what they were pinned for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recollect.kv import accounts
from recollect.kv.accounts import Pin
from recollect.kv.blocks import Key
from recollect.kv.disk import DiskStore


@dataclass(frozen=True, slots=True)
class Stored:
    """What of a pinned prefix is on disk."""

    blocks: int
    tokens: int
    stored_bytes: int


def find(store: DiskStore, name: str) -> Pin | None:
    """
    Return the pin of that name.

    Raises:
        StoreError: The files cannot be read.
    """
    with store.env.reading() as txn:
        return accounts.find_pin(txn, store.env, name, store.sealer)


def add(store: DiskStore, pin: Pin) -> bool:
    """
    Keep a prefix, which may not be there yet; return whether the name was free.

    Raises:
        StoreError: The files cannot be written.
    """
    with store.env.writing() as txn:
        return accounts.add_pin(txn, store.env, pin, store.sealer)


def drop(store: DiskStore, name: str) -> bool:
    """
    Let a prefix be evicted again; return whether it was pinned.

    Raises:
        StoreError: The files cannot be written.
    """
    with store.env.writing() as txn:
        return accounts.drop_pin(txn, store.env, name, store.sealer)


def drop_all(store: DiskStore, about: Mapping[str, Any]) -> list[str]:
    """
    Let go whatever was pinned with these values; return the names.

    Raises:
        StoreError: The files cannot be written.
    """
    with store.env.writing() as txn:
        found = accounts.pins(txn, store.env, store.sealer)
        names = [pin.name for pin in found if about.items() <= pin.about.items()]
        for name in names:
            accounts.drop_pin(txn, store.env, name, store.sealer)
        return names


def stored(store: DiskStore, pin: Pin) -> Stored:
    """
    Return what of a pinned prefix is on disk: all of it, unless something was damaged.

    Raises:
        StoreError: The files cannot be read.
    """
    heads = []
    with store.env.reading() as txn:
        key, table = pin.tail, store.env.table("entries")
        while (head := accounts.sound_head(key, txn.get(key, db=table))) is not None:
            heads.append(head)
            key = head.parent
    return Stored(
        blocks=len(heads),
        tokens=sum(head.tokens for head in heads),
        stored_bytes=sum(head.stored_bytes for head in heads),
    )


def are_stored(store: DiskStore, keys: Iterable[Key]) -> bool:
    """
    Return whether something is known of each of these blocks; none is read.

    Raises:
        StoreError: The files cannot be read.
    """
    with store.env.reading() as txn:
        table = store.env.table("entries")
        return all(txn.get(key, db=table) is not None for key in keys)


def pinned_bytes(store: DiskStore) -> int:
    """
    Return what all that is pinned takes, shared blocks counted once.

    Raises:
        StoreError: The files cannot be read.
    """
    with store.env.reading() as txn:
        table = store.env.table("entries")
        keys = accounts.pinned_keys(txn, store.env)
        found = (accounts.sound_head(key, txn.get(key, db=table)) for key in keys)
        return sum(head.stored_bytes for head in found if head is not None)

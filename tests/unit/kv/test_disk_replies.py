"""Replies on disk: found by their own name alone, as they were, and never more than there is room for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recollect.encryption import Cipher
from recollect.kv.disk import DiskStore
from recollect.kv.record import Sealer, StoredReply

REPLY = StoredReply("by the harbour, at noon \udc80", (5, 70_000, 0))
Open = Callable[..., DiskStore]


@pytest.fixture
def opened(open_store: Open) -> Iterator[Open]:
    """Return what opens the store; all are closed in the end."""
    stores: list[DiskStore] = []

    def open_it(*, sealer: Sealer | None = None, budget_bytes: int = 64 << 20) -> DiskStore:
        stores.append(open_store(sealer=sealer, budget_bytes=budget_bytes))
        return stores[-1]

    yield open_it
    for store in stores:
        store.close()


def name_of(store: DiskStore, key: bytes = b"place", namespace: str = "") -> bytes:
    return store.reply_name("weights", namespace, key)


def test_a_reply_is_found_in_its_place_and_namespace_alone(opened: Open) -> None:
    store = opened()
    store.remember({name_of(store): REPLY})
    assert opened().recall(name_of(store)) == REPLY
    for other in (
        name_of(store, b"elsewhere"),
        name_of(store, namespace="b"),
        store.reply_name("other weights", "", b"place"),
    ):
        assert store.recall(other) is None


def test_an_encrypted_store_tells_nothing_of_them(opened: Open, tmp_path: Path) -> None:
    plain = opened()
    name = name_of(plain)
    plain.close()
    sealed = opened(sealer=Cipher(b"k" * 32))
    assert name_of(sealed) != name
    sealed.remember({name_of(sealed): REPLY})
    assert sealed.recall(name_of(sealed)) == REPLY
    content = (tmp_path / "kv" / "data.mdb").read_bytes()
    assert b"harbour" not in content
    assert name not in content


@pytest.mark.parametrize("place", [0, 8, 16, 20, 24, -1])
def test_what_is_not_as_it_was_written_is_not_found(opened: Open, place: int) -> None:
    store = opened()
    name = name_of(store)
    store.remember({name: REPLY})
    table = store.env.tables["replies"]
    with store.env.writing() as txn:
        damaged = bytearray(txn.get(name, db=table))
        damaged[place] ^= 1
        txn.put(name, bytes(damaged), db=table)
    assert store.recall(name) is None
    with store.env.writing() as txn:
        txn.put(name, b"short", db=table)
    assert store.recall(name) is None


def test_a_plain_reply_in_an_encrypted_store_is_not_believed(opened: Open) -> None:
    cipher = Cipher(b"k" * 32)
    plain = opened()
    name = name_of(plain)
    plain.remember({name: REPLY})
    plain.close()
    assert opened(sealer=cipher).recall(name) is None


def test_the_oldest_go_where_there_are_too_many(tmp_path: Path) -> None:
    times = iter(range(100))
    store = DiskStore(tmp_path / "kv", budget_bytes=1 << 20, clock=lambda: next(times))
    names = [name_of(store, b"%d" % number) for number in range(20)]
    for name in names:
        store.remember({name: REPLY})
    found = [store.recall(name) is not None for name in names]
    assert found == sorted(found), "an older one stayed"
    assert 12 <= sum(found) <= 16
    store.close()


def test_clearing_forgets_them(opened: Open) -> None:
    store = opened()
    store.remember({name_of(store): REPLY})
    store.clear()
    assert store.recall(name_of(store)) is None

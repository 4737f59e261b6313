"""Pins in an encrypted store: found by name with the key, kept without it, and no name to read."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from recollect.encryption import Cipher
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.record import Identity, Pin, chained_key, disguised_key

IDENTITY = Identity("weights", "runtime-1", "f32")
CIPHER, OTHER = Cipher(b"k" * 32), Cipher(b"o" * 32)
ROOT, TOKENS = b"r" * 32, (1, 2, 3, 4)
TAIL = chained_key(ROOT, TOKENS)
PIN = Pin("the harbour", TAIL, 4, IDENTITY.digest().hex(), 12.0, {"kind": "checkpoint", "node": 1})
Open = Callable[..., DiskStore]


@pytest.fixture
def opened(open_store: Open) -> Iterator[Open]:
    """Return what opens the store with a key; all are closed in the end."""
    stores: list[DiskStore] = []

    def open_it(sealer: Cipher | None = CIPHER) -> DiskStore:
        stores.append(open_store(sealer=sealer))
        return stores[-1]

    yield open_it
    for store in stores:
        store.close()


def in_file(tmp_path: Path, *words: bytes) -> list[bytes]:
    content = (tmp_path / "kv" / "data.mdb").read_bytes()
    return [word for word in words if word in content]


def test_names_and_facts_are_sealed_and_found_by_name(opened: Open, tmp_path: Path) -> None:
    store = opened()
    assert store.add_pin(PIN) is True
    assert store.add_pin(replace(PIN, tokens=2)) is False, "the name is taken"
    assert store.find_pin(PIN.name) == PIN
    assert store.find_pin("the") is None
    assert store.pins() == [PIN]
    assert in_file(tmp_path, b"harbour", b"checkpoint", b"node", TAIL.hex().encode()) == []
    assert store.drop_pin("the") is False
    assert store.drop_pin(PIN.name) is True
    assert store.pins() == []


def test_they_come_by_name_and_go_by_what_is_known_of_them(opened: Open) -> None:
    store = opened()
    for name in ("c", "a", "b"):
        store.add_pin(replace(PIN, name=name, about={"kind": name}))
    assert [pin.name for pin in store.pins()] == ["a", "b", "c"]
    assert store.drop_pins({"kind": "b"}) == ["b"]
    assert [pin.name for pin in store.pins()] == ["a", "c"]


@pytest.mark.parametrize("key", [None, OTHER])
def test_without_the_key_they_say_nothing_and_keep_what_they_keep(
    opened: Open, key: Cipher | None
) -> None:
    store = opened()
    store.add_pin(PIN)
    store.write(IDENTITY, [NewBlock(TAIL, ROOT, True, TOKENS, b"payload")])
    stranger = opened(key)
    assert stranger.pins() == []
    assert stranger.find_pin(PIN.name) is None
    assert stranger.drop_pin(PIN.name) is False
    stranger.evict(1 << 20)
    assert stranger.clear() == 0
    assert store.size_of(PIN).tokens == 4


def test_a_pin_that_was_moved_to_another_name_or_prefix_does_not_open(opened: Open) -> None:
    store = opened()
    for name in ("one", "two"):
        store.add_pin(replace(PIN, name=name))
    with store.env.writing() as txn:
        table = store.env.tables["pins"]
        (one, first), (two, second) = ((bytes(k), bytes(v)) for k, v in txn.cursor(table))
        txn.put(one, second, db=table)
        txn.put(two, second.replace(TAIL, b"x" * 32), db=table)
    assert first != second
    assert store.pins() == []
    assert [store.find_pin(name) for name in ("one", "two")] == [None, None]


def test_what_an_earlier_version_wrote_plain_is_sealed_when_the_store_is_opened(
    opened: Open,
) -> None:
    plain = opened(None)
    store = opened()
    store.add_pin(replace(PIN, name="both", tokens=3))
    plain.add_pin(replace(PIN, name="both"))
    plain.add_pin(PIN)
    assert accounts_of(plain) == {"both": 4, PIN.name: 4}
    store = opened()
    assert accounts_of(store) == {"both": 3, PIN.name: 4}, "what was sealed before counts"
    assert accounts_of(plain) == {}
    with store.reading() as tables:
        values = [bytes(value) for _, value in tables.rows("pins")]
        assert tables.pinned_tails() == {TAIL}
    assert not any(b"harbour" in value or b"both" in value for value in values)


def accounts_of(store: DiskStore) -> dict[str, int]:
    return {pin.name: pin.tokens for pin in store.pins()}


def test_a_damaged_pin_is_none(open_store: Open, opened: Open) -> None:
    store = open_store()
    store.add_pin(PIN)
    with store.env.writing() as txn:
        for key in (b"a", b"b"):
            txn.put(key, b'{"name": "a"}' if key == b"a" else b"\xff", db=store.env.tables["pins"])
    assert store.pins() == [PIN]
    assert store.find_pin("a") is None
    with store.reading() as tables:
        assert tables.pinned_tails() == {TAIL}
    store.close()
    secret = CIPHER.name_secret
    assert opened().pins() == [replace(PIN, tail=disguised_key(TAIL, secret))]

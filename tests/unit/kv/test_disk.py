"""What was stored is found by what it follows, within the budget, and nothing else is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.errors import StoreCorruptError, StoreFullError
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.record import (
    Buffer,
    Entry,
    Identity,
    Pin,
    chained_key,
    namespace_key,
    unpack_entry,
)
from recollect.kv.tables import Savings

IDENTITY = Identity("weights", "runtime", "f32")
ROOT = namespace_key("weights", "")
SIZE = 4


def chain(*blocks: tuple[int, ...], payload_bytes: int = 100) -> list[NewBlock]:
    """Return blocks that follow each other from the root on; a payload says which tokens it is of."""
    made: list[NewBlock] = []
    parent = ROOT
    for tokens in blocks:
        key = chained_key(parent, tokens)
        payload = (bytes(tokens) * payload_bytes)[:payload_bytes]
        made.append(NewBlock(key, parent, parent == ROOT, tokens, payload))
        parent = key
    return made


def found(store: DiskStore, *token_ids: int) -> tuple[list[tuple[int, ...]], int]:
    result = store.find(ROOT, token_ids, block_size=SIZE, inside_block=True)
    return [entry.token_ids for entry in result.entries], result.last_tokens


def payloads(store: DiskStore, *token_ids: int, identity: Identity = IDENTITY) -> list[bytes]:
    entries = store.find(ROOT, token_ids, block_size=SIZE, inside_block=True).entries
    taken: list[bytes] = []

    def take(number: int, payload: Buffer) -> None:
        assert number == len(taken)
        taken.append(bytes(payload))

    assert store.read(identity, entries, take) == len(taken)
    return taken


@pytest.fixture
def store(open_store: Callable[..., DiskStore]) -> DiskStore:
    return open_store()


A, B, C, TAIL = (1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12), (9, 10)


def test_blocks_are_found_by_what_they_follow(store: DiskStore) -> None:
    store.write(IDENTITY, chain(A, B))
    assert found(store, *A, *B) == ([A, B], 4)
    assert found(store, *A, *B, 99) == ([A, B], 4)
    assert found(store, *B) == ([], 0), "B is known after A only"
    assert payloads(store, *A, *B) == [block.payload for block in chain(A, B)]


def test_a_part_of_a_block_is_found_where_histories_part(store: DiskStore) -> None:
    store.write(IDENTITY, chain(A, B))
    assert found(store, *A, 5, 6, 99, 99) == ([A, B], 2)
    assert found(store, 1, 2) == ([A], 2)
    whole = store.find(ROOT, [*A, 5, 6], block_size=SIZE, inside_block=False)
    assert [entry.token_ids for entry in whole.entries] == [A]


def test_a_longer_block_replaces_the_part_that_it_begins_with(store: DiskStore) -> None:
    store.write(IDENTITY, chain(A, TAIL))
    store.write(IDENTITY, chain(A, (9, 11)))
    assert found(store, *A, 9, 10) == ([A, TAIL], 2)
    store.write(IDENTITY, chain(A, C))
    assert found(store, *A, 9, 10) == ([A, C], 2)
    assert found(store, *A, 9, 11) == ([A, (9, 11)], 2), "that one begins otherwise, and stays"
    assert list(store.problems()) == []


def test_a_part_is_kept_and_found_whole_where_it_cannot_be_cut(store: DiskStore) -> None:
    def whole(*token_ids: int) -> tuple[list[tuple[int, ...]], int]:
        result = store.find(ROOT, token_ids, block_size=SIZE, inside_block=False, whole_tails=True)
        return [entry.token_ids for entry in result.entries], result.last_tokens

    for tail in (TAIL, (9, 10, 11), (9, 11), C):
        store.write(IDENTITY, chain(A, tail), keep_parts=True)
    assert whole(*A, *C) == ([A, C], 4)
    assert whole(*A, 9, 10, 11, 99) == ([A, (9, 10, 11)], 3), "the longest of those"
    assert whole(*A, 9, 10, 99) == ([A, TAIL], 2)
    assert whole(*A, 9, 10) == ([A, TAIL], 2)
    assert whole(*A, 9, 99) == ([A], 4), "no part of a part"
    assert whole(9, 10) == ([], 0), "they are known after A only"
    assert list(store.problems()) == []


def test_a_part_that_is_pinned_is_not_replaced(store: DiskStore) -> None:
    store.write(IDENTITY, chain(A, TAIL))
    tail = chain(A, TAIL)[-1].key
    assert store.add_pin(Pin("here", tail, 6, "", 0.0, {}))
    store.write(IDENTITY, chain(A, C))
    assert store.remove([]) == 0
    assert {TAIL, C} <= {entry.token_ids for entry in _all_entries(store)}


def test_what_is_there_already_is_not_written_again(store: DiskStore) -> None:
    first = store.write(IDENTITY, chain(A))
    again = store.write(IDENTITY, chain(A, B))
    assert (first.blocks, again.blocks) == (1, 1)
    assert again.stored == {block.key for block in chain(A, B)}
    assert store.write(IDENTITY, chain(A, B)).stored_bytes == 0


def test_a_block_that_nothing_could_find_is_left_out(store: DiskStore) -> None:
    written = store.write(IDENTITY, chain(A, B)[1:])
    assert (written.stored, written.blocks) == (set(), 0)
    assert list(store.problems()) == []


def test_with_a_block_go_those_that_follow_it(store: DiskStore) -> None:
    store.write(IDENTITY, [*chain(A, B, C), *chain(A, TAIL)])
    assert store.remove([chain(A, B)[-1].key]) == 2
    assert found(store, *A, *B, *C) == ([A], 4)
    assert found(store, *A, *TAIL) == ([A, TAIL], 2)
    assert list(store.problems()) == []


def test_everything_survives_closing(open_store: Callable[..., DiskStore]) -> None:
    store = open_store()
    store.write(IDENTITY, chain(A, B))
    store.close()
    store = open_store()
    assert payloads(store, *A, *B) == [block.payload for block in chain(A, B)]
    store.close()


def test_two_stores_of_one_folder_see_the_same(open_store: Callable[..., DiskStore]) -> None:
    first, second = open_store(), open_store()
    first.write(IDENTITY, chain(A))
    assert found(second, *A) == ([A], 4)
    first.close()
    second.write(IDENTITY, chain(A, B))
    assert found(second, *A, *B) == ([A, B], 4)
    second.close()


def test_tails_go_before_what_they_follow_and_the_oldest_first(tmp_path: Path) -> None:
    now = [0.0]
    store = DiskStore(tmp_path / "kv", budget_bytes=4 << 20, clock=lambda: now[0])
    for tokens in ((20,) * 4, (30,) * 4, (40,) * 4):
        now[0] += 1
        store.write(IDENTITY, chain(A, tokens, C))
    now[0] += 1
    store.touch([chain(A, (20,) * 4, C)[-1].key])
    store.evict(1)
    assert found(store, *A, *(30,) * 4, *C)[0] == [A, (30,) * 4]
    store.evict(1)
    assert found(store, *A, *(30,) * 4, *C)[0] == [A]
    store.evict(1)
    assert found(store, *A, *(40,) * 4, *C)[0] == [A, (40,) * 4]
    assert found(store, *A, *(20,) * 4, *C)[0] == [A, (20,) * 4, C]
    assert list(store.problems()) == []


@pytest.mark.slow
def test_the_budget_holds_and_the_file_stays_within_it(tmp_path: Path) -> None:
    budget = 2 << 20
    store = DiskStore(tmp_path / "kv", budget_bytes=budget)
    for number in range(60):
        tokens = (number % 250, number // 250, 1, 1)
        store.write(IDENTITY, chain(A, tokens, payload_bytes=60_000))
        with store.reading() as tables:
            assert tables.total_bytes() <= budget
        assert found(store, *A, *tokens)[0] == [A, tokens], "the newest is there"
    assert store.evicted_blocks > 20
    assert store.env.file_bytes <= budget
    assert list(store.problems()) == []


@pytest.mark.slow
def test_what_is_pinned_is_never_given_up(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv", budget_bytes=2 << 20)
    store.write(IDENTITY, chain(A, B, payload_bytes=60_000))
    pin = Pin("here", chain(A, B)[-1].key, 8, IDENTITY.digest().hex(), 0.0, {"why": "test"})
    assert store.add_pin(pin)
    for number in range(60):
        store.write(IDENTITY, chain((number, 1, 1, 1), payload_bytes=60_000))
    assert payloads(store, *A, *B) == [b.payload for b in chain(A, B, payload_bytes=60_000)]
    assert store.clear() > 0
    assert found(store, *A, *B)[0] == [A, B]
    assert store.pins() == [pin]
    store.clear(pinned=True)
    assert found(store, *A, *B)[0] == []
    assert store.pins() == []


def test_a_nearly_full_disk_takes_nothing_more(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(IDENTITY, chain(A))
    monkeypatch.setattr("recollect.kv.disk.RESERVED_BYTES", 1 << 60)
    with pytest.raises(StoreFullError, match="make room"):
        store.write(IDENTITY, chain(A, B))
    assert found(store, *A, *B)[0] == [A]


def test_a_value_larger_than_the_budget_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv", budget_bytes=1 << 20)
    store.write(IDENTITY, chain(A))
    with pytest.raises(StoreFullError, match="--kv-disk"):
        store.write(IDENTITY, chain(A, B, payload_bytes=2 << 20))
    assert list(store.problems()) == []


def test_a_file_that_is_no_store_is_put_aside(
    tmp_path: Path, open_store: Callable[..., DiskStore]
) -> None:
    folder = tmp_path / "kv"
    folder.mkdir()
    (folder / "data.mdb").write_bytes(b"something else" * 1000)
    store = open_store()
    store.write(IDENTITY, chain(A))
    assert found(store, *A) == ([A], 4)
    kept = list(tmp_path.glob("kv.damaged-*"))
    assert len(kept) == 1
    assert (kept[0] / "data.mdb").read_bytes() == b"something else" * 1000


def test_the_folder_is_private(store: DiskStore) -> None:
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert (store.folder / "data.mdb").stat().st_mode & 0o777 == 0o600


def test_what_is_stored_is_told_by_model(store: DiskStore) -> None:
    other = Identity("weights", "runtime", "f16")
    store.write(IDENTITY, chain(A, B))
    store.write(other, chain((7, 7, 7, 7)))
    with store.writing() as tables:
        tables.add_savings(other.digest(), Savings(100, 2.0, 0.5))
        tables.add_savings(other.digest(), Savings(20, 1.0, None))
    by_identity = {holding.identity: holding for holding in store.holdings()}
    assert (by_identity[IDENTITY].blocks, by_identity[IDENTITY].tokens) == (2, 8)
    assert (by_identity[other].blocks, by_identity[other].tokens) == (1, 4)
    assert by_identity[other].savings == Savings(120, 3.0, 0.5)


def test_the_audit_sees_what_is_not_as_it_was_written(store: DiskStore) -> None:
    store.write(IDENTITY, chain(A, B, C))
    blocks = store.env.tables["blocks"]
    first, second, third = (block.key for block in chain(A, B, C))
    with store.env.writing() as txn:
        value = bytearray(txn.get(second, db=blocks))
        value[-1] ^= 1
        txn.put(second, bytes(value), db=blocks)
        txn.delete(third, db=blocks)
    wrong = dict(store.problems())
    assert set(wrong) == {second, third}
    assert first not in wrong


def test_a_store_that_is_damaged_inside_says_so(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmdb

    def broken(*_: object, **__: object) -> None:
        raise lmdb.CorruptedError("mdb_get: MDB_CORRUPTED")

    monkeypatch.setattr(store.env, "begin", broken)
    with pytest.raises(StoreCorruptError, match="recollect cache clear"):
        found(store, *A)


def _all_entries(store: DiskStore) -> list[Entry]:
    with store.env.reading() as txn:
        return [
            unpack_entry(bytes(key), value, None)
            for key, value in txn.cursor(store.env.tables["entries"])
        ]

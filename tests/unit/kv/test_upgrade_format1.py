"""
A store that an earlier version wrote keeps its blocks; one of a later version is left alone.

`data/format1` was written by the last version with format 1: a chain of two blocks and a part under
one block, and twenty more blocks beside the second.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from recollect.encryption import KV_PURPOSE, Cipher
from recollect.errors import StoreVersionError
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.record import Buffer, Identity, Key, chained_key, namespace_key

IDENTITY = Identity("weights", "runtime", "f32")
EARLIER = Path(__file__).parent / "data" / "format1"
CIPHER = Cipher(bytes(range(32))).for_purpose(KV_PURPOSE)
A, B = (1, 2, 3, 4), (5, 6, 7, 8)
Open = Callable[..., DiskStore]


def root_of(sealer: Cipher | None) -> Key:
    return namespace_key("weights", "", b"" if sealer is None else sealer.name_secret)


def restored(store: DiskStore, *token_ids: int) -> tuple[int, list[bytes]]:
    """Return how many leading tokens are found, and what the blocks hold."""
    root = root_of(store.sealer)  # type: ignore[arg-type]  # these tests seal with a cipher alone
    found = store.find(root, token_ids, block_size=4, inside_block=True)
    taken: list[bytes] = []

    def take(_: int, payload: Buffer) -> None:
        taken.append(bytes(payload))

    assert store.read(IDENTITY, found.entries, take) == len(found.entries)
    return max(0, len(found.entries) - 1) * 4 + found.last_tokens, taken


@pytest.fixture(params=[None, CIPHER], ids=["plain", "sealed"])
def sealer(request: pytest.FixtureRequest, tmp_path: Path) -> Cipher | None:
    """Have a store of format 1 where `open_store` opens one, and return what it is sealed with."""
    name = "plain" if request.param is None else "sealed"
    shutil.copytree(EARLIER / name, tmp_path / "kv")
    cipher: Cipher | None = request.param
    return cipher


def test_all_blocks_of_an_earlier_version_are_found_and_so_are_their_parts(
    open_store: Open, sealer: Cipher | None
) -> None:
    store = open_store(sealer=sealer)
    assert restored(store, *A, *B, 9, 10) == (10, [bytes(b) * 8 for b in (A, B, (9, 10))])
    length, payloads = restored(store, *A, 5, 6, 99)
    assert (length, payloads[0]) == (6, bytes(A) * 8)
    # A pinned part is there beside what begins with it: which of the two is met first, names decide.
    assert payloads[1] in (bytes(B) * 8, bytes((5, 6)) * 8)
    for first in range(20, 40):
        tokens = tuple(range(first, first + 4))
        assert restored(store, *A, *tokens[:3], 99) == (7, [bytes(A) * 8, bytes(tokens) * 8])
    assert [pin.name for pin in store.pins()] == ["here"]
    assert list(store.problems()) == []
    assert sum(store.misses.values()) == 0
    store.close()
    store = open_store(sealer=sealer)
    assert store.holdings()[0].blocks == 24
    store.close()


def test_what_is_written_next_replaces_a_part_of_an_earlier_version(
    open_store: Open, sealer: Cipher | None
) -> None:
    store = open_store(sealer=sealer)
    secret = store.chain_secret
    parent = chained_key(chained_key(root_of(sealer), A, secret), B, secret)
    tokens = (9, 10, 11, 12)
    block = NewBlock(chained_key(parent, tokens, secret), parent, False, tokens, b"whole")
    store.write(IDENTITY, [block])
    assert restored(store, *A, *B, 9, 10, 99)[1][-1] == b"whole"
    assert store.holdings()[0].blocks == 24
    assert list(store.problems()) == []
    store.close()


def test_without_the_key_blocks_can_be_removed_and_with_it_they_are_ordered(
    open_store: Open, tmp_path: Path
) -> None:
    shutil.copytree(EARLIER / "sealed", tmp_path / "kv")
    store = open_store()  # as what only gives room back may do
    first = chained_key(chained_key(root_of(CIPHER), A), (20, 21, 22, 23))
    assert store.remove([first]) == 1
    assert store.holdings()[0].blocks == 23
    store.close()
    store = open_store(sealer=CIPHER)
    assert restored(store, *A, 21, 22, 99) == (6, [bytes(A) * 8, bytes((21, 22, 23, 24)) * 8])
    assert list(store.problems()) == []
    store.close()


def test_an_earlier_version_refuses_what_this_one_wrote(
    open_store: Open, sealer: Cipher | None
) -> None:
    """It opens its table of children so; what it says then is a sentence of its own."""
    store = open_store(sealer=sealer)
    folder = store.folder
    store.close()
    with (
        lmdb.open(str(folder), max_dbs=7) as earlier,
        pytest.raises(lmdb.IncompatibleError),
    ):
        earlier.open_db(b"children", dupsort=True)
    store = open_store(sealer=sealer)
    assert list(store.problems()) == []
    store.close()


def test_a_new_store_is_refused_by_an_earlier_version_too(open_store: Open) -> None:
    store = open_store()
    store.close()
    with (
        lmdb.open(str(store.folder), max_dbs=7) as earlier,
        pytest.raises(lmdb.IncompatibleError),
    ):
        earlier.open_db(b"children", dupsort=True)


def test_what_a_later_version_wrote_is_left_alone(open_store: Open) -> None:
    store = open_store()
    with store.env.writing() as txn:
        txn.put(b"format", (4).to_bytes(8, "little"), db=store.env.tables["info"])
    store.close()
    before = (store.folder / "data.mdb").read_bytes()
    with pytest.raises(StoreVersionError, match="newer version"):
        open_store()
    assert (store.folder / "data.mdb").read_bytes() == before


def test_a_plain_store_can_be_opened_by_the_version_before(open_store: Open) -> None:
    """Only an encrypted one has other names, and a number of its own."""
    for sealer, number in ((None, 2), (CIPHER, 3)):
        store = open_store(sealer=sealer)
        with store.env.reading() as txn:
            assert txn.get(b"format", db=store.env.tables["info"])[0] == number
        store.close()
        shutil.rmtree(store.folder)


def test_a_store_that_cannot_be_written_is_read_as_it_is(
    open_store: Open, sealer: Cipher | None, read_only_disk: Callable[[], None]
) -> None:
    """Also one of an earlier version, whose parts of blocks are then not found."""
    read_only_disk()
    store = open_store(sealer=sealer)
    assert store.env.is_read_only
    assert restored(store, *A, *B) == (8, [bytes(A) * 8, bytes(B) * 8])
    assert store.holdings()[0].blocks == 24
    assert list(store.problems()) == []
    store.close()

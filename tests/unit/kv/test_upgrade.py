"""
Who has the files of an encrypted store and not its secret can try no tokens, not even two.

Stores of earlier versions, which let one, are written anew when they are opened, and keep all else.
"""

import logging
import shutil
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import IO

import lmdb
import pytest

from recollect.encryption import KV_PURPOSE, Cipher
from recollect.errors import StoreBusyError
from recollect.kv import environment
from recollect.kv.blocks import PUBLIC
from recollect.kv.disk import RESERVED_BYTES, DiskStore, NewBlock
from recollect.kv.record import (
    Buffer,
    Identity,
    Key,
    Pin,
    StoredReply,
    branch_digests,
    chained_key,
    disguised_key,
    namespace_key,
)

IDENTITY = Identity("weights", "runtime", "f32")
FORMAT_1 = Path(__file__).parent / "data" / "format1"
CIPHER = Cipher(bytes(range(32))).for_purpose(KV_PURPOSE)
OTHER = Cipher(b"o" * 32)
VOCABULARY = range(5, 11)
MESSAGE = b"a guess at all that was said"
ROOTS = {s: namespace_key("weights", "", s.name_secret if s else b"") for s in (None, CIPHER)}
Tokens = tuple[int, ...]
Open = Callable[..., DiskStore]
WriteEarlier = Callable[..., list[NewBlock]]
Start = Callable[[str], subprocess.Popen[str]]


def guesses() -> list[Tokens]:
    """Return all blocks of one or two tokens."""
    return [(one,) for one in VOCABULARY] + list(product(VOCABULARY, repeat=2))


def attacked(folder: Path, tried: Iterable[Tokens] | None = None) -> set[tuple[str, Tokens]]:
    """
    Return what the files of a store give away to whoever tries all, without the secret, and by what.

    It tries *tried*, or else all blocks of one or two tokens.

    Anything in the files may be a name, and the name of what a block follows, in use or given up.
    """
    content = (folder / "data.mdb").read_bytes()
    windows = {content[at : at + 32] for at in range(len(content) - 31)}
    names = {window for window in windows if len(set(window)) > 15}  # a hash has about 30 of 32
    digests = {window[:8] for window in names}
    parents = names | {namespace_key("weights", space) for space in ("", PUBLIC)}
    found: set[tuple[str, Tokens]] = set()
    tried = guesses() if tried is None else list(tried)
    for parent in parents:
        for ids in tried:
            if chained_key(parent, ids) in names:
                found.add(("name", ids))
            if len(ids) == 2 and branch_digests(parent, ids) in digests:
                found.add(("order", ids))
        if blake2b(parent + MESSAGE, digest_size=32, person=b"recollect reply").digest() in names:
            found.add(("reply", ()))
    return found


def fill(store: DiskStore) -> set[Tokens]:
    """Write blocks of two tokens, a pin and a reply; return the tokens."""
    blocks: list[NewBlock] = []
    for head in ((5, 6), (7, 8)):
        parent = ROOTS[store.sealer]  # type: ignore[index]  # these tests seal with a cipher alone
        for tokens in (head, (9, 10), (10, 9)):
            key = chained_key(parent, tokens, store.chain_secret)
            follows_root = tokens == head
            blocks.append(NewBlock(key, parent, follows_root, tokens, bytes(tokens)))
            parent = key
    store.write(IDENTITY, blocks)
    about = {"kind": "warm", "prefix": blocks[2].key.hex()}
    store.add_pin(Pin("here", blocks[2].key, 6, IDENTITY.digest().hex(), 1.0, about))
    name = store.reply_name("weights", "", MESSAGE)
    store.remember({name: StoredReply("said", (5, 6))})
    return {block.token_ids for block in blocks}


@pytest.mark.slow
def test_two_tokens_of_a_plain_store_are_found_by_trying_all(open_store: Open) -> None:
    """Or the attack in the next tests would find nothing anywhere."""
    store = open_store()
    written = fill(store)
    store.close()
    expected = {(way, ids) for way in ("name", "order") for ids in written} | {("reply", ())}
    assert attacked(store.folder) == expected


@pytest.mark.slow
def test_nothing_of_an_encrypted_store_is_found_by_trying_all(open_store: Open) -> None:
    store = open_store(sealer=CIPHER)
    fill(store)
    assert list(store.problems()) == []
    store.close()
    assert attacked(store.folder) == set()


@pytest.fixture
def format_1(tmp_path: Path) -> Path:
    """Return the folder of an encrypted store of format 1, which has blocks of two tokens."""
    return Path(shutil.copytree(FORMAT_1 / "sealed", tmp_path / "kv"))


@pytest.fixture
def format_2(tmp_path: Path, write_earlier_store: WriteEarlier) -> Path:
    """Return the folder of an encrypted store of format 2, which has blocks of two tokens."""
    write_earlier_store(tmp_path / "kv", CIPHER, [[(5, 6), (9, 10)], [(7, 8), (8, 7)]])
    return tmp_path / "kv"


@pytest.mark.slow
@pytest.mark.parametrize("earlier", ["format_1", "format_2"])
def test_what_an_earlier_version_gave_away_is_gone_once_the_store_was_opened(
    open_store: Open, request: pytest.FixtureRequest, earlier: str
) -> None:
    folder: Path = request.getfixturevalue(earlier)
    former = names_in(folder)
    given_away = {ids for way, ids in attacked(folder) if way == "name"}
    assert len(given_away) > 1
    open_store(sealer=CIPHER).close()
    content = (folder / "data.mdb").read_bytes()
    assert not any(name in content for name in former)
    assert attacked(folder, given_away) == set()
    assert sorted(path.name for path in folder.iterdir()) == ["data.mdb", "lock.mdb"]
    assert (folder / "data.mdb").stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_version_before_refuses_what_was_written_anew(open_store: Open, format_2: Path) -> None:
    """They compare the number with theirs, 2; and format 1 takes `children` for a table."""
    open_store(sealer=CIPHER).close()
    with lmdb.open(str(format_2), max_dbs=8, readonly=True) as env:
        info = env.open_db(b"info", create=False)
        with env.begin() as txn:
            assert int.from_bytes(txn.get(b"format", b"", db=info), "little") == 3
        with pytest.raises(lmdb.Error):
            env.open_db(b"children", dupsort=True, create=False)


def test_blocks_pins_and_replies_are_there_as_before(
    open_store: Open, tmp_path: Path, write_earlier_store: WriteEarlier
) -> None:
    folder = tmp_path / "kv"
    chain = [(number, 1) for number in range(50)]
    former = chain_names(ROOTS[CIPHER], chain, b"")
    text = chained_key(former[-2], (49,))
    absent = namespace_key("weights", "plain")
    identity = IDENTITY.digest().hex()
    made = [
        Pin("warm", former[-1], 99, identity, 1.0, {"kind": "warm", "prefix": text.hex()}),
        Pin("place", absent, 7, identity, 2.0, {"kind": "checkpoint", "node": 3}),
    ]
    blocks = write_earlier_store(
        folder, CIPHER, [chain, [(99, 98)]], kept=made, said={MESSAGE: StoredReply("said", (5, 6))}
    )
    store = open_store(sealer=CIPHER)
    secret = store.chain_secret
    expected = chain_names(ROOTS[CIPHER], chain, secret)
    place, warm = store.pins()
    assert warm == Pin(
        "warm",
        expected[-1],
        99,
        identity,
        1.0,
        {"kind": "warm", "prefix": chained_key(expected[-2], (49,), secret).hex()},
    )
    assert place == Pin("place", disguised_key(absent, secret), 7, identity, 2.0, made[1].about)
    assert store.size_of(warm).blocks == 50
    assert found(store, chain) == [block.payload for block in blocks[:50]]
    assert found(store, [(99, 98)]) == [blocks[50].payload]
    assert store.recall(store.reply_name("weights", "", MESSAGE)) == StoredReply("said", (5, 6))
    assert list(store.problems()) == []
    assert store.holdings()[0].blocks == 51
    store.close()


def test_a_block_that_is_damaged_goes_with_what_follows_it_and_its_pin_stays(
    open_store: Open,
    tmp_path: Path,
    write_earlier_store: WriteEarlier,
    caplog: pytest.LogCaptureFixture,
) -> None:
    chain = [(1, 2), (3, 4), (5, 6)]
    kept = [Pin("here", chain_names(ROOTS[CIPHER], chain, b"")[-1], 6, "", 1.0, {})]
    blocks = write_earlier_store(tmp_path / "kv", CIPHER, [chain], kept=kept)
    store = open_store()  # without the key, as what only takes from it does
    with store.env.writing() as txn:
        txn.put(blocks[1].key, b"damaged", db=store.env.tables["blocks"])
    store.close()
    for _ in range(2):
        store = open_store(sealer=CIPHER)
        assert found(store, chain) == [blocks[0].payload]
        (pin,) = store.pins()
        assert pin.tail == chain_names(ROOTS[CIPHER], chain, store.chain_secret)[-1]
        assert list(store.problems()) == []
        store.close()
    (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "2 of its blocks were dropped" in said


@pytest.mark.parametrize("damaged", [0, 1])
def test_what_follows_a_damaged_entry_is_not_taken_for_a_first_block(
    open_store: Open, tmp_path: Path, write_earlier_store: WriteEarlier, damaged: int
) -> None:
    """Its parent would stay in clear beside the name of the root, and could be tried."""
    chains = [[(5, 6), (7, 8), (9, 10), (10, 9)], [(6, 5)]]
    blocks = write_earlier_store(tmp_path / "kv", CIPHER, chains)
    store = open_store()
    with store.env.writing() as txn:
        entry = bytearray(txn.get(blocks[damaged].key, db=store.env.tables["entries"]))
        entry[40] ^= 1
        txn.put(blocks[damaged].key, bytes(entry), db=store.env.tables["entries"])
    store.close()
    store = open_store(sealer=CIPHER)
    assert [len(found(store, chain)) for chain in chains] == [damaged, 1]
    assert store.holdings()[0].blocks == damaged + 1
    assert list(store.problems()) == []
    store.close()
    content = (tmp_path / "kv" / "data.mdb").read_bytes()
    assert not any(block.key in content for block in blocks)


def test_where_the_disk_has_no_room_for_all_what_was_used_last_and_is_pinned_stays(
    open_store: Open,
    tmp_path: Path,
    write_earlier_store: WriteEarlier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chains = [[(number, 1), (number, 2)] for number in range(10)]
    kept = [Pin("here", chain_names(ROOTS[CIPHER], chains[0], b"")[-1], 4, "", 1.0, {})]
    write_earlier_store(tmp_path / "kv", CIPHER, chains, payload_bytes=40_000, kept=kept)
    usage = namedtuple("usage", "total used free")
    free = RESERVED_BYTES + 6 * 45_056 + 4000
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, free))
        store = open_store(sealer=CIPHER)
    assert [len(found(store, chain)) for chain in chains] == [2, 0, 0, 0, 0, 0, 0, 0, 2, 2]
    (pin,) = store.pins()
    assert store.size_of(pin).blocks == 2
    assert list(store.problems()) == []
    store.close()


def test_where_there_is_no_room_at_all_the_places_of_pins_stay(
    open_store: Open,
    tmp_path: Path,
    write_earlier_store: WriteEarlier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = [Pin("here", chain_names(ROOTS[CIPHER], [(1, 2)], b"")[-1], 2, "", 1.0, {})]
    write_earlier_store(tmp_path / "kv", CIPHER, [[(1, 2)], [(3, 4)]], kept=kept)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 0))
        store = open_store(sealer=CIPHER)
    (pin,) = store.pins()
    assert store.size_of(pin).blocks == 0
    (key,) = chain_names(ROOTS[CIPHER], [(1, 2)], store.chain_secret)
    store.write(IDENTITY, [NewBlock(key, ROOTS[CIPHER], True, (1, 2), b"again")])
    assert store.size_of(pin).blocks == 1, "what is computed again is pinned again"
    store.close()


@pytest.mark.slow
def test_what_is_in_memory_at_a_time_does_not_grow_with_the_store(
    open_store: Open, tmp_path: Path, write_earlier_store: WriteEarlier
) -> None:
    peaks = []
    for count in (20, 50):
        chain = [(number, 1) for number in range(count)]
        write_earlier_store(tmp_path / "kv", CIPHER, [chain], payload_bytes=1 << 20)
        tracemalloc.start()
        store = open_store(sealer=CIPHER)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found(store, chain)) == count
        store.close()
        shutil.rmtree(tmp_path / "kv")
    assert peaks[1] < peaks[0] + (4 << 20)


@pytest.mark.slow
def test_of_a_store_of_another_key_nothing_is_lost(open_store: Open, format_2: Path) -> None:
    before = names_in(format_2)
    store = open_store(sealer=OTHER)
    assert store.holdings() == []
    store.close()
    (aside,) = format_2.parent.glob("kv.damaged-*")
    assert names_in(aside) == before


OPEN = """
import sys
from pathlib import Path
from recollect.encryption import KV_PURPOSE, Cipher
from recollect.kv.disk import DiskStore
sealer = Cipher(bytes(range(32))).for_purpose(KV_PURPOSE) if sys.argv[2] == "key" else None
sys.stdin.readline()
store = DiskStore(Path(sys.argv[1]), budget_bytes=64 << 20, sealer=sealer)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(format_2: Path) -> Iterator[Start]:
    """Return what starts a process that opens the store after a line, and says so."""
    started: list[subprocess.Popen[str]] = []

    def start_one(key: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OPEN, str(format_2), key]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))  # noqa: S603
        return started[-1]

    yield start_one
    for process in started:
        process.communicate("")


@pytest.mark.slow
def test_while_another_process_has_it_open_it_stays_as_it_is_and_that_is_said(
    open_store: Open,
    format_2: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    former = names_in(format_2)
    said = begun(start("no key"))
    assert said.readline() == "open\n"
    monkeypatch.setattr(environment, "WAIT_S", 0.2)
    with pytest.raises(StoreBusyError, match="close it"):
        open_store(sealer=CIPHER)
    assert names_in(format_2) == former


def test_while_this_process_has_it_open_without_the_key_that_is_said(
    open_store: Open, format_2: Path
) -> None:
    store = open_store()
    with pytest.raises(StoreBusyError, match="close it"):
        open_store(sealer=CIPHER)
    assert list(store.take_refused()) == []
    store.close()
    store = open_store(sealer=CIPHER)
    assert found(store, [(5, 6), (9, 10)]) != []
    store.close()
    assert format_2.exists()


@pytest.mark.slow
def test_two_that_open_it_at_the_same_time_both_get_it(start: Start, open_store: Open) -> None:
    both = [start("key"), start("key")]
    lines = [begun(process) for process in both]
    assert [line.readline() for line in lines] == ["open\n", "open\n"]
    store = open_store(sealer=CIPHER)
    assert len(found(store, [(5, 6), (9, 10)])) == 2
    assert list(store.problems()) == []
    store.close()


def begun(process: subprocess.Popen[str]) -> IO[str]:
    """Let a process open the store; return what it says."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout is not None
    return process.stdout


def found(store: DiskStore, chain: Sequence[Tokens]) -> list[bytes]:
    """Return what the leading blocks of a chain hold that are found and read."""
    ids = [token for tokens in chain for token in tokens]
    entries = store.find(ROOTS[CIPHER], ids, block_size=2, inside_block=False).entries
    taken: list[bytes] = []

    def take(_: int, payload: Buffer) -> None:
        taken.append(bytes(payload))

    assert store.read(IDENTITY, entries, take) == len(entries)
    return taken


def chain_names(root: Key, chain: Sequence[Tokens], secret: bytes) -> list[Key]:
    names = [root]
    for tokens in chain:
        names.append(chained_key(names[-1], tokens, secret))
    return names[1:]


def names_in(folder: Path) -> set[Key]:
    """Return the names of blocks in a store that nobody has open."""
    with lmdb.open(str(folder), max_dbs=8, readonly=True, lock=False) as env:
        table = env.open_db(b"entries", create=False)
        with env.begin() as txn:
            return {bytes(key) for key, _ in txn.cursor(table)}

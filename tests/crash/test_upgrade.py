"""`kill -9` while an encrypted store of an earlier version is written anew loses nothing."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from recollect.encryption import Cipher
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.record import Buffer, Identity, Pin, StoredReply, chained_key, namespace_key

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a way to start quickly")

CIPHER = Cipher(bytes(32))
ROOT = namespace_key("weights", "", CIPHER.name_secret)
CHAIN = [(number, 1, 2, 3) for number in range(200)]
SAID = StoredReply("said", (1, 2))
PAYLOAD_BYTES = 100_000
ROUNDS = 12


def format_of(folder: Path) -> int:
    with lmdb.open(str(folder), max_dbs=8, readonly=True) as env:
        info = env.open_db(b"info", create=False)
        with env.begin() as txn:
            return int.from_bytes(txn.get(b"format", b"", db=info), "little")


def test_a_kill_leaves_the_store_as_it_was_or_written_anew(
    tmp_path: Path,
    write_earlier_store: Callable[..., list[NewBlock]],
    convert_and_kill: Callable[[str, Path, float], int],
) -> None:
    tail = ROOT
    for tokens in CHAIN:
        tail = chained_key(tail, tokens)
    blocks = write_earlier_store(
        tmp_path / "earlier",
        CIPHER,
        [CHAIN],
        payload_bytes=PAYLOAD_BYTES,
        kept=[Pin("here", tail, 800, "", 1.0, {})],
        said={b"place": SAID},
    )
    former = {block.key for block in blocks}
    chance = random.Random(20261126)  # noqa: S311 - moments, no secrets
    formats = []
    longest_s = 0.3  # as long as it takes here, which the rounds find out
    folder = tmp_path / "kv"
    for _ in range(ROUNDS):
        shutil.copytree(tmp_path / "earlier", folder)
        for _ in range(chance.choice((1, 2))):  # what was killed once may be so again
            ended = convert_and_kill("store", folder, chance.uniform(0, longest_s))
            formats.append((ended, format_of(folder)))
            longest_s *= 1.3 if ended == -signal.SIGKILL else 0.6
        check(folder, blocks, former)
        shutil.rmtree(folder)
    killed = {number for ended, number in formats if ended == -signal.SIGKILL}
    assert 2 in killed, "no process was killed before it was done"


def check(folder: Path, blocks: list[NewBlock], former: set[bytes]) -> None:
    """Check that all is there once it was opened again, and nothing that gives tokens away."""
    store = DiskStore(folder, budget_bytes=64 << 20, sealer=CIPHER)
    ids = [token for tokens in CHAIN for token in tokens]
    entries = store.find(ROOT, ids, block_size=4, inside_block=False).entries
    read: list[bool] = []

    def take(number: int, payload: Buffer) -> None:
        read.append(bytes(payload) == blocks[number].payload)

    assert store.read(Identity("weights", "runtime", "f32"), entries, take) == len(CHAIN)
    assert all(read)
    (pin,) = store.pins()
    assert store.size_of(pin).blocks == len(CHAIN)
    assert store.recall(store.reply_name("weights", "", b"place")) == SAID
    assert list(store.problems()) == []
    store.close()
    # A process killed right after the rename leaves a folder without the file, until the next one.
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock.mdb"]
    assert kept == [folder / "data.mdb"]
    content = (folder / "data.mdb").read_bytes()
    assert not any(name in content for name in former)

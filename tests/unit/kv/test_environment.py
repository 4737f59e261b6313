"""Whatever the folder and the system do, what comes of it is one of our errors, or a store that works."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from recollect import config
from recollect.errors import StoreBusyError, StoreCorruptError, StoreError
from recollect.kv.disk import DiskStore, NewBlock, open_existing
from recollect.kv.record import Identity, chained_key, namespace_key

IDENTITY = Identity("weights", "runtime", "f32")
ROOT = namespace_key("weights", "")
Open = Callable[..., DiskStore]


def block(number: int, payload_bytes: int = 100) -> NewBlock:
    tokens = (number, 1, 2, 3)
    return NewBlock(chained_key(ROOT, tokens), ROOT, True, tokens, bytes(payload_bytes))


def test_a_folder_that_cannot_be_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "kv"):
        with pytest.raises(StoreError, match="RECOLLECT_HOME"):
            DiskStore(folder, budget_bytes=1 << 20)
        with pytest.raises(StoreError, match="RECOLLECT_HOME"):
            open_existing(folder, None)
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_disk_that_does_not_say_how_full_it_is_is_an_error_with_a_remedy(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()

    def unknown(_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", unknown)
    with pytest.raises(StoreError, match="check it"):
        store.write(IDENTITY, [block(1)])
    store.close()


def test_a_file_that_is_gone_is_an_error(open_store: Open) -> None:
    store = open_store()
    (store.folder / "data.mdb").unlink()
    with pytest.raises(StoreError, match="RECOLLECT_HOME"):
        store.env.file_bytes  # noqa: B018 - it raises
    store.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
def test_little_address_space_is_enough(tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from recollect.kv.disk import DiskStore\n"
        "DiskStore(Path(sys.argv[1]), budget_bytes=64 << 20).close()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "kv")], check=True)  # noqa: S603


@pytest.mark.slow
def test_a_larger_store_of_another_process_needs_no_larger_map(
    tmp_path: Path, open_store: Open
) -> None:
    """Its budget is larger than ours: a map that grew under readers would end them."""
    small = open_store(budget_bytes=1 << 20)
    small.write(IDENTITY, [block(0)])
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from recollect.kv.disk import DiskStore, NewBlock\n"
        "from recollect.kv.record import chained_key, namespace_key\n"
        "from recollect.kv.record import Identity\n"
        "root = namespace_key('weights', '')\n"
        "store = DiskStore(Path(sys.argv[1]), budget_bytes=64 << 20)\n"
        "for n in range(1, 50):\n"
        "    tokens = (n, 1, 2, 3)\n"
        "    block = NewBlock(chained_key(root, tokens), root, True, tokens, bytes(100_000))\n"
        "    store.write(Identity('weights', 'runtime', 'f32'), [block])\n"
        "store.close()\n"
    )
    with small.env.reading() as txn:
        before = txn.stat(small.env.tables["entries"])["entries"]
        subprocess.run([sys.executable, "-c", program, str(tmp_path / "kv")], check=True)  # noqa: S603
        assert small.env.file_bytes > 4 << 20
        with small.env.reading() as newer:
            assert newer.stat(small.env.tables["entries"])["entries"] == 50
        assert txn.stat(small.env.tables["entries"])["entries"] == before == 1
    assert small.holdings()[0].blocks == 50
    small.close()


def test_a_map_that_another_process_outgrew_is_said_so(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where the file is as large as its map."""
    store = open_store()

    def outgrown(**_: object) -> None:
        raise lmdb.MapResizedError("mdb_txn_begin: MDB_MAP_RESIZED")

    monkeypatch.setattr(store.env, "begin", outgrown)
    with pytest.raises(StoreBusyError, match="--kv-disk"):
        store.find(ROOT, [1, 2, 3, 4], block_size=4, inside_block=True)
    store.close()


@pytest.mark.parametrize(
    ("error", "is_damaged"), [(lmdb.CorruptedError, True), (lmdb.PanicError, False)]
)
def test_only_a_file_that_is_damaged_is_put_aside_by_the_next_start(
    open_store: Open, monkeypatch: pytest.MonkeyPatch, error: type[Exception], is_damaged: bool
) -> None:
    store = open_store()
    store.write(IDENTITY, [block(1)])

    def fail(**_: object) -> None:
        raise error("mdb_txn_begin: as if")

    with monkeypatch.context() as failing:
        failing.setattr(store.env, "begin", fail)
        with pytest.raises(StoreCorruptError, match="next start"):
            store.evict(1)
    store.close()
    store = open_store()
    assert len(store.holdings()) == (0 if is_damaged else 1)
    store.close()


def test_a_file_that_was_found_damaged_is_not_touched_any_more(open_store: Open) -> None:
    """LMDB would follow what is in it, for the writer also where only a reader has seen it."""
    env = open_store().env
    with pytest.raises(StoreCorruptError, match="is damaged"), env.reading():
        raise lmdb.CorruptedError("as after a page that is not what it should be")
    entered = []
    for begin in (env.writing, env.reading):
        with pytest.raises(StoreCorruptError, match="is damaged"), begin() as transaction:
            entered.append(transaction)
    assert entered == []


@pytest.mark.slow
def test_values_of_any_size_leave_the_file_near_its_budget(open_store: Open) -> None:
    """Free pages may not lie in a row; then less is kept, and the file stops growing."""
    budget = 4 << 20
    store = open_store(budget_bytes=budget)
    sizes = [3000 + 7919 * number % 200_000 for number in range(400)]
    for number, size in enumerate(sizes):
        store.write(IDENTITY, [block(number, size)])
    assert store.env.file_bytes <= budget * 1.25
    assert list(store.problems()) == []
    assert store.holdings()[0].stored_bytes >= budget / 4
    store.close()


def test_what_a_full_disk_has_can_be_read_without_room_for_more(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.write(IDENTITY, [block(1)])
    store.close()
    monkeypatch.setattr(config, "default_kv_disk_bytes", lambda _: 0)
    store = open_existing(store.folder, None)
    assert len(store.find(ROOT, (1, 1, 2, 3), block_size=4, inside_block=True).entries) == 1
    store.close()

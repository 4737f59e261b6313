"""Space on disk is given back where nobody has the store open, and nothing is lost of it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.environment import shrink
from recollect.kv.record import Identity, chained_key, namespace_key

IDENTITY = Identity("weights", "runtime", "f32")
ROOT = namespace_key("weights", "")

OPEN = """
import sys, time
from pathlib import Path
from recollect.kv.disk import DiskStore
store = DiskStore(Path(sys.argv[1]), budget_bytes=64 << 20)
print("open", flush=True)
sys.stdin.read()
"""


def fill(store: DiskStore, blocks: int, payload_bytes: int = 10_000) -> None:
    for number in range(blocks):
        tokens = (number, 1, 2, 3)
        block = NewBlock(chained_key(ROOT, tokens), ROOT, True, tokens, bytes(payload_bytes))
        store.write(IDENTITY, [block])


@pytest.fixture(scope="module", params=[200, 201])
def emptied(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """
    Return the folder of a store that was filled and emptied but for two blocks, to be copied.

    After an even and an odd number of transactions: LMDB keeps the state in two places in turn.
    """
    store = DiskStore(tmp_path_factory.mktemp("emptied") / "kv", budget_bytes=64 << 20)
    fill(store, request.param)
    keys = sorted(chained_key(ROOT, (number, 1, 2, 3)) for number in range(request.param))
    store.remove(keys[2:])
    store.close()
    return store.folder


@pytest.fixture
def folder(emptied: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, which `open_store` opens."""
    return shutil.copytree(emptied, tmp_path / "kv")


@pytest.mark.slow
def test_the_file_is_as_small_as_what_is_in_it(
    folder: Path, open_store: Callable[..., DiskStore]
) -> None:
    before = (folder / "data.mdb").stat().st_size
    given_back = shrink(folder)
    after = (folder / "data.mdb").stat().st_size
    assert given_back == before - after > 1_000_000
    assert after < 200_000
    assert sorted(path.name for path in folder.iterdir()) == ["data.mdb", "lock.mdb"]
    assert (folder / "data.mdb").stat().st_mode & 0o077 == 0
    store = open_store()
    assert list(store.problems()) == []
    assert store.holdings()[0].blocks == 2
    fill(store, 5)
    assert list(store.problems()) == []
    store.close()


def test_what_this_process_has_open_is_left_alone(
    folder: Path, open_store: Callable[..., DiskStore]
) -> None:
    before = (folder / "data.mdb").stat()
    store = open_store()
    assert shrink(folder) is None
    store.close()
    assert (folder / "data.mdb").stat().st_ino == before.st_ino


@pytest.mark.slow
def test_what_another_process_has_open_is_left_alone(
    folder: Path, open_store: Callable[..., DiskStore]
) -> None:
    with subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", OPEN, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        assert shrink(folder) is None
        store = open_store()  # still works beside it
        fill(store, 3)
        store.close()
        assert shrink(folder) is None
        child.communicate("")
    assert (shrink(folder) or 0) > 0


@pytest.mark.slow
def test_whoever_opens_it_meanwhile_waits_and_finds_it_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, open_store: Callable[..., DiskStore]
) -> None:
    """A process that opens the store while it is copied comes second, and loses nothing it writes."""
    children: list[subprocess.Popen[str]] = []
    script = OPEN.replace(
        'print("open", flush=True)',
        "from recollect.kv.record import Identity\n"
        "from recollect.kv.disk import NewBlock\n"
        "from recollect.kv.record import chained_key, namespace_key\n"
        "root = namespace_key('weights', '')\n"
        "key = chained_key(root, (9, 9))\n"
        "block = NewBlock(key, root, True, (9, 9), b'late')\n"
        "store.write(Identity('weights', 'runtime', 'f32'), [block])\n"
        "store.close()",
    ).replace("import sys, time", "print('started', flush=True)\nimport sys, time")
    copy2 = Path.replace

    def slow(self: Path, target: Path) -> Path:
        child = subprocess.Popen(  # noqa: S603 - our own code
            [sys.executable, "-c", script, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(2)  # it waits for the lock
        return copy2(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    assert (shrink(folder) or 0) > 0
    (child,) = children
    assert child.wait(120) == 0
    assert child.stdout is not None
    child.stdout.close()
    store = open_store()
    assert store.holdings()[0].blocks == 3
    assert list(store.problems()) == []
    store.close()

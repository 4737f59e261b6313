"""A damaged file takes no process away, and a sound one is never taken for damaged."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.errors import StoreCorruptError
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.pages import DamagedPagesError, walk
from recollect.kv.record import Identity, chained_key, namespace_key

PROGRAM = Path(__file__).with_name("damaged_stores.py")
IDENTITY = Identity("weights", "runtime", "f32")
ROOT = namespace_key("weights", "")
PAGE = 4096
Open = Callable[..., DiskStore]

WRITER = """
import itertools, sys
from pathlib import Path
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.record import chained_key, namespace_key
from recollect.kv.record import Identity
root = namespace_key("weights", "")
store = DiskStore(Path(sys.argv[1]), budget_bytes=4 << 20)
for number in itertools.count():
    tokens = (number, 1, 2, 3)
    block = NewBlock(chained_key(root, tokens), root, True, tokens, bytes(9000))
    store.write(Identity("weights", "runtime", "f32"), [block])
    if number % 7 == 3:
        store.remove([block.key])
    print(number, flush=True)
"""


def fill(store: DiskStore, count: int, payload_bytes: int = 9000) -> None:
    for first in range(0, count, 100):
        blocks = []
        for number in range(first, min(count, first + 100)):
            tokens = (number, 1, 2, 3)
            payload = bytes(payload_bytes)
            blocks.append(NewBlock(chained_key(ROOT, tokens), ROOT, True, tokens, payload))
        store.write(IDENTITY, blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 10), *(pytest.param(n, 40, marks=pytest.mark.slow) for n in (10, 40, 80))],
)
def test_no_damage_takes_the_process_away(tmp_path: Path, first: int, count: int) -> None:
    """Without a look at the pages, one damage in nine of these ended it with a signal."""
    program = (
        "import sys, runpy; "
        f"module = runpy.run_path({str(PROGRAM)!r}); "
        "from pathlib import Path; module['make_sound'](Path(sys.argv[1]) / 'sound')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)  # noqa: S603
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, str(PROGRAM), str(tmp_path), str(first), str(first + count)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout.split()[-1:], done.stderr[-2000:])


def test_a_damaged_file_is_put_aside_with_one_warning(
    open_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    fill(store, 200)
    store.close()
    data = store.folder / "data.mdb"
    content = bytearray(data.read_bytes())
    os.truncate(data, len(content) // 2)
    with caplog.at_level(logging.WARNING, logger="recollect"):
        store = open_store()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    fill(store, 3)
    assert store.holdings()[0].blocks == 3
    store.close()
    (kept,) = store.folder.parent.glob("kv.damaged-*")
    assert (kept / "data.mdb").stat().st_size == len(content) // 2
    with caplog.at_level(logging.WARNING, logger="recollect"):
        open_store().close()
    assert len(caplog.records) == 1


def test_a_damaged_head_of_a_value_is_found_before_anything_is_written(
    open_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """LMDB follows it where it removes the value; so the next start puts the store aside."""
    store = open_store()
    fill(store, 20)
    store.close()
    data = store.folder / "data.mdb"
    content = bytearray(data.read_bytes())
    heads = [at for at in range(0, len(content), PAGE) if content[at + 10 : at + 12] == b"\4\0"]
    content[heads[0] + 12] ^= 1
    data.write_bytes(content)
    store = open_store()
    assert store.holdings()[0].blocks == 20, "it can be read all the same"
    with pytest.raises(StoreCorruptError, match="damaged"):
        store.evict(1)
    store.close()
    with caplog.at_level(logging.WARNING, logger="recollect"):
        store = open_store()
    assert len(caplog.records) == 1
    assert store.holdings() == []
    store.close()


@pytest.mark.slow
def test_a_store_in_use_by_others_is_sound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kv"
    with subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with caplog.at_level(logging.WARNING, logger="recollect"):
            for _ in range(40):
                DiskStore(folder, budget_bytes=4 << 20).close()
        writer.kill()
    assert caplog.records == []
    assert list(tmp_path.glob("kv.damaged-*")) == []


@pytest.mark.slow
def test_kill_9_at_any_time_leaves_a_sound_store(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    first = {chained_key(ROOT, (0, 1, 2, 3))}
    for number in range(6):
        with subprocess.Popen(  # noqa: S603 - our own code
            [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.01 * number)  # at another moment of a write each time
            writer.send_signal(signal.SIGKILL)
        store = DiskStore(folder, budget_bytes=4 << 20)
        assert list(store.problems()) == []
        assert store.has_blocks(first), "what was reported as written is there"
        assert store.remove(first) == 1
        store.close()
    assert list(tmp_path.glob("kv.damaged-*")) == []


@pytest.mark.few(1)
@pytest.mark.parametrize("payload_bytes", [10, 9000])
def test_a_large_store_with_many_free_pages_is_sound(open_store: Open, payload_bytes: int) -> None:
    store = open_store(budget_bytes=256 << 20)
    fill(store, 3000, payload_bytes)
    for first in (0, 1500, 500):
        keys = [chained_key(ROOT, (n, 1, 2, 3)) for n in range(first, first + 400)]
        store.remove(keys)
        fill(store, first + 100, payload_bytes)
        with store.env.reading() as txn:
            assert walk(store.folder / "data.mdb", txn.id(), values=True)
    store.close()


def test_a_page_that_is_used_twice_or_is_free_and_used_is_damage(open_store: Open) -> None:
    store = open_store()
    fill(store, 50)
    with store.env.reading() as txn:
        number = txn.id()
    data = store.folder / "data.mdb"
    content = bytearray(data.read_bytes())
    branches = [at for at in range(0, len(content), PAGE) if content[at + 10 : at + 12] == b"\1\0"]
    first = int.from_bytes(content[branches[-1] + 16 : branches[-1] + 18], "little")
    second = int.from_bytes(content[branches[-1] + 18 : branches[-1] + 20], "little")
    at = branches[-1]
    content[at + first : at + first + 4] = content[at + second : at + second + 4]
    store.close()
    data.write_bytes(content)
    with pytest.raises(DamagedPagesError, match="used twice"):
        walk(data, number)

"""`recollect cache` shows, checks and clears what is on disk, and loads no model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from recollect.cli.main import app
from recollect.conversation.model import Model
from recollect.errors import ConfigError, StoreError
from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.record import Identity, chained_key
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
OpenStore = Callable[[], DiskStore]


class Keyed:
    """Seals nothing that could be read without it."""

    name_secret = b"x" * 32

    def seal(self, plain: bytes | memoryview, *, context: bytes) -> bytes:
        return bytes(byte ^ 0x55 for byte in bytes(plain))

    def open(self, sealed: bytes | memoryview, *, context: bytes) -> bytes:
        return self.seal(sealed, context=context)


def invoke(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, ["cache", *arguments], input=typed, catch_exceptions=False)


def run(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def kept(make_model: Callable[..., Model], open_home_store: OpenStore) -> None:
    """Have a conversation with a checkpoint and a warm text on disk, and no model any more."""
    model = make_model(store=open_home_store())
    session = model.session(name="poem", params=SHORT)
    session.respond("one")
    session.checkpoint("here")
    session.respond("two, which goes on for a while")
    model.warm("a text that is long enough for a few blocks", name="text")
    model.close()


def damage(store: DiskStore) -> bytes:
    """Change a bit in a block that nothing follows; return its key."""
    with store.env.writing() as txn:
        blocks = store.env.tables["blocks"]
        followed = {bytes(parent) for parent, _ in txn.cursor(store.env.tables["siblings"])}
        key = next(bytes(key) for key, _ in txn.cursor(blocks) if bytes(key) not in followed)
        value = bytearray(txn.get(key, db=blocks))
        value[-1] ^= 1
        txn.put(key, value, db=blocks)
    return key


@pytest.mark.parametrize("command", ["ls", "stats", "verify", "clear"])
def test_where_nothing_is_kept_that_is_said_and_nothing_is_made(home: Path, command: str) -> None:
    assert "`recollect chat`" in run(command)
    assert not home.exists()


def test_without_anything_kept_json_is_empty(home: Path) -> None:
    assert json.loads(run("--json")) == {"kept": [], "pins": []}
    assert json.loads(run("stats", "--json")) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
def test_the_list_shows_models_and_pins() -> None:
    shown = json.loads(run("ls", "--json"))
    (kept,) = shown["kept"]
    assert (kept["model"], kept["runtime"]) == ("reference", "reference-1")
    assert kept["tokens"] > 0
    names = [(pin["name"], pin["kind"], pin["model"]) for pin in shown["pins"]]
    assert names == [("here", "checkpoint", "reference"), ("text", "warm", "reference")]
    lines = run().splitlines()
    assert any(line.split()[:2] == ["reference", "reference-1"] for line in lines)
    assert any(line.split()[:3] == ["here", "checkpoint", "reference"] for line in lines)


@pytest.mark.slow
def test_stats_count_what_was_restored(
    kept: None, make_model: Callable[..., Model], open_home_store: OpenStore
) -> None:
    model = make_model(store=open_home_store())
    usage = model.resume("poem", params=SHORT).respond("three").usage
    assert usage.restored_tokens > 0
    model.close()
    values = json.loads(run("stats", "--json"))
    assert values["restored_tokens"] == usage.restored_tokens
    assert values["stored_bytes"] >= values["pinned_bytes"] > 0
    assert values["file_bytes"] > 0
    assert f"{usage.restored_tokens:,} tokens instead of computing" in run("stats")


@pytest.mark.slow
def test_verify_finds_what_is_damaged_and_repair_removes_it(
    kept: None, open_home_store: OpenStore
) -> None:
    assert run("verify").startswith("All of ")
    store = open_home_store()
    key = damage(store)
    store.close()
    result = invoke("verify")
    assert result.exit_code == 1
    assert f"block {key.hex()[:16]}: is not as it was written (checksum)" in result.output
    assert "1 of " in result.output
    assert "1 block was deleted" in run("verify", "--repair")
    assert run("verify").startswith("All of ")


@pytest.mark.slow
def test_repair_takes_what_follows_a_damaged_block_of_64000_tokens(
    open_home_store: OpenStore,
) -> None:
    store, parent, keys = open_home_store(), b"r" * 32, list[bytes]()
    blocks = []
    for number in range(2000):
        tokens = (number, *range(31))
        keys.append(chained_key(parent, tokens))
        blocks.append(NewBlock(keys[-1], parent, number == 0, tokens, b"payload"))
        parent = keys[-1]
    store.write(Identity("weights", "runtime", "f32"), blocks)
    with store.env.writing() as txn:
        txn.put(keys[2], b"damaged", db=store.env.tables["blocks"])
    store.close()
    assert invoke("verify").exit_code == 1
    assert "1,998 blocks were deleted" in run("verify", "--repair")
    assert run("verify") == "All of 2 blocks are as they were written.\n"


@pytest.mark.slow
def test_repair_puts_accounts_and_edges_right(kept: None, open_home_store: OpenStore) -> None:
    store = open_home_store()
    with store.env.writing() as txn:
        txn.put(b"bytes", (7).to_bytes(8, "little"), db=store.env.tables["info"])
        txn.put(b"p" * 32, b"c" * 32, db=store.env.tables["siblings"])
        txn.put(b"b" * 32, b"nobody knows it", db=store.env.tables["blocks"])
    before = len(list(store.problems()))
    store.close()
    assert before == 3
    assert invoke("verify").exit_code == 1
    run("verify", "--repair")
    assert run("verify").startswith("All of ")


def test_what_is_encrypted_is_not_called_damaged(home: Path) -> None:
    store = DiskStore(home / "kv", budget_bytes=64 << 20, sealer=Keyed())
    root = b"r" * 32
    block = NewBlock(chained_key(root, (1, 2)), root, True, (1, 2), b"payload")
    store.write(Identity("weights", "runtime", "f32"), [block])
    store.close()
    said = run("verify", "--repair")
    assert "1 block is encrypted and could not be checked." in said
    assert json.loads(run("--json"))["kept"][0]["blocks"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
def test_clear_leaves_what_is_pinned_and_gives_the_space_back(home: Path) -> None:
    before = (home / "kv" / "data.mdb").stat().st_size
    pinned = json.loads(run("stats", "--json"))["pinned_bytes"]
    said = run("clear", "--yes")
    assert "were given back to the disk" in said
    values = json.loads(run("stats", "--json"))
    assert values["stored_bytes"] == values["pinned_bytes"] == pinned
    assert (home / "kv" / "data.mdb").stat().st_size < before
    run("clear", "--yes", "--pinned")
    shown = json.loads(run("--json"))
    assert shown["pins"] == []
    assert shown["kept"][0]["blocks"] == 0


@pytest.mark.usefixtures("kept")
def test_clear_asks_and_takes_silence_for_no() -> None:
    with pytest.raises(ConfigError, match="--yes"):
        invoke("clear")
    assert json.loads(run("--json"))["kept"][0]["blocks"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
def test_evict_gives_up_what_was_asked_for() -> None:
    before = json.loads(run("stats", "--json"))["stored_bytes"]
    run("evict", "5kB")
    left = json.loads(run("stats", "--json"))
    assert 5000 <= before - left["stored_bytes"] < 10_000
    with pytest.raises(ConfigError):
        invoke("evict", "much")


@pytest.mark.usefixtures("kept")
def test_unpin_lets_go_by_name() -> None:
    run("unpin", "text")
    assert [pin["name"] for pin in json.loads(run("--json"))["pins"]] == ["here"]
    with pytest.raises(StoreError, match="lists"):
        invoke("unpin", "text")


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
def test_what_another_process_has_open_is_cleared_and_not_shortened(home: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from recollect.kv.disk import DiskStore\n"
        "store = DiskStore(Path(sys.argv[1]), budget_bytes=64 << 20)\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", script, str(home / "kv")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        assert "Another process has the file open" in run("clear", "--yes", "--pinned")
        child.communicate("")
    assert json.loads(run("--json"))["kept"][0]["blocks"] == 0
    assert "given back to the disk" in run("clear", "--yes")


@pytest.mark.slow
def test_a_store_that_is_damaged_inside_is_removed(
    kept: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        from recollect.errors import StoreCorruptError

        raise StoreCorruptError("It is damaged.")

    monkeypatch.setattr(DiskStore, "clear", fail)
    assert "was damaged; it was deleted" in run("clear", "--yes")
    assert not (home / "kv" / "data.mdb").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
def test_clear_removes_damaged_stores_that_were_put_aside(home: Path) -> None:
    aside = home / "kv.damaged-20260101T000000000000"
    shutil.copytree(home / "kv", aside)
    said = run("clear", "--yes")
    assert "1 damaged store that had been put aside was deleted." in said
    assert not aside.exists()
    shutil.move(home / "kv", aside)
    assert "1 damaged store" in run("clear", "--yes")
    assert list(home.glob("kv*")) == []


def test_clear_leaves_nothing_of_a_store_that_is_found_damaged_only_then(
    home: Path, open_home_store: OpenStore
) -> None:
    open_home_store().close()
    (home / "kv" / "data.mdb").write_bytes(b"what was said" * 1000)
    run("clear", "--yes")
    assert not [f for f in home.rglob("*") if f.is_file() and b"what was said" in f.read_bytes()]

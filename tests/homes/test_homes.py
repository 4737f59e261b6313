"""
Homes of earlier versions: each is opened, and no turn of it is lost; newer ones are refused.

`make_home.py` made them, each with the program of its day, and what that program said is beside it.
"""

import json
import shutil
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import pytest
from starlette.testclient import TestClient

import recollect
from recollect import encryption
from recollect.cli.main import run as run_command_line
from recollect.journal.journal import JOURNAL_NAME
from recollect.kv.disk import STORE_FOLDER
from recollect.server.access import KeyFile, keyring
from recollect.server.app import create_app
from recollect.server.hub import ModelHub
from recollect.server.settings import Settings
from recollect.types import SamplingParams

ARCHIVES = sorted(Path(__file__).parent.glob("*.tar.xz"))
SHORT = SamplingParams(max_tokens=12, ignore_eos=True)


@dataclass(frozen=True)
class OldHome:
    """A home of an earlier version, unpacked, and what was said in it."""

    folder: Path
    said: dict[str, Any]


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OldHome:
    archive: Path = request.param
    folder = tmp_path / "old"
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    said = json.loads(
        archive.with_name(archive.name.replace(".tar.xz", ".json")).read_text("utf-8")
    )
    monkeypatch.setenv("RECOLLECT_HOME", str(folder))
    monkeypatch.delenv(encryption.PASSPHRASE_VARIABLE, raising=False)
    if encryption.is_encrypted(folder):
        monkeypatch.setenv(encryption.PASSPHRASE_VARIABLE, "correct horse")
    return OldHome(folder, said)


@pytest.fixture
def client(old: OldHome) -> Iterator[TestClient]:
    """Return a client of a server on that home, with the key that was made in it."""
    cipher = encryption.unlock(old.folder)
    hub = ModelHub(lambda name: recollect.load(name, home=old.folder), ("reference",))
    settings = Settings(home=old.folder, cipher=cipher, models=("reference",), has_keys=True)
    app = create_app(settings, hub, keyring(KeyFile.in_home(old.folder), ()))
    headers = {"Authorization": f"Bearer {old.said['server']['key']}"}
    with TestClient(app, base_url="http://127.0.0.1/v1", headers=headers) as client:
        yield client


def test_there_are_homes_to_open() -> None:
    assert {path.name.split("-")[-1] for path in ARCHIVES} == {"plain.tar.xz", "encrypted.tar.xz"}


def test_every_turn_of_every_branch_is_there(old: OldHome) -> None:
    with recollect.load("reference", home=old.folder) as model:
        for branch in old.said["branches"]:
            session = model.resume(branch["conversation"], tip=branch["tip"])
            shown = [
                {
                    "role": node.role,
                    "content": node.content,
                    "token_ids": None if node.token_ids is None else list(node.token_ids),
                }
                for node in session.path()
            ]
            assert shown == branch["path"]
        assert model.journal.check() == []


def test_a_turn_goes_on_as_if_nothing_had_ever_been_kept(old: OldHome) -> None:
    copy = old.folder.with_name("copy")
    shutil.copytree(old.folder, copy)
    replies = []
    for home, kv_disk in ((old.folder, 8 << 20), (copy, 0)):
        with recollect.load("reference", home=home, kv_disk=kv_disk) as model:
            for tip in ("main", "idea"):
                reply = model.resume("plans", tip=tip).respond("And then?", params=SHORT)
                replies.append((tip, reply.node.token_ids))
    assert replies[:2] == replies[2:]


def test_checkpoints_and_warm_texts_are_there_with_their_kv(old: OldHome) -> None:
    with recollect.load("reference", home=old.folder, kv_disk=8 << 20) as model:
        (checkpoint,) = [kept for kept in model.checkpoints() if kept.name == "before the tickets"]
        assert checkpoint.conversation == "plans"
        session = model.resume(checkpoint="before the tickets")
        assert [node.content for node in session.path()][-2] == "And how — by train? 列車で"
        again = session.respond("Buy the tickets.", params=SHORT)
        assert again.node.token_ids == tuple(old.said["branches"][0]["path"][-1]["token_ids"])
        assert again.usage.computed_tokens < 60
    # In a process that has measured nothing yet: where computing is faster than reading, as it may be
    # on the reference model, only a block is read.
    with recollect.load("reference", home=old.folder, kv_disk=8 << 20) as model:
        text = "A text that everybody asks about. " * 4
        about = model.session().respond(f"{text}What is it?", params=SHORT)
        assert about.usage.reused_tokens > 128


@pytest.mark.parametrize(
    "old", [path for path in ARCHIVES if "encrypted" in path.name], indirect=True
)
def test_names_that_give_tokens_away_are_gone_once_a_model_was_loaded(old: OldHome) -> None:
    data = old.folder / STORE_FOLDER / "data.mdb"
    with lmdb.open(str(data.parent), max_dbs=8, readonly=True, lock=False) as env:
        entries, pins = (env.open_db(name, create=False) for name in (b"entries", b"pins"))
        with env.begin() as txn:
            former = {key for key, _ in txn.cursor(entries)}
            former |= {value[1:33] for _, value in txn.cursor(pins)}
    assert len(former) > 20
    recollect.load("reference", home=old.folder, kv_disk=8 << 20).close()
    content = data.read_bytes()
    assert not any(name in content for name in former)


def test_what_a_client_kept_is_there(old: OldHome, client: TestClient) -> None:
    kept = old.said["server"]
    items = client.get(f"/conversations/{kept['conversation']}/items", params={"order": "asc"})
    assert [item["id"] for item in items.json()["data"]] == kept["items"]
    texts = [
        client.get(f"/responses/{name}").json()["output"][0]["content"][0]["text"]
        for name in kept["responses"]
    ]
    assert texts == kept["texts"]
    rewind = f"/conversations/{kept['conversation']}/rewind"
    assert client.post(rewind, json={"checkpoint": "here"}).is_success


def test_a_chat_that_only_its_client_kept_is_warm(old: OldHome, client: TestClient) -> None:
    messages = [*old.said["server"]["chat"], {"role": "user", "content": "Go on."}]
    body = {"model": "reference", "messages": messages, "max_tokens": 4}
    usage = client.post("/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 64


@pytest.fixture
def refused(
    old: OldHome, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """Return what runs a command on that home, checks that it is refused, and returns the sentence."""

    def run() -> str:
        monkeypatch.setattr("sys.argv", ["recollect", "conversations", "list"])
        with pytest.raises(SystemExit) as ended:
            run_command_line()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("recollect: ")
        assert said.count("\n") == 1
        return said

    return run


def test_a_newer_journal_is_refused_in_one_sentence(
    old: OldHome, refused: Callable[[], str]
) -> None:
    journal = old.folder / JOURNAL_NAME
    with closing(sqlite3.connect(journal)) as connection:
        newest = connection.execute("PRAGMA user_version").fetchone()[0]
        connection.execute(f"PRAGMA user_version = {newest + 1000}")
        connection.commit()
    before = journal.read_bytes()
    assert "take a newer recollect" in refused()
    assert journal.read_bytes() == before


@pytest.mark.parametrize("old", ARCHIVES[:1], indirect=True)
def test_a_home_encrypted_by_a_newer_version_is_refused_in_one_sentence(
    old: OldHome, refused: Callable[[], str]
) -> None:
    path = old.folder / encryption.KEY_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1000}))
    assert "take a newer recollect" in refused()

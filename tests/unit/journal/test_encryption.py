"""Encrypting a folder leaves nothing in it that can be read, and nothing is lost but caches."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

import recollect
from recollect import config, encryption
from recollect.encryption import Cipher
from recollect.errors import ConfigError, StoreError
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.kv.disk import STORE_FOLDER, open_existing
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
SAID = "Where is the treasure buried?"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much work a passphrase is does not matter here."""
    monkeypatch.setattr(encryption, "Scrypt", partial(encryption.Scrypt, n=2))
    monkeypatch.delenv(encryption.PASSPHRASE_VARIABLE, raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder with a conversation, KV that is pinned, and a history of what was typed."""
    home = tmp_path / "home"
    with recollect.load("reference", home=home) as model:
        session = model.session(name="secret plan")
        session.respond(SAID, params=SHORT)
        session.checkpoint("before the plan")
        model.warm("A text that is long enough to be kept.", name="plan of the oak")
        session.respond("And then?", params=SHORT)
    (home / config.HISTORY_NAME).write_text(f"+{SAID}\n")
    (home / "models").mkdir()
    (home / "models" / "weights").write_text("public")
    return home


def readable(home: Path) -> Iterator[str]:
    """Yield the names of the files in which what was said can be read, as text or as token ids."""
    # A byte is a token here, and ids are kept as int32.
    words = (
        SAID.encode(),
        b"plan",
        b"checkpoint",
        b"".join(bytes([byte, 0, 0, 0]) for byte in b"treasure"),
    )
    for file in home.rglob("*"):
        if file.is_file() and any(word in file.read_bytes() for word in words):
            yield file.name


@pytest.mark.slow
def test_encrypting_leaves_nothing_to_read_and_everything_to_resume(home: Path) -> None:
    assert sorted(readable(home)) == [JOURNAL_NAME, "data.mdb", config.HISTORY_NAME]
    cipher = recollect.encrypt(home, passphrase="open sesame")
    assert list(readable(home)) == []
    assert sorted(file.name for file in home.iterdir()) == [
        JOURNAL_NAME,
        encryption.KEY_FILE,
        STORE_FOLDER,
        "models",
    ]
    assert (home / "models" / "weights").read_text() == "public"
    with recollect.load("reference", home=home, cipher=cipher) as model:
        session = model.resume("secret plan")
        assert next(message["content"] for message in session.transcript()) == SAID
        session.respond("And what is in it?")
        other = model.session(name="another plan")
        other.respond(SAID)
        other.checkpoint("another plan")
        model.warm("A text that is long enough to be kept.", name="plan of the oak")
        names = [made.name for made in model.checkpoints()]
        assert names == ["another plan", "before the plan"]
        assert model.journal.check() == []
    assert list(readable(home)) == []


@pytest.mark.slow
def test_checkpoints_stay_as_places_and_warm_texts_go(home: Path) -> None:
    cipher = recollect.encrypt(home, passphrase="open sesame")
    with recollect.load("reference", home=home, cipher=cipher) as model:
        (made,) = model.checkpoints()
        assert (made.name, made.conversation, made.stored_tokens) == (
            "before the plan",
            "secret plan",
            0,
        )
        back = model.resume(checkpoint="before the plan")
        assert [node.content for node in back.path() if node.role == "user"] == [SAID]
        model.drop_checkpoint("before the plan")
        assert back.checkpoint("before the plan").stored_tokens == made.tokens
    again = recollect.encrypt(home, passphrase="open sesame")
    with recollect.load("reference", home=home, cipher=again) as model:
        assert [made.name for made in model.checkpoints()] == ["before the plan"]


@pytest.mark.slow
def test_the_places_that_stay_do_not_name_what_was_plain(home: Path) -> None:
    """With the plain name of a place whoever has the file could check all that was said up to it."""
    with closing(open_existing(home / STORE_FOLDER, None)) as store:
        tails = [pin.tail for pin in store.pins()]
    assert len(tails) == 2
    recollect.encrypt(home, passphrase="open sesame")
    content = (home / STORE_FOLDER / "data.mdb").read_bytes()
    assert not any(tail in content or tail.hex().encode() in content for tail in tails)


@pytest.mark.slow
def test_stores_that_were_put_aside_go_too(home: Path) -> None:
    shutil.copytree(home / STORE_FOLDER, home / f"{STORE_FOLDER}.damaged-20260101T000000")
    (home / STORE_FOLDER / "data.mdb").write_bytes(b"something else" * 1000)
    recollect.encrypt(home, passphrase="open sesame")
    assert list(readable(home)) == []
    assert list(home.glob("*damaged*")) == []
    assert not (home / STORE_FOLDER).exists()


@pytest.mark.slow
def test_the_environment_unlocks_a_folder_for_the_library(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recollect.encrypt(home, passphrase="open sesame")
    with pytest.raises(ConfigError, match="is encrypted"):
        recollect.load("reference", home=home)
    monkeypatch.setenv(encryption.PASSPHRASE_VARIABLE, "open sesame")
    with recollect.load("reference", home=home) as model:
        assert [info.name for info in model.sessions()] == ["secret plan"]


@pytest.mark.slow
def test_a_cipher_of_another_folder_is_refused(home: Path, tmp_path: Path) -> None:
    other = recollect.encrypt(tmp_path / "other", passphrase="open sesame")
    with pytest.raises(ConfigError, match="not encrypted"):
        recollect.load("reference", home=home, cipher=other)
    recollect.encrypt(home, passphrase="open sesame")
    with pytest.raises(ConfigError, match="another key"):
        recollect.load("reference", home=home, cipher=other)
    assert recollect.unlock(home, passphrase="open sesame") is not None


def test_what_is_refused_changes_nothing(home: Path) -> None:
    before = {file: file.read_bytes() for file in home.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="no passphrase"):
        recollect.encrypt(home)
    assert {file: file.read_bytes() for file in home.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_encrypting_again_needs_the_same_passphrase(home: Path) -> None:
    cipher = recollect.encrypt(home, passphrase="open sesame")
    again = recollect.encrypt(home, passphrase="open sesame")
    assert again.name_secret == cipher.name_secret
    with pytest.raises(ConfigError, match="not the passphrase"):
        recollect.encrypt(home, passphrase="wrong")


@pytest.mark.slow
def test_what_broke_off_is_finished_by_encrypting_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the worst moment: the folder says that it is encrypted, and its journal is not yet."""

    opened = Journal.open

    def die(path: Path, *, cipher: Cipher | None = None, convert: bool = False) -> Journal:
        if convert:
            raise KeyboardInterrupt
        return opened(path, cipher=cipher)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "open", die)
        with pytest.raises(KeyboardInterrupt):
            recollect.encrypt(home, passphrase="open sesame")
    assert list(readable(home)) == [JOURNAL_NAME]
    cipher = recollect.unlock(home, passphrase="open sesame")
    with pytest.raises(ConfigError, match="`recollect encrypt` converts it"):
        Journal.open(home / JOURNAL_NAME, cipher=cipher)
    recollect.encrypt(home, passphrase="open sesame")
    with Journal.open(home / JOURNAL_NAME, cipher=cipher) as journal:
        assert list(readable(home)) == []
        assert [info.name for info in journal.conversations()] == ["secret plan"]


def test_a_cache_that_cannot_be_deleted_is_told_before_anything_is_encrypted(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(StoreError, match="delete it"):
        recollect.encrypt(home, passphrase="open sesame")
    assert not encryption.is_encrypted(home)
    with Journal.open(home / JOURNAL_NAME) as journal:
        assert [info.name for info in journal.conversations()] == ["secret plan"]


@pytest.mark.slow
def test_a_new_folder_is_encrypted_from_its_first_turn(tmp_path: Path) -> None:
    cipher = recollect.encrypt(tmp_path / "new", passphrase="open sesame")
    with recollect.load("reference", home=tmp_path / "new", cipher=cipher) as model:
        model.session(name="secret plan").respond(SAID)
        assert list(readable(tmp_path / "new")) == []


def test_kv_comes_back_from_an_encrypted_disk_and_not_with_another_key(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    recollect.encrypt(one, passphrase="open sesame")
    recollect.encrypt(other, passphrase="open sesame")  # with a salt of its own

    def restored_tokens(home: Path) -> int:
        cipher = recollect.unlock(home, passphrase="open sesame")
        with recollect.load("reference", home=home, cipher=cipher) as model:
            return model.session().respond(SAID * 5, params=SHORT).usage.restored_tokens

    assert restored_tokens(one) == 0
    assert restored_tokens(one) > 100
    shutil.copytree(one / STORE_FOLDER, other / STORE_FOLDER)
    assert restored_tokens(other) == 0
    assert list(readable(tmp_path)) == []


@pytest.mark.slow
def test_encrypting_again_removes_what_an_open_chat_or_a_damaged_store_has_left(
    home: Path,
) -> None:
    recollect.encrypt(home, passphrase="open sesame")
    (home / config.HISTORY_NAME).write_text(f"+{SAID}\n")
    (home / f"{config.HISTORY_NAME}.new-0123").write_text(f"+{SAID}\n")
    aside = home / f"{STORE_FOLDER}.damaged-20260101T000000"
    aside.mkdir()
    (aside / "data.mdb").write_text(SAID)
    recollect.encrypt(home, passphrase="open sesame")
    assert list(readable(home)) == []
    assert not aside.exists()


@pytest.mark.slow
def test_without_the_file_that_names_the_key_the_remedy_is_that_file(home: Path) -> None:
    recollect.encrypt(home, passphrase="open sesame")
    copy = (home / encryption.KEY_FILE).read_bytes()
    (home / encryption.KEY_FILE).unlink()
    told = r"encryption\.json is missing.*put that file back from a copy"
    with pytest.raises(ConfigError, match=told):
        Journal.open(home / JOURNAL_NAME)
    stored = (home / STORE_FOLDER / "data.mdb").read_bytes()
    with pytest.raises(ConfigError, match=told):  # with a new key nobody could ever read it
        recollect.encrypt(home, passphrase="open sesame")
    assert not encryption.is_encrypted(home)
    assert (home / STORE_FOLDER / "data.mdb").read_bytes() == stored
    with pytest.raises(ConfigError, match=r"put its encryption\.json back from a copy"):
        recollect.unlock(home, passphrase="open sesame")
    (home / encryption.KEY_FILE).write_bytes(copy)
    cipher = recollect.encrypt(home, passphrase="open sesame")
    with Journal.open(home / JOURNAL_NAME, cipher=cipher) as journal:
        assert journal.load("secret plan").nodes[0].content == SAID


@pytest.mark.slow
def test_encrypting_again_removes_kv_that_a_program_without_the_key_has_kept(home: Path) -> None:
    cipher = recollect.encrypt(home, passphrase="open sesame")
    with recollect.load("reference", home=home, cipher=cipher) as model:
        model.resume(checkpoint="before the plan").checkpoint("again")
    moved = (home / encryption.KEY_FILE).rename(home / "moved")
    with recollect.load("reference", home=home) as model:
        model.session().respond(SAID, params=SHORT)
    moved.rename(home / encryption.KEY_FILE)
    assert "data.mdb" in readable(home)
    recollect.encrypt(home, passphrase="open sesame")
    assert list(readable(home)) == []
    with recollect.load("reference", home=home, cipher=cipher) as model:
        assert [made.name for made in model.checkpoints()] == ["again", "before the plan"]


@pytest.mark.slow
def test_encrypting_again_removes_a_store_of_which_nobody_can_tell_what_it_holds(
    home: Path,
) -> None:
    recollect.encrypt(home, passphrase="open sesame")
    (home / STORE_FOLDER / "data.mdb").write_bytes(SAID.encode() * 1000)
    recollect.encrypt(home, passphrase="open sesame")
    assert list(readable(home)) == []

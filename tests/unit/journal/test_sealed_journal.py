"""An encrypted journal shows nothing of what was said, and nothing in it can be changed or moved."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from recollect.encryption import KEY_FILE, Cipher
from recollect.errors import (
    ConfigError,
    NameTakenError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
)
from recollect.journal import schema
from recollect.journal.database import Database
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import Label, NewNode, StoredConversation, checksum
from recollect.journal.rows import NODE_COLUMNS, Sealing
from recollect.types import ToolLinks

CIPHER = Cipher(bytes(range(32)))
SECRETS = {
    "name": "a divorce",
    "model": "/home/alex/models/lawyer.gguf",
    "tip": "idea of Tuesday",
    "question": "Where is the treasure buried?",
    "answer": "Below the oak, of course.",
    "tool": "dig_below_the_oak",
    "note": "for the heirs of Alexandrine",
}
TOKEN_IDS = (1_701_969_505, 538_976_288, 1_953_719_668)
LINKS = ToolLinks(call_ids=("call_1",), name=SECRETS["tool"])
USAGE = {"prompt_tokens": 123_456_789, "difference": "what was asked before"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / JOURNAL_NAME


@pytest.fixture
def sealed(path: Path) -> Iterator[Journal]:
    with Journal.open(path, cipher=CIPHER) as journal:
        yield journal
        assert journal.check() == []


def fill(journal: Journal, turns: int = 1) -> int:
    """Keep a conversation in which everything is secret; return its id."""
    chat = journal.create(SECRETS["name"], model=SECRETS["model"], fingerprint="f00d").id
    parent = None
    for _ in range(turns):
        ids = journal.append(
            chat,
            parent,
            [
                NewNode(role="user", content=SECRETS["question"]),
                NewNode(
                    role="assistant",
                    content=SECRETS["answer"],
                    token_ids=TOKEN_IDS,
                    finish_reason="stop",
                    usage=USAGE,
                    fingerprint="f00d",
                    links=LINKS,
                ),
            ],
            tip=SECRETS["tip"],
        )
        parent = ids[-1]
    journal.set_label(
        Label(name="resp_1", conversation_id=chat, node_id=parent, note={"for": SECRETS["note"]})
    )
    return chat


def in_the_files(path: Path) -> list[str]:
    """Return which of the secrets can be read in any file of the folder."""
    data = b"\0".join(file.read_bytes() for file in path.parent.iterdir())
    secrets = {name: text.encode() for name, text in SECRETS.items()}
    secrets["token ids"] = b"".join(number.to_bytes(4, "little") for number in TOKEN_IDS)
    secrets["usage"] = b"123456789"
    return [name for name, secret in secrets.items() if secret in data]


def sql(path: Path, *statements: str) -> None:
    """Change a closed journal's file behind its back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def is_as_it_was_filled(stored: StoredConversation) -> bool:
    names = (stored.name, stored.model, [*stored.tips])
    user, reply = stored.nodes
    return (
        names == (SECRETS["name"], SECRETS["model"], [SECRETS["tip"]])
        and (user.content, user.token_ids, user.usage) == (SECRETS["question"], None, None)
        and (reply.content, reply.token_ids, reply.usage) == (SECRETS["answer"], TOKEN_IDS, USAGE)
        and (user.links, reply.links) == (None, LINKS)
    )


def test_what_is_sealed_is_read_again_and_is_not_in_the_files(path: Path) -> None:
    with Journal.open(path, cipher=CIPHER) as journal:
        fill(journal)
        assert in_the_files(path) == []  # with the log not yet in the main file
    assert in_the_files(path) == []
    with Journal.open(path, cipher=CIPHER) as journal:
        assert is_as_it_was_filled(journal.load(SECRETS["name"]))
        assert journal.check() == []


def test_the_same_search_finds_everything_in_a_plain_journal(path: Path) -> None:
    with Journal.open(path) as journal:
        fill(journal)
    assert in_the_files(path) == [*SECRETS, "token ids", "usage"]


@pytest.mark.slow
def test_a_plain_journal_is_converted_and_leaves_no_trace(path: Path) -> None:
    """Also of what was deleted, renamed or went on with another model before."""
    with Journal.open(path) as journal:
        fill(journal)
        journal.rename(SECRETS["name"], "x")
        fill(journal, 50)
        journal.delete("x")
        before = journal.load(SECRETS["name"])
        infos = journal.conversations()
    with Journal.open(path, cipher=CIPHER, convert=True) as journal:
        assert in_the_files(path) == []
        assert journal.check() == []
        assert journal.load(SECRETS["name"]) == before
        assert [label.note for label in journal.labels(before.id)] == [{"for": SECRETS["note"]}]
        assert journal.conversations() == infos
        again = journal.append(before.id, before.nodes[-1].id, [NewNode(role="user", content="x")])
    assert again[0] > before.nodes[-1].id
    assert in_the_files(path) == []


def test_a_file_of_the_first_version_is_converted_as_well(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        schema.migrate(connection, schema.MIGRATIONS[:1])
        connection.execute(
            "INSERT INTO conversations (name, created_at, updated_at, model, fingerprint, format) "
            "VALUES (?, ?, ?, ?, 'f00d', 1)",
            (SECRETS["name"], *[datetime.now(UTC).isoformat()] * 2, SECRETS["model"]),
        )
    with Journal.open(path) as journal:
        assert [info.model for info in journal.conversations()] == [SECRETS["model"]]
    with Journal.open(path, cipher=CIPHER, convert=True) as journal:
        assert [info.name for info in journal.conversations()] == [SECRETS["name"]]
    assert in_the_files(path) == []


def test_a_damaged_plain_journal_is_not_converted(path: Path) -> None:
    with Journal.open(path) as journal:
        fill(journal)
    sql(path, "UPDATE nodes SET content = 'forged' WHERE id = 1")
    with pytest.raises(StoreCorruptError, match="node 1"):
        Journal.open(path, cipher=CIPHER, convert=True)
    with Journal.open(path) as journal:
        assert [info.name for info in journal.conversations()] == [SECRETS["name"]]


@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["mark", "rewrite"])
def test_a_conversion_that_breaks_off_is_finished_when_it_is_opened_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with Journal.open(path) as journal:
        fill(journal)

    def break_down(*_: object) -> None:
        raise KeyboardInterrupt

    where = Sealing if step == "mark" else Database
    with monkeypatch.context() as patch:
        patch.setattr(where, step, break_down)
        with pytest.raises(KeyboardInterrupt):
            Journal.open(path, cipher=CIPHER, convert=True)
    with Journal.open(path, cipher=CIPHER, convert=True) as journal:
        assert is_as_it_was_filled(journal.load(SECRETS["name"]))
        assert in_the_files(path) == []


@pytest.mark.slow
def test_the_plain_text_goes_when_its_last_reader_has_gone(path: Path) -> None:
    with Journal.open(path) as journal:
        fill(journal)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM nodes").fetchone()
        with pytest.raises(StoreBusyError):
            Journal.open(path, cipher=CIPHER, convert=True, busy_timeout_s=0.05)
        assert in_the_files(path) != []
    with Journal.open(path, cipher=CIPHER):
        assert in_the_files(path) == []


@pytest.mark.slow
def test_a_plain_journal_is_not_taken_for_an_encrypted_one(path: Path) -> None:
    """Anybody could have put it there; nobody has to be asked about an empty one."""
    with Journal.open(path) as journal:
        fill(journal)
    with pytest.raises(ConfigError, match="recollect encrypt"):
        Journal.open(path, cipher=CIPHER)
    with Journal.open(path) as journal:
        assert is_as_it_was_filled(journal.load(SECRETS["name"]))
        journal.delete(SECRETS["name"])
    with Journal.open(path, cipher=CIPHER) as journal:
        assert journal.conversations() == []


def test_without_the_key_or_with_another_it_is_refused_and_left_alone(path: Path) -> None:
    with Journal.open(path, cipher=CIPHER) as journal:
        fill(journal)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"encryption\.json is missing"):
        Journal.open(path)
    path.with_name(KEY_FILE).touch()
    with pytest.raises(ConfigError, match="RECOLLECT_PASSPHRASE"):
        Journal.open(path)
    with pytest.raises(ConfigError, match="another key"):
        Journal.open(path, cipher=Cipher(os.urandom(32)))
    assert path.read_bytes() == before


def test_who_has_it_open_plain_cannot_write_plain_text_into_it(path: Path) -> None:
    with Journal.open(path) as plain:
        chat = fill(plain)
        with Journal.open(path, cipher=CIPHER, convert=True):
            with pytest.raises(StoreError, match="start again"):
                plain.append(chat, None, [NewNode(role="user", content=SECRETS["question"])])
            with pytest.raises(StoreError, match="start again"):
                plain.load(chat)
    assert in_the_files(path) == []


def test_names_are_found_taken_and_given_away_as_in_a_plain_journal(sealed: Journal) -> None:
    fill(sealed)
    with pytest.raises(NameTakenError):
        sealed.create(SECRETS["name"], model="m", fingerprint="f")
    dated = [sealed.create(model="m", fingerprint="f").name for _ in range(2)]
    assert dated[1] == f"{dated[0]}-2"
    with pytest.raises(NameTakenError):
        sealed.rename(dated[0], dated[1])
    sealed.rename(SECRETS["name"], "another")
    assert is_as_it_was_filled(sealed.load("another")) is False
    sealed.rename("another", SECRETS["name"])
    assert is_as_it_was_filled(sealed.load(SECRETS["name"]))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE nodes SET content = (SELECT content FROM nodes WHERE id = 3) WHERE id = 1", 1),
        ("UPDATE nodes SET usage = (SELECT usage FROM nodes WHERE id = 4) WHERE id = 2", 2),
        ("UPDATE nodes SET token_ids = (SELECT token_ids FROM nodes WHERE id = 4) WHERE id = 2", 2),
        ("UPDATE nodes SET content = 'I never said that' WHERE id = 1", 1),
        ("UPDATE nodes SET role = 'system' WHERE id = 1", 1),
        ("UPDATE nodes SET parent_id = 2 WHERE id = 4", 4),
        ("UPDATE nodes SET finish_reason = 'length' WHERE id = 2", 2),
        ("UPDATE nodes SET links = (SELECT links FROM nodes WHERE id = 4) WHERE id = 2", 2),
        ("UPDATE nodes SET links = NULL WHERE id = 2", 2),
    ],
)
def test_what_was_moved_or_changed_is_found_even_with_a_right_checksum(
    path: Path, statement: str, problem: int
) -> None:
    """Whoever can write the file can compute a checksum, but not seal anything."""
    with Journal.open(path, cipher=CIPHER) as journal:
        fill(journal, 2)
    sql(path, statement)
    _set_checksums(path)
    with Journal.open(path, cipher=CIPHER) as journal:
        assert journal.check() == [f"node {problem} does not open with the key"]
        with pytest.raises(StoreCorruptError, match=f"node {problem} is not as it was written"):
            journal.load(SECRETS["name"])


def test_a_note_opens_only_at_its_label(path: Path) -> None:
    with Journal.open(path, cipher=CIPHER) as journal:
        chat = fill(journal)
        found = journal.find_label("resp_1")
        assert found is not None
        assert found.note == {"for": SECRETS["note"]}
        journal.set_label(Label(name="resp_2", conversation_id=chat))
    sql(path, "UPDATE labels SET note = (SELECT note FROM labels WHERE label = 'resp_1')")
    with Journal.open(path, cipher=CIPHER) as journal:
        assert journal.check() == ["the label resp_2 does not open with the key"]
        with pytest.raises(StoreCorruptError, match="resp_2"):
            journal.find_label("resp_2")


def _set_checksums(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for row in connection.execute(f"SELECT {NODE_COLUMNS} FROM nodes").fetchall():  # noqa: S608
            node_id, _, *values = row
            summed = checksum(*values) if values[-1] is not None else checksum(*values[:-1])
            connection.execute("UPDATE nodes SET checksum = ? WHERE id = ?", (summed, node_id))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (["UPDATE tips SET node_id = 1"], "a branch of conversation 1 does not open with the key"),
        (
            [
                "UPDATE conversations SET name = x'00' WHERE id = 2",
                "UPDATE conversations SET fingerprint = 'beef' WHERE id = 1",
            ],
            "a name of conversation 1 does not open with the key",
        ),
        (
            [
                "CREATE TEMP TABLE held AS SELECT id, name FROM conversations",
                "UPDATE conversations SET name = x'00' WHERE id = 1",
                "UPDATE conversations SET name = (SELECT name FROM held WHERE id = 1) WHERE id = 2",
            ],
            "a name of conversation 2 does not open with the key",
        ),
    ],
)
def test_a_name_opens_only_where_it_was_given(
    path: Path, statements: list[str], problem: str
) -> None:
    with Journal.open(path, cipher=CIPHER) as journal:
        fill(journal)
        journal.create("other", model="m", fingerprint="f")
    sql(path, *statements)
    with Journal.open(path, cipher=CIPHER) as journal:
        assert problem in journal.check()
        with pytest.raises(StoreCorruptError, match="conversation"):
            journal.load(SECRETS["name"])

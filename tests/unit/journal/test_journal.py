"""What is written is there again; what is damaged, newer or locked is refused and left alone."""

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from recollect.errors import (
    ConversationError,
    MisuseError,
    NameTakenError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreVersionError,
    UnknownConversationError,
    UnknownNodeError,
)
from recollect.journal import schema
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import ConversationRecord, Entry, Label, NewNode
from recollect.types import ToolLinks

USAGE = {"prompt_tokens": 7, "ttft_s": 0.125, "decode_tps": None, "reason": {"what": "new"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / JOURNAL_NAME


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.open(path) as opened:
        yield opened
        assert opened.check() == []


def turn(question: str, answer: str, *token_ids: int) -> list[NewNode]:
    return [
        NewNode(role="user", content=question),
        NewNode(
            role="assistant",
            content=answer,
            token_ids=token_ids,
            finish_reason="stop",
            usage=USAGE,
            fingerprint="f00d",
        ),
    ]


def create(journal: Journal, name: str | None = None) -> int:
    return journal.create(name, model="smollm2", fingerprint="f00d").id


def damage(path: Path, old: bytes, new: bytes) -> None:
    """Overwrite bytes in a closed journal's file, once."""
    data = path.read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def sql(path: Path, *statements: str) -> None:
    """Change a closed journal's file behind its back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


# --- what is kept


def test_a_turn_comes_back_as_it_was_written_after_reopening(path: Path) -> None:
    with Journal.open(path) as journal:
        chat = create(journal, "poem")
        ids = journal.append(
            chat, None, turn("Hello\0 \n", "Grüße 🎉", 0, 5, 2**31 - 1), tip="main"
        )
    with Journal.open(path) as journal:
        stored = journal.load("poem")
        assert journal.check() == []
    user, reply = stored.nodes
    assert (stored.id, stored.name, stored.model) == (chat, "poem", "smollm2")
    assert stored.fingerprint == "f00d"
    assert [user.id, reply.id] == ids
    assert (user.parent_id, user.role, user.content) == (None, "user", "Hello\0 \n")
    assert (user.token_ids, user.finish_reason, user.usage, user.fingerprint) == (None,) * 4
    assert (reply.parent_id, reply.role, reply.content) == (ids[0], "assistant", "Grüße 🎉")
    assert reply.token_ids == (0, 5, 2**31 - 1)
    assert (reply.finish_reason, reply.usage, reply.fingerprint) == ("stop", USAGE, "f00d")
    assert reply.created_at.tzinfo is UTC
    assert stored.tips == {"main": ids[1]}


def test_no_token_ids_are_not_the_same_as_none_kept(journal: Journal) -> None:
    chat = create(journal)
    journal.append(chat, None, [NewNode(role="assistant", content="", token_ids=())])
    journal.append(chat, None, [NewNode(role="assistant", content="")])
    assert [node.token_ids for node in journal.load(chat).nodes] == [(), None]


def test_a_second_turn_after_the_same_node_is_a_branch(journal: Journal) -> None:
    chat = create(journal)
    first = journal.append(chat, None, turn("a", "b", 1), tip="main")
    left = journal.append(chat, first[-1], turn("c", "d", 2), tip="main")
    right = journal.append(chat, first[-1], turn("e", "f", 3), tip="idea")
    stored = journal.load(chat)
    assert [node.id for node in stored.path(right[-1])] == first + right
    assert stored.tips == {"main": left[-1], "idea": right[-1]}
    assert [node.id for node in stored.leaves()] == [left[-1], right[-1]]


def test_ids_are_unique_over_all_conversations_and_never_given_again(journal: Journal) -> None:
    one, other = create(journal), create(journal)
    first = journal.append(one, None, turn("a", "b"))
    second = journal.append(other, None, turn("a", "b"))
    journal.delete(other)
    third = journal.append(one, None, turn("a", "b"))
    ids = first + second + third
    assert ids == sorted(set(ids))


def test_a_tip_can_be_moved_and_stand_at_the_root(journal: Journal) -> None:
    chat = create(journal)
    ids = journal.append(chat, None, turn("a", "b"), tip="main")
    journal.set_tip(chat, "idea", ids[0])
    journal.set_tip(chat, "main", None)
    assert journal.load(chat).tips == {"main": None, "idea": ids[0]}


def test_the_list_counts_what_there_is(journal: Journal) -> None:
    journal.append(create(journal, "full"), None, turn("é", "b", 1, 2), tip="main")
    create(journal, "empty")
    empty, full = journal.conversations()
    assert (full.name, full.turns, full.tips) == ("full", 1, ("main",))
    assert full.size_bytes == 2 + 1 + 8
    assert (empty.name, empty.turns, empty.tips, empty.size_bytes) == ("empty", 0, (), 0)


def test_the_list_begins_with_what_was_used_last(journal: Journal) -> None:
    ids = {name: create(journal, name) for name in ("first", "second", "third")}
    journal.append(ids["second"], None, turn("a", "b"))
    assert [info.name for info in journal.conversations()] == ["second", "third", "first"]
    journal.set_tip(ids["first"], "main", None)
    assert [info.name for info in journal.conversations()] == ["first", "second", "third"]


def test_a_conversation_without_a_name_gets_a_new_one_that_says_the_day(journal: Journal) -> None:
    names = [journal.create(model="m", fingerprint="f").name for _ in range(3)]
    today = datetime.now().astimezone().date().isoformat()
    assert names == [today, f"{today}-2", f"{today}-3"]


def test_the_model_can_be_another_one_from_now_on(journal: Journal) -> None:
    chat = create(journal)
    journal.append(chat, None, turn("a", "b", 1))
    journal.write(chat, Entry(nodes=(), model=("qwen2.5", "beef")))
    stored = journal.load(chat)
    assert (stored.model, stored.fingerprint) == ("qwen2.5", "beef")
    assert stored.nodes[1].fingerprint == "f00d"


def test_a_model_can_be_called_by_a_path_that_is_no_text(journal: Journal) -> None:
    assert journal.create(model="/m\udcff.gguf", fingerprint="f").model == "/m?.gguf"


def test_renaming_frees_the_old_name(journal: Journal) -> None:
    chat = create(journal, "old")
    journal.rename("old", "new")
    journal.rename("new", "new")
    assert journal.load("new").id == chat
    assert create(journal, "old") != chat


def test_what_was_deleted_cannot_be_found_in_the_file(path: Path) -> None:
    secret = "the secret of the old lighthouse " * 200  # over several pages
    with Journal.open(path) as journal:
        create(journal, "kept")
        journal.append(create(journal, "gone"), None, turn("why?", secret, 1, 2), tip="main")
        journal.delete("gone")
        assert [info.name for info in journal.conversations()] == ["kept"]
        assert journal.check() == []
        for file in path.parent.iterdir():
            assert b"lighthouse" not in file.read_bytes()


@pytest.mark.slow
def test_a_long_conversation_can_be_deleted(journal: Journal) -> None:
    """A chain longer than SQLite lets one deletion follow from another."""
    chat = create(journal, "long")
    journal.append(chat, None, [NewNode(role="user", content="a")] * 3000)
    journal.delete("long")
    assert journal.conversations() == []


def test_adding_a_whole_conversation_gives_it_ids_of_its_own(journal: Journal) -> None:
    chat = create(journal, "here")
    ids = journal.append(chat, None, turn("a", "b", 1), tip="main")
    journal.append(chat, ids[0], turn("c", "d", 2), tip="idea")
    stored = journal.load(chat)
    added = journal.load(journal.add(stored, "there").id)
    offset = added.nodes[0].id - stored.nodes[0].id
    assert offset > 0
    assert [node.id - offset for node in added.nodes] == [node.id for node in stored.nodes]
    assert [node.token_ids for node in added.nodes] == [node.token_ids for node in stored.nodes]
    assert {tip: at and at - offset for tip, at in added.tips.items()} == stored.tips
    assert (added.created_at, added.updated_at) == (stored.created_at, stored.updated_at)


# --- what is refused, and changes nothing


def test_a_turn_that_cannot_be_kept_as_a_whole_is_not_kept_in_part(journal: Journal) -> None:
    chat = create(journal)
    journal.append(chat, None, turn("a", "b"), tip="main")
    before = journal.load(chat)
    with pytest.raises(ConversationError, match="half a character"):
        journal.append(chat, None, turn("fine", "half \ud83c"), tip="main")
    with pytest.raises(ConversationError, match="name of a branch"):
        journal.append(chat, None, turn("fine", "too"), tip="no\nname")
    assert journal.load(chat) == before


def test_a_conversation_that_cannot_be_added_as_a_whole_is_not_added(journal: Journal) -> None:
    chat = create(journal, "good")
    journal.append(chat, None, turn("a", "b"))
    stored = journal.load(chat)
    bad = ConversationRecord(
        name="bad",
        created_at=stored.created_at,
        updated_at=stored.updated_at,
        model="m",
        fingerprint="f",
        nodes=stored.nodes,
        tips={"no\nname": None},
    )
    with pytest.raises(ConversationError):
        journal.add(bad)
    assert [info.name for info in journal.conversations()] == ["good"]


def test_a_parent_in_another_conversation_is_unknown(journal: Journal) -> None:
    one, other = create(journal), create(journal)
    ids = journal.append(one, None, turn("a", "b"))
    with pytest.raises(UnknownNodeError, match=f"no node {ids[0]}"):
        journal.append(other, ids[0], turn("c", "d"))
    with pytest.raises(UnknownNodeError):
        journal.set_tip(other, "main", ids[0])
    assert journal.load(other).nodes == ()


def test_a_conversation_that_was_deleted_takes_no_more_turns(journal: Journal) -> None:
    chat = create(journal, "gone")
    journal.delete(chat)
    for call in (
        lambda: journal.append(chat, None, turn("a", "b")),
        lambda: journal.set_tip(chat, "main", None),
        lambda: journal.write(chat, Entry(nodes=(), model=("m", "f"))),
        lambda: journal.load("gone"),
        lambda: journal.load(chat),
        lambda: journal.rename("gone", "back"),
        lambda: journal.delete("gone"),
        lambda: journal.load("half \ud83c"),
    ):
        with pytest.raises(UnknownConversationError):
            call()


def test_a_name_is_given_once(journal: Journal) -> None:
    create(journal, "one")
    create(journal, "two")
    for call in (
        lambda: create(journal, "one"),
        lambda: journal.rename("two", "one"),
        lambda: journal.add(journal.load("two"), "one"),
    ):
        with pytest.raises(NameTakenError, match="another name"):
            call()
    assert sorted(info.name for info in journal.conversations()) == ["one", "two"]


@pytest.mark.parametrize("name", ["", " a", "a ", "a\nb", "a\x1b[2J", "-a", "a" * 101, "\ud83c"])
def test_a_name_that_cannot_be_typed_or_shown_is_refused(journal: Journal, name: str) -> None:
    chat = create(journal, "kept")
    with pytest.raises(ConversationError, match="cannot be the name"):
        create(journal, name)
    with pytest.raises(ConversationError, match="cannot be the name"):
        journal.rename(chat, name)
    assert [info.name for info in journal.conversations()] == ["kept"]


def test_a_closed_journal_is_a_bug_of_the_caller(path: Path) -> None:
    journal = Journal.open(path)
    journal.close()
    journal.close()
    with pytest.raises(MisuseError, match="closed"):
        journal.conversations()


# --- the file


@pytest.mark.skipif(os.name != "posix", reason="other systems have other permissions")
def test_only_the_owner_can_read_what_was_said(path: Path) -> None:
    before = os.umask(0)
    try:
        with Journal.open(path) as journal:
            create(journal)
            files = list(path.parent.iterdir())
            assert len(files) > 1, "the log beside the file is looked at, too"
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_each_commit_goes_to_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `synchronous` is set to is seen in nothing else, short of cutting the power."""
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def noting(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", noting)
    with Journal.open(path):
        connection = opened[-1]
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


def refused(path: Path, error: type[StoreError]) -> str:
    """Return what is said when a file is refused; it and its log are the same afterwards."""
    log = path.with_name(path.name + "-wal")
    before, log_before = path.read_bytes(), log.read_bytes() if log.exists() else b""
    with pytest.raises(error) as caught:
        Journal.open(path)
    assert type(caught.value) is error
    assert path.read_bytes() == before
    assert (log.read_bytes() if log.exists() else b"") == log_before
    return str(caught.value)


def fill(path: Path, turns: int = 50) -> None:
    with Journal.open(path) as journal:
        chat = create(journal, "chat")
        for number in range(turns):
            journal.append(chat, None, turn(f"question {number}", "word " * 100, number))


@pytest.mark.slow
def test_a_file_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    fill(path)
    sql(path, "PRAGMA user_version = 99")
    assert "version 99" in refused(path, StoreVersionError)


@pytest.mark.slow
def test_a_newer_version_is_seen_where_only_the_log_says_so(path: Path, tmp_path: Path) -> None:
    """As a process leaves it that was killed just after it had migrated the file."""
    fill(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA user_version = 99")
        copy = tmp_path / "copy.sqlite3"
        copy.write_bytes(path.read_bytes())
        copy.with_name("copy.sqlite3-wal").write_bytes(
            path.with_name(path.name + "-wal").read_bytes()
        )
    assert "version 99" in refused(copy, StoreVersionError)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def blank_pages(data: bytes) -> bytes:
    return data[:4096] + bytes(4096 * 3) + data[4096 * 4 :]


def garbage(data: bytes) -> bytes:
    return b"These are my notes, and no database at all.\n" * 200


def no_header(data: bytes) -> bytes:
    return bytes(100) + data[100:]


@pytest.mark.few(1)
@pytest.mark.parametrize("how", [cut, blank_pages, garbage, no_header])
def test_a_damaged_file_is_refused_and_left_alone(
    path: Path, how: Callable[[bytes], bytes]
) -> None:
    fill(path)
    path.write_bytes(how(path.read_bytes()))
    assert "backup" in refused(path, StoreCorruptError)


def test_a_database_of_something_else_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    sql(path, "CREATE TABLE recipes (name TEXT)")
    assert "no journal of recollect" in refused(path, StoreCorruptError)


def test_a_letter_that_was_changed_in_the_file_is_noticed(path: Path) -> None:
    with Journal.open(path) as journal:
        chat = create(journal, "chat")
        ids = journal.append(chat, None, turn("a", "I never said that", 1))
        create(journal, "fine")
    damage(path, b"I never said", b"I always sai")
    with Journal.open(path) as journal:
        with pytest.raises(StoreCorruptError, match=f"node {ids[1]}"):
            journal.load("chat")
        assert journal.load("fine").nodes == ()
        assert journal.check() == [f"node {ids[1]} is not as it was written"]


def test_what_has_to_do_with_tools_is_kept_and_checked(path: Path) -> None:
    calls = NewNode(
        role="assistant", content="", token_ids=(1,), links=ToolLinks(call_ids=("call_1", "call_2"))
    )
    answers = NewNode(role="tool", content="42", links=ToolLinks(tool_call_id="call_1", name="f"))
    with Journal.open(path) as journal:
        ids = journal.append(create(journal, "chat"), None, [calls, answers])
        assert [node.links for node in journal.load("chat").nodes] == [calls.links, answers.links]
    for damaged in ("'{}'", "NULL"):
        sql(path, f"UPDATE nodes SET links = {damaged} WHERE id = {ids[1]}")  # noqa: S608
        with Journal.open(path) as journal:
            with pytest.raises(StoreCorruptError, match=f"node {ids[1]}"):
                journal.load("chat")
            assert journal.check() == [f"node {ids[1]} is not as it was written"]


def test_text_that_is_no_text_any_more_is_noticed(path: Path) -> None:
    with Journal.open(path) as journal:
        journal.append(create(journal, "chat"), None, turn("a", "I never said that"))
    damage(path, b"I never said", b"I \xff\xfe\xfd\xfc\xfb said")
    with Journal.open(path) as journal, pytest.raises(StoreCorruptError):
        journal.load("chat")


def test_an_empty_file_is_a_new_journal(path: Path) -> None:
    """As a process leaves it that was killed before it had written anything."""
    path.parent.mkdir()
    path.touch()
    with Journal.open(path) as journal:
        assert journal.conversations() == []


def test_a_file_whose_making_was_cut_short_is_made_anew(path: Path, tmp_path: Path) -> None:
    """As a process leaves it that was killed before the log was turned on."""
    half_made = tmp_path / "half made"
    with closing(sqlite3.connect(half_made, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")  # writes to the file before the commit
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE conversations (id)")
        connection.executemany("INSERT INTO conversations VALUES (?)", [("x" * 3000,)] * 50)
        path.parent.mkdir()
        for end in ("", "-journal"):
            data = half_made.with_name(half_made.name + end).read_bytes()
            assert data
            path.with_name(path.name + end).write_bytes(data)
    with Journal.open(path) as journal:
        assert journal.conversations() == []
        assert journal.check() == []


def test_a_place_where_no_file_can_be_is_a_store_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    folder = tmp_path / JOURNAL_NAME
    folder.mkdir()
    for path in (blocker / JOURNAL_NAME, folder):
        with pytest.raises(StoreError, match="RECOLLECT_HOME"):
            Journal.open(path)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE nodes SET parent_id = 99 WHERE id = 4", "node 4 hangs under"),
        ("UPDATE nodes SET parent_id = 1 WHERE id = 4", "node 4 hangs under"),
        ("UPDATE nodes SET parent_id = 4 WHERE id = 3", "node 3 is not younger"),
        ("UPDATE nodes SET token_ids = x'01000000' WHERE id = 3", "node 3 has token ids"),
        ("UPDATE nodes SET token_ids = x'0100' WHERE id = 4", "node 4 has a part"),
        ("UPDATE nodes SET token_ids = x'02000000' WHERE id = 4", "node 4 is not as it was"),
        ("UPDATE nodes SET usage = NULL WHERE id = 4", "node 4 is not as it was"),
        ("UPDATE nodes SET conversation_id = 9 WHERE id = 4", "node 4 is of no conversation"),
        ("UPDATE tips SET node_id = 1", "branch 'main' stands at no node"),
        ("UPDATE tips SET conversation_id = 9", "tip 'main' is of no conversation"),
    ],
)
def test_check_finds(path: Path, statement: str, problem: str) -> None:
    with Journal.open(path) as journal:
        first, second = create(journal), create(journal)
        assert journal.append(first, None, turn("a", "b", 1)) == [1, 2]
        assert journal.append(second, None, turn("a", "b", 1), tip="main") == [3, 4]
        assert journal.check() == []
    sql(path, "PRAGMA ignore_check_constraints = ON", "PRAGMA foreign_keys = OFF", statement)
    with Journal.open(path) as journal:
        assert any(found.startswith(problem) for found in journal.check())


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE nodes SET parent_id = 2 WHERE id = 1",
        "UPDATE nodes SET token_ids = x'01000000' WHERE id = 1",
        "DELETE FROM nodes WHERE id = 1",
        "DELETE FROM conversations",
        "UPDATE tips SET node_id = 99",
    ],
)
def test_the_tables_themselves_refuse_what_cannot_be(path: Path, statement: str) -> None:
    with Journal.open(path) as journal:
        journal.append(create(journal), None, turn("a", "b", 1), tip="main")
    with pytest.raises(sqlite3.IntegrityError):
        sql(path, "PRAGMA foreign_keys = ON", statement)


# --- versions


def add_notes(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE conversations ADD COLUMN notes TEXT NOT NULL DEFAULT ''")


def break_down(connection: sqlite3.Connection) -> None:
    connection.execute("DROP TABLE tips")
    raise sqlite3.OperationalError("injected")


@pytest.mark.slow
def test_an_older_file_is_brought_to_the_newest_version(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(path)
    with Journal.open(path) as journal:
        before = journal.load("chat")
    newer = (*schema.MIGRATIONS, add_notes)
    monkeypatch.setattr(schema, "MIGRATIONS", newer)
    monkeypatch.setattr(schema.migrate, "__defaults__", (newer,))
    for _ in range(2):  # the second time there is nothing to do
        Journal.open(path).close()
        with closing(sqlite3.connect(path)) as connection:
            assert schema.version(connection) == len(newer)
            assert connection.execute("SELECT notes FROM conversations").fetchall() == [("",)]
    with Journal.open(path) as journal:
        assert journal.load("chat") == before


def test_a_file_of_the_first_version_keeps_its_conversations_for_the_user(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        schema.migrate(connection, schema.MIGRATIONS[:1])
        connection.execute(
            "INSERT INTO conversations (name, created_at, updated_at, model, fingerprint, format)"
            " VALUES ('old', ?1, ?1, 'smollm2', 'f00d', 1)",
            (datetime.now(UTC).isoformat(timespec="microseconds"),),
        )
    with Journal.open(path) as journal:
        assert [info.name for info in journal.conversations()] == ["old"]
        assert journal.load("old").namespace == ""
        assert journal.labels(journal.load("old").id) == []
        assert journal.check() == []


# --- namespaces and labels


def test_what_is_in_one_namespace_is_not_there_for_another(journal: Journal) -> None:
    theirs = journal.create("theirs", model="m", fingerprint="f", namespace="key").id
    (node,) = journal.append(theirs, None, [NewNode(role="user", content="secret")])
    assert journal.conversations() == []
    assert [info.name for info in journal.conversations("key")] == ["theirs"]
    for name in ("theirs", theirs):
        with pytest.raises(UnknownConversationError):
            journal.load(name)
        with pytest.raises(UnknownConversationError):
            journal.delete(name)
    assert journal.load(theirs, namespace="key").nodes[0].content == "secret"
    label = Label(name="resp_1", conversation_id=theirs, node_id=node)
    journal.set_label(label)
    assert journal.find_label("resp_1") is None
    assert journal.find_label("resp_1", namespace="key") == label


def test_a_label_is_there_until_it_or_its_conversation_goes(journal: Journal) -> None:
    chat, other = create(journal), create(journal)
    (node,) = journal.append(chat, None, [NewNode(role="user", content="a")])
    whole = Label(name="conv", conversation_id=chat, note={"topic": "rivers"})
    part = Label(name="resp", conversation_id=chat, node_id=node, note={"n": 1})
    for label in (whole, replace(part, note={}), part):
        journal.set_label(label)
    assert journal.labels(chat) == [whole, part]
    assert journal.labels(other) == []
    with pytest.raises(UnknownNodeError):
        journal.set_label(replace(part, conversation_id=other))
    journal.delete_label("conv")
    assert journal.find_label("conv") is None
    assert journal.find_label("resp") == part
    journal.delete(chat)
    assert journal.labels(chat) == []
    with pytest.raises(UnknownConversationError):
        journal.set_label(whole)


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    fill(path, 3)
    migrations = (*schema.MIGRATIONS, add_notes, break_down)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        with pytest.raises(sqlite3.OperationalError, match="injected"):
            schema.migrate(connection, migrations)
        assert schema.version(connection) == len(schema.MIGRATIONS)
    with Journal.open(path) as journal:
        assert journal.check() == []
        assert journal.conversations()[0].turns == 3


def test_a_conversation_in_a_newer_format_is_refused_and_the_others_are_not(path: Path) -> None:
    with Journal.open(path) as journal:
        create(journal, "newer")
        create(journal, "known")
    sql(path, "UPDATE conversations SET format = 2 WHERE name = 'newer'")
    with Journal.open(path) as journal:
        with pytest.raises(StoreVersionError, match="update"):
            journal.load("newer")
        assert journal.load("known").nodes == ()


# --- several at once


def test_a_journal_that_stays_locked_is_refused_after_the_timeout(path: Path) -> None:
    with Journal.open(path, busy_timeout_s=0.05) as journal:
        chat = create(journal, "chat")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreBusyError, match="try again"):
                journal.append(chat, None, turn("a", "b"))
            assert journal.load(chat).nodes == (), "reading does not wait for a writer"
            other.execute("ROLLBACK")
        assert len(journal.append(chat, None, turn("a", "b"))) == 2


def test_a_journal_that_is_locked_as_a_whole_cannot_be_opened(path: Path) -> None:
    fill(path, 1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        before = path.read_bytes()
        with pytest.raises(StoreBusyError):
            Journal.open(path, busy_timeout_s=0.05)
        other.execute("ROLLBACK")
    assert path.read_bytes() == before


def test_two_journals_on_one_file_make_two_branches(path: Path) -> None:
    with Journal.open(path) as one, Journal.open(path) as other:
        chat = create(one, "chat")
        start = one.append(chat, None, turn("a", "b"), tip="main")
        left = one.append(chat, start[-1], turn("left", "b"), tip="main")
        right = other.append(chat, start[-1], turn("right", "b"), tip="main")
        stored = one.load(chat)
        assert stored == other.load(chat)
        assert [node.id for node in stored.leaves()] == [left[-1], right[-1]]
        assert stored.tips == {"main": right[-1]}


def in_threads(*jobs: Callable[[], object]) -> None:
    """Run jobs at once, and raise what one of them raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


@pytest.mark.slow
def test_threads_share_a_journal_and_lose_nothing(journal: Journal) -> None:
    chat = create(journal)
    written: dict[int, list[list[int]]] = {number: [] for number in range(4)}

    def write(number: int) -> None:
        parent = None
        for index in range(25):
            ids = journal.append(
                chat, parent, turn(f"{number}", f"{index}", index), tip=f"t{number}"
            )
            written[number].append(ids)
            parent = ids[-1]

    in_threads(*(lambda number=number: write(number) for number in written))
    stored = journal.load(chat)
    assert len(stored.nodes) == 4 * 25 * 2
    for number, turns in written.items():
        path = stored.path(stored.tips[f"t{number}"])
        assert [node.id for node in path] == [node_id for ids in turns for node_id in ids]
        assert {node.content for node in path if node.role == "user"} == {f"{number}"}


@pytest.mark.slow
def test_threads_that_open_a_new_file_at_once_all_get_it(path: Path) -> None:
    opened: list[Journal] = []
    try:
        in_threads(*[lambda: opened.append(Journal.open(path))] * 8)
        names = {journal.create(model="m", fingerprint="f").name for journal in opened}
        assert len(names) == 8
        assert opened[0].check() == []
    finally:
        for journal in opened:
            journal.close()


def test_a_file_that_another_process_makes_meanwhile_is_no_foreign_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables come between the look at whose file it is and the look at what is in it."""
    connect = sqlite3.connect
    tried: list[str] = []

    class Interrupted(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            if statement == "SELECT 1 FROM sqlite_master" and not tried:
                tried.append(statement)
                # The file may be locked for one that reads it; then nothing came between.
                with suppress(sqlite3.OperationalError):
                    schema.migrate(other)
            return super().execute(statement, *arguments)

    path.parent.mkdir()
    with closing(connect(path, timeout=0, isolation_level=None)) as other:
        monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Interrupted))
        with Journal.open(path) as journal:
            assert journal.conversations() == []
    assert tried


@pytest.mark.slow
def test_names_that_are_chosen_at_once_are_all_different(path: Path) -> None:
    """Each looks what is taken before it writes: somebody else must not write in between."""

    def create_some() -> None:
        with Journal.open(path) as journal:
            for _ in range(20):
                create(journal)

    in_threads(*[create_some] * 4)
    with Journal.open(path) as journal:
        assert len(journal.conversations()) == 80


def test_what_a_process_of_an_earlier_version_writes_on_is_counted_and_named(path: Path) -> None:
    """It may have had the file open when that was brought to this version."""
    with Journal.open(path) as journal:
        journal.append(create(journal, "now"), None, turn("Hello", "Hi", 1, 2), tip="main")
    with closing(sqlite3.connect(path, isolation_level=None)) as earlier:
        earlier.execute(
            "INSERT INTO conversations (id, name, created_at, updated_at, model, fingerprint, format, "
            "namespace) SELECT 7, 'then', created_at, updated_at, model, fingerprint, format, namespace "
            "FROM conversations"
        )
        columns = "role, created_at, fingerprint, checksum, usage, token_ids, content"
        earlier.execute(
            f"INSERT INTO nodes (conversation_id, {columns}) SELECT 7, {columns} FROM nodes "  # noqa: S608
            "WHERE role = 'assistant'"
        )
    with Journal.open(path) as journal:
        now, then = sorted(journal.conversations(), key=lambda info: info.id)
        assert (now.turns, now.size_bytes) == (1, len("HelloHi") + 8)
        assert (then.turns, then.size_bytes) == (1, len("Hi") + 8)
        assert then.label.startswith("conv_")
        assert then.label != now.label
        found = journal.find_label(then.label)
        assert found is not None
        assert found.conversation_id == 7


def test_an_entry_is_written_as_a_whole_or_not_at_all(journal: Journal) -> None:
    nodes = [NewNode(role="user", content="fine"), NewNode(role="user", content="half \ud800")]
    with pytest.raises(ConversationError):
        journal.begin("new", Entry(nodes=nodes, tip="main"), model="m", fingerprint="f")
    good = Entry(nodes=nodes[:1], tip="main", note=lambda _: {"deep": "\ud800"})
    with pytest.raises(ConversationError):
        journal.begin("new", good, model="m", fingerprint="f")
    assert journal.conversations() == []
    chat = create(journal, "new")
    with pytest.raises(ConversationError):
        journal.write(chat, good)
    assert journal.load(chat).nodes == ()


def test_a_name_is_found_in_its_own_namespace_only(journal: Journal) -> None:
    journal.create("theirs", model="m", fingerprint="f", namespace="them")
    mine = journal.create("mine", model="m", fingerprint="f")
    assert journal.find("theirs") is None
    assert journal.find("mine", namespace="them") is None
    assert journal.find("mine") == mine
    assert journal.find("nobody's") is None
    assert journal.find("half \ud800") is None

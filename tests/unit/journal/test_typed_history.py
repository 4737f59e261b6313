"""What was typed of a conversation goes with it, and nothing else does."""

import stat
import sys
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory

import recollect
from recollect import config
from recollect.errors import StoreError
from recollect.journal.journal import Journal, forget_typed
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


def typed(path: Path, *entries: str) -> None:
    history = FileHistory(str(path))
    for entry in entries:
        history.store_string(entry)


def left(path: Path) -> list[str]:
    return list(reversed(list(FileHistory(str(path)).load_history_strings())))


def test_entries_that_said_a_message_go_however_they_were_typed(tmp_path: Path) -> None:
    path = tmp_path / "history"
    typed(
        path,
        "one",
        '"""\ntwo\nlines\n"""',
        "/edit 2 two and a half",
        "/system Be brief.",
        " /three ",
        "\ud800 four",
        "five",
        "/undo",
    )
    messages = ["one", "two\nlines", "two and a half", "Be brief.", "/three", "\ud800 four"]
    assert forget_typed(path, messages) == 6
    assert left(path) == ["five", "/undo"]
    assert [file.name for file in tmp_path.iterdir()] == ["history"]
    typed(path, "six")
    assert left(path) == ["five", "/undo", "six"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such bits")
def test_a_history_that_was_rewritten_can_be_read_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "history"
    typed(path, "one", "two")
    path.chmod(0o644)
    forget_typed(path, ["one"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_history_there_is_nothing_to_forget(tmp_path: Path) -> None:
    assert forget_typed(tmp_path / "history", ["one"]) == 0
    assert list(tmp_path.iterdir()) == []


def conversation(home: Path, *said: str, namespace: str = "") -> str:
    with recollect.load("reference", home=home) as model:
        session = model.session(name="secret", namespace=namespace)
        for text in said:
            session.respond(text, params=SHORT)
    return "secret"


@pytest.mark.slow
def test_deleting_a_conversation_forgets_what_was_typed_of_it(tmp_path: Path) -> None:
    name = conversation(tmp_path, "Where is it?", "Under the oak?")
    typed(tmp_path / config.HISTORY_NAME, "Where is it?", "Hello", "Under the oak?", "/undo")
    with Journal.open(tmp_path / "conversations.sqlite3") as journal:
        journal.delete(name)
    assert left(tmp_path / config.HISTORY_NAME) == ["Hello", "/undo"]


@pytest.mark.slow
def test_a_client_with_a_namespace_has_typed_nothing_here(tmp_path: Path) -> None:
    name = conversation(tmp_path, "Hello", namespace="client")
    typed(tmp_path / config.HISTORY_NAME, "Hello")
    with Journal.open(tmp_path / "conversations.sqlite3") as journal:
        journal.delete(name, namespace="client")
    assert left(tmp_path / config.HISTORY_NAME) == ["Hello"]


def test_a_history_that_cannot_be_read_is_told_and_nothing_is_deleted(tmp_path: Path) -> None:
    name = conversation(tmp_path, "Where is it?")
    (tmp_path / config.HISTORY_NAME).mkdir()
    with Journal.open(tmp_path / "conversations.sqlite3") as journal:
        with pytest.raises(StoreError, match="history cannot be changed"):
            journal.delete(name)
        assert [info.name for info in journal.conversations()] == [name]

"""The input line, driven through prompt_toolkit's pipe instead of a terminal."""

import stat
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from recollect import encryption
from recollect.cli.repl import WordsCompleter, history_at, make_prompt
from recollect.journal.journal import QUOTES, is_open, unquote

ENTER, ALT_ENTER = "\r", "\x1b\r"


def completer(commands: Iterable[str] = ("/undo", "/unknown", "/fork")) -> WordsCompleter:
    return WordsCompleter(
        commands, names=lambda: ["main", "idea"], names_after={"/load": lambda: ["a place"]}
    )


def typed(keys: str) -> str:
    """Return the message that these keys make."""
    with create_pipe_input() as source:
        source.send_text(keys)
        prompt = make_prompt(InMemoryHistory(), completer(), source=source, screen=DummyOutput())
        return prompt.prompt("")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (f"hello{ENTER}", "hello"),
        (f"one{ALT_ENTER}two{ENTER}", "one\ntwo"),
        (f"one\\{ENTER}two{ENTER}", "one\ntwo"),
        (f"\x1b[200~one\ntwo\x1b[201~{ENTER}", "one\ntwo"),
        (f"{QUOTES}one{ENTER}two{QUOTES}{ENTER}", f"{QUOTES}one\ntwo{QUOTES}"),
        (f"{QUOTES}{ENTER}{ENTER}one{ENTER}{QUOTES}{ENTER}", f"{QUOTES}\n\none\n{QUOTES}"),
        ("hello\n", "hello"),
    ],
)
def test_keys_make_messages(keys: str, message: str) -> None:
    assert message == typed(keys)


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("plain", "plain"),
        (f"{QUOTES}one\ntwo{QUOTES}", "one\ntwo"),
        (f" {QUOTES}\none\n  two\n{QUOTES} ", "one\n  two"),
        (f"{QUOTES}{QUOTES}", ""),
        (f"{QUOTES}never closed", f"{QUOTES}never closed"),
        (f"in {QUOTES}the middle{QUOTES}", f"in {QUOTES}the middle{QUOTES}"),
    ],
)
def test_a_block_says_what_is_inside(text: str, inner: str) -> None:
    assert inner == unquote(text)


def test_a_block_is_open_until_its_quotes_come() -> None:
    assert is_open(QUOTES)
    assert is_open(f"{QUOTES}one\n")
    assert not is_open(f"{QUOTES}one\n{QUOTES}")
    assert not is_open("one")


def completions(text: str) -> list[str]:
    found = completer().get_completions(Document(text), CompleteEvent())
    return [completion.text for completion in found]


def test_commands_and_names_are_completed() -> None:
    assert completions("/un") == ["/undo", "/unknown"]
    assert completions("/fork i") == ["idea"]
    assert completions("/load ") == ["a place"]


def test_messages_are_not_completed() -> None:
    assert completions("un") == []


def test_history_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "home" / "history"
    history_at(path).append_string("one\ntwo")
    assert list(history_at(path).load_history_strings()) == ["one\ntwo"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such bits")
def test_only_the_owner_can_read_the_history(tmp_path: Path) -> None:
    path = tmp_path / "home" / "history"
    path.parent.mkdir()
    path.touch(0o644)
    assert isinstance(history_at(path), FileHistory)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_home_that_cannot_be_had_is_no_reason_not_to_talk(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    assert isinstance(history_at(tmp_path / "home" / "history"), InMemoryHistory)


def test_an_open_chat_writes_no_history_into_a_folder_that_was_encrypted_meanwhile(
    tmp_path: Path,
) -> None:
    path = tmp_path / "home" / "history"
    history = history_at(path)
    history.append_string("before")
    path.unlink()
    (path.parent / encryption.KEY_FILE).write_text("{}")
    history.append_string("after")
    assert not path.exists()
    assert history.get_strings()[-1] == "after"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such bits")
def test_a_history_that_is_made_again_can_be_read_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "home" / "history"
    history = history_at(path)
    path.unlink()
    history.append_string("again")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

"""`recollect conversations` shows and changes the journal, and loads no model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pexpect
import pytest
from typer.testing import CliRunner, Result

from recollect.cli.main import app
from recollect.errors import (
    ConfigError,
    ConversationFileError,
    InvalidParameterError,
    NameTakenError,
    RecollectError,
    UnknownConversationError,
)
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import NewNode


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def journal(home: Path) -> Iterator[Journal]:
    with Journal.open(home / JOURNAL_NAME) as opened:
        yield opened


@pytest.fixture
def poem(journal: Journal) -> Journal:
    """Return the journal with one conversation of three turns and two branches."""
    chat = journal.create("poem", model="smollm2", fingerprint="f00d").id
    start = journal.append(chat, None, turn("Write a poem.", "Roses are red.", 5, 6))
    journal.append(chat, start[-1], turn("Another.", "Violets are blue.", 7), tip="main")
    journal.append(chat, start[0], [NewNode(role="assistant", content="The sea.")], tip="sea")
    return journal


def turn(question: str, answer: str, *token_ids: int) -> list[NewNode]:
    return [
        NewNode(role="user", content=question),
        NewNode(role="assistant", content=answer, token_ids=token_ids, finish_reason="stop"),
    ]


def run(*arguments: str, typed: str | None = None) -> Result:
    """Run a command that is to succeed."""
    result = CliRunner().invoke(
        app, ["conversations", *arguments], input=typed, catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result


def fail(error: type[RecollectError], *arguments: str) -> str:
    """Run a command that is to raise an error of ours, and return what it says."""
    with pytest.raises(error) as caught:
        CliRunner().invoke(app, ["conversations", *arguments], catch_exceptions=False)
    return str(caught.value)


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_without_conversations_the_list_says_how_to_begin_one(arguments: tuple[str, ...]) -> None:
    assert "`recollect chat`" in run(*arguments).output
    assert json.loads(run(*arguments, "--json").output) == []


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_the_list_is_what_comes_without_a_command(
    poem: Journal, arguments: tuple[str, ...]
) -> None:
    row = next(line for line in run(*arguments).output.splitlines() if "poem" in line)
    assert row.split()[:1] == ["poem"]
    for cell in ("3", "72 B", "smollm2", "main, sea"):
        assert cell in row


def test_the_name_of_a_strangers_model_moves_no_cursor(poem: Journal) -> None:
    """A file that is imported may call the model anything."""
    poem.create("other", model="bard\x1b[2J\u202edrab", fingerprint="f00d")
    assert "bard[2Jdrab" in run().output


def test_the_list_as_json_has_sizes_in_bytes_and_times_in_utc(poem: Journal) -> None:
    (fields,) = json.loads(run("--json").output)
    info = poem.conversations()[0]
    assert datetime.fromisoformat(fields.pop("created_at")) == info.created_at
    assert datetime.fromisoformat(fields.pop("updated_at")) == info.updated_at
    assert fields == {
        "name": "poem",
        "model": "smollm2",
        "fingerprint": "f00d",
        "turns": 3,
        "tips": ["main", "sea"],
        "size_bytes": 60 + 3 * 4,
    }


def test_show_draws_all_branches_and_where_the_tips_stand(poem: Journal) -> None:
    lines = run("show", "poem").output.splitlines()
    assert len(lines) == 4
    assert "Roses are red." in lines[1]
    assert "Violets are blue." in lines[2]
    assert "main (here)" in lines[2]
    assert "The sea." in lines[3]
    assert "sea" in lines[3].partition("←")[2]


def test_show_lets_nothing_move_the_cursor(journal: Journal) -> None:
    chat = journal.create("evil", model="m", fingerprint="f").id
    journal.append(chat, None, turn("a\x1b[2Jb", "\x07c[bold]d"), tip="main")
    output = run("show", "evil").output
    assert "\x1b" not in output
    assert "\x07" not in output
    assert "c[bold]d" in output


def test_rename_gives_it_another_name(poem: Journal) -> None:
    assert "'ode'" in run("rename", "poem", "ode").output
    assert [info.name for info in poem.conversations()] == ["ode"]


def test_rename_to_a_name_that_is_taken_changes_nothing(poem: Journal) -> None:
    poem.create("ode", model="m", fingerprint="f")
    assert "another name" in fail(NameTakenError, "rename", "poem", "ode")
    assert {info.name for info in poem.conversations()} == {"ode", "poem"}


def test_delete_needs_a_yes_where_nobody_can_be_asked(poem: Journal) -> None:
    assert "--yes" in fail(ConfigError, "delete", "poem")
    assert len(poem.conversations()) == 1
    run("delete", "poem", "--yes")
    assert poem.conversations() == []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("typed", "left"),
    [("n", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("", 1), ("y", 0)))],
)
def test_delete_asks_at_a_terminal(
    poem: Journal, terminal: Callable[..., Any], typed: str, left: int
) -> None:
    program = "from recollect.cli.main import app; app(['conversations', 'delete', 'poem'])"
    command = terminal(sys.executable, "-c", program)
    command.expect_exact("with 3 turns for good?")
    command.sendline(typed)
    command.expect(pexpect.EOF)
    command.close()
    assert command.exitstatus == 0
    assert len(poem.conversations()) == left


@pytest.mark.parametrize(
    "arguments",
    [("show", "no"), ("rename", "no", "x"), ("delete", "no", "--yes"), ("export", "no")],
)
def test_an_unknown_name_is_an_error_that_says_where_to_look(
    poem: Journal, arguments: tuple[str, ...]
) -> None:
    assert "`recollect conversations`" in fail(UnknownConversationError, *arguments)
    assert len(poem.conversations()) == 1


def test_what_is_exported_as_json_can_be_imported(poem: Journal, tmp_path: Path) -> None:
    run("export", "poem", "poem.json")
    assert "taken" not in run("import", "poem.json", "--name", "copy").output
    original, copy = poem.load("poem"), poem.load("copy")
    assert [node.content for node in copy.nodes] == [node.content for node in original.nodes]
    assert [node.token_ids for node in copy.nodes] == [node.token_ids for node in original.nodes]
    run("export", "copy", "copy.json")
    assert poem.check() == []


def test_export_prints_markdown_unless_told_otherwise(poem: Journal) -> None:
    assert "## You\n\nAnother.\n\n## Assistant\n\nViolets are blue." in run("export", "poem").output
    assert "The sea.\n" in run("export", "poem", "--branch", "sea").output
    assert json.loads(run("export", "poem", "--format", "json").output)["name"] == "poem"


def test_export_writes_what_the_file_is_called_for(poem: Journal, tmp_path: Path) -> None:
    run("export", "poem", "poem.md")
    assert (tmp_path / "poem.md").read_text("utf-8").startswith("# poem\n")
    run("export", "poem", "poem.txt", "--format", "json")
    assert json.loads((tmp_path / "poem.txt").read_text("utf-8"))["version"] == 1


def test_export_leaves_a_file_that_is_there_alone(poem: Journal, tmp_path: Path) -> None:
    (tmp_path / "poem.md").write_text("mine")
    assert "another name" in fail(ConversationFileError, "export", "poem", "poem.md")
    assert (tmp_path / "poem.md").read_text() == "mine"


def test_export_to_where_nothing_can_be_is_an_error(poem: Journal) -> None:
    assert "check the path" in fail(ConversationFileError, "export", "poem", "no/such/folder.md")


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"# poem\n", b'{"format": "other"}'])
def test_a_file_that_is_no_conversation_is_not_imported(
    journal: Journal, tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "file.json").write_bytes(data)
    assert "export" in fail(ConversationFileError, "import", "file.json")
    assert journal.conversations() == []


def test_a_file_that_is_not_there_is_an_error() -> None:
    assert "check the path" in fail(ConversationFileError, "import", "no.json")


def test_importing_the_same_name_again_says_how_to_give_another(
    poem: Journal, tmp_path: Path
) -> None:
    run("export", "poem", "poem.json")
    assert "another name" in fail(NameTakenError, "import", "poem.json")
    assert len(poem.conversations()) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
def test_an_export_for_which_there_is_no_room_leaves_no_file(poem: Journal, tmp_path: Path) -> None:
    chat_id = poem.find("poem").id  # type: ignore[union-attr]  # the fixture has kept it
    poem.append(chat_id, None, [NewNode(role="user", content="long " * 100_000)])
    program = (
        "import resource, signal, sys\n"
        "from recollect.cli.main import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "sys.argv = ['recollect', 'conversations', 'export', 'poem', 'poem.json']\n"
        "run()\n"
    )
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "poem.json cannot be used (File too large)" in done.stderr
    assert not (tmp_path / "poem.json").exists()


def test_words_are_found_in_all_conversations(poem: Journal) -> None:
    other = poem.create("garden", model="smollm2", fingerprint="f00d").id
    poem.append(other, None, turn("What is red?", "Many roses are."), tip="main")
    found = json.loads(run("search", "ROSES", "red", "--json").output)
    assert [(hit["conversation"], hit["branch"], hit["message"]) for hit in found] == [
        ("poem", "main", 2)
    ]
    found = json.loads(run("search", "roses are", "--json").output)
    assert [hit["conversation"] for hit in found] == ["garden", "poem"]
    output = run("search", "roses", "--limit", "1").output
    assert "Many roses are." in output
    assert "Roses are red." not in output
    assert "--limit shows more" in output
    assert "No message" in run("search", "(", '"').output
    assert "give at least one word" in fail(InvalidParameterError, "search", '"')


def test_the_list_comes_in_pages(journal: Journal) -> None:
    for number in range(5):
        journal.create(f"chat-{number}", model="smollm2", fingerprint="f00d")
    first = json.loads(run("list", "--limit", "3", "--json").output)
    assert [one["name"] for one in first] == ["chat-4", "chat-3", "chat-2"]
    rest = json.loads(run("--limit", "3", "--after", "chat-2", "--json").output)
    assert [one["name"] for one in rest] == ["chat-1", "chat-0"]

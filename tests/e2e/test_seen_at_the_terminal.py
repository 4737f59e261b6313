"""
What was wrong with chats once, as a person at the terminal sees it: costs, kills, two at once, full disks.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

import pexpect

from recollect.journal.journal import JOURNAL_NAME, Journal

RECOLLECT = [sys.executable, "-m", "recollect"]
REFERENCE = ["--model", "reference", "--ignore-eos", "-n", "5"]
LARGE = (50, 200)
READY, TAKEN = "\x1b[?2004h", "\x1b[?2004l"
"""What the line editor sends when it is ready for a line, and when it has taken one."""
CTRL_D = "\x04"
SEQUENCE = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")

Start = Callable[..., Any]


@pytest.fixture
def home(environment: dict[str, str]) -> Path:
    return Path(environment["RECOLLECT_HOME"])


@pytest.fixture
def start(terminal: Callable[..., Any], environment: dict[str, str]) -> Start:
    """Return what starts a program on a terminal; a chat, if no other is given."""

    def begin(*arguments: str, program: list[str] | None = None, ready: bool = True) -> Any:
        command = program or [*RECOLLECT, "chat", *REFERENCE]
        child = terminal(*command, *arguments, env=environment, dimensions=LARGE)
        if ready:
            child.expect_exact(READY)
        return child

    return begin


def type_in(child: Any, line: str) -> str:
    """Type a line, and return what is shown until the next one can be typed."""
    child.send(line + "\r")
    child.expect_exact(TAKEN)
    child.expect_exact(READY)
    return SEQUENCE.sub("", child.before)


def elsewhere(environment: dict[str, str], *arguments: str) -> None:
    """Run a command while a chat goes on."""
    command = [*RECOLLECT, *arguments]
    subprocess.run(command, env=environment, check=True, timeout=60)  # noqa: S603 - our own command


def end(child: Any) -> str:
    """Leave, see that it ends well, and return what is shown last."""
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "Traceback" not in child.before
    return SEQUENCE.sub("", child.before)


def refused(child: Any) -> str:
    """Return the one sentence by which a command is refused; a terminal breaks it between words."""
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2
    said = " ".join(SEQUENCE.sub("", child.before).split())
    assert said.startswith("recollect: ")
    assert said.count("recollect: ") == 1
    assert "Traceback" not in said
    return said


def files_of(home: Path) -> set[str]:
    return {file.relative_to(home).parts[0] for file in home.rglob("*") if file.is_file()}


def test_no_save_says_so_and_leaves_no_file(start: Start, home: Path) -> None:
    child = start("--no-save")
    assert "Nothing of this chat is saved" in child.before
    type_in(child, "one secret thing")
    assert "not saved, so it can have no checkpoint" in type_in(child, "/save here")
    assert "Saved" not in end(child)
    assert files_of(home) <= {"hashes"}


def test_the_first_message_reuses_nothing_that_was_there_before(start: Start) -> None:
    """What was read while it was typed is told apart from what was known."""
    child = start()
    child.send("a message of a few words that is typed slowly")
    with pytest.raises(pexpect.TIMEOUT):
        child.expect("(?s).{1000}", timeout=1.5)
    first = type_in(child, "")
    assert "reused" not in first
    assert re.search(r"\d new · (?:\d+ read ahead · )?first token", first)
    assert re.search(r"\d reused \(memory\)", type_in(child, "again"))
    end(child)


def test_a_question_survives_a_kill_and_is_answered_in_the_next_chat(start: Start) -> None:
    child = start("-n", "3000", "--name", "poem")
    child.send("what did I ask?\r")
    child.expect("(?s).{300}")
    child.kill(signal.SIGKILL)
    child.expect(pexpect.EOF)
    again = start("--resume", "poem")
    assert "you: what did I ask?" in again.before
    assert "This message has no reply yet: /regenerate generates one" in again.before
    assert "first token" in type_in(again, "/regenerate")
    assert "1 what did I ask? → " in type_in(again, "/tree")
    end(again)


def test_a_conversation_that_is_renamed_meanwhile_is_named_as_it_is_called(
    start: Start, environment: dict[str, str]
) -> None:
    child = start("--name", "poem")
    type_in(child, "one")
    elsewhere(environment, "conversations", "rename", "poem", "ode")
    assert "named 'ode'" in type_in(child, "/name")
    type_in(child, "two")
    assert "To go on: recollect chat --resume ode" in end(child)
    assert "main 2 turns (here)" in start("--resume", "ode").before


def test_a_conversation_that_is_deleted_meanwhile_is_not_said_to_be_saved(
    start: Start, environment: dict[str, str]
) -> None:
    child = start("--name", "poem")
    type_in(child, "one")
    elsewhere(environment, "conversations", "delete", "poem", "--yes")
    assert "has been deleted" in type_in(child, "/name")
    said = end(child)
    assert "Another program has deleted this conversation" in said
    assert "To go on" not in said


def test_the_second_chat_in_a_conversation_is_told_the_name_of_its_branch(start: Start) -> None:
    first, second = start("--name", "poem"), None
    type_in(first, "one")
    second = start("--resume", "poem")
    type_in(first, "left")
    told = type_in(second, "right")
    assert "this chat goes on in the new branch 'main-2'" in told
    assert "you (main-2)>" in SEQUENCE.sub("", told + second.after) or "main-2" in told
    end(second)
    end(first)
    assert "main 2 turns (here) · main-2 2 turns" in start("--resume", "poem").before


def test_a_reply_has_the_same_number_in_the_tree_and_in_show(
    start: Start, environment: dict[str, str]
) -> None:
    child = start("--name", "poem")
    for line in ("one", "/undo", "two", "/undo", "three"):
        type_in(child, line)
    drawn = dict(re.findall(r"1 (\w+) → .*?#(\d+)", type_in(child, "/tree")))
    assert set(drawn) == {"one", "two", "three"}
    show = [*RECOLLECT, "conversations", "show", "poem"]
    shown = start(program=show, ready=False)
    shown.expect(pexpect.EOF)
    for said, number in drawn.items():
        assert re.search(rf"{said}\b.*#{number}\b", shown.before), shown.before
    type_in(child, f"/goto #{drawn['one']}")
    assert re.search(r"1 one → .*main \(here\)", type_in(child, "/tree"))
    end(child)


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Runs Python where no file may grow beyond so many bytes, as on a full disk."""


def limited(size: int, *arguments: str) -> list[str]:
    chat = ["-m", "recollect", "chat", *REFERENCE, *arguments]
    return [sys.executable, "-c", LIMITED, str(size), *chat]


def test_a_full_disk_is_one_line_and_what_was_said_before_can_be_read(
    start: Start, environment: dict[str, str]
) -> None:
    child = start("--name", "poem")
    type_in(child, "one")
    end(child)
    full = start(program=limited(4096, "--resume", "poem"))
    assert "Resumed 'poem': main 1 turn" in full.before  # reading needs no room
    said = type_in(full, "two")
    assert re.search(r"recollect: .*(?:room|space|full)", said), said
    assert "Traceback" not in said
    assert "1 one → " in type_in(full, "/tree")
    end(full)
    again = start("--resume", "poem")
    assert "first token" in type_in(again, "three")
    end(again)


def test_a_full_disk_at_the_start_is_one_line(start: Start) -> None:
    said = refused(start(program=limited(0, "--name", "poem"), ready=False))
    assert re.search(r"room|space|full", said), said


@pytest.mark.parametrize("home", ["file", "file/below"])
def test_a_home_that_is_no_folder_is_one_line(
    start: Start, environment: dict[str, str], tmp_path: Path, home: str
) -> None:
    (tmp_path / "file").write_text("")
    environment["RECOLLECT_HOME"] = str(tmp_path / home)
    assert "file" in refused(start(ready=False))


def test_a_terminal_that_goes_away_takes_the_chat_along_and_loses_nothing(
    start: Start, home: Path
) -> None:
    child = start("--name", "poem")
    type_in(child, "one")
    child.close()  # the window is closed
    assert child.signalstatus in {None, signal.SIGHUP, signal.SIGKILL}
    with Journal.open(home / JOURNAL_NAME) as journal:
        assert journal.check() == []
        (info,) = journal.conversations()
        assert next(node.content for node in journal.load(info.id).nodes) == "one"


def test_a_full_context_names_the_ways_out_and_one_is_to_drop_the_oldest(start: Start) -> None:
    child = start()
    type_in(child, "x" * 4000)
    long = "y" * 5000
    said = type_in(child, long)
    assert re.search(r"recollect: .*context", said), said
    for way in ("/set overflow drop-oldest", "/undo", "/rewind N", "/edit N", "/new"):
        assert way in said
    assert "overflow is drop-oldest" in type_in(child, "/set overflow drop-oldest")
    assert "the oldest turn is left out" in type_in(child, long)
    end(child)


def test_an_error_breaks_between_words_where_the_terminal_is_narrow(
    terminal: Callable[..., Any], environment: dict[str, str]
) -> None:
    command = [*RECOLLECT, "chat", "--resume", "a conversation that was never begun"]
    child = terminal(*command, env=environment, dimensions=(24, 40))
    child.expect(pexpect.EOF)
    lines = [line for line in SEQUENCE.sub("", child.before).splitlines() if line]
    assert " ".join(map(str.strip, lines)) == (
        "recollect: There is no conversation 'a conversation that was never begun'; "
        "`recollect conversations` lists those that exist."
    )
    assert len(lines) > 2
    assert all(len(line) <= 40 for line in lines)

"""
A conversation outlives its process: `recollect chat` left, killed, resumed, and twice at once.
"""

import json
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
from recollect.journal.records import NewNode, StoredConversation

RECOLLECT = [sys.executable, "-m", "recollect"]
REFERENCE = ["--model", "reference", "--ignore-eos"]
SHORT = [*REFERENCE, "-n", "5"]
PROMPT = "you>"
TIMEOUT_S = 60
CTRL_D = "\x04"

Spawn = Callable[..., Any]


@pytest.fixture
def path(environment: dict[str, str]) -> Path:
    """Return where the journal is."""
    return Path(environment["RECOLLECT_HOME"]) / JOURNAL_NAME


def say(child: Any, line: str, until: str = "first token") -> None:
    """Type a line, press Enter, and wait for what ends it and for the next prompt."""
    child.send(line + "\r")
    child.expect(until)
    child.expect_exact(PROMPT)


def leave(child: Any) -> str:
    """Press Ctrl-D at the prompt, see that it ends well, and return what it says last."""
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    return str(child.before)


def kept(path: Path) -> list[StoredConversation]:
    """Return all conversations, the last used first, after a look through the whole journal."""
    with Journal.open(path) as journal:
        assert journal.check() == []
        return [journal.load(info.id) for info in journal.conversations()]


def said(conversation: StoredConversation, tip: str = "main") -> list[str]:
    """Return the user's messages up to a tip; each has its reply."""
    path = conversation.path(conversation.tips[tip])
    assert [node.role for node in path] == ["user", "assistant"] * (len(path) // 2)
    return [node.content for node in path if node.role == "user"]


def run(environment: dict[str, str], *arguments: str, text: str = "") -> Any:
    return subprocess.run(  # noqa: S603 - our own command
        [*RECOLLECT, *arguments],
        input=text,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_chat_goes_on_where_it_was_left(spawn: Spawn, path: Path) -> None:
    first = spawn(*SHORT)
    for line in ("one", "two"):
        say(first, line)
    assert "Saved. To go on: recollect chat --resume 2" in leave(first)  # the date
    second = spawn(*SHORT, "--resume")
    assert "main 2 turns (here)" in second.before
    assert "you: two" in second.before
    say(second, "three")
    leave(second)
    (conversation,) = kept(path)
    assert said(conversation) == ["one", "two", "three"]


def test_all_branches_are_there_again(spawn: Spawn, path: Path) -> None:
    first = spawn(*SHORT, "--name", "poem")
    say(first, "one")
    first.send("/fork idea\r")
    first.expect_exact("you (idea)>")
    first.send("two\r")
    first.expect("first token")
    first.expect_exact("you (idea)>")
    leave(first)
    second = spawn(*SHORT, "--resume", "poem")
    assert "main 1 turn (here) · idea 2 turns" in second.before
    second.send("/switch idea\r")
    second.expect_exact("you (idea)>")
    second.send("three\r")
    second.expect("first token")
    second.expect_exact("you (idea)>")
    leave(second)
    (conversation,) = kept(path)
    assert (said(conversation), said(conversation, "idea")) == (["one"], ["one", "two", "three"])


def test_resume_takes_the_last_one_or_one_by_name(spawn: Spawn, path: Path) -> None:
    for name in ("first", "second"):
        child = spawn(*SHORT, "--name", name)
        say(child, f"in {name}")
        leave(child)
    for arguments, name in ((["--resume"], "second"), (["--resume", "first"], "first")):
        child = spawn(*SHORT, *arguments)
        assert f"Resumed '{name}'" in child.before
        leave(child)
    assert sorted(said(conversation) for conversation in kept(path)) == [
        ["in first"],
        ["in second"],
    ]


def test_an_empty_chat_and_one_that_is_not_saved_leave_nothing(spawn: Spawn, path: Path) -> None:
    leave(spawn(*SHORT))
    assert kept(path) == []
    child = spawn(*SHORT, "--no-save")
    say(child, "one")
    assert "Kept" not in leave(child)
    assert kept(path) == []


def test_a_chat_that_is_killed_in_a_reply_has_all_finished_turns_and_the_question(
    spawn: Spawn, path: Path
) -> None:
    """In each of 10 rounds one turn is finished and the next one killed before its end."""
    arguments = [*REFERENCE, "-n", "4000", "--overflow", "drop-oldest"]
    finished: list[str] = []
    for number in range(10):
        child = spawn(*arguments, *(["--resume"] if finished else ["--name", "poem"]))
        child.send(f"finished {number}\r")
        child.expect("(?s).{300}")
        child.sendintr()
        child.expect("stopped, /continue goes on · ")
        child.expect_exact(PROMPT)
        finished.append(f"finished {number}")
        child.send(f"killed {number}\r")
        child.expect("(?s).{300}")
        child.kill(signal.SIGKILL)
        child.expect(pexpect.EOF)
        child.close()
        assert child.signalstatus == signal.SIGKILL
        (conversation,) = kept(path)
        question = next(n for n in conversation.nodes if n.id == conversation.tips["main"])
        assert (question.role, question.content) == ("user", f"killed {number}")
        # What is said after each kill takes the place of the question that got no reply.
        before = [node.content for node in conversation.path(question.parent_id)]
        assert before[::2] == finished
        assert len(conversation.nodes) == 2 * len(finished) + number + 1


def test_two_chats_in_one_home_do_not_disturb_each_other(spawn: Spawn, path: Path) -> None:
    left, right = spawn(*SHORT), spawn(*SHORT)
    for number in range(3):
        say(left, f"left {number}")
        say(right, f"right {number}")
    leave(left)
    leave(right)
    expected = [[f"{side} {number}" for number in range(3)] for side in ("left", "right")]
    assert expected == sorted(said(conversation) for conversation in kept(path))


def test_two_chats_in_one_conversation_make_branches_of_it(spawn: Spawn, path: Path) -> None:
    first = spawn(*SHORT, "--name", "poem")
    say(first, "one")
    second = spawn(*SHORT, "--resume", "poem")
    say(first, "left")
    second.send("right\r")
    second.expect("first token")
    second.expect_exact("this chat goes on in the new branch")
    second.expect_exact("you (main-2)>")
    leave(first)
    leave(second)
    (conversation,) = kept(path)
    asked = [node for node in conversation.nodes if node.role == "user"]
    assert [node.content for node in asked] == ["one", "left", "right"]
    assert asked[1].parent_id == asked[2].parent_id
    assert said(conversation) == ["one", "left"]
    assert said(conversation, "main-2") == ["one", "right"]


def test_a_conversation_of_another_model_goes_on_and_says_so(spawn: Spawn, path: Path) -> None:
    with Journal.open(path) as journal:
        chat = journal.create("poem", model="bard", fingerprint="f00d").id
        asked = NewNode(role="user", content="one")
        reply = NewNode(role="assistant", content="uno", token_ids=[7], fingerprint="f00d")
        journal.append(chat, None, [asked, reply], tip="main")
    child = spawn(*SHORT, "--resume")
    assert "1 reply of this branch came from bard: reference reads the text" in child.before
    say(child, "two", until="generated by this model")
    leave(child)
    again = spawn(*SHORT, "--resume")
    assert "1 reply of this branch came from another model" in again.before
    leave(again)
    (conversation,) = kept(path)
    assert (said(conversation), conversation.model) == (["one", "two"], "reference")


def test_the_model_of_a_conversation_is_the_one_it_goes_on_with(
    environment: dict[str, str], path: Path
) -> None:
    with Journal.open(path) as journal:
        journal.create("old", model="bard", fingerprint="f00d")
    done = run(environment, "chat", "--resume", "old", text="hi\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("recollect: There is no model 'bard'")
    done = run(environment, "chat", *SHORT, "--resume", "old", "--json", text="hi\n")
    assert done.returncode == 0
    done = run(environment, "chat", "--resume", "--json", "-n", "5", text="again\n")
    assert json.loads(done.stdout)["prompt"] == "again"


def test_a_pipe_keeps_what_has_a_name_and_nothing_else(
    environment: dict[str, str], path: Path
) -> None:
    assert run(environment, "chat", *SHORT, text="one\n").returncode == 0
    assert not path.exists()
    for arguments, text in ((["--name", "poem"], "one\ntwo\n"), (["--resume", "poem"], "three\n")):
        assert run(environment, "chat", *SHORT, "--lines", *arguments, text=text).returncode == 0
    (conversation,) = kept(path)
    assert said(conversation) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume"], "There is no conversation yet"),
        (["--resume", "nowhere"], "There is no conversation 'nowhere'"),
        (["--resume", "--no-save"], "--no-save saves nothing"),
        (["--resume", "--system", "be brief"], "--system is for a new conversation"),
        (["--name", "-x"], "'-x' cannot be the name of a conversation"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(
    environment: dict[str, str], arguments: list[str], says: str
) -> None:
    done = run(environment, "chat", *SHORT, *arguments, text="hi\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"recollect: {says}")
    assert done.stderr.count("\n") == 1


def test_what_was_said_can_be_listed_shown_and_exported(
    environment: dict[str, str], path: Path
) -> None:
    run(environment, "chat", *SHORT, "--lines", "--name", "poem", text="one\ntwo\n")
    (listed,) = json.loads(run(environment, "conversations", "--json").stdout)
    assert (listed["name"], listed["turns"], listed["model"]) == ("poem", 2, "reference")
    assert "2 two → " in run(environment, "conversations", "show", "poem").stdout
    exported = json.loads(
        run(environment, "conversations", "export", "poem", "--format", "json").stdout
    )
    assert [node["content"] for node in exported["nodes"] if node["role"] == "user"] == [
        "one",
        "two",
    ]
    assert run(environment, "conversations", "delete", "poem", "--yes").returncode == 0
    assert kept(path) == []


def test_what_is_typed_is_read_before_enter(spawn: Spawn) -> None:
    """A machine may be too busy for it in one pause, and not in all of them."""
    child = spawn(*SHORT)
    ahead = 0
    for attempt in range(5):
        typed = f"message {attempt} " + "of some words " * 20
        child.send(typed)
        with pytest.raises(pexpect.TIMEOUT):  # a user who thinks, as long as nothing is drawn
            child.expect("(?s).{1000}", timeout=1.5)
        child.send("\r")
        child.expect(r"new · (?:([\d,]+) read ahead)?")
        ahead = int((child.match[1] or "0").replace(",", ""))
        child.expect_exact(PROMPT)
        child.send("/rewind 0\r")
        child.expect_exact(PROMPT)
        if ahead >= len(typed) - 2:
            break
    assert ahead >= len(typed) - 2  # a byte is a token, and what ends it is said without spaces
    leave(child)

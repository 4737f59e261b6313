"""The first walk of a new user, from an empty data folder to a conversation that goes on in a new process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

import pexpect
import platformdirs

from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.models.catalog import DEFAULT_MODEL

RECOLLECT = [sys.executable, "-m", "recollect"]
SIZE = (50, 200)
READY = "\x1b[?2004h"
WAIT_S = 300


class Walk:
    """A chat, a line after another."""

    def __init__(self, child: Any) -> None:
        self._child = child
        child.timeout = WAIT_S
        child.expect_exact(READY)
        self.welcome: str = child.before

    def type(self, line: str) -> str:
        """Type a line, and return what comes until the next one can be typed."""
        self._child.send(line + "\r")
        self._child.expect_exact("\x1b[?2004l")
        self._child.expect_exact(READY)
        return str(self._child.before)

    def leave(self) -> str:
        """Leave by a lone `exit`, and return what is said last."""
        self._child.send("exit\r")
        self._child.expect_exact("Leave the chat? [Y/n]")
        self._child.send("\r")
        self._child.expect(pexpect.EOF)
        self._child.close()
        assert self._child.exitstatus == 0
        return str(self._child.before)


@pytest.fixture
def begin(terminal: Callable[..., Any], environment: dict[str, str]) -> Callable[..., Walk]:
    def start(*arguments: str) -> Walk:
        chat = [*RECOLLECT, "chat", *arguments]
        return Walk(terminal(*chat, env=environment, dimensions=SIZE))

    return start


def walk(begin: Callable[..., Walk], home: Path, *model: str) -> tuple[str, list[str]]:
    """Do all of it; return what was shown at first, and the replies."""
    first = begin(*model, "--name", "trip")
    assert "tokens of context" in first.welcome
    assert "? lists commands and keys" in first.welcome
    cost = first.type("What is the capital of France?")
    assert " new · " in cost
    assert "reused" not in cost
    assert "reused (memory)" in first.type("And of Italy?")
    tree = first.type("/tree")
    assert "1 What is the capital of France? → " in tree
    assert "2 And of Italy? → " in tree
    assert "main is after turn 1" in first.type("/rewind 1")
    assert "Now on the branch spain" in first.type("/fork spain")
    assert "reused (memory)" in first.type("And of Spain?")
    tree = first.type("/tree")
    assert (
        tree.index("2 And of Italy?") < tree.index("2 And of Spain?") < tree.index("spain (here)")
    )
    assert "Saved. To go on: recollect chat --resume trip" in first.leave()

    again = begin("--resume", "trip")
    assert "Resumed 'trip': " in again.welcome
    assert "No model was named" not in again.welcome  # they know by now
    assert "main 1 turn" in again.welcome
    assert "spain 2 turns" in again.welcome
    again.type("/switch spain")
    assert "reused (" in again.type("And of Portugal?")  # from disk: it is another process
    assert "3 And of Portugal?" in again.type("/tree")
    again.leave()
    with Journal.open(home / JOURNAL_NAME) as journal:
        assert journal.check() == []
        stored = journal.load(journal.conversations()[0].id)
        path = stored.path(stored.tips["spain"])
        replies = [node.content for node in stored.nodes if node.role == "assistant"]
    assert [node.content for node in path if node.role == "user"] == [
        "What is the capital of France?",
        "And of Spain?",
        "And of Portugal?",
    ]
    return first.welcome, replies


def test_the_walk_without_weights(begin: Callable[..., Walk], environment: dict[str, str]) -> None:
    welcome, replies = walk(
        begin, Path(environment["RECOLLECT_HOME"]), "--model", "reference", "-n", "20"
    )
    assert "No model was named" not in welcome  # they named their model
    assert len(replies) == 4


@pytest.mark.model
def test_the_walk_with_the_default_model(
    begin: Callable[..., Walk], environment: dict[str, str]
) -> None:
    home = Path(environment["RECOLLECT_HOME"])
    home.mkdir(mode=0o700)
    (home / "models").symlink_to(Path(platformdirs.user_data_dir("recollect")) / "models")
    welcome, replies = walk(begin, home, "-t", "0", "-n", "60")
    assert f"No model was named, so {DEFAULT_MODEL} replies (98 MB): SmolLM2 135M" in welcome
    assert "Better ones: qwen2.5-coder-0.5b" in welcome
    assert all(replies)


def test_the_first_start_says_what_is_fetched_before_it_is(
    terminal: Callable[..., Any], environment: dict[str, str]
) -> None:
    chat = [*RECOLLECT, "chat"]
    child = terminal(*chat, env=environment | {"RECOLLECT_OFFLINE": "1"}, dimensions=SIZE)
    child.expect(pexpect.EOF)
    child.close()
    said = child.before
    assert said.index("It is fetched once, now.") < said.index("recollect: ")
    assert "Traceback" not in said
    assert child.exitstatus == 2

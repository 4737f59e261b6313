"""
Ctrl-C is quiet, whenever it comes: from the first line of our own code to the end of the process.

Each seed is a moment: while the chat starts, in a reply, or while it ends. What was said is in the journal.
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

import signal

import pexpect

from recollect.journal.journal import JOURNAL_NAME, Journal

STARTED = """
import runpy, signal, sys
sys.orig_argv = ["python", "-m", "recollect", *sys.argv[1:]]
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "-m"
print("started", flush=True)
runpy.run_module("recollect", run_name="__main__", alter_sys=True)
"""
"""`python -m recollect` from the moment on where Python itself is there."""
ARGUMENTS = ["chat", "--model", "reference", "--ignore-eos", "-n", "3000", "--name", "poem"]
READY, TAKEN = "\x1b[?2004h", "\x1b[?2004l"
"""What the line editor sends when it is ready for a line, and when it has taken one."""
CTRL_D = "\x04"
MOST_START_S, MOST_REPLY_S, MOST_END_S = 4.0, 1.0, 0.4
"""Until when the moments are: a start, a reply and an end take about so long, or less."""


def start(terminal: Callable[..., Any], environment: dict[str, str]) -> Any:
    child = terminal(sys.executable, "-c", STARTED, *ARGUMENTS, env=environment)
    child.expect_exact("started")
    return child


def say(child: Any, line: str) -> str:
    """Type a line as soon as the chat is ready for one, and return what was shown until then."""
    child.expect_exact(READY)
    shown: str = child.before
    child.send(line)
    child.expect_exact(TAKEN)
    return shown


def end_of(child: Any) -> tuple[str, int]:
    """Return what came last, and the exit status as a shell has it."""
    child.expect(pexpect.EOF)
    return child.before, status_of(child)


def status_of(child: Any) -> int:
    child.close()
    return int(child.exitstatus if child.signalstatus is None else 128 + child.signalstatus)


def require_quiet(*shown: str) -> None:
    for text in shown:
        assert not any(word in text for word in ("Traceback", "KeyboardInterrupt", "ignored")), text


def asked(environment: dict[str, str]) -> list[str]:
    """Return what was said in the conversation, after a look through the whole journal."""
    path = Path(environment["RECOLLECT_HOME"]) / JOURNAL_NAME
    if not path.exists():
        return []
    with Journal.open(path) as journal:
        assert journal.check() == []
        found = [journal.load(info.id) for info in journal.conversations()]
    return [node.content for one in found for node in one.nodes if node.role == "user"]


@pytest.mark.parametrize("seed", range(10))
def test_while_it_starts(
    seed: int, terminal: Callable[..., Any], environment: dict[str, str]
) -> None:
    moment = random.Random(seed).uniform(0, MOST_START_S)  # noqa: S311 - the same every time
    child = start(terminal, environment)
    time.sleep(moment)
    child.sendintr()
    # Either it ends, or it was ready for a line already, and the next key ends it.
    seen = child.expect([pexpect.EOF, "Ctrl-C again, or Ctrl-D, to leave"])
    before = child.before
    if seen == 1:
        child.send(CTRL_D)
        after, status = end_of(child)
        require_quiet(before, after)
        assert status == 0
    else:
        require_quiet(before)
        assert status_of(child) == 128 + signal.SIGINT
    assert asked(environment) == []


@pytest.mark.parametrize("seed", range(10))
def test_in_a_reply(seed: int, terminal: Callable[..., Any], environment: dict[str, str]) -> None:
    moment = random.Random(seed).uniform(0, MOST_REPLY_S)  # noqa: S311 - the same every time
    child = start(terminal, environment)
    say(child, "hello\r")
    time.sleep(moment)
    child.sendintr()
    stopped = say(child, "again\r")
    child.sendintr()
    child.expect_exact(READY)
    child.send(CTRL_D)
    after, status = end_of(child)
    require_quiet(stopped, after)
    assert status == 0
    said = asked(environment)
    assert said in (["hello", "again"], ["hello"], ["again"], [])
    # A reply that was shown is there; one that was stopped before it began leaves nothing.
    if "before it began" not in stopped:
        assert "hello" in said
        assert "Saved. To go on: recollect chat --resume poem" in after


@pytest.mark.parametrize("seed", range(10))
def test_while_it_ends(
    seed: int, terminal: Callable[..., Any], environment: dict[str, str]
) -> None:
    moment = random.Random(seed).uniform(0, MOST_END_S)  # noqa: S311 - the same every time
    child = start(terminal, environment)
    say(child, "hello\r")
    time.sleep(0.3)
    child.sendintr()
    stopped = say(child, CTRL_D)
    time.sleep(moment)
    child.sendintr()
    after, status = end_of(child)
    require_quiet(after)
    assert status in {0, 128 + signal.SIGINT}
    # On a busy machine it had not begun, and leaves nothing.
    assert asked(environment) == ([] if "before it began" in stopped else ["hello"])


@pytest.mark.parametrize("seed", range(5))
def test_in_the_one_reply_to_a_question(
    seed: int, terminal: Callable[..., Any], environment: dict[str, str]
) -> None:
    moment = random.Random(seed).uniform(0, MOST_REPLY_S)  # noqa: S311 - the same every time
    question = [*ARGUMENTS, "hello"]
    child = terminal(sys.executable, "-c", STARTED, *question, env=environment)
    child.expect_exact("\x1b[?25h")  # the bar that is drawn while it loads is gone
    child.expect("(?s).{100}")  # of the reply
    time.sleep(moment)
    child.sendintr()
    after, status = end_of(child)
    require_quiet(after)
    assert status in {0, 128 + signal.SIGINT}
    assert asked(environment) == ["hello"]

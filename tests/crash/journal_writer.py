"""
Writes turns to a journal until it is killed; run by `test_journal.py`, never by pytest.

Reads commands, a line of words between tabs each. `start FILE WRITER COUNT` forks a process that
appends that many turns (0: without end) to the conversation `chat`, and says which of them are
acknowledged; `wait WRITER` says when it has ended. Forking spares each of a hundred processes the
imports. This process itself never opens a journal: nothing of SQLite's is carried across a fork.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

from recollect.errors import NameTakenError
from recollect.journal.journal import Journal
from recollect.journal.records import NewNode


def say(line: str) -> None:
    """Write a line in one piece: several processes share this pipe."""
    os.write(1, f"{line}\n".encode())


def turn(writer: str, number: int) -> list[NewNode]:
    """Return a turn of several pages now and then, so that a commit is more than one write."""
    length = 4000 if number % 5 == 0 else 40
    return [
        NewNode(role="user", content=f"{writer} {number}"),
        NewNode(
            role="assistant",
            content=f"reply to {writer} {number}",
            token_ids=range(length),
            finish_reason="stop",
            usage={"generated_tokens": length},
            fingerprint="f00d",
        ),
    ]


def write(path: Path, writer: str, count: int) -> None:
    """Append turns, each after the one before, and acknowledge each when `append` has returned."""
    with Journal.open(path) as journal:
        with contextlib.suppress(NameTakenError):
            journal.create("chat", model="m", fingerprint="f00d")
        chat, parent, number = journal.load("chat").id, None, 0
        while number < count or not count:
            ids = journal.append(chat, parent, turn(writer, number), tip=f"tip-{writer}")
            say(f"ack {writer} {number} {ids[0]} {ids[1]}")
            parent, number = ids[1], number + 1


def start(path: Path, writer: str, count: int) -> int:
    """Return the id of a new process that writes."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        write(path, writer, count)
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)  # not into the loop below, which is the parent's


def main() -> None:
    pids = {}
    for line in sys.stdin:
        command, *words = line.rstrip("\n").split("\t")
        if command == "start":
            file, writer, count = words
            pids[writer] = start(Path(file), writer, int(count))
            say(f"pid {writer} {pids[writer]}")
        else:
            (writer,) = words
            _, status = os.waitpid(pids.pop(writer), 0)
            say(f"end {writer} {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()

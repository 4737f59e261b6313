"""`kill -9` at any moment loses no turn that was acknowledged, and leaves no half of one."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recollect.errors import UnknownConversationError
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import StoredConversation

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a way to start quickly")

WRITER = Path(__file__).with_name("journal_writer.py")


@dataclass
class Writers:
    """The processes of `journal_writer.py`, and what they have acknowledged."""

    process: "subprocess.Popen[str]"
    pids: dict[str, int] = field(default_factory=dict)
    acknowledged: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """For each writer the ids of its turns, in their order."""

    def start(self, path: Path, writer: str, count: int = 0) -> None:
        """Start a process and return when it is there; what it does first is not waited for."""
        self.acknowledged[writer] = []
        self._command("start", str(path), writer, str(count))
        while writer not in self.pids:
            self._read()

    def kill(self, writer: str) -> None:
        os.kill(self.pids[writer], signal.SIGKILL)

    def end(self, writer: str) -> int:
        """Wait for the end of a process and return its exit status."""
        self._command("wait", writer)
        del self.pids[writer]
        while (status := self._read()) is None:
            pass
        return status

    def _command(self, *words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\t".join(words) + "\n")
        self.process.stdin.flush()

    def _read(self) -> int | None:
        """Take in one line; return the exit status if it says one."""
        assert self.process.stdout is not None
        kind, writer, *values = self.process.stdout.readline().split()
        numbers = [int(value) for value in values]
        if kind == "ack":
            number, user_id, reply_id = numbers
            assert number == len(self.acknowledged[writer])
            self.acknowledged[writer].append((user_id, reply_id))
        elif kind == "pid":
            (self.pids[writer],) = numbers
        else:
            return numbers[0]
        return None


@pytest.fixture
def writers() -> Iterator[Writers]:
    command = [sys.executable, str(WRITER)]
    process = subprocess.Popen(  # noqa: S603 - ourselves
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    started = Writers(process)
    with process:
        try:
            yield started
        finally:
            for writer in list(started.pids):
                started.kill(writer)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / JOURNAL_NAME


def assert_nothing_is_lost(stored: StoredConversation, writers: Writers) -> int:
    """Check every turn that was ever acknowledged; return how many more there are."""
    nodes = {node.id: node for node in stored.nodes}
    for writer, turns in writers.acknowledged.items():
        for number, (user_id, reply_id) in enumerate(turns):
            user, reply = nodes[user_id], nodes[reply_id]
            assert user.content == f"{writer} {number}"
            assert reply.content == f"reply to {writer} {number}"
            assert reply.parent_id == user_id
            assert reply.token_ids == tuple(range(4000 if number % 5 == 0 else 40))
    answered = {node.parent_id for node in stored.nodes if node.role == "assistant"}
    assert answered == {node.id for node in stored.nodes if node.role == "user"}, "half a turn"
    unsaid = 0
    for writer, turns in writers.acknowledged.items():
        kept = len(stored.path(stored.tips.get(f"tip-{writer}"))) // 2
        # The tip moves with its turn, and between the commit and the word of it comes the kill.
        assert kept - len(turns) in (0, 1)
        unsaid += kept - len(turns)
    assert len(stored.nodes) == 2 * (unsaid + sum(map(len, writers.acknowledged.values())))
    return unsaid


def test_a_hundred_kills_at_random_moments_lose_no_turn(writers: Writers, path: Path) -> None:
    """Two of three rounds kill one process, the third two that write at once."""
    chance = random.Random(20260301)  # noqa: S311 - moments, no secrets
    for number in range(100):
        names = [f"{number}a", f"{number}b"][: 2 if number % 3 == 2 else 1]
        for name in names:
            writers.start(path, name)
        for name in names:
            # No sleep for something to happen: the moment is what is tried out.
            time.sleep(chance.uniform(0, 0.06))
            writers.kill(name)
        for name in names:
            assert writers.end(name) == -signal.SIGKILL
        if number % 5 == 4:
            with Journal.open(path) as journal:
                assert journal.check() == []
                assert_nothing_is_lost(journal.load("chat"), writers)
    total = sum(map(len, writers.acknowledged.values()))
    assert total > 100, "the processes were killed before they had done anything"


def test_a_kill_while_the_file_is_being_made_leaves_one_that_can_be_used(
    writers: Writers, tmp_path: Path
) -> None:
    chance = random.Random(20260302)  # noqa: S311
    for number in range(30):
        path = tmp_path / f"{number}" / JOURNAL_NAME
        writers.acknowledged.clear()
        writers.start(path, "a")
        time.sleep(chance.uniform(0, 0.012))  # as above
        writers.kill("a")
        writers.end("a")
        with Journal.open(path) as journal:
            assert journal.check() == []
            try:
                stored = journal.load("chat")
            except UnknownConversationError:
                assert writers.acknowledged == {"a": []}
                continue
            assert_nothing_is_lost(stored, writers)


def test_two_processes_that_write_at_once_lose_nothing(writers: Writers, path: Path) -> None:
    for name in ("a", "b"):
        writers.start(path, name, 100)
    assert [writers.end(name) for name in ("a", "b")] == [0, 0]
    with Journal.open(path) as journal:
        assert journal.check() == []
        assert assert_nothing_is_lost(journal.load("chat"), writers) == 0
    assert [len(turns) for turns in writers.acknowledged.values()] == [100, 100]

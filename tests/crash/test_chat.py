"""
`kill -9` of a whole `recollect chat` at any moment loses no turn whose reply was printed, and leaves
no KV on disk that is not as it was written.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recollect.conversation.journal import JOURNAL_NAME, Journal
from recollect.conversation.records import StoredConversation
from recollect.kv.disk import STORE_FOLDER, DiskStore
from recollect.kv.disk_audit import holdings, problems

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a way to start quickly")

WRITER = Path(__file__).with_name("chat_writer.py")
ROUNDS = 200
ROUNDS_A_CONVERSATION = 10
PROMPTS = 2000
"""More than a process can say before it is killed."""
OPTIONS = ["--model", "reference", "--ignore-eos", "-n", "6", "--json", "--overflow", "drop-oldest"]


class Chats:
    """The processes of `chat_writer.py`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._pids: dict[str, int] = {}

    def start(self, name: str, out: Path, *arguments: str) -> None:
        self._pids[name] = self._ask("start", name, str(out), *arguments)

    def kill(self, name: str) -> None:
        """Kill a process, which has not ended by itself."""
        os.kill(self._pids.pop(name), signal.SIGKILL)
        assert self._ask("wait", name) == -signal.SIGKILL

    def kill_all(self) -> None:
        for name in list(self._pids):
            self.kill(name)

    def _ask(self, *words: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(words) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def chats(home: Path) -> Iterator[Chats]:
    process = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, str(WRITER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "RECOLLECT_HOME": str(home)},
        text=True,
    )
    started = Chats(process)
    with process:
        try:
            yield started
        finally:
            started.kill_all()


def printed(out: Path) -> list[tuple[str, str]]:
    """Return the prompts and replies of the lines that were printed to their end."""
    lines = out.read_bytes().split(b"\n")[:-1] if out.exists() else []
    return [(turn["prompt"], turn["reply"]) for turn in map(json.loads, lines)]


def assert_nothing_is_lost(
    conversation: StoredConversation, runs: list[list[tuple[str, str]]]
) -> None:
    """Check that each turn that was printed is there, after the one that its process said before."""
    nodes = {node.id: node for node in conversation.nodes}
    asked = {node.content: node for node in conversation.nodes if node.role == "user"}
    replies = {node.parent_id: node for node in conversation.nodes if node.role == "assistant"}
    assert {node.id for node in asked.values()} == set(replies), "half a turn"
    for run in runs:
        for number, (prompt, reply) in enumerate(run):
            assert replies[asked[prompt].id].content == reply
            if number:
                before = nodes[asked[prompt].parent_id or 0]
                assert before is replies[asked[run[number - 1][0]].id]
    tip = conversation.tips["main"]
    assert tip is None or nodes[tip].role == "assistant"


def kv_blocks(home: Path) -> int:
    """Check all KV on disk, and return how many blocks there are."""
    store = DiskStore(home / STORE_FOLDER, budget_bytes=64 << 20)
    try:
        assert list(problems(store)) == []
        return sum(holding.blocks for holding in holdings(store))
    finally:
        store.close()


def test_two_hundred_kills_of_a_chat_lose_no_turn_and_leave_no_wrong_kv(
    chats: Chats, home: Path, tmp_path: Path
) -> None:
    """Every third round two processes are in the same conversation."""
    chance = random.Random(20260303)  # noqa: S311 - moments, no secrets
    total, kept = 0, 0
    for first in range(0, ROUNDS, ROUNDS_A_CONVERSATION):
        conversation, runs = f"chat {first}", []
        for number in range(first, first + ROUNDS_A_CONVERSATION):
            with Journal.open(home / JOURNAL_NAME) as journal:
                exists = conversation in {info.name for info in journal.conversations()}
            option = "--resume" if exists else "--name"
            names = [f"{number}a", f"{number}b"][: 2 if exists and number % 3 == 2 else 1]
            for name in names:
                prompts = tmp_path / f"{name}.txt"
                prompts.write_text("".join(f"{name} {n}\n" for n in range(PROMPTS)))
                arguments = [*OPTIONS, "--prompts", str(prompts), option, conversation]
                chats.start(name, tmp_path / f"{name}.json", *arguments)
            for name in names:
                # No sleep for something to happen: the moment is what is tried out.
                time.sleep(chance.uniform(0, 0.25))
                chats.kill(name)
            runs += [printed(tmp_path / f"{name}.json") for name in names]
        total += sum(map(len, runs))
        with Journal.open(home / JOURNAL_NAME) as journal:
            assert journal.check() == []
            if any(runs):
                assert_nothing_is_lost(journal.load(conversation), runs)
        kept_before, kept = kept, kv_blocks(home)
        assert kept > kept_before, "no KV was being written"
    assert total > ROUNDS, "the processes were killed before they had said anything"

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

from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import StoredConversation
from recollect.kv.disk import STORE_FOLDER, DiskStore

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
    unanswered = {node.id for node in asked.values()} - set(replies)
    assert not set(replies) - {node.id for node in asked.values()}, "a reply to nothing"
    assert len(unanswered) <= len(runs), (
        "each process was killed once, and asks one thing at a time"
    )
    assert len(asked) == sum(node.role == "user" for node in conversation.nodes), "said twice"
    for run in runs:
        for number, (prompt, reply) in enumerate(run):
            assert replies[asked[prompt].id].content == reply
            if number:
                before = nodes[asked[prompt].parent_id or 0]
                assert before is replies[asked[run[number - 1][0]].id]
    for tip in conversation.tips.values():
        assert tip is None or nodes[tip].role == "assistant" or tip in unanswered


def kv_blocks(home: Path) -> int:
    """Check all KV on disk, and return how many blocks there are."""
    store = DiskStore(home / STORE_FOLDER, budget_bytes=64 << 20)
    try:
        assert list(store.problems()) == []
        return sum(holding.blocks for holding in store.holdings())
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
        kept = kv_blocks(home)
    # Of all rounds, not of each: on a busy machine ten processes may be killed before they write.
    assert kept > ROUNDS_A_CONVERSATION, "no KV was being written"
    assert total > ROUNDS, "the processes were killed before they had said anything"


def wait_for_question(home: Path, conversation: str) -> StoredConversation:
    """Return the conversation as soon as something has been asked in it that has no reply yet."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with Journal.open(home / JOURNAL_NAME) as journal:
            names = {info.name for info in journal.conversations()}
            stored = journal.load(conversation) if conversation in names else None
        if stored is not None and stored.nodes and stored.nodes[-1].role == "user":
            return stored
        time.sleep(0.005)
    raise AssertionError("nothing was kept before its reply")


LONG = ["--model", "reference", "--ignore-eos", "-n", "6000", "--json"]


@pytest.mark.parametrize("said_after", ["What is a prefix?", "Something else"])
def test_a_question_survives_a_kill_during_its_reply_and_is_there_once(
    chats: Chats, home: Path, tmp_path: Path, said_after: str
) -> None:
    question = tmp_path / "question.txt"
    question.write_text("What is a prefix?\n")
    system = ["--system", "Be brief."]
    chats.start(
        "first", tmp_path / "first.json", *LONG, *system, "--prompts", str(question), "--name", "a"
    )
    stored = wait_for_question(home, "a")
    chats.kill("first")
    assert printed(tmp_path / "first.json") == []
    assert [(node.role, node.content) for node in stored.nodes] == [
        ("system", "Be brief."),
        ("user", "What is a prefix?"),
    ]
    assert stored.tips == {"main": stored.nodes[-1].id}
    again = tmp_path / "again.txt"
    again.write_text(f"{said_after}\n" + "".join(f"more {n}\n" for n in range(PROMPTS)))
    chats.start("second", tmp_path / "b.json", *OPTIONS, "--prompts", str(again), "--resume", "a")
    while not (turns := printed(tmp_path / "b.json")):
        time.sleep(0.005)
    chats.kill("second")
    assert turns[0][0] == said_after
    with Journal.open(home / JOURNAL_NAME) as journal:
        assert journal.check() == []
        stored = journal.load("a")
    asked = [node for node in stored.nodes if node.role == "user"]
    assert [node.content for node in asked].count("What is a prefix?") == 1
    by_content = {node.content: node for node in asked}
    assert by_content[said_after].parent_id == stored.nodes[0].id, "it follows the instructions"
    replies = {node.parent_id: node.content for node in stored.nodes if node.role == "assistant"}
    assert replies[by_content[said_after].id] == turns[0][1]

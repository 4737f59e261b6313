"""What is read of the changes that triggers note: names of messages, and what reading them costs."""

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from recollect.errors import UnknownConversationError
from recollect.journal.changes import changes_after, item_name, response_item
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import Label, NewNode
from recollect.journal.rows import Sealing
from recollect.journal.schema import MOST_CHANGES
from recollect.journal.statements import Statements

SAID = NewNode(role="user", content="one")


def begin(journal: Journal) -> int:
    return journal.create(model="smollm2", fingerprint="f00d").id


@pytest.mark.slow
def test_messages_have_their_numbers_whatever_they_follow(tmp_path: Path) -> None:
    draw = random.Random(5)  # noqa: S311 - of a test
    with Journal.open(tmp_path / JOURNAL_NAME) as journal:
        chats = [begin(journal), begin(journal)]
        labels = {chat: journal.info(chat).label for chat in chats}
        kept: dict[int, list[int]] = {chat: [] for chat in chats}
        expected = []
        for _ in range(200):
            chat = draw.choice(chats)
            parent = draw.choice([None, *kept[chat]])
            kept[chat] += journal.append(chat, parent, [SAID])
            number = None if parent is None else kept[chat].index(parent) + 1
            expected.append((labels[chat], number, len(kept[chat])))
        told = [
            (change.conversation, change.parent, change.item)
            for change in journal.changes(0, [""]).changes
            if change.kind == "message.created"
        ]
    assert told == [
        (label, None if parent is None else item_name(label, parent), item_name(label, number))
        for label, parent, number in expected
    ]


def test_a_search_and_a_change_call_a_message_alike(tmp_path: Path) -> None:
    with Journal.open(tmp_path / JOURNAL_NAME) as journal:
        chat = begin(journal)
        (node_id,) = journal.append(chat, None, [SAID])
        for name in ("resp_b", "resp_c", "resp_a"):
            journal.set_label(Label(name=name, conversation_id=chat, node_id=node_id))
        (hit,) = journal.search("one")
        _, names = journal.names(chat, [node_id])
        assert hit.node_label is not None
        assert names == {node_id: response_item(hit.node_label)}


@pytest.mark.slow
def test_reading_changes_does_not_get_slower_with_the_conversation(tmp_path: Path) -> None:
    """What is counted are steps of SQLite's machine, so that the load of this one does not matter."""
    path = tmp_path / JOURNAL_NAME
    with Journal.open(path) as journal:
        chat = begin(journal)
        steps = []
        for older in (0, 5_000):
            parent = journal.append(chat, None, [SAID] * older)[-1] if older else None
            after = journal.last_change()
            journal.append(chat, parent, [SAID] * 100)
            steps.append(_steps(path, after))
    assert steps[1] < 4 * steps[0]


def _steps(path: Path, after: int) -> int:
    """Return how many hundreds of steps it takes to read what has changed."""
    taken = 0

    def count() -> int:
        nonlocal taken
        taken += 1
        return 0

    with closing(sqlite3.connect(path)) as connection:
        connection.set_progress_handler(count, 100)
        read = changes_after(Statements(connection, Sealing(path, None)), after, [""])
    assert len([change for change in read.changes if change.kind == "message.created"]) == 100
    return taken


@pytest.mark.slow
def test_a_snapshot_is_read_again_after_every_kind_of_change_and_only_then(tmp_path: Path) -> None:
    """What is kept of it is the same object; what a change leaves is what a fresh reading gives."""
    with Journal.open(tmp_path / JOURNAL_NAME) as journal, Journal.open(journal.path) as other:
        chat, another = begin(journal), begin(journal)
        first, second = journal.append(chat, None, [SAID, SAID], tip="main")
        known = journal.snapshot(chat)

        def reads_again() -> bool:
            nonlocal known
            found, fresh = journal.snapshot(chat, known=known), journal.snapshot(chat)
            assert (found.conversation, found.responses) == (fresh.conversation, fresh.responses)
            is_new = found.conversation is not known.conversation
            known = found
            return is_new

        assert not reads_again()
        changes: dict[str, Callable[[], object]] = {
            "a message": lambda: other.append(chat, second, [SAID]),
            "a branch": lambda: other.set_tip(chat, "main", first),
            "a new branch": lambda: journal.set_tip(chat, "fork", None),
            "no branch": lambda: journal.drop_tip(chat, "fork"),
            "a name": lambda: other.rename(chat, "called so"),
            "a label": lambda: other.set_label(
                Label(name="resp_a", conversation_id=chat, node_id=second)
            ),
            "no label": lambda: other.delete_label("resp_a"),
            "something taken back": lambda: journal.take_back(
                chat, journal.append(chat, second, [SAID]), tip=None, back_to=None, began=False
            ),
        }
        for what, change in changes.items():
            journal.append(another, None, [SAID])
            assert not reads_again(), "another conversation has changed"
            change()
            assert reads_again(), what
            assert not reads_again()
        for _ in range(MOST_CHANGES // 500 + 1):  # so many that what was noted is forgotten
            journal.append(another, None, [SAID] * 500)
        assert reads_again()
        journal.delete(chat)
        with pytest.raises(UnknownConversationError):
            journal.snapshot(chat, known=known)

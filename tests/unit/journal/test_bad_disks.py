"""What was said can be read where nothing can be written, and damage is told in one sentence."""

import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.errors import (
    RecollectError,
    StoreCorruptError,
    StoreFullError,
    StoreUnavailableError,
)
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import Entry, Label, NewNode

PAGE = 4096
"""Bytes of a page of SQLite."""
MOST_S = 60.0
"""For everything that is tried with one damaged journal, which takes milliseconds."""


def fill(journal: Journal, conversations: int = 4) -> None:
    for number in range(conversations):
        asked = NewNode(role="user", content="hello " * 30)
        answered = NewNode(
            role="assistant",
            content="x" * 300,
            token_ids=range(80),
            fingerprint="f",
            usage={"a": 1},
        )
        entry = Entry(nodes=[asked, answered], tip="main", note=lambda _: {"metadata": {"a": "b"}})
        written = journal.begin(f"chat {number}", entry, model="m", fingerprint="f")
        more = [NewNode(role="user", content="q")]
        journal.append(written.conversation_id, written.ids[-1], more, tip="idea")
        name, at = f"resp_{number}", written.ids[-1]
        journal.set_label(
            Label(name=name, conversation_id=written.conversation_id, node_id=at, note={"h": 1})
        )


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return a file with flipped bits, wrong bytes, a wrong page, a wrong head, or without its end."""
    spoilt = bytearray(data)
    at = chance.randrange(len(data))
    match chance.randrange(5):
        case 0:
            for _ in range(chance.choice([1, 1, 2, 8])):
                spoilt[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 1:
            length = min(chance.randrange(1, 200), len(data) - at)
            spoilt[at : at + length] = chance.randbytes(length)
        case 2:
            del spoilt[at:]
        case 3:
            one, other = (chance.randrange(len(data) // PAGE) * PAGE for _ in range(2))
            spoilt[one : one + PAGE] = data[other : other + PAGE]
        case _:
            spoilt[chance.randrange(2 * PAGE)] = chance.randrange(256)
    return bytes(spoilt)


def everything(journal: Journal) -> list[Callable[[], Any]]:
    """Return what can be done with a journal: list, show, resume, verify, and go on."""
    more = [NewNode(role="user", content="more")]
    calls: list[Callable[[], Any]] = [
        journal.conversations,
        journal.check,
        lambda: journal.notes([1, 2, 3]),
        lambda: journal.find_label("resp_1"),
        lambda: journal.find("chat 1"),
    ]
    for journal_id in range(1, 5):
        calls += [
            partial(journal.load, journal_id),
            partial(journal.labels, journal_id),
            partial(journal.append, journal_id, None, more, tip="main"),
        ]
    return [
        *calls,
        lambda: journal.create(model="m", fingerprint="f"),
        lambda: journal.rename(1, "another"),
        lambda: journal.delete(2),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))]
)
def test_a_damaged_journal_is_told_as_one_whatever_is_done_with_it(
    tmp_path: Path, seed: int
) -> None:
    with Journal.open(tmp_path / "sound") as journal:
        fill(journal)
    data = (tmp_path / "sound").read_bytes()
    chance, came = random.Random(seed), Counter[type]()  # noqa: S311 - damage, no secrets
    for number in range(100):
        path = tmp_path / str(number)
        path.write_bytes(damaged(data, chance))
        begun = time.monotonic()
        try:
            with Journal.open(path) as journal:
                for call in everything(journal):
                    try:
                        call()
                    except RecollectError as error:
                        came[type(error)] += 1
        except RecollectError as error:
            came[type(error)] += 1
        assert time.monotonic() - begun < MOST_S
    assert came[StoreCorruptError] > 20, "hardly anything was damaged"


def test_a_full_disk_can_be_read_from_and_says_so(small_disk: Any) -> None:
    path = small_disk.path / JOURNAL_NAME
    with Journal.open(path) as journal:
        fill(journal)
    small_disk.fill()
    with Journal.open(path) as journal:
        assert [info.turns for info in journal.conversations()] == [1] * 4
        assert len(journal.load("chat 1").nodes) == 3
        assert journal.check() == []
        for _ in range(2):
            with pytest.raises(StoreFullError, match="disk is full"):
                journal.append(1, None, [NewNode(role="user", content="x" * 50_000)])
        assert len(journal.load("chat 0").nodes) == 3
        small_disk.make_room()
        journal.append(1, None, [NewNode(role="user", content="x" * 50_000)])
        assert len(journal.load("chat 0").nodes) == 4


def test_a_journal_that_is_open_when_the_disk_gets_full_goes_on_reading(small_disk: Any) -> None:
    with Journal.open(small_disk.path / JOURNAL_NAME) as journal:
        fill(journal)
        small_disk.fill()
        with pytest.raises(StoreFullError):
            journal.append(1, None, [NewNode(role="user", content="x" * 50_000)])
        assert len(journal.load("chat 0").nodes) == 3
        small_disk.make_room()
        journal.append(1, None, [NewNode(role="user", content="x" * 50_000)])
        assert journal.check() == []


def test_a_read_only_disk_can_be_read_from_and_is_left_as_it_is(small_disk: Any) -> None:
    path = small_disk.path / JOURNAL_NAME
    with Journal.open(path) as journal:
        fill(journal)
    before = path.read_bytes()
    small_disk.make_read_only()
    try:
        with Journal.open(path) as journal:
            assert journal.conversations()[0].name == "chat 3"
            assert journal.load("chat 1").tips.keys() == {"main", "idea"}
            assert journal.check() == []
            with pytest.raises(StoreUnavailableError):
                journal.create(model="m", fingerprint="f")
            assert len(journal.conversations()) == 4
            assert sorted(one.name for one in small_disk.path.iterdir()) == [JOURNAL_NAME]
            assert path.read_bytes() == before
            small_disk.make_read_only(again=True)
            journal.create(model="m", fingerprint="f")
            assert len(journal.conversations()) == 5
    finally:
        small_disk.make_read_only(again=True)


def test_a_new_journal_on_a_read_only_disk_is_refused(small_disk: Any) -> None:
    small_disk.make_read_only()
    try:
        with pytest.raises(StoreUnavailableError):
            Journal.open(small_disk.path / JOURNAL_NAME)
    finally:
        small_disk.make_read_only(again=True)


def test_a_chat_on_a_full_disk_is_as_it_was_and_goes_on_when_there_is_room(
    small_disk: Any, make_model: Callable[..., Model]
) -> None:
    chat = make_model().session(name="trains")
    chat.respond("one")
    small_disk.fill()
    before = (chat.tip, len(chat.tree))
    with pytest.raises(StoreFullError):
        chat.respond("two " * 300)
    assert (chat.tip, len(chat.tree)) == before
    small_disk.make_room()
    chat.respond("two")
    assert [node.content for node in chat.path() if node.role == "user"] == ["one", "two"]
    chat.conversation.check()

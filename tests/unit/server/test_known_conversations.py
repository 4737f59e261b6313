"""Conversations that are kept as they were read: how much memory they take, and which are forgotten."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.conversation.costs import Costs
from recollect.conversation.model import Model
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import Entry, NewNode
from recollect.server.known_conversations import KnownConversations


def message(number: int, length: int, fingerprint: str) -> NewNode:
    text = f"{number} ".ljust(length, "x")
    if number % 2 == 0:
        return NewNode(role="user", content=text)
    ids = tuple(1000 + n for n in range(length))
    usage = {"prompt_tokens": number + 1000, "completion_tokens": 7000, "ttft_s": 0.125}
    return NewNode(
        role="assistant", content=text, token_ids=ids, fingerprint=fingerprint, usage=usage
    )


@pytest.mark.slow
@pytest.mark.parametrize("length", [8, 400])
def test_what_is_kept_takes_about_what_it_is_counted_as(
    make_model: Callable[..., Model], tmp_path: Path, length: int
) -> None:
    """With everything that pages find out of it: its tree, its names, what it is encoded as."""
    model, known = make_model(context_length=8192), KnownConversations()
    with Journal.open(tmp_path / JOURNAL_NAME) as journal:
        nodes = [message(n, length, model.weights_fingerprint) for n in range(2_000)]
        written = journal.begin("long", Entry(nodes=nodes, tip="main"), model="m", fingerprint="f")
        chat, label = written.conversation_id, journal.info(written.conversation_id).label
        once = KnownConversations().read(journal, chat, label, "")
        Costs(model).of(list(once.tree.values()))  # so that the encoder remembers all it will
        del nodes, written, once
        gc.collect()
        tracemalloc.start()
        read = known.read(journal, chat, label, "")
        encodings = read.encodings(model, ())
        Costs(model, known=encodings).of(list(read.tree.values()))
        assert len(read.by_name) == 2_000
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert 0.4 < read.size_bytes / taken < 2.5


def test_those_read_longest_ago_are_forgotten(tmp_path: Path) -> None:
    with Journal.open(tmp_path / JOURNAL_NAME) as journal:
        chats = []
        for name in "abc":
            nodes = [message(n, 20, "f") for n in range(10)]
            entry = Entry(nodes=nodes, tip="main")
            chats.append(journal.begin(name, entry, model="m", fingerprint="f").conversation_id)
        size = KnownConversations().read(journal, chats[0], "conv_a", "").size_bytes
        known = KnownConversations(int(2.5 * size))
        first, second = (known.read(journal, chat, "conv", "") for chat in chats[:2])
        assert known.read(journal, chats[0], "conv", "") is first
        known.read(journal, chats[2], "conv", "")
        assert known.read(journal, chats[0], "conv", "") is first
        assert known.read(journal, chats[1], "conv", "") is not second
        small = KnownConversations(size // 2)
        assert small.read(journal, chats[0], "conv", "").stored == first.stored
        assert small.read(journal, chats[0], "conv", "") is not first
        again = known.read(journal, chats[1], "conv", "")
        assert known.read(journal, chats[1], "conv", "") is again
        known.forget(chats[1])
        assert known.read(journal, chats[1], "conv", "") is not again

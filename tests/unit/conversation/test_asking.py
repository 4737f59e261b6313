"""What a person says is kept when it is said, once; and two who talk at once lose nothing."""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.errors import StoreBusyError, StoreError, UnknownConversationError
from recollect.journal import database
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import StoredConversation
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=6)


def said(stored: StoredConversation) -> list[tuple[str, str]]:
    return [(node.role, node.content) for node in stored.nodes if node.role != "assistant"]


@pytest.fixture
def path(model: Model) -> Path:
    return model.journal.path


def test_a_question_is_in_the_journal_before_its_reply_begins(model: Model) -> None:
    chat = model.session("Be brief.", params=SHORT, name="trains")
    with chat.stream("one") as stream:
        stored = model.journal.load("trains")
        assert said(stored) == [("system", "Be brief."), ("user", "one")]
        assert stored.tips == {"main": stored.nodes[-1].id}
        assert len(chat.tree) == 1, "the tree grows with the reply"
        for _ in stream:
            pass
    stored = model.journal.load("trains")
    assert [node.role for node in stored.nodes] == ["system", "user", "assistant"]
    assert stored.tips == {"main": stored.nodes[-1].id}
    assert model.journal.check() == []
    chat.conversation.check()


def test_a_reply_that_is_stopped_before_it_began_leaves_no_question(model: Model) -> None:
    chat = model.session("Be brief.", params=SHORT, name="trains")
    chat.stream("one").close()
    with pytest.raises(UnknownConversationError):
        model.journal.load("trains")
    chat.respond("two")
    before = model.journal.load("trains")
    chat.stream("three").close()
    after = model.journal.load("trains")
    assert (after.nodes, after.tips) == (before.nodes, before.tips)
    assert model.journal.check() == []
    assert [info.turns for info in model.sessions()] == [1]
    chat.conversation.check()


def test_a_stream_that_nobody_reads_leaves_no_question_when_the_next_one_is_asked(
    model: Model,
) -> None:
    chat = model.session(params=SHORT, name="trains")
    chat.respond("one")
    chat.stream("two")  # forgotten at once
    chat.respond("three")
    stored = model.journal.load("trains")
    assert said(stored) == [("user", "one"), ("user", "three")]
    assert list(stored.tips) == ["main"]
    assert model.resume("trains").transcript() == chat.transcript()


@pytest.mark.few(3)
@pytest.mark.parametrize("then", ["one", "other", None])
def test_a_question_whose_reply_was_cut_off_is_answered_or_replaced(
    model: Model, make_model: Callable[..., Model], then: str | None
) -> None:
    killed = model.session("Be brief.", params=SHORT, name="trains")
    killed.conversation.ask(killed.tip, "one", tip="main")  # and the program ends here
    again = make_model().resume("trains", params=SHORT)
    assert (again.tip.role, again.tip.content) == ("user", "one")
    reply = again.respond(then)
    asked = reply.node.parent
    assert asked is not None
    assert asked.content == (then or "one")
    assert asked.parent is not None
    assert asked.parent.role == "system"
    stored = model.journal.load("trains")
    assert [text for role, text in said(stored) if role == "user"].count("one") == 1
    assert list(stored.tips) == ["main"]
    assert model.journal.check() == []
    again.undo()
    assert again.tip.role == "system"


def test_a_question_that_others_have_seen_stays(model: Model) -> None:
    chat = model.session(params=SHORT, name="trains")
    chat.respond("one")
    stream = chat.stream("two")
    stored = model.journal.load("trains")
    model.journal.set_tip(stored.id, "mark", stored.nodes[-1].id)
    stream.close()
    stored = model.journal.load("trains")
    assert said(stored) == [("user", "one"), ("user", "two")]
    assert stored.tips["main"] == stored.nodes[1].id
    chat.respond("three")
    assert chat.name == "main"
    assert model.journal.check() == []


def test_a_conversation_that_is_not_kept_is_in_no_journal(model: Model, path: Path) -> None:
    model.session(params=SHORT).respond("secret")
    model.session_from([{"role": "user", "content": "secret"}], params=SHORT).respond(None)
    assert model.sessions() == []


@pytest.mark.slow
def test_a_second_chat_goes_on_as_a_branch_with_a_name(model: Model) -> None:
    model.session(params=SHORT, name="trains").respond("one")
    first, second = (model.resume("trains", params=SHORT) for _ in range(2))
    first.respond("first")
    assert second.name == "main"
    second.respond("second")
    first.respond("first again")
    second.respond("second again")
    assert (first.name, second.name) == ("main", "main-2")
    third = model.resume("trains", params=SHORT)
    assert third.transcript() == first.transcript()
    assert model.resume("trains", tip="main-2").transcript() == second.transcript()
    assert list(second.conversation.tips) == ["main-2"]
    second.undo()
    assert model.resume("trains", tip="main-2").transcript() == second.transcript()
    assert model.resume("trains").transcript() == first.transcript()
    for chat in (first, second):
        chat.conversation.check()
    assert model.journal.check() == []


def test_a_tip_that_others_move_during_a_reply_is_left_to_them(model: Model) -> None:
    model.session(params=SHORT, name="trains").respond("one")
    first, second = (model.resume("trains", params=SHORT) for _ in range(2))
    with first.stream("first") as stream:
        second.undo()
        for _ in stream:
            pass
    assert (first.name, second.name) == ("main", "main-2")
    assert model.resume("trains").transcript() == first.transcript()


def test_undo_after_others_went_on_takes_nothing_from_them(model: Model) -> None:
    model.session(params=SHORT, name="trains").respond("one")
    first, second = (model.resume("trains", params=SHORT) for _ in range(2))
    first.respond("first")
    second.undo()
    assert second.name == "main-2"
    assert model.resume("trains").transcript() == first.transcript()


def test_a_conversation_knows_what_it_is_called_now(model: Model) -> None:
    chat = model.session(params=SHORT, name="trains")
    chat.respond("one")
    model.journal.rename("trains", "boats")
    assert chat.conversation.current_name() == "boats"
    model.journal.rename("boats", "cars")
    chat.respond("two")
    assert chat.conversation.name == "cars"
    model.journal.delete("cars")
    assert chat.conversation.current_name() is None


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for others for a fifth of a second."""
    for module in (database, "recollect.conversation.conversation"):
        monkeypatch.setattr(
            f"{module if isinstance(module, str) else module.__name__}.BUSY_TIMEOUT_S", 0.2
        )


@pytest.mark.slow
def test_threads_that_wait_for_a_held_journal_fail_together_and_not_one_after_the_other(
    make_model: Callable[..., Model], tmp_path: Path
) -> None:
    """Each has one deadline of its own: eight are told in the time of one, and readers go on."""
    path = tmp_path / JOURNAL_NAME
    with Journal.open(path, busy_timeout_s=2.0) as journal:
        info = journal.create("a", model="m", fingerprint="")
        failures: list[float] = []
        begun = threading.Barrier(9)

        def write() -> None:
            begun.wait()
            with pytest.raises(StoreBusyError):
                journal.set_tip(info.id, "main", None)
            failures.append(1)

        threads = [threading.Thread(target=write) for _ in range(8)]
        with closing(database.Database(path)) as other, other.writing():
            for thread in threads:
                thread.start()
            begun.wait()
            assert [one.name for one in journal.conversations()] == ["a"], "readers do not wait"
            assert not failures, "it was read while they waited"
            in_turns = time.monotonic() + 12  # one after the other they would take 16 s
            for thread in threads:
                thread.join(timeout=in_turns - time.monotonic())
                assert not thread.is_alive(), "one waited for another's time too"
        journal.set_tip(info.id, "main", None)


def test_what_keeps_nothing_does_not_wait_for_a_held_journal(
    model: Model, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recollect.conversation.conversation.BUSY_TIMEOUT_S", 60.0)
    chat = model.session(params=SHORT, name="trains")
    chat.respond("one")
    told: list[type[BaseException]] = []

    def ask() -> None:
        try:
            chat.respond("two")
        except StoreError as error:
            told.append(type(error))

    with closing(database.Database(path)) as other, other.writing():
        thread = threading.Thread(target=ask)
        thread.start()
        messages: list[Any] = [*chat.transcript(), {"role": "user", "content": "unkept"}]
        reply = model.session_from(messages, params=SHORT).respond(None)
        assert reply.usage.generated_tokens == 6
        assert thread.is_alive(), "the chat that is kept still waits"
    thread.join()
    assert not told, "it came free in time"
    assert said(model.journal.load("trains")) == [("user", "one"), ("user", "two")]

"""What is done for a session in the background, on the reference model."""

import threading
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.engine.decoder import Task
from recollect.engine.reply import IdleWork
from recollect.engine.scheduler import MOST_SPARE
from recollect.types import SamplingParams, Usage

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


def settle(model: Model) -> None:
    """Wait until what was begun in the background is done: idle work is done in order."""
    sequence = model.engine.new_sequence(None)
    sequence.append([1])
    task = Task(sequence, lambda: False, idle=True, on_end=sequence.release)
    model.engine.submit(task)
    task.wait()


def usage_of(session: Session, text: str) -> Usage:
    usage = session.respond(text, params=SHORT).usage
    assert usage.reused_tokens + usage.computed_tokens == usage.prompt_tokens
    return usage


def test_what_is_typed_is_computed_before_it_is_said(model: Model) -> None:
    session = model.session()
    session.prewarm_later("what is the capital of")
    settle(model)
    usage = usage_of(session, "what is the capital of France?")
    assert usage.read_ahead_tokens >= len("what is the capital of")  # a byte is a token


def test_what_was_typed_into_a_model_that_has_read_nothing_is_not_reused(model: Model) -> None:
    session = model.session()
    for text in ("what is the capital of France", "what is the", "what is the capital of France"):
        session.prewarm_later(text)
        settle(model)
    usage = usage_of(session, "what is the capital of France?")
    assert (usage.reused_tokens, usage.computed_tokens) == (0, usage.prompt_tokens)
    # E and S are the marks around a message, one token each.
    assert usage.awaited_tokens == len("?E\nSassistant\n")


def test_what_is_reused_was_there_when_the_turn_before_had_ended(model: Model) -> None:
    session = model.session()
    first = usage_of(session, "one")
    settle(model)
    session.prewarm_later("what is the capital of")
    settle(model)
    second = usage_of(session, "what is the capital of France?")
    # All but the last token of the reply, which has no KV yet when the reply ends.
    assert second.reused_tokens == first.prompt_tokens + first.generated_tokens - 1
    third = usage_of(session, "and now?")
    assert third.reused_tokens == second.prompt_tokens + second.generated_tokens - 1


def test_what_was_read_ahead_of_another_text_does_not_count(model: Model) -> None:
    session = model.session("A system prompt of a few words.")
    session.prewarm_later("a question that is never asked")
    settle(model)
    usage = usage_of(session, "something else")
    assert usage.reused_tokens == 0
    assert usage.awaited_tokens >= len("something else")


def test_a_session_that_reads_what_another_has_read_reuses_it(model: Model) -> None:
    model.session().prewarm_later("what is the capital of")
    settle(model)
    usage = usage_of(model.session(), "what is the capital of France?")
    assert usage.reused_tokens >= len("what is the capital of")
    assert usage.read_ahead_tokens == 0


def test_what_prewarm_has_computed_is_told_as_read_ahead(model: Model) -> None:
    session = model.session()
    ahead = session.prewarm("what is the capital of")
    usage = usage_of(session, "what is the capital of France?")
    assert usage.read_ahead_tokens == ahead
    assert usage.reused_tokens == 0


def test_a_text_that_changes_costs_only_what_changed(model: Model) -> None:
    session = model.session()
    before = model.engine.computed_tokens
    for text in ("what is the capital", "what is the capital of", "what is the capital of Fr"):
        session.prewarm_later(text)
        settle(model)
    tail = 3  # the barrier's own tokens
    assert model.engine.computed_tokens - before <= len("<|im_start|>user\n") + 25 + tail


def test_a_new_text_takes_the_place_of_the_one_before_without_waiting(model: Model) -> None:
    session = model.session()
    with model.engine.lock:  # no forward pass begins, so waiting for one would hang
        session.prewarm_later("what is the capital of")
        session.prewarm_later("what else")
    settle(model)
    usage = usage_of(session, "what else is there?")
    assert usage.read_ahead_tokens >= len("what else")
    model.engine.check()


def test_a_message_that_is_sent_takes_over_from_what_was_typed(model: Model) -> None:
    session = model.session()
    text = "a long message " * 60
    session.prewarm_later(text)
    usage = session.respond(text, params=SHORT).usage
    assert usage.reused_tokens + usage.computed_tokens == usage.prompt_tokens
    model.engine.check()


def test_a_message_waits_until_what_was_typed_is_taken_in(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another thread, as a terminal does it: nobody is told that a reply is being generated."""
    session, usages = model.session(), list[Usage]()
    entered, leave, start = threading.Event(), threading.Event(), IdleWork.start

    def slow(self: IdleWork, sequence: Any) -> None:
        entered.set()
        assert leave.wait(60)
        start(self, sequence)

    with monkeypatch.context() as planted:
        planted.setattr(IdleWork, "start", slow)
        typing = threading.Thread(target=session.prewarm_later, args=["what is the capital of"])
        typing.start()
        assert entered.wait(60)
        saying = threading.Thread(target=lambda: usages.append(usage_of(session, "one")))
        saying.start()
        saying.join(0.2)
        leave.set()
        typing.join(60)
        saying.join(60)
    assert len(usages) == 1
    model.engine.check()


def test_nothing_is_prewarmed_while_a_reply_is_generated(model: Model) -> None:
    session = model.session()
    with session.stream("one", params=SHORT) as stream:
        session.prewarm_later("what is the capital of")
        assert [*stream]
    assert session.path()[-1].role == "assistant"


def test_what_does_not_fit_is_left_to_the_message_to_say(model: Model) -> None:
    session = model.session()
    session.prewarm_later("long " * 1000)
    settle(model)
    assert model.engine.computed_tokens == 1  # the barrier's


def test_a_branch_goes_on_where_it_stands(model: Model) -> None:
    session = model.session(params=SHORT)
    session.respond("one")
    session.fork(name="idea").respond("two")
    again = session.branch("idea")
    assert again.tip is session.conversation.tips["idea"]
    again.respond("three")
    assert session.conversation.tips["idea"] is again.tip
    assert session.tip is session.conversation.tips["main"]


def test_an_engine_that_is_never_idle_is_left_with_the_newest_of_them(model: Model) -> None:
    sessions = [model.session(f"You are number {number}.") for number in range(40)]
    with model.engine.lock:  # no forward pass begins
        for session in sessions:
            session.prewarm_later("what is the capital of")
        model.engine.check()
    settle(model)
    warm = [session.warm_tokens() for session in sessions]
    is_warm = [have == wanted for have, wanted in warm]
    assert is_warm == [False] * (40 - MOST_SPARE) + [True] * MOST_SPARE
    model.engine.check()

"""What is done for a session in the background, on the reference model."""

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.engine.scheduler import MOST_SPARE
from recollect.engine.task import Task
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


def settle(model: Model) -> None:
    """Wait until what was begun in the background is done: idle work is done in order."""
    sequence = model.engine.new_sequence(None)
    sequence.append([1])
    task = Task(sequence, lambda: False, idle=True, on_end=sequence.release)
    model.engine.submit(task)
    task.wait()


def reused_after(session: Session, text: str) -> tuple[int, int]:
    usage = session.respond(text, params=SHORT).usage
    return usage.reused_tokens, usage.prompt_tokens


def test_what_is_typed_is_computed_before_it_is_said(model: Model) -> None:
    session = model.session()
    session.prewarm_later("what is the capital of")
    settle(model)
    reused, _ = reused_after(session, "what is the capital of France?")
    assert reused >= len("what is the capital of")  # a byte is a token


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
    reused, _ = reused_after(session, "what else is there?")
    assert reused >= len("what else")
    model.engine.check()


def test_a_message_that_is_sent_takes_over_from_what_was_typed(model: Model) -> None:
    session = model.session()
    text = "a long message " * 60
    session.prewarm_later(text)
    usage = session.respond(text, params=SHORT).usage
    assert usage.reused_tokens + usage.computed_tokens == usage.prompt_tokens
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

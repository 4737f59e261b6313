"""What is fine with ten chats is fine with twenty thousand: counted in calls, messages and bytes."""

import gc
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from recollect.conversation import matching
from recollect.conversation.conversation import Conversation
from recollect.conversation.matching import MOST_BYTES, MOST_MESSAGES, Known
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.tree import Node
from recollect.journal.records import NewNode
from recollect.kv.disk import DiskStore
from recollect.types import Message, SamplingParams

SYSTEM: Message = {"role": "system", "content": "You are careful."}
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


def asked(number: int) -> list[Message]:
    return [SYSTEM, {"role": "user", "content": f"{number:06} is what number?"}]


def answer(session: Session, text: str) -> None:
    """Keep a reply, as a turn does when it is generated."""
    reply = NewNode(role="assistant", content=text, token_ids=[*text.encode()], fingerprint="f")
    session.conversation.add(session.tip, [reply], tip=None)


def chat(model: Model, number: int) -> None:
    answer(model.session_from(asked(number)), f"reply {number}")


def count_calls(work: Callable[[], object]) -> int:
    """Return how many functions are called, in Python and in C: each comparison of two texts is one."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    gc.disable()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def alive(kind: type) -> int:
    gc.collect()
    # By type: `isinstance` asks an object for its class, and some answer with a warning.
    return sum(type(one) is kind for one in gc.get_objects())


@pytest.mark.slow
def test_twenty_thousand_stateless_chats_on_one_system_prompt(model: Model) -> None:
    """A chat costs what it costs after two thousand, and what is kept has a bound."""
    others = {kind: alive(kind) for kind in (Known, Node, Conversation)}  # of earlier tests
    calls = {}
    for number in range(20_000):
        chat(model, number)
        if number + 1 in {2_000, 20_000}:
            calls[number + 1] = count_calls(lambda: chat(model, 500_000))
    model.known.check()
    # Ten times as many siblings are four more comparisons for each of the places that are looked for,
    # and what is new pushes out something old.
    assert calls[20_000] < calls[2_000] + 60
    assert calls[20_000] < 600
    assert len(model.known) == MOST_MESSAGES
    assert model.known.held_bytes <= MOST_BYTES
    assert alive(Known) - others[Known] <= MOST_MESSAGES + 1
    assert alive(Node) - others[Node] < 10
    assert alive(Conversation) - others[Conversation] < 5


@pytest.mark.slow
def test_a_chat_of_a_thousand_messages_costs_the_same_each_turn_wherever_it_hangs(
    model: Model,
) -> None:
    """Work for a chat grows with its own length alone: with others beside it, it is the same."""
    messages = [SYSTEM]
    for number in range(500):
        messages += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"reply {number}"},
        ]
    model.session_from(messages)
    question: Message = {"role": "user", "content": "And now?"}
    alone = count_calls(lambda: model.session_from([*messages, question]))
    for number in range(3_000):
        chat(model, number)
    among_others = count_calls(lambda: model.session_from([*messages, question]))
    assert among_others < alone + 60


@pytest.mark.slow
def test_an_edit_is_told_from_the_closest_of_twenty_thousand(model: Model) -> None:
    again: Message = {"role": "user", "content": "And then?"}
    for number in range(0, 20_000, 2):
        model.session_from(asked(number) if number != 12344 else [*asked(number), again])
    said: Message = {"role": "user", "content": "012345 is what letter?"}
    other = model.session_from([SYSTEM, said, again])
    usage = other.respond(None, params=SHORT).usage
    assert usage.reason == "message_changed"
    assert usage.difference == "Message 2: '4 is what number?' became '5 is what letter?'."


@pytest.mark.slow
def test_long_messages_are_forgotten_by_their_bytes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "MOST_BYTES", 1 << 20)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(300):
            session = model.session_from(
                [SYSTEM, {"role": "user", "content": f"{number}" * 10_000}]
            )
            answer(session, "reply " * 1_000)
            assert model.known.held_bytes <= 1 << 20
        del session
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    model.known.check()
    assert 20 < len(model.known) < 200
    assert held < 1.2 * (1 << 20)


@pytest.mark.slow
def test_small_messages_are_counted_with_what_holds_them(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "MOST_BYTES", 1 << 20)
    chat(model, 0)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(2_000):
            chat(model, number)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(model.known) < 2_000
    assert held < 1.1 * (1 << 20)


def test_namespaces_share_one_bound(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MOST_MESSAGES", 30)
    others = alive(Known)  # of earlier tests
    for number in range(100):
        model.session_from(asked(number), namespace=f"{number}")
    model.known.check()
    assert len(model.known) == 30
    assert alive(Known) - others <= 45


def test_the_beginning_of_a_conversation_outlives_its_end(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left can be found: nothing is known whose beginning was forgotten."""
    monkeypatch.setattr(matching, "MOST_MESSAGES", 10)
    long: list[Message] = [{"role": "user", "content": f"{number}"} for number in range(30)]
    model.session_from(long)
    model.session("x")  # one more message, of another conversation
    model.known.check()
    found = matching.MessageIndex(model.known).find(long)
    assert found is not None
    assert found.messages == 9


def test_what_is_forgotten_is_found_on_disk(
    make_model: Callable[..., Model],
    open_store: Callable[[], DiskStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matching, "MOST_MESSAGES", 20)
    model = make_model(store=open_store())
    session = model.session_from(asked(0), params=SHORT)
    reply = session.respond(None)
    messages = session.transcript()
    assert model.engine.tier is not None
    model.engine.tier.flush()
    for number in range(1, 50):
        chat(model, number)
    index = matching.MessageIndex(model.known)
    found = index.find(messages)
    assert found is not None
    assert found.messages == 1
    again = model.session_from(messages)
    assert again.tip.token_ids == reply.node.token_ids
    model.known.check()

"""Messages sent as text are found where they came from, and told apart where they differ."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.conversation import matching
from recollect.conversation.conversation import Conversation
from recollect.conversation.matching import MessageIndex
from recollect.conversation.tree import Node
from recollect.journal.records import NewNode
from recollect.types import Message, Role

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
MESSAGES = st.lists(
    st.builds(
        lambda role, content: Message(role=role, content=content),
        st.sampled_from(ROLES),
        st.sampled_from(["", "a", "b", "ab"]),
    ),
    max_size=4,
)


def grow(index: MessageIndex, messages: list[Message]) -> tuple[Conversation, Node]:
    conversation = Conversation(model="m", fingerprint="f", index=index)
    tip = conversation.tree.root
    for message in messages:
        tip = conversation.add_unsaved(tip, message)
    return conversation, tip


def said(role: Role, content: str) -> Message:
    return {"role": role, "content": content}


@given(known=st.lists(MESSAGES, max_size=6), wanted=MESSAGES)
def test_the_longest_known_beginning_is_found(
    known: list[list[Message]], wanted: list[Message]
) -> None:
    index = MessageIndex()
    for messages in known:
        grow(index, messages)
    index.check()
    beginnings = {str(messages[:length]) for messages in known for length in range(1, 5)}
    expected = max((n for n in range(len(wanted) + 1) if str(wanted[:n]) in beginnings), default=0)
    found = index.find(wanted)
    assert (found.messages if found else 0) == expected
    if found:
        conversation = Conversation(model="m", fingerprint="f")
        taken = conversation.take_over(found)
        assert [node.message() for node in taken.path()] == wanted[:expected]
        conversation.check()


def test_a_reply_that_was_generated_is_found_rather_than_its_text() -> None:
    index = MessageIndex()
    conversation, asked = grow(index, [said("user", "Hi.")])
    reply = NewNode(role="assistant", content="Hello.", token_ids=[1, 2], fingerprint="f")
    conversation.add(asked, [reply], tip=None)
    grow(index, [said("user", "Hi."), said("assistant", "Hello.")])
    found = index.find([said("user", "Hi."), said("assistant", "Hello.")])
    assert found is not None
    assert found.path[-1][1].token_ids == (1, 2)


def test_an_edited_message_says_what_it_was() -> None:
    index = MessageIndex()
    grow(index, [said("user", "One."), said("assistant", "1"), said("user", "Two apples.")])
    edited = [said("user", "One."), said("assistant", "1"), said("user", "Two pears.")]
    change = index.change(edited, index.find(edited))
    assert change is not None
    assert (change.message, change.role) == (2, "user")
    assert (change.was, change.is_now) == ("apples.", "pears.")


def test_a_message_after_the_end_is_no_change() -> None:
    index = MessageIndex()
    grow(index, [said("user", "One."), said("assistant", "1")])
    longer = [said("user", "One."), said("assistant", "1"), said("user", "Two.")]
    assert index.change(longer, index.find(longer)) is None
    assert index.change(longer[:2], index.find(longer[:2])) is None


def test_other_instructions_before_the_same_question_are_told() -> None:
    index = MessageIndex()
    grow(index, [said("system", "Be brief."), said("user", "Hi.")])
    other = [said("system", "Be long."), said("user", "Hi.")]
    change = index.change(other, index.find(other))
    assert change is not None
    assert (change.role, change.was, change.is_now) == ("system", "brief.", "long.")
    unrelated = [said("system", "Be long."), said("user", "Bye.")]
    assert index.change(unrelated, index.find(unrelated)) is None


def test_what_was_used_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MOST_MESSAGES", 2)
    index = MessageIndex()
    grow(index, [said("user", "1")])
    grow(index, [said("user", "2")])
    assert index.find([said("user", "1")]) is not None
    grow(index, [said("user", "3")])
    assert index.find([said("user", "2")]) is None
    assert index.find([said("user", "1")]) is not None
    assert len(index) == 2

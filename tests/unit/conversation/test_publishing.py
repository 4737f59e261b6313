"""Instructions that were published are read once for the sessions of all namespaces."""

from collections.abc import Callable

import pytest

from recollect.conversation.model import Model
from recollect.errors import ConversationError
from recollect.kv.disk import DiskStore
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
SYSTEM = "You answer for the library of a small town."
TEXT = "Here is what a reader asks often:"

Open = Callable[..., DiskStore]
MakeModel = Callable[..., Model]


def test_sessions_of_every_namespace_begin_warm(model: Model) -> None:
    made = model.publish(SYSTEM)
    assert made.computed_tokens == made.tokens > len(SYSTEM)
    replies = []
    for namespace in ("a", "b", ""):
        reply = model.session(SYSTEM, params=SHORT, namespace=namespace).respond("hello")
        assert reply.usage.reused_tokens == made.tokens
        replies.append(reply.text)
    assert model.unpublish(SYSTEM)
    assert not model.unpublish(SYSTEM)
    reply = model.session(SYSTEM, params=SHORT, namespace="c").respond("hello")
    assert reply.usage.reused_tokens == 0
    assert replies == [reply.text] * 3


def test_a_text_that_first_messages_begin_with_can_be_public_too(model: Model) -> None:
    made = model.publish(SYSTEM, TEXT)
    reply = model.session(SYSTEM, params=SHORT, namespace="a").respond(f"{TEXT} when?")
    assert reply.usage.reused_tokens == made.tokens
    assert model.publish(SYSTEM).computed_tokens <= 1, "it begins a longer one"
    assert model.unpublish(SYSTEM, TEXT)
    again = model.session(SYSTEM, params=SHORT, namespace="b").respond("hello")
    assert again.usage.reused_tokens >= model.publish(SYSTEM).tokens
    with pytest.raises(ConversationError, match="nothing to read"):
        model.publish()


def test_what_is_public_can_be_kept_on_disk_for_a_namespace_of_its_own(
    make_model: MakeModel, open_store: Open
) -> None:
    first = make_model(store=open_store())
    first.publish(SYSTEM)
    made = first.warm(system=SYSTEM, name="library")
    assert made.computed_tokens == 0
    first.close()
    second = make_model(store=open_store())
    usage = second.session(SYSTEM, params=SHORT).respond("hello").usage
    assert usage.restored_tokens == made.tokens
    other = second.session(SYSTEM, params=SHORT, namespace="a").respond("hello").usage
    assert other.reused_tokens == 0, "it is not public any more"

"""A checkpoint keeps a place on disk against eviction, and is the way back to it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.errors import (
    ConversationError,
    NameTakenError,
    StoreError,
    StoreFullError,
    UnknownCheckpointError,
    UnknownNodeError,
)
from recollect.journal.home import drop_of_conversation
from recollect.kv.disk import DiskStore
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)

Open = Callable[..., DiskStore]
MakeModel = Callable[..., Model]


@pytest.fixture
def warm(make_model: MakeModel, open_store: Open) -> Model:
    """Return a model with the KV of its home on disk."""
    return make_model(store=open_store())


def talk(model: Model, *said: str, name: str = "poem") -> Session:
    session = model.session("be brief", name=name, params=SHORT)
    for text in said:
        session.respond(text)
    return session


def store_of(model: Model) -> DiskStore:
    assert model.engine.tier is not None
    return model.engine.tier.store


def test_a_checkpoint_says_where_it_stands_and_what_it_takes(warm: Model) -> None:
    session = talk(warm, "one", "two")
    made = session.checkpoint("before the end")
    assert (made.name, made.conversation, made.turns) == ("before the end", "poem", 2)
    tokens, total = session.warm_tokens()
    assert tokens == total == made.tokens == made.stored_tokens
    assert made.stored_bytes > 0
    assert warm.checkpoints() == [made]


@pytest.mark.slow
def test_after_a_restart_one_comes_back_to_it_and_reads_nothing_again(
    make_model: MakeModel, open_store: Open
) -> None:
    first = make_model(store=open_store())
    session = talk(first, "one", "two")
    made = session.checkpoint("here")
    session.respond("three")
    first.close()
    second = make_model(store=open_store())
    back = second.resume(checkpoint="here", params=SHORT)
    assert [node.content for node in back.path() if node.role == "user"] == ["one", "two"]
    usage = back.respond("another three").usage
    assert usage.restored_tokens == made.tokens
    assert usage.computed_tokens == usage.prompt_tokens - made.tokens
    assert [node.role for node in second.resume("poem").path()][-1] == "assistant"
    assert len(back.tree) == 1 + 2 * 4, "both thirds are in it"


def test_return_to_goes_there_in_the_same_session(warm: Model) -> None:
    session = talk(warm, "one")
    session.checkpoint("here")
    tip = session.tip
    session.respond("two")
    session.return_to("here")
    assert session.tip is tip
    before = warm.engine.computed_tokens
    session.prewarm()
    assert warm.engine.computed_tokens == before


def test_a_session_goes_to_checkpoints_of_its_own_conversation_only(warm: Model) -> None:
    talk(warm, "one").checkpoint("here")
    other = talk(warm, "two", name="other")
    tip = other.tip
    with pytest.raises(UnknownNodeError, match="--checkpoint"):
        other.return_to("here")
    with pytest.raises(UnknownNodeError):
        warm.resume("other", checkpoint="here")
    with pytest.raises(UnknownCheckpointError, match="recollect checkpoints"):
        other.return_to("nowhere")
    assert other.tip is tip


def test_a_name_that_is_taken_is_refused_and_keeps_what_it_had(warm: Model) -> None:
    session = talk(warm, "one")
    made = session.checkpoint("here")
    session.respond("two")
    with pytest.raises(NameTakenError):
        session.checkpoint("here")
    assert warm.checkpoints() == [made]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["", " x", "-x", "a\nb"])
def test_what_is_no_name_is_refused(warm: Model, name: str) -> None:
    with pytest.raises(ConversationError, match="checkpoint"):
        talk(warm, "one").checkpoint(name)
    assert warm.checkpoints() == []


def test_a_conversation_that_is_not_kept_has_no_checkpoints(warm: Model) -> None:
    session = warm.session(params=SHORT)
    session.respond("one")
    with pytest.raises(ConversationError, match="not saved"):
        session.checkpoint("here")


def test_there_is_none_in_a_namespace_because_names_would_leak(warm: Model) -> None:
    session = warm.session(name="poem", params=SHORT, namespace="theirs")
    session.respond("one")
    with pytest.raises(ConversationError, match="namespace"):
        session.checkpoint("here")


def test_there_is_none_before_anything_was_said(warm: Model) -> None:
    with pytest.raises(ConversationError, match="said"):
        talk(warm).checkpoint("here")
    session = talk(warm, "one", name="other")
    session.rewind(session.tree.root)
    with pytest.raises(ConversationError, match="said"):
        session.checkpoint("here")


def test_without_room_on_disk_there_is_none(model: Model) -> None:
    session = talk(model, "one")
    with pytest.raises(StoreError, match="--kv-disk"):
        session.checkpoint("here")
    with pytest.raises(StoreError, match="--kv-disk"):
        model.checkpoints()


@pytest.mark.slow
def test_it_survives_when_all_else_is_given_up(warm: Model) -> None:
    session = talk(warm, "one", "two")
    made = session.checkpoint("here")
    session.respond("three")
    assert warm.engine.tier is not None
    warm.engine.tier.flush()
    store = store_of(warm)
    assert store.evict(1 << 40) > 0
    (left,) = warm.checkpoints()
    assert left == made
    assert list(store.problems()) == []
    warm.drop_checkpoint("here")
    assert warm.checkpoints() == []
    assert store.evict(1 << 40) == made.stored_bytes


def test_what_was_evicted_from_disk_unnoticed_is_written_again(warm: Model) -> None:
    session = talk(warm, "one", "two")
    session.prewarm()
    assert warm.engine.tier is not None
    warm.engine.tier.flush()
    store_of(warm).clear()  # the blocks in memory still say that they are on disk
    made = session.checkpoint("here")
    assert made.stored_tokens == made.tokens


@pytest.mark.slow
def test_no_more_is_pinned_than_leaves_room_for_others(
    make_model: MakeModel, open_store: Open
) -> None:
    model = make_model(store=open_store(budget_bytes=1 << 20), context_length=4096)
    session = talk(model, "long " * 300)
    with pytest.raises(StoreFullError, match="unpin something"):
        session.checkpoint("here")
    assert model.checkpoints() == []


def test_drop_refuses_what_is_no_checkpoint(warm: Model) -> None:
    talk(warm, "one").checkpoint("here")
    (pin,) = store_of(warm).pins()
    assert store_of(warm).add_pin(replace(pin, name="a text", about={"kind": "warm"}))
    for name in ("a text", "nowhere"):
        with pytest.raises(UnknownCheckpointError):
            warm.drop_checkpoint(name)
    assert [made.name for made in warm.checkpoints()] == ["here"]


@pytest.mark.slow
def test_with_a_conversation_go_its_checkpoints(warm: Model) -> None:
    talk(warm, "one").checkpoint("here")
    talk(warm, "two", name="other").checkpoint("there")
    (info,) = [info for info in warm.sessions() if info.name == "poem"]
    warm.journal.delete("poem")
    (gone,) = [made for made in warm.checkpoints() if made.name == "here"]
    assert gone.conversation is None
    with pytest.raises(UnknownCheckpointError, match="deleted"):
        warm.resume(checkpoint="here")
    assert drop_of_conversation(store_of(warm), info.id, info.created_at) == ["here"]
    assert [made.name for made in warm.checkpoints()] == ["there"]


def test_no_text_is_in_what_is_kept_of_it(warm: Model) -> None:
    talk(warm, "a secret").checkpoint("here")
    (pin,) = store_of(warm).pins()
    assert set(pin.about) == {"kind", "conversation", "begun", "node", "turns"}
    assert "secret" not in str(pin)

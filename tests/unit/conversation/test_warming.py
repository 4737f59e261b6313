"""A text that was read once is not read again by what begins with it, in any later process."""

from collections.abc import Callable

import pytest

from recollect.conversation.model import Model
from recollect.errors import ContextFullError, ConversationError, NameTakenError, StoreError
from recollect.kv.disk import DiskStore
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
TEXT = "a document that is long enough to take some blocks"

Open = Callable[..., DiskStore]
MakeModel = Callable[..., Model]


@pytest.fixture
def model(make_model: MakeModel, open_store: Open) -> Model:
    return make_model(store=open_store())


def pinned(model: Model) -> list[str]:
    assert model.engine.tier is not None
    return [pin.name for pin in model.engine.tier.store.pins()]


@pytest.mark.few(3)
@pytest.mark.parametrize("whole_blocks_only", [False, True])
def test_a_later_session_reads_only_what_follows(
    make_model: MakeModel, open_store: Open, whole_blocks_only: bool
) -> None:
    first = make_model(store=open_store(), whole_blocks_only=whole_blocks_only)
    made = first.warm(TEXT, system="be brief", name="text")
    assert made.computed_tokens == made.tokens > len(TEXT)
    first.close()
    second = make_model(store=open_store(), whole_blocks_only=whole_blocks_only)
    usage = second.session("be brief", params=SHORT).respond(f"{TEXT}. And now?").usage
    lost = made.tokens % 8 if whole_blocks_only else 0
    assert usage.restored_tokens == made.tokens - lost


def test_instructions_alone_are_read_up_to_where_a_message_begins(model: Model) -> None:
    made = model.warm(system="be brief", name="brief")
    usage = model.session("be brief", params=SHORT).respond("hello").usage
    assert usage.reused_tokens == made.tokens


def test_what_is_warm_already_is_told_and_costs_nothing(
    make_model: MakeModel, open_store: Open
) -> None:
    first = make_model(store=open_store())
    made = first.warm(TEXT, name="text")
    first.close()
    second = make_model(store=open_store())
    again = second.warm(TEXT, name="another name")
    assert (again.name, again.tokens, again.stored_bytes) == (
        "text",
        made.tokens,
        made.stored_bytes,
    )
    assert (again.computed_tokens, second.engine.forward_passes) == (0, 0)
    assert again.since == made.since
    assert pinned(second) == ["text"]


def test_what_was_lost_of_it_is_read_again(model: Model) -> None:
    made = model.warm(TEXT, name="text")
    assert model.engine.tier is not None
    store = model.engine.tier.store
    (pin,) = store.pins()
    store.remove([pin.tail])
    again = model.warm(TEXT, name="text")
    assert again.stored_bytes == made.stored_bytes
    assert list(store.problems()) == []


def test_a_text_that_has_changed_takes_the_place_of_the_one_before(model: Model) -> None:
    made = model.warm(TEXT, name="text")
    changed = model.warm(TEXT[:-20] + "!", name="text")
    assert changed.tokens == made.tokens - 19
    assert changed.computed_tokens < 20
    assert pinned(model) == ["text"]


def test_a_change_that_fails_leaves_the_one_before(model: Model) -> None:
    model.warm(TEXT, name="text")
    with pytest.raises(ContextFullError):
        model.warm("long " * 1000, name="text")
    assert pinned(model) == ["text"]
    assert model.warm(TEXT, name="text").computed_tokens == 0


def test_a_name_of_something_else_is_refused(model: Model) -> None:
    session = model.session(name="poem", params=SHORT)
    session.respond("one")
    session.checkpoint("text")
    with pytest.raises(NameTakenError):
        model.warm(TEXT, name="text")
    assert len(model.checkpoints()) == 1


def test_what_cannot_be_kept_is_refused(model: Model, make_model: MakeModel) -> None:
    with pytest.raises(ConversationError, match="nothing to read"):
        model.warm(name="text")
    with pytest.raises(ConversationError, match="warm text"):
        model.warm(TEXT, name=" ")
    with pytest.raises(StoreError, match="--kv-disk"):
        make_model().warm(TEXT, name="text")


def test_progress_is_told_in_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recollect.engine.pinning.REFRESH_S", 0.0)
    seen: list[tuple[int, int | None]] = []
    made = model.warm("long " * 300, name="text", progress=lambda _, *done: seen.append(done))
    assert seen
    assert all(0 <= done <= made.tokens and total == made.tokens for done, total in seen)

"""What a client sends as text after a restart is read as the token ids that were generated."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.kv.disk import DiskStore
from recollect.types import Message, SamplingParams

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
Load = Callable[[], Model]


@pytest.fixture
def load(make_model: Callable[..., Model], open_store: Callable[[], DiskStore]) -> Load:
    """Return what loads the model with the store of this test, as after a restart."""
    return lambda: make_model(store=open_store())


def turn(
    model: Model, messages: list[Message], text: str, *, namespace: str = ""
) -> tuple[Session, list[Message]]:
    """Ask as a client does that sends everything; return the session and what it sends next time."""
    asked: list[Message] = [*messages, {"role": "user", "content": text}]
    session = model.session_from(asked, params=SHORT, namespace=namespace)
    session.respond(None)
    return session, [*asked, session.tip.message()]


def test_replies_have_their_ids_and_only_what_is_new_is_computed(load: Load) -> None:
    model = load()
    messages: list[Message] = [{"role": "system", "content": "You are careful."}]
    for text in ("one", "two", "three"):
        session, messages = turn(model, messages, text)
    generated = [node.token_ids for node in session.path()]
    text_ids = model.tokenizer.encode(session.tip.content)
    assert tuple(text_ids) != session.tip.token_ids, "encoding the text anew shows the difference"
    computed = session.fork().stream("four").read().usage.computed_tokens
    model.close()

    model = load()
    session, _ = turn(model, messages, "four")
    assert [node.token_ids for node in session.path()][: len(generated)] == generated
    usage = session.tip.usage
    assert usage is not None
    assert usage["computed_tokens"] <= computed + model.engine.block_size
    assert usage["reason"] == "new"
    session.conversation.check()


def test_another_namespace_reads_the_text(load: Load) -> None:
    model = load()
    session, messages = turn(model, [], "one", namespace="a")
    model.close()
    model = load()
    for namespace, expected in (("b", None), ("", None), ("a", session.tip.token_ids)):
        theirs = model.session_from(messages, namespace=namespace)
        assert theirs.tip.token_ids == expected


def test_what_was_changed_is_no_longer_what_was_generated(load: Load) -> None:
    model = load()
    _, messages = turn(model, [], "one")
    model.close()
    model = load()
    other: list[Message] = [{"role": "user", "content": "uno"}, messages[1]]
    shorter: list[Message] = [
        messages[0],
        {"role": "assistant", "content": str(messages[1]["content"])[:-1]},
    ]
    for changed in (other, shorter):
        assert model.session_from(changed).tip.token_ids is None


def test_a_kept_conversation_is_in_the_journal_alone(load: Load) -> None:
    model = load()
    session = model.session(name="diary", params=SHORT)
    session.respond("one")
    messages = [node.message() for node in session.path()]
    model.close()
    assert load().session_from(messages).tip.token_ids is None


def test_without_a_disk_nothing_is_remembered(
    make_model: Callable[..., Model], tmp_path: Path
) -> None:
    _, messages = turn(make_model(), [], "one")
    assert make_model().session_from(messages).tip.token_ids is None
    assert not (tmp_path / "home" / "kv").exists()


@pytest.mark.slow
def test_a_call_that_comes_back_as_an_object_is_what_the_model_wrote(load: Load) -> None:
    pytest.importorskip("llguidance")
    clock = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    model = load()
    asked: list[Message] = [{"role": "user", "content": "What time is it?"}]
    session = model.session_from(asked, tools=[clock], tool_choice="required")
    reply = session.respond(None, params=SamplingParams(max_tokens=200))
    assert reply.tool_calls
    sent: list[Message] = [*asked, session.tip.message()]
    model.close()

    model = load()
    tip = model.session_from(sent).tip
    assert (tip.token_ids, tip.content) == (session.tip.token_ids, session.tip.content)
    assert tip.message() == sent[-1]

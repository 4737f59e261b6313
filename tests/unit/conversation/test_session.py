"""Whatever is done to a conversation, the next reply is a fresh one's, and nothing is computed twice."""

import asyncio
import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.conversation.prompt import PromptEncoder
from recollect.conversation.session import ReplyStream, Session
from recollect.conversation.showing import Prompt
from recollect.conversation.tree import Tree
from recollect.conversation.turn import Reply
from recollect.engine.decoder import Task
from recollect.engine.reply import IdleWork, ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.errors import (
    ContextFullError,
    ConversationError,
    InvalidParameterError,
    MisuseError,
    OutOfBlocksError,
    RewindError,
    RuntimeFailure,
    SessionBusyError,
    TemplateError,
    UnknownNodeError,
)
from recollect.runtime.base import Pace
from recollect.text.tokenizer import ByteTokenizer
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=6)
SYSTEM = "You are brief."


@pytest.fixture
def chat(model: Model) -> Session:
    return model.session(SYSTEM, params=SHORT)


def said(session: Session) -> list[str]:
    return [node.content for node in session.path()]


def fresh_reply(session: Session, text: str | None) -> tuple[str, list[int]]:
    """Return what a sequence that shares nothing and computes everything anew answers there."""
    model = session.model
    prompt = model.prompts.encode(session.path(), text)
    generator = Generator(model.engine, session.params, namespace=None)
    generator.append_tokens(prompt.token_ids)
    reply = ReplyGeneration(model.engine, generator, model.tokenizer)
    reply.start()
    answer = "".join(reply)
    reply.finish()
    assert reply.usage().reused_tokens == 0
    ids = reply.token_ids
    reply.release()
    return answer, ids


def check_as_fresh(session: Session, text: str | None) -> Reply:
    engine = session.model.engine
    text_ids = session.model.prompts.encode(session.path(), text).token_ids
    expected = fresh_reply(session, text)
    settle(session)
    known = engine.warm_tokens(text_ids, session.namespace)
    reply = session.respond(text)
    assert (reply.text, list(reply.node.token_ids or ())) == expected
    usage = reply.usage
    assert usage.reused_tokens + usage.computed_tokens == usage.prompt_tokens == len(text_ids)
    # The logits after a prompt that was read lately are known, too.
    assert usage.awaited_tokens in {len(text_ids) - known, max(1, len(text_ids) - known)}
    session.conversation.check()
    engine.check()
    return reply


def settle(session: Session) -> None:
    """Wait until the idle work after the last turn is done, so that what is warm is certain."""
    for task in session.model.engine.tasks():
        task.wait()


def used_up(model: Model) -> bool:
    """Return whether anybody but the cache holds a block."""
    return model.engine.pool.used_blocks != model.engine.cache.evictable_blocks


def test_the_first_turn_computes_its_prompt_and_the_next_only_what_is_new(chat: Session) -> None:
    first = chat.respond("Hello")
    assert (first.usage.reused_tokens, first.usage.computed_tokens) == (
        0,
        first.usage.prompt_tokens,
    )
    second = check_as_fresh(chat, "And now?")
    # What the template puts before the message was computed while nobody waited.
    assert second.usage.awaited_tokens == len("And now?E\nSassistant\n")
    assert second.usage.read_ahead_tokens > 0
    assert second.usage.reason == "new"


def test_a_conversation_says_what_was_said(chat: Session) -> None:
    first = chat.respond("Hello")
    second = chat.respond("More")
    assert chat.transcript() == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": second.text},
    ]
    assert chat.tip is second.node
    assert str(second) == second.text
    assert second.node.usage == second.usage.to_dict()
    assert second.finish_reason == "length"


def test_without_a_system_message_there_is_none(model: Model) -> None:
    chat = model.session(params=SHORT)
    assert chat.transcript() == []
    chat.respond("Hello")
    assert len(chat.path()) == 2


def test_the_pieces_of_a_stream_are_the_reply(chat: Session) -> None:
    with chat.stream("Hello") as stream:
        assert stream.reply is None
        pieces = list(stream)
    assert stream.reply is not None
    assert "".join(pieces) == stream.reply.text


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_undo_goes_back_by_turns_and_the_next_reply_is_as_if_they_had_not_been(
    chat: Session, turns: int
) -> None:
    places = [chat.tip]
    for text in ("one", "two", "three"):
        chat.respond(text)
        places.append(chat.tip)
    settle(chat)
    fed = chat.model.engine.computed_tokens
    assert chat.undo(turns) is places[-1 - turns]
    assert chat.model.engine.computed_tokens == fed
    assert len(said(chat)) == 1 + 2 * (3 - turns)
    check_as_fresh(chat, "other")


@pytest.mark.parametrize("turns", [0, -1, 3])
def test_undo_of_turns_that_were_not_is_refused_and_changes_nothing(
    chat: Session, turns: int
) -> None:
    chat.respond("one")
    chat.respond("two")
    before = (chat.tip, said(chat))
    with pytest.raises(RewindError):
        chat.undo(turns)
    assert (chat.tip, said(chat)) == before


def test_undone_turns_stay_in_the_tree_and_can_be_gone_back_to(chat: Session) -> None:
    chat.respond("one")
    later = chat.respond("two").node
    chat.undo(2)
    chat.respond("other")
    chat.rewind(later)
    assert said(chat)[1::2] == ["one", "two"]
    check_as_fresh(chat, "three")


def test_rewind_to_a_users_message_lets_it_be_answered(chat: Session) -> None:
    reply = chat.respond("one")
    user = reply.node.parent
    assert user is not None
    chat.rewind(user)
    again = check_as_fresh(chat, None)
    assert again.text == reply.text
    assert again.node.parent is user


def test_rewind_to_the_root_begins_anew_without_even_the_system_message(chat: Session) -> None:
    chat.respond("one")
    chat.rewind(chat.tree.root)
    check_as_fresh(chat, "two")
    assert len(said(chat)) == 2


def test_a_node_of_another_conversation_is_refused_everywhere(chat: Session, model: Model) -> None:
    other = model.session(SYSTEM, params=SHORT)
    stranger = other.respond("one").node
    chat.respond("one")
    before = chat.tip
    assert stranger.parent is not None
    user = stranger.parent
    for use in (
        lambda: chat.rewind(stranger),
        lambda: chat.fork(stranger),
        lambda: chat.edit(user, "x"),
    ):
        with pytest.raises(UnknownNodeError):
            use()
    assert chat.tip is before


def test_a_fork_costs_nothing_and_then_goes_its_own_way(chat: Session, model: Model) -> None:
    chat.respond("one")
    middle = chat.tip
    chat.respond("two")
    settle(chat)
    passes, used = model.engine.forward_passes, model.engine.pool.used_blocks
    at_tip, at_middle = chat.fork(), chat.fork(middle)
    assert (model.engine.forward_passes, model.engine.pool.used_blocks) == (passes, used)
    for session, text in ((at_middle, "m"), (chat, "c"), (at_tip, "t"), (at_middle, "m2")):
        check_as_fresh(session, text)
    assert said(at_middle)[1::2] == ["one", "m", "m2"]
    assert said(at_tip)[1::2] == ["one", "two", "t"]
    assert said(chat)[1::2] == ["one", "two", "c"]
    assert at_tip.tree is chat.tree
    chat.close()
    check_as_fresh(at_tip, "t2")


def test_a_fork_in_the_middle_of_a_reply_is_at_the_place_before_it(chat: Session) -> None:
    chat.respond("one")
    tip = chat.tip
    stream = iter(chat.stream("two", params=SamplingParams(max_tokens=12)))
    next(stream)
    fork = chat.fork()
    assert fork.tip is tip
    check_as_fresh(fork, "other")
    list(stream)
    check_as_fresh(chat, "three")


def test_regenerate_answers_the_same_message_again(chat: Session) -> None:
    first = chat.respond("one")
    again = chat.regenerate()
    assert again.text == first.text
    hot = SamplingParams(max_tokens=6, temperature=2.0, seed=5)
    other = chat.regenerate(params=hot)
    assert other.text != first.text
    assert first.node.parent is not None
    assert first.node.parent.children == [first.node, again.node, other.node]
    assert other.usage.computed_tokens == 0
    check_as_fresh(chat, "two")


def test_regenerate_where_nothing_was_said_is_refused(chat: Session) -> None:
    with pytest.raises(ConversationError, match="Nothing has been said"):
        chat.regenerate()
    assert said(chat) == [SYSTEM]


def test_edit_says_something_else_at_that_place_and_keeps_the_old_branch(chat: Session) -> None:
    chat.respond("one")
    first = chat.path()[1]
    old_tip = chat.respond("two").node
    reply = chat.edit(first, "uno")
    assert said(chat) == [SYSTEM, "uno", reply.text]
    assert len(chat.path()[0].children) == 2
    chat.rewind(old_tip)
    assert said(chat)[1::2] == ["one", "two"]
    check_as_fresh(chat, "three")


def test_only_a_users_message_can_be_edited(chat: Session) -> None:
    reply = chat.respond("one")
    system = chat.path()[0]
    for node in (reply.node, system, chat.tree.root):
        with pytest.raises(ConversationError):
            chat.edit(node, "x")
    assert chat.tip is reply.node


def test_an_answer_needs_a_message(chat: Session) -> None:
    for _ in range(2):
        with pytest.raises(ConversationError, match="no message to answer"):
            chat.respond(None)
    end = min(ByteTokenizer.eos_token_ids)
    chat.respond("one", params=SamplingParams(logit_bias={end: 100.0}))
    with pytest.raises(ConversationError):
        chat.respond(None)
    chat.respond("two")


def test_prewarm_computes_the_message_before_it_is_said(chat: Session) -> None:
    chat.respond("one")
    before = said(chat)
    typed = "A rather long message that takes a while to type"
    settle(chat)
    assert chat.prewarm("A rather long") > 0
    assert chat.prewarm("A rather long") == 0
    assert chat.prewarm(typed) == len(typed) - len("A rather long")
    assert said(chat) == before
    reply = check_as_fresh(chat, typed)
    assert reply.usage.awaited_tokens < len(typed)


def test_prewarm_of_other_text_leaves_no_trace(chat: Session) -> None:
    chat.respond("one")
    chat.prewarm("this is not what will be said")
    check_as_fresh(chat, "thus")


def test_prewarm_that_failed_can_be_tried_again(chat: Session, faults: Any) -> None:
    chat.respond("one")
    settle(chat)
    faults.forward_in = 0
    with pytest.raises(RuntimeFailure):
        chat.prewarm("typed text")
    assert chat.prewarm("typed text") > 0
    check_as_fresh(chat, "typed text and more")


def test_prewarm_before_anything_was_said_computes_the_system_message(chat: Session) -> None:
    assert chat.prewarm() > len(SYSTEM)
    check_as_fresh(chat, "one")


def test_leaving_the_loop_keeps_what_was_said(chat: Session) -> None:
    pieces = []
    for piece in chat.stream("one", params=SamplingParams(max_tokens=50)):
        pieces.append(piece)
        if len(pieces) == 3:
            break
    tip = chat.tip
    assert tip.role == "assistant"
    assert tip.content.startswith("".join(pieces))
    assert tip.finish_reason == "cancelled"
    check_as_fresh(chat, "two")


@pytest.mark.parametrize("after", range(8))
def test_a_reply_stopped_anywhere_is_followed_as_if_it_had_ended_there(
    model: Model, chat: Session, after: int
) -> None:
    with model.engine.lock:  # nothing is generated before it is stopped, if that comes first
        stream = chat.stream("one")
        if after == 0:
            stream.stop()
    out = ""
    for number, piece in enumerate(stream, 1):
        out += piece
        if number == after:
            stream.stop()
    assert out == ("" if stream.reply is None else stream.reply.text)
    assert (stream.reply is None) == (after == 0)
    check_as_fresh(chat, "two")


def test_a_reply_that_had_not_begun_leaves_the_conversation_as_it_was(chat: Session) -> None:
    chat.respond("one")
    before = (chat.tip, len(chat.tree))
    with chat.stream("two") as stream:
        pass
    assert stream.reply is None
    chat.stream("three").close()
    assert (chat.tip, len(chat.tree)) == before
    check_as_fresh(chat, "four")


@pytest.mark.parametrize("leave_after", [None, 2])
def test_an_event_loop_reads_a_reply_which_is_kept_as_a_turn(
    chat: Session, leave_after: int | None
) -> None:
    async def read(stream: ReplyStream) -> str:
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == leave_after:
                break
        await asyncio.to_thread(stream.close)
        return "".join(pieces)

    stream = chat.stream("one")
    text = asyncio.run(read(stream))
    assert stream.reply is not None
    assert text == stream.reply.text == chat.tip.content
    check_as_fresh(chat, "two")


@pytest.mark.slow
def test_a_stream_that_is_forgotten_does_not_block_the_session(chat: Session) -> None:
    chat.stream("one")
    gc.collect()
    assert said(chat) == [SYSTEM]
    check_as_fresh(chat, "two")


@pytest.mark.parametrize("pace", [Pace(prefill_chunk=16)], ids=[""])
def test_cancelling_during_the_prefill_keeps_what_was_computed_and_says_nothing(
    chat: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime: Any = chat.model.engine.runtime
    forward, passes = runtime.forward, []
    long = "word " * 40
    begun = threading.Event()

    def forward_then_stop(rows: Any) -> Any:
        assert begun.wait(60)
        passes.append(rows)
        if len(passes) == 4:
            stream.stop()
        return forward(rows)

    monkeypatch.setattr(runtime, "forward", forward_then_stop)
    stream = chat.stream(long)
    begun.set()
    assert list(stream) == []
    assert (stream.reply, said(chat)) == (None, [SYSTEM])
    monkeypatch.undo()
    assert check_as_fresh(chat, long).usage.reused_tokens == 64


def test_a_session_that_replies_refuses_everything_else(chat: Session) -> None:
    reply = chat.respond("one")
    user = reply.node.parent
    assert user is not None
    stream = chat.stream("two")
    pieces = iter(stream)
    next(pieces)
    for use in (
        lambda: chat.respond("x"),
        lambda: chat.stream("x"),
        lambda: chat.rewind(chat.tree.root),
        chat.undo,
        chat.regenerate,
        lambda: chat.edit(user, "x"),
        lambda: chat.prewarm("x"),
    ):
        with pytest.raises(SessionBusyError):
            use()
        assert chat.tip is reply.node
    list(pieces)
    assert said(chat)[1::2] == ["one", "two"]
    check_as_fresh(chat, "three")


def test_a_second_thread_is_refused_too(chat: Session) -> None:
    raised: list[BaseException] = []

    def intrude() -> None:
        try:
            chat.respond("x")
        except SessionBusyError as error:
            raised.append(error)

    with chat.stream("one") as stream:
        pieces = iter(stream)
        next(pieces)
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
    assert len(raised) == 1
    assert said(chat)[1::2] == ["one"]


def test_sessions_in_several_threads_give_what_they_give_alone(model: Model) -> None:
    texts = ["one", "two", "three"]
    alone = [said_by(model.session(f"S{number}", params=SHORT), texts) for number in range(4)]
    base = [model.session(f"S{number}", params=SHORT) for number in range(4)]
    results: dict[int, list[str]] = {}

    def talk(number: int) -> None:
        results[number] = said_by(base[number], texts)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(4)] == alone


def said_by(session: Session, texts: list[str]) -> list[str]:
    return [session.respond(text).text for text in texts]


def test_a_prompt_that_does_not_fit_leaves_the_conversation_as_it_was(
    make_model: Callable[..., Model],
) -> None:
    chat = make_model(context_length=200).session(SYSTEM, params=SHORT)
    chat.respond("one")
    before = (chat.tip, len(chat.tree))
    for use in (
        lambda: chat.respond("x" * 200),
        lambda: chat.prewarm("x" * 200),
        lambda: chat.edit(chat.path()[1], "x" * 200),
    ):
        with pytest.raises(ContextFullError) as raised:
            use()
        assert raised.value.limit == 200
        assert (chat.tip, len(chat.tree)) == before
    check_as_fresh(chat, "two")


def test_a_context_that_fills_up_ends_the_reply(make_model: Callable[..., Model]) -> None:
    chat = make_model(context_length=120).session(params=SamplingParams(ignore_eos=True))
    reply = chat.respond("one")
    assert reply.finish_reason == "length"
    assert reply.usage.prompt_tokens + reply.usage.generated_tokens == 120
    with pytest.raises(ContextFullError):
        chat.respond("two")
    chat.undo()
    check_as_fresh(chat, "two")


def test_bad_parameters_leave_the_conversation_as_it_was(chat: Session) -> None:
    chat.respond("one")
    before = (chat.tip, len(chat.tree))
    with pytest.raises(InvalidParameterError):
        chat.respond("two", params=SamplingParams(logit_bias={10**6: 1.0}))
    assert (chat.tip, len(chat.tree)) == before
    check_as_fresh(chat, "two")


def test_a_refusal_of_the_template_leaves_the_conversation_as_it_was(
    make_model: Callable[..., Model],
) -> None:
    source = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
    )
    chat = make_model(template=source).session(params=SHORT)
    chat.respond("one")
    before = (chat.tip, len(chat.tree))
    with pytest.raises(TemplateError):
        chat.respond("bad")
    with pytest.raises(TemplateError):
        chat.edit(chat.path()[0], "bad")
    assert (chat.tip, len(chat.tree)) == before
    check_as_fresh(chat, "two")


def test_a_template_that_rewrites_a_reply_is_reported_and_the_reply_is_still_right(
    make_model: Callable[..., Model],
) -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{{ m.content | reverse }}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}[assistant]"
    )
    chat = make_model(template=source).session(params=SHORT)
    first = chat.respond("one")
    assert first.usage.reason == "new"
    second = check_as_fresh(chat, "two")
    assert second.usage.reason == "template_rewrote"
    assert second.usage.difference == "The template shows reply 1 otherwise."


@pytest.mark.parametrize("failing_pass", range(7))
def test_a_failing_pass_keeps_what_was_said_and_the_conversation_can_go_on(
    chat: Session, faults: Any, failing_pass: int
) -> None:
    chat.respond("one")
    settle(chat)
    before = chat.tip
    faults.forward_in = failing_pass
    if failing_pass < 6:
        with pytest.raises(RuntimeFailure):
            chat.respond("two")
    else:
        chat.respond("two")
    faults.forward_in = None
    if failing_pass == 0:
        assert chat.tip is before
    else:
        assert chat.tip.finish_reason == ("cancelled" if failing_pass < 6 else "length")
        assert chat.tip.token_ids is not None
        assert len(chat.tip.token_ids) == failing_pass
    check_as_fresh(chat, "three")


@pytest.mark.parametrize("operation", ["regenerate", "edit"])
@pytest.mark.parametrize("failing_pass", [0, 2])
def test_when_an_edit_or_a_regeneration_fails_the_session_stands_where_it_stood(
    chat: Session, faults: Any, operation: str, failing_pass: int
) -> None:
    chat.respond("one")
    tip = chat.respond("two").node
    settle(chat)
    faults.forward_in = failing_pass
    first = chat.path()[1]
    act = partial(chat.edit, first, "uno") if operation == "edit" else chat.regenerate
    with pytest.raises(RuntimeFailure):
        act()
    assert chat.tip is tip
    check_as_fresh(chat, "three")


def test_out_of_blocks_at_the_prompt_leaves_the_conversation_as_it_was(
    make_model: Callable[..., Model],
) -> None:
    chat = make_model(num_blocks=20).session(SYSTEM, params=SHORT)
    chat.respond("one")
    before = (chat.tip, len(chat.tree))
    with pytest.raises(OutOfBlocksError):
        chat.respond("x" * 160)
    assert (chat.tip, len(chat.tree)) == before
    chat.model.engine.check()
    chat.respond("two")


def test_out_of_blocks_in_the_middle_of_a_reply_keeps_what_was_said_and_reports(
    make_model: Callable[..., Model],
) -> None:
    model = make_model(num_blocks=8)
    chat = model.session(params=SamplingParams(ignore_eos=True))
    pieces: list[str] = []
    with pytest.raises(OutOfBlocksError):
        pieces.extend(chat.stream("one"))
    assert chat.tip.role == "assistant"
    assert chat.tip.finish_reason == "cancelled"
    # 64 slots are full, and the 65th token is known and has no KV.
    prompt = model.prompts.encode([], "one").token_ids
    assert chat.tip.token_ids is not None
    assert len(prompt) + len(chat.tip.token_ids) == 65
    assert chat.tip.content.startswith("".join(pieces))
    model.engine.check()
    chat.undo()
    assert chat.respond("one", params=SHORT).usage.computed_tokens == 0


def test_between_turns_a_session_holds_no_block_and_a_closed_one_can_be_used_again(
    chat: Session, model: Model
) -> None:
    chat.respond("one")
    settle(chat)
    assert not used_up(model)
    with chat:
        pass
    chat.close()
    assert not used_up(model)
    assert len(said(chat)) == 3
    check_as_fresh(chat, "two")


def test_closing_in_the_middle_of_a_reply_leaves_the_reply_to_its_reader(
    chat: Session, model: Model
) -> None:
    stream = chat.stream("one", params=SamplingParams(max_tokens=30))
    pieces = iter(stream)
    next(pieces)
    chat.close()
    list(pieces)
    assert chat.tip.role == "assistant"
    settle(chat)
    assert not used_up(model)


def test_a_closed_model_is_misuse_and_its_conversations_can_still_be_read(
    make_model: Callable[..., Model],
) -> None:
    with make_model() as model:
        chat = model.session(SYSTEM, params=SHORT)
        chat.respond("one")
    model.close()
    assert len(said(chat)) == 3
    with pytest.raises(MisuseError):
        chat.respond("two")
    with pytest.raises(MisuseError):
        model.session().respond("one")
    with pytest.raises(MisuseError):
        chat.prewarm("two")
    chat.close()
    assert len(said(chat)) == 3


def test_a_model_that_is_closed_while_it_replies_keeps_what_was_given_out(
    make_model: Callable[..., Model],
) -> None:
    model = make_model(context_length=8000, num_blocks=2000)
    chat = model.session(params=SamplingParams(ignore_eos=True, max_tokens=7000))
    stream = chat.stream("one")
    pieces = iter(stream)
    out = next(pieces)
    model.close()
    out += "".join(pieces)
    assert stream.reply is not None
    assert stream.reply.text == chat.tip.content == out
    assert chat.tip.finish_reason == "cancelled"


@pytest.mark.slow
def test_a_forgotten_session_leaves_its_blocks_to_others(model: Model) -> None:
    chat = model.session(SYSTEM, params=SHORT)
    chat.respond("one")
    settle(chat)
    del chat
    gc.collect()
    assert not used_up(model)


def test_text_of_any_kind_can_be_said(chat: Session) -> None:
    for text in ("", " ", "\n\n", "é€😀", "<|im_end|>", "\ud800", "a\x00b"):
        check_as_fresh(chat, text)


def test_parameters_of_the_session_hold_unless_a_call_says_otherwise(chat: Session) -> None:
    assert chat.respond("one").usage.generated_tokens == 6
    assert chat.respond("two", params=SamplingParams(max_tokens=2)).usage.generated_tokens == 2
    assert chat.respond("three").usage.generated_tokens == 6


def test_stop_strings_end_a_reply_and_the_next_turn_follows_the_cut(chat: Session) -> None:
    whole = chat.respond("one", params=SamplingParams(max_tokens=20)).text
    stop = whole[4:6]
    reply = chat.regenerate(params=SamplingParams(max_tokens=20, stop=(stop,)))
    assert reply.finish_reason == "stop"
    assert reply.text == whole[: whole.index(stop)]
    assert reply.node.token_ids is not None
    assert chat.model.tokenizer.decode(reply.node.token_ids) == reply.text
    check_as_fresh(chat, "two")


def test_with_whole_blocks_only_everything_is_still_as_fresh(
    make_model: Callable[..., Model],
) -> None:
    chat = make_model(whole_blocks_only=True).session(SYSTEM, params=SHORT)
    for text in ("one", "two"):
        chat.respond(text)
    fork = chat.fork()
    chat.undo()
    assert chat.respond("three").usage.reused_tokens % 8 == 0
    fork.regenerate()
    expected = make_model(whole_blocks_only=True).session(SYSTEM, params=SHORT)
    for text in ("one", "three"):
        expected.respond(text)
    assert said(chat) == said(expected)


# The oracle above must be able to fail.


def test_a_session_that_keeps_stale_kv_is_seen(
    chat: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the histories part inside a block, the rest of it is not there."""
    chat.respond("one")
    chat.respond("two")
    chat.undo()
    other = "something that is longer than what was undone " * 3
    expected = fresh_reply(chat, other)

    with monkeypatch.context() as planted:
        planted.setattr(chat.model.engine.runtime, "copy_blocks", lambda _: None)
        reply = chat.respond(other)
    assert (reply.text, list(reply.node.token_ids or ())) != expected


def test_a_tree_is_shared_by_forks_and_by_nobody_else(chat: Session, model: Model) -> None:
    assert chat.fork().tree is chat.tree
    assert model.session().tree is not chat.tree
    assert isinstance(chat.tree, Tree)


def test_regenerating_computes_nothing(chat: Session) -> None:
    chat.respond("one")
    assert chat.regenerate().usage.computed_tokens == 0


def test_an_edit_reuses_all_that_comes_before_the_first_difference(chat: Session) -> None:
    chat.respond("a message that is long")
    chat.respond("two")
    usage = chat.edit(chat.path()[1], "a message that is other").usage
    assert usage.computed_tokens == len("otherE\nSassistant\n")


def test_sessions_on_one_system_prompt_compute_it_once_and_hold_it_once(model: Model) -> None:
    system = "You are an assistant for all questions about trains. " * 6
    model.session(system, params=SHORT).respond("one")
    blocks = model.engine.pool.used_blocks
    for number in range(7):
        usage = model.session(system, params=SHORT).respond(f"{number} is my question").usage
        assert usage.reused_tokens >= len(system)
    assert model.engine.pool.used_blocks - blocks <= 7 * 10


def test_namespaces_share_neither_kv_nor_messages(model: Model) -> None:
    ours = model.session(SYSTEM, params=SHORT, namespace="ours")
    ours.respond("one")
    assert model.session_from(ours.transcript(), namespace="theirs").tip.token_ids is None
    assert ours.tip.token_ids is not None
    found = model.session_from(ours.transcript(), namespace="ours")
    assert found.tip.token_ids == ours.tip.token_ids
    theirs = model.session(SYSTEM, params=SHORT, namespace="theirs").respond("one")
    assert theirs.usage.reused_tokens == 0


def test_idle_work_computes_what_the_template_puts_before_the_next_message(
    chat: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(IdleWork, "start", lambda _self, sequence: sequence.release())
        chat.respond("one")
        lazy = chat.respond("two").usage.awaited_tokens
    chat.respond("three")
    settle(chat)
    # The last token of the reply, its end, and the head of the next message.
    assert lazy - chat.respond("two").usage.awaited_tokens == len("xE\nSuser\n")


def test_a_prewarm_is_dropped_for_free(chat: Session) -> None:
    chat.respond("one")
    chat.prewarm("typed and then")
    assert chat.respond("typed at last").usage.awaited_tokens == len("t lastE\nSassistant\n")


@pytest.mark.slow
def test_what_is_pinned_survives_whatever_else_needs_room(make_model: Callable[..., Model]) -> None:
    model = make_model(num_blocks=40)
    pinned, other = (model.session(text, params=SHORT) for text in ("pinned " * 8, "other " * 8))
    pinned.respond("one")
    pinned.pin()
    other.respond("one")
    settle(other)
    for number in range(6):
        model.session(f"{number} " * 90, params=SHORT).respond("one")
    assert model.engine.cache.evicted_blocks > 0
    warm, tokens = pinned.warm_tokens()
    assert warm == tokens
    assert other.warm_tokens()[0] < other.warm_tokens()[1]
    pinned.unpin()
    for number in range(6):
        model.session(f"{number} " * 90, params=SHORT).respond("one")
    assert pinned.warm_tokens()[0] < tokens


def test_going_on_after_a_pin_and_unpinning_leaves_the_books_right(
    chat: Session, model: Model
) -> None:
    """What is pinned may end inside a block that then grows."""
    for text in ("one", "two", "three"):
        chat.respond(text)
        chat.pin()
        chat.respond("x")
        settle(chat)
        model.engine.check()
        chat.unpin()
        model.engine.check()


def test_two_threads_that_edit_and_say_are_refused_and_never_mixed(
    chat: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they interleave, what is said follows a place where the session stood."""
    chat.respond("one")
    tip = chat.respond("two").node
    answers: list[object] = []

    def say() -> None:
        try:
            answers.append(chat.respond("mine").node.path())
        except SessionBusyError:
            answers.append(None)

    threads: list[threading.Thread] = []
    encode = PromptEncoder.encode

    def encode_slowly(self: PromptEncoder, *arguments: Any) -> Prompt:
        if len(threads) < 3:
            threads.append(thread := threading.Thread(target=say))
            thread.start()
            thread.join()
        return encode(self, *arguments)

    monkeypatch.setattr(PromptEncoder, "encode", encode_slowly)
    chat.regenerate()
    assert answers
    assert set(map(str, answers)) == {"None"}
    assert chat.tip.parent is tip.parent
    assert not any(node.content == "mine" for node in chat.tree.nodes())


def test_an_interrupt_while_waiting_for_idle_work_leaves_the_session_free(
    chat: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.respond("one")

    def interrupted(_: Task) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr(Task, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.respond("two")
    check_as_fresh(chat, "two")


def test_reading_a_stream_again_gives_nothing_and_waits_for_nobody(chat: Session) -> None:
    stream = chat.stream("one")
    assert list(stream)
    assert list(stream) == []
    left = chat.stream("two")
    for _ in left:
        break
    assert list(left) == []
    check_as_fresh(chat, "three")


def test_a_session_samples_as_the_makers_recommend_and_tells_the_seed(
    make_model: Callable[..., Model],
) -> None:
    makers = {"temperature": 1.5, "top_p": 0.95}
    model = make_model(sampling=makers)
    session = model.session(keep=True)
    assert session.params == SamplingParams(temperature=1.5, top_p=0.95)
    reply = session.respond("one", params=replace(session.params, max_tokens=12))
    used = reply.usage.sampling
    assert used is not None
    assert {**used, "seed": 0} == {**makers, "seed": 0}
    same = SamplingParams(max_tokens=12, temperature=1.5, top_p=0.95, seed=int(used["seed"]))
    assert model.session(params=same).respond("one").text == reply.text
    name = session.conversation.name
    assert name is not None
    kept = model.resume(name)
    assert kept.params == session.params == model.session_from(kept.transcript()).params
    assert kept.tip.usage is not None
    assert kept.tip.usage["sampling"] == used
    assert model.session(params=SamplingParams()).respond("one").usage.sampling is None

"""A session's replies on an event loop: as on a thread, and a task that is cancelled ends them."""

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.engine.sampling import Generator
from recollect.errors import ContextFullError, ConversationError, SessionBusyError
from recollect.types import SamplingParams

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
LONG = replace(SHORT, max_tokens=1500)


@pytest.fixture
def chat(model: Model) -> Session:
    return model.session("You are brief.", params=SHORT)


def check(model: Model) -> None:
    """Check that nobody but the cache holds a block, and that nothing is worked on."""
    assert [task for task in model.engine.tasks() if not task.idle] == []
    for task in model.engine.tasks():
        task.join()
    assert model.engine.pool.used_blocks == model.engine.cache.evictable_blocks
    model.engine.check()


def test_a_reply_has_the_same_ids_as_on_a_thread(chat: Session, model: Model) -> None:
    other = model.session("You are brief.", params=SHORT, namespace="other")
    expected = [other.respond("Hello"), other.respond("And?")]

    async def ask() -> None:
        first = await chat.respond_async("Hello")
        assert first.node.token_ids == expected[0].node.token_ids
        assert first.usage.prompt_tokens == expected[0].usage.prompt_tokens
        stream = chat.stream_async("And?")
        pieces = [piece async for piece in stream]
        assert stream.reply is not None
        assert "".join(pieces) == stream.reply.text == expected[1].text
        assert stream.reply.node is chat.tip
        assert stream.reply.node.token_ids == expected[1].node.token_ids
        assert [piece async for piece in stream] == []

    asyncio.run(ask())
    assert chat.transcript() == other.transcript()
    check(model)


def test_leaving_the_loop_keeps_what_was_said_and_the_next_question_waits(
    chat: Session, model: Model
) -> None:
    async def ask() -> None:
        pieces: list[str] = []
        async for piece in chat.stream_async("one", params=LONG):
            pieces.append(piece)
            if len(pieces) == 3:
                break
        reply = await chat.respond_async("two")
        said = [node.content for node in reply.node.path()]
        assert said[1:4] == ["one", "".join(pieces), "two"]

    asyncio.run(ask())
    check(model)


def test_the_next_question_waits_though_a_thread_still_knows_what_it_began(
    chat: Session, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of a pool lets go of its work some time after its result was handed over."""
    held, to_thread = list[Any](), asyncio.to_thread

    def holding(work: Any, *arguments: Any) -> Any:
        held.append(work)
        return to_thread(work, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", holding)

    async def leave_and_ask() -> None:
        async for _ in chat.stream_async("Hello"):
            break
        await chat.respond_async("And then?")

    asyncio.run(leave_and_ask())
    assert held
    check(model)


@pytest.mark.few(3)
@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.02, 0.1])
def test_a_task_that_is_cancelled_ends_the_reply(
    chat: Session, model: Model, seconds: float
) -> None:
    async def ask() -> None:
        task = asyncio.create_task(chat.respond_async("one", params=LONG))
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not [task for task in model.engine.tasks() if not task.idle]
        await chat.respond_async("two")  # the session is free

    asyncio.run(ask())
    chat.conversation.check()
    check(model)


def test_the_end_of_a_block_ends_the_reply(chat: Session, model: Model) -> None:
    async def ask() -> None:
        async with chat.stream_async("one", params=LONG) as stream:
            first = await anext(stream)
        assert stream.reply is not None
        assert stream.reply.finish_reason == "cancelled"
        assert stream.reply.text == first
        async with chat.stream_async("two"):
            pass  # never begun
        assert chat.tip is stream.reply.node

    asyncio.run(ask())
    check(model)


def test_one_that_nobody_reads_on_ends_with_its_last_reference(chat: Session, model: Model) -> None:
    async def ask() -> None:
        stream = chat.stream_async("one", params=LONG)
        await anext(stream)
        del stream
        gc.collect()

    asyncio.run(ask())
    assert chat.respond("two").finish_reason == "length"
    check(model)


def test_errors_are_those_of_a_thread(chat: Session, model: Model) -> None:
    async def ask() -> None:
        with pytest.raises(ContextFullError):
            await chat.respond_async("x" * 3000)
        with pytest.raises(ConversationError, match="no message to answer"):
            await chat.respond_async(None)
        async with chat.stream_async("one", params=LONG) as stream:
            await anext(stream)
            with pytest.raises(SessionBusyError):
                await chat.respond_async("two")
        await chat.respond_async("three")

    asyncio.run(ask())
    check(model)


@pytest.mark.slow
def test_ending_a_reply_twice_waits_for_its_end(
    chat: Session, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is cancelled again while a thread ends its reply: the session is free afterwards."""
    is_ending, go_on, close = threading.Event(), threading.Event(), Generator.close

    def held(self: Generator) -> None:
        is_ending.set()
        assert go_on.wait(60)
        close(self)

    async def twice() -> None:
        reply = chat.stream_async("Hello", params=LONG)
        await anext(reply)
        monkeypatch.setattr(Generator, "close", held)
        first = asyncio.ensure_future(reply.aclose())
        await asyncio.to_thread(is_ending.wait, 60)
        first.cancel()
        again = asyncio.ensure_future(reply.aclose())
        await asyncio.wait([again], timeout=0.2)
        assert not again.done()
        go_on.set()
        await again
        assert reply.reply is not None
        assert reply.reply.finish_reason == "cancelled"

    asyncio.run(twice())
    assert chat.respond("And?").finish_reason == "length"
    check(model)


@pytest.mark.slow
def test_a_task_that_is_cancelled_twice_while_its_reply_begins_waits_for_that(
    chat: Session, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the task can ask the session next."""
    is_beginning, go_on, stream = threading.Event(), threading.Event(), Session.stream

    def held(self: Session, text: str | None, *, params: SamplingParams | None = None) -> Any:
        begun = stream(self, text, params=params)
        is_beginning.set()
        assert go_on.wait(60)
        return begun

    monkeypatch.setattr(Session, "stream", held)

    async def twice() -> None:
        task = asyncio.create_task(chat.respond_async("one", params=LONG))
        await asyncio.to_thread(is_beginning.wait, 60)
        for _ in range(2):
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
            assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.undo()
        await chat.respond_async("two")

    asyncio.run(twice())
    check(model)


async def _by_timeout(work: Coroutine[Any, Any, Any], seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work


async def _by_a_sibling(work: Coroutine[Any, Any, Any], seconds: float) -> None:
    async def fail() -> None:
        await asyncio.sleep(seconds)
        raise LookupError

    with suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(work)
            group.create_task(fail())


async def _twice(work: Coroutine[Any, Any, Any], seconds: float) -> None:
    """A task that is cancelled again while it still ends what it began."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _read_a_piece(chat: Session, params: SamplingParams) -> None:
    """Close a generator early, as a comprehension that is left does."""
    async for _ in chat.stream_async("streamed", params=params):
        return


async def _explored(chat: Session, params: SamplingParams) -> None:
    await chat.explore_async(["this", "that"], params=params, keep=0)


ASKED: dict[str, Callable[[Session, SamplingParams], Coroutine[Any, Any, Any]]] = {
    "respond": lambda chat, params: chat.respond_async("asked", params=params),
    "stream": _read_a_piece,
    "explore": _explored,
}


@pytest.mark.few(3)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("cancel", [_by_timeout, _by_a_sibling, _twice])
def test_however_a_task_ends_early_nothing_is_left_and_the_session_is_free(
    chat: Session, model: Model, asked: str, cancel: Callable[..., Coroutine[Any, Any, None]]
) -> None:
    """And the next question has the reply that it has without any KV from before."""
    threads = threading.active_count()

    async def ask() -> None:
        for seconds in (0.0, 0.001, 0.01, 0.05):
            await cancel(ASKED[asked](chat, LONG), seconds)
        said = [node.content for node in chat.tip.path()]
        reply = await chat.respond_async("At last")
        assert [node.content for node in reply.node.path()][: len(said)] == said

    asyncio.run(ask())
    model.engine.forget()  # what is reused says the same as what is computed anew
    other = chat.fork(chat.tip.path()[-3])
    assert other.respond("At last").node.token_ids == chat.tip.token_ids
    chat.conversation.check()
    check(model)
    assert threading.active_count() <= threads + 1  # the engine's own, which may just have begun

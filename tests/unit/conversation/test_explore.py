"""Replies that are tried beside each other: one prefix, one batch, and only what is kept stays."""

import asyncio
import gc
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from recollect.conversation.branches import Branch
from recollect.conversation.event_log import Event
from recollect.conversation.explore import Exploration
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.engine.sampling import Generator
from recollect.errors import (
    ContextFullError,
    ConversationError,
    InvalidParameterError,
    RuntimeFailure,
)
from recollect.runtime.base import ReferenceRuntime, Row
from recollect.types import SamplingParams

HOT = SamplingParams(max_tokens=6, temperature=1.5, seed=1, ignore_eos=True)
SYSTEM = "You are brief. " * 20


@pytest.fixture
def chat(model: Model) -> Session:
    return model.session(SYSTEM, params=HOT)


@pytest.fixture
def kept(model: Model) -> Session:
    """Return a session whose conversation is in the journal."""
    session = model.session(SYSTEM, params=HOT, name="kept")
    session.respond("Hello")
    return session


def ids(branches: list[Branch]) -> list[list[int]]:
    return [list(one.leaf.token_ids or ()) for one in branches if one.leaf is not None]


def check(model: Model) -> None:
    """Check that nobody but the cache holds a block, and that nothing is worked on."""
    assert [task for task in model.engine.tasks() if not task.idle] == []
    for task in model.engine.tasks():
        task.join()
    assert model.engine.tasks() == []
    assert model.engine.pool.used_blocks == model.engine.cache.evictable_blocks
    model.engine.check()


def rows(model: Model) -> tuple[Any, ...]:
    """Return how much the journal has of the conversation `kept`, and where its branches are."""
    stored = model.journal.load("kept")
    return len(stored.nodes), dict(stored.tips)


# What leads to the branches


def test_what_leads_to_the_branches_is_computed_and_held_once(
    make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts of the benchmark, on the reference runtime: a trunk of 2,000 tokens, 8 of 64."""
    model = make_model(context_length=4096, num_blocks=1024)
    chat = model.session("x" * 2000, params=replace(HOT, max_tokens=64))
    engine, most, rows_in_pass = model.engine, 0, list[int]()
    forward = ReferenceRuntime.forward

    def counted(self: ReferenceRuntime, batch: list[Row]) -> Any:
        nonlocal most
        most = max(most, engine.pool.used_blocks)
        rows_in_pass.append(len(batch))
        return forward(self, batch)

    monkeypatch.setattr(ReferenceRuntime, "forward", counted)
    before = engine.computed_tokens
    found = chat.explore([f"Question {number}" for number in range(8)], keep=0).read()
    trunk = len("Ssystem\n" + "x" * 2000)
    whole = [one.reply.usage.prompt_tokens for one in found.branches if one.reply is not None]
    usage, own = found.usage, sum(whole) - 8 * trunk
    assert usage.reused_tokens + usage.computed_tokens == usage.prompt_tokens == sum(whole)
    assert trunk < usage.computed_tokens <= trunk + own
    # The last token of each reply is not fed.
    assert engine.computed_tokens - before == usage.computed_tokens + 8 * 63
    assert most <= -(-trunk // 8) + 8 * (-(-(own // 8 + 64) // 8) + 1)
    assert rows_in_pass.count(8) >= 60
    check(model)


def test_replies_to_one_prompt_read_it_once(chat: Session, model: Model) -> None:
    found = chat.explore(["Hello"] * 4).read()
    costs = [one.reply.usage.computed_tokens for one in found.branches if one.reply]
    assert costs == [found.usage.prompt_tokens // 4, 0, 0, 0]
    assert len({one.text for one in found.branches}) == 4


def test_what_was_read_ahead_counts_once(chat: Session, model: Model) -> None:
    chat.respond("Hello")
    check(model)
    read = chat.prewarm("And")
    before = model.engine.computed_tokens
    usage = chat.explore(["And now?", "And then?"], keep=0).read().usage
    fed = model.engine.computed_tokens - before - usage.generated_tokens + 2
    assert usage.computed_tokens == usage.read_ahead_tokens + fed
    assert usage.read_ahead_tokens >= read > 0


def test_a_branch_is_the_reply_that_a_fork_would_have_given(chat: Session, model: Model) -> None:
    chat.respond("Hello")
    found = chat.explore(["One?", "Two?", "Three?"], keep=0).read()
    for number, text in enumerate(["One?", "Two?", "Three?"]):
        alone = model.session(SYSTEM, params=HOT, namespace=f"alone {number}")
        alone.respond("Hello")
        expected = alone.respond(text, params=replace(HOT, seed=1 + number))
        assert ids(found.branches)[number] == list(expected.node.token_ids or ())
        assert found.branches[number].transcript() == alone.transcript()


# What stays


def test_all_are_kept_where_nothing_is_said_of_them(kept: Session) -> None:
    tip, before = kept.tip, len(kept.tree)
    found = kept.explore(["One?"] * 3).read()
    assert [one.name for one in found.kept] == ["explore-1", "explore-2", "explore-3"]
    nodes = [one.node for one in found.branches]
    assert len(kept.tree) == before + 4  # the message once
    for branch, node in zip(found.branches, nodes, strict=True):
        assert node is kept.branch(branch.name or "").tip
        assert kept.conversation.saved_id(node) is not None
    assert kept.tip is tip
    kept.conversation.check()


def test_best_of_n_keeps_the_best_alone(kept: Session, model: Model) -> None:
    before, tip = len(kept.tree), kept.tip
    found = kept.explore(["Hello"] * 4, score=lambda one: -abs(one.index - 2)).read()
    assert found.best is found.branches[2]
    assert [one.name for one in found.branches] == [None, None, "explore-1", None]
    assert [one.score for one in found.branches] == [-2.0, -1.0, 0.0, -1.0]
    assert len(kept.tree) == before + 2
    assert kept.tip is tip
    assert set(model.journal.load("kept").tips) == {"main", "explore-1"}
    on = kept.branch("explore-1")
    assert on.tip is found.best.node
    assert on.respond("And now?").usage.reused_tokens > found.usage.prompt_tokens // 4


def test_what_was_pruned_is_warm_and_can_be_kept_later(chat: Session, model: Model) -> None:
    found = chat.explore(["Hello"] * 3, score=lambda one: one.index).read()
    other = found.branches[0]
    before = len(chat.tree)
    node = found.keep(other, "second")
    assert len(chat.tree) == before + 1  # its message was there
    assert found.keep(other) is node
    check(model)
    usage = chat.branch("second").respond("Go on").usage
    assert usage.awaited_tokens <= len("E\nUuser\nGo onE\nSassistant\n") + 1
    with pytest.raises(ConversationError, match="'second'"):
        found.keep(found.branches[1], "second")


def test_nothing_is_kept_where_nothing_is_to_be(kept: Session, model: Model) -> None:
    before, nodes = rows(model), len(kept.tree)
    found = kept.explore(["One?", "Two?"], keep=0).read()
    assert (rows(model), len(kept.tree)) == (before, nodes)
    assert [one.node for one in found.branches] == [None, None]
    assert len({one.text for one in found.branches}) == 2
    check(model)


def test_names_are_those_that_are_asked_for(chat: Session) -> None:
    chat.explore(["One?", "Two?"], name=["left", "right"]).read()
    assert {"left", "right"} <= set(chat.conversation.tips)
    chat.explore(["One?"], name="left").read()
    chat.explore(["One?"], name="left").read()
    assert {"left-1", "left-2"} <= set(chat.conversation.tips)


# Levels


def test_a_beam_goes_on_from_the_best_of_each_level(kept: Session, model: Model) -> None:
    before = len(kept.tree)
    found = kept.explore(["Next."] * 3, depth=3, keep=2, score=lambda one: -one.index).read()
    assert [one.level for one in found.branches] == [1] * 3 + [2] * 6 + [3] * 6
    parents = [one.parent.index if one.parent else None for one in found.branches]
    assert parents == [None] * 3 + [0] * 3 + [1] * 3 + [3] * 3 + [4] * 3
    assert [one.index for one in found.kept] == [9, 10]
    assert found.best.index == 9
    transcript = found.best.transcript()
    assert [one["content"] for one in transcript if one["role"] == "user"][1:] == ["Next."] * 3
    # Both go through the same first two replies; the third is of each its own.
    assert len(kept.tree) == before + 7
    assert kept.branch("explore-1").transcript() == transcript
    kept.conversation.check()
    # A level computes what it adds: the replies before it are there.
    usages = [one.reply.usage for one in found.branches if one.reply and one.level == 3]
    assert max(one.computed_tokens for one in usages) <= len("E\nUuser\nNext.E\nSassistant\n") + 1
    check(model)


def test_a_number_lets_cut_replies_go_on(chat: Session, model: Model) -> None:
    chat.add({"role": "user", "content": "Count."})
    found = chat.explore(3, depth=2, score=lambda one: -one.index).read()
    first, longer = found.branches[0], found.branches[3:]
    assert [len(one) for one in ids(found.branches)] == [6] * 3 + [12] * 3
    for one in longer:
        assert one.parent is first
        assert ids([one])[0][:6] == ids([first])[0]
    assert [one["role"] for one in found.best.transcript()] == ["system", "user", "assistant"]
    assert found.best.node is not None
    assert found.best.node.parent is chat.tip
    check(model)


def test_a_reply_that_came_to_its_end_stays_in_the_race(chat: Session) -> None:
    chat.add({"role": "user", "content": "Count."})
    first = chat.explore(1, keep=0).read().branches[0]
    ended = replace(HOT, stop=(first.text[:1],), ignore_eos=True)
    found = chat.explore(1, params=ended, depth=3, score=lambda _: 1.0).read()
    assert len(found.branches) == 1
    assert found.best.reply is not None
    assert found.best.reply.finish_reason == "stop"
    assert [one.index for one in found.kept] == [0]


def test_a_function_says_what_is_said_after_each_branch(chat: Session) -> None:
    def after(branch: Branch | None) -> list[str]:
        if branch is None:
            return ["left", "right"]
        return [] if branch.prompt == "left" else [f"after {branch.index}"]

    found = chat.explore(after, depth=4, keep=2, score=lambda one: one.level).read()
    prompts = [one.prompt for one in found.branches]
    assert prompts == ["left", "right", "after 1", "after 2", "after 3"]
    assert [one.index for one in found.kept] == [4, 0]


def test_several_models_have_a_trunk_each(
    make_model: Callable[..., Model], chat: Session, model: Model
) -> None:
    chat.respond("Hello")
    other = make_model(block_size=4)
    found = chat.explore(["One?", "Two?"], models=[model, other]).read()
    assert [one.model for one in found.branches] == [model, model, other, other]
    assert other.engine.computed_tokens > len(SYSTEM)
    best = chat.explore(["One?"], models=[model, other], score=lambda one: one.index).read()
    assert [one.index for one in best.kept] == [1]
    chat.conversation.check()
    check(other)


# What goes wrong


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompts": ["a"] * 2, "params": replace(HOT, temperature=0.0)}, "greedy"),
        ({"prompts": 2, "params": SamplingParams()}, "greedy"),
        ({"prompts": 0}, "0 replies"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": "text"}, "no list of prompts"),
        ({"prompts": ["a"], "depth": 0}, "depth is 0"),
        ({"prompts": ["a"], "depth": 2}, "give a score"),
        ({"prompts": ["a"], "depth": 2, "keep": True, "score": len}, "give a score"),
        ({"prompts": ["a"], "keep": -1}, "keep is -1"),
        ({"prompts": ["a", "b"], "keep": 1}, "a score too"),
        ({"prompts": ["a"], "params": [HOT, HOT]}, "1 prompts and 2 params"),
        ({"prompts": ["a"], "name": ["x", "y"]}, "1 prompts and 2 names"),
        ({"prompts": ["a"], "name": ["main"]}, "one of these names"),
        ({"prompts": ["a", "b"], "name": ["x", "x"]}, "one of these names"),
    ],
)
def test_values_that_do_not_go_together_are_refused(
    chat: Session, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidParameterError, match=told):
        chat.explore(**values)


def test_a_prompt_that_does_not_fit_ends_all_before_they_begin(chat: Session, model: Model) -> None:
    found = chat.explore(["short", "x" * 3000])
    with pytest.raises(ContextFullError):
        found.read()
    assert found.branches == []
    assert model.engine.computed_tokens == 0
    check(model)


def test_an_exploration_is_read_once(chat: Session) -> None:
    found = chat.explore(["a"]).read()
    with pytest.raises(ConversationError, match="read once"):
        list(found)
    with pytest.raises(ConversationError, match="read the exploration"):
        _ = chat.explore(["a"]).usage


@pytest.fixture
def third_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every reply with three tokens at most fail at its second."""
    choose = Generator.generate_next_token

    def fails(self: Generator) -> int | None:
        if self.params.max_tokens == 3 and len(self.sequence) > self.reply_start:
            raise RuntimeFailure("injected")
        return choose(self)

    monkeypatch.setattr(Generator, "generate_next_token", fails)


@pytest.mark.usefixtures("third_fails")
def test_one_that_fails_says_so_and_the_others_go_on(kept: Session, model: Model) -> None:
    params = [HOT, replace(HOT, max_tokens=3), HOT]
    found = kept.explore(["a", "b", "c"], params=params).read()
    assert [one.is_whole for one in found.branches] == [True, False, True]
    assert len(found.kept) == 2
    with pytest.raises(RuntimeFailure, match="injected"):
        _ = found.branches[1].text
    check(model)
    with pytest.raises(RuntimeFailure, match="injected"):
        kept.explore(["a"], params=replace(HOT, max_tokens=3)).read()
    check(model)


def test_what_a_score_raises_ends_all(kept: Session, model: Model) -> None:
    before = rows(model)
    for score in (lambda _: 1 / 0, lambda _: float("nan")):
        with pytest.raises((ZeroDivisionError, ConversationError)):
            kept.explore(["a", "b"], score=score).read()
        check(model)
    assert rows(model) == before


def test_a_score_that_is_no_number_is_refused_in_a_sentence(kept: Session, model: Model) -> None:
    before, given = rows(model), list[Any]()

    async def awaited(_: Branch) -> float:
        return 1.0

    def returns_awaited(branch: Branch) -> Any:
        given.append(awaited(branch))
        return given[0]

    with pytest.raises(InvalidParameterError, match="returns a number"):
        kept.explore(["a"], score=awaited)  # type: ignore[arg-type] # that is what is wrong
    wrong: list[Any] = [lambda _: None, lambda _: "much", returns_awaited]
    for score in wrong:
        with pytest.raises(ConversationError, match="returns a number"):
            kept.explore(["a", "b"], score=score).read()
        check(model)
    assert rows(model) == before


def test_what_has_no_score_is_never_the_best(kept: Session) -> None:
    """The loop was left before they were scored, and the one that was has less than nothing."""
    found = kept.explore(["a"] * 3, score=lambda _: -5.0)
    for branch in found:
        assert found.best is branch
        break
    assert found.best.score == -5.0


def test_a_name_that_somebody_takes_meanwhile_gets_a_number(kept: Session, model: Model) -> None:
    found = kept.explore(["a", "b"], name=["x", "y"])
    for number, _ in enumerate(found.pieces()):
        if not number:
            kept.fork(name="x")
    assert [one.name for one in found.branches] == ["x-2", "y"]
    assert kept.branch("x-2").tip is found.branches[0].node
    assert kept.branch("x").tip is kept.tip
    check(model)
    kept.conversation.check()


def test_two_programs_explore_one_conversation(kept: Session, model: Model) -> None:
    """Neither sees what the other keeps; both have all, under names that say where it is."""
    other = model.resume("kept", params=HOT)
    ours, theirs = kept.explore(["a"] * 2).read(), other.explore(["b"] * 2).read()
    assert [one.name for one in ours.kept] == ["explore-1", "explore-2"]
    assert [one.name for one in theirs.kept] == ["explore-1-2", "explore-1-3"]
    stored = model.journal.load("kept")
    for session, found in ((kept, ours), (other, theirs)):
        for branch in found.kept:
            assert branch.name is not None
            assert branch.node is not None
            assert session.branch(branch.name).tip is branch.node
            assert stored.tips[branch.name] == session.conversation.saved_id(branch.node)
    again = other.explore(["c"] * 2).read()
    assert len({one.name for one in (*theirs.kept, *again.kept)}) == 4
    other.conversation.check()


@pytest.mark.parametrize(
    ("prompts", "how", "about"),
    [
        (1.5, {}, "prompts"),
        (None, {}, "prompts"),
        ([1, 2], {}, "prompts"),
        (b"ab", {}, "prompts"),
        ({"a": 1}, {}, "prompts"),
        (lambda _: None, {}, "prompts"),
        (lambda _: "abc", {}, "prompts"),
        (10**9, {}, "prompts"),
        (["a"] * 1025, {}, "prompts"),
        (["a"], {"params": []}, "params"),
        (["a"], {"params": "hot"}, "params"),
        (["a"], {"params": [None]}, "params"),
        (["a"], {"score": 5}, "score"),
        (["a"], {"name": None}, "name"),
        (["a"], {"name": [5]}, "name"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(
    chat: Session, prompts: Any, how: dict[str, Any], about: str
) -> None:
    with pytest.raises(InvalidParameterError) as refused:
        chat.explore(prompts, **how).read()
    assert refused.value.param == about


@pytest.mark.parametrize(
    ("prompts", "name"), [(["a", "half \ud800"], "x"), (["a"], "a\nb"), (["a"], ""), (["a"], [""])]
)
def test_what_cannot_be_saved_is_refused_before_anything_is_computed(
    kept: Session, model: Model, prompts: list[str], name: Any
) -> None:
    check(model)
    before = model.engine.computed_tokens
    with pytest.raises(ConversationError):
        kept.explore(prompts, name=name).read()
    assert model.engine.computed_tokens == before


def test_leaving_the_loop_ends_the_rest(chat: Session, model: Model) -> None:
    params = [HOT, *[replace(HOT, max_tokens=1500, seed=number) for number in range(3)]]
    for branch in chat.explore(["a", "b", "c", "d"], params=params):
        assert branch.index == 0
        break
    check(model)
    assert [one for one in chat.conversation.tips if one != "main"] == ["explore-1"]


@pytest.mark.slow
def test_close_waits_for_a_reply_that_another_thread_ends(
    kept: Session, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is cancelled while a thread keeps what has ended: nothing may come to the tree later."""
    is_ending, go_on, close = threading.Event(), threading.Event(), Generator.close

    def held(self: Generator) -> None:
        is_ending.set()
        assert go_on.wait(60)
        close(self)

    monkeypatch.setattr(Generator, "close", held)
    found, seen = kept.explore(["a"]), list[int]()

    def end() -> None:
        found.close()
        seen.append(len(found.kept))

    reader, closer = threading.Thread(target=lambda: list(found)), threading.Thread(target=end)
    reader.start()
    assert is_ending.wait(60)
    closer.start()
    closer.join(0.2)
    assert seen == []
    go_on.set()
    closer.join(60)
    reader.join(60)
    assert seen == [1]
    assert found.branches[0].node is not None
    check(model)


def test_stop_comes_from_another_thread(chat: Session, model: Model) -> None:
    found = chat.explore(["a", "b"], params=replace(HOT, max_tokens=1500))
    for seen, _ in enumerate(found.pieces()):
        if seen == 5:
            threading.Thread(target=found.stop).start()
    assert {one.reply.finish_reason for one in found.branches if one.reply} == {"cancelled"}
    assert found.kept == []
    check(model)


# Event loops


def test_an_event_loop_reads_the_same(chat: Session, model: Model) -> None:
    """In `exact` the ids are the same, whoever reads them."""
    expected = chat.explore(["One?", "Two?"], keep=0).read()

    async def read() -> tuple[list[list[int]], ...]:
        at_once = await chat.explore_async(["One?", "Two?"], keep=0)
        one_by_one = chat.explore_async(["One?", "Two?"], keep=0)
        branches = [branch async for branch in one_by_one]
        pieces = chat.explore_async(["One?", "Two?"], keep=0)
        texts = {0: "", 1: ""}
        async for index, piece in pieces.pieces_async():
            texts[index] += piece
        assert texts == {one.index: one.text for one in expected.branches}
        branches.sort(key=lambda one: one.index)
        return ids(at_once.branches), ids(branches), ids(pieces.branches)

    assert asyncio.run(read()) == (ids(expected.branches),) * 3
    check(model)


def test_the_event_loop_is_never_blocked(chat: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may wait happens on other threads: prompts, scores, the ends of replies, the journal."""
    seen = set[str]()
    loops = threading.current_thread().name

    def note(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            assert threading.current_thread().name != loops, name
            seen.add(name)
            return work(*arguments, **options)

        return noted

    conversation = type(chat.conversation)
    for owner, name in (
        (type(chat.model.prompts), "encode"),
        (conversation, "add"),
        (conversation, "ask"),
        (Generator, "close"),
    ):
        monkeypatch.setattr(owner, name, note(name, getattr(owner, name)))

    async def read() -> None:
        score = note("score", lambda _: 1.0)
        await chat.explore_async(["One?", "Two?"], depth=2, score=score)
        await chat.respond_async("Hello")
        async for _ in chat.stream_async("And?"):
            break
        await chat.respond_async("And then?")

    asyncio.run(read())
    assert seen == {"encode", "add", "ask", "close", "score"}


def test_a_task_that_is_cancelled_ends_the_engines_work(kept: Session, model: Model) -> None:
    before = rows(model)
    endless = replace(HOT, max_tokens=1500)

    async def cancelled(seconds: float) -> None:
        task = asyncio.ensure_future(kept.explore_async(["a", "b"], params=endless))
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        check(model)

    for milliseconds in (0, 1, 5, 20):
        asyncio.run(cancelled(milliseconds / 1000))
    assert rows(model) == before


@pytest.mark.slow
def test_a_loop_that_is_closed_early_ends_the_engines_work(kept: Session, model: Model) -> None:
    """Nothing runs on that loop any more, so nobody could close what is read on it."""
    before, loop = rows(model), asyncio.new_event_loop()
    endless = replace(HOT, max_tokens=1500)
    for task in model.engine.tasks():
        task.join()
    computed = model.engine.computed_tokens
    readings: list[Any] = [Exploration.pieces_async, Exploration.__aiter__]
    for read in readings:
        reading = read(kept.explore_async(["a", "b"], params=[replace(HOT, max_tokens=2), endless]))

        async def first(reading: Any = reading) -> None:
            await anext(reading)

        loop.run_until_complete(first())
        if read is Exploration.__aiter__:
            loop.close()
        else:
            loop.run_until_complete(reading.aclose())
        del reading, first
    gc.collect()
    for task in model.engine.tasks():
        task.join()
    assert model.engine.computed_tokens - computed < 1500
    check(model)
    assert rows(model)[0] == before[0] + 2  # the first branch of the second had come to its end


def test_what_is_tried_is_told(kept: Session, model: Model) -> None:
    """As any reply: begun, piece by piece, over; each is told to be kept as what, or as nothing."""
    heard: list[Event] = []
    over = threading.Semaphore(0)

    def hear(event: Event) -> None:
        heard.append(event)
        if event.kind == "reply.completed":
            over.release()

    stop = model.on_event(hear)
    tip = kept.conversation.saved_id(kept.tip)
    found = kept.explore(["One?", "Two?"], name=["one", "two"]).read()
    pruned = kept.explore(["One?"] * 2, score=lambda one: one.index, depth=2, keep=1).read()
    ended = [one for one in pruned.branches if one.is_whole]
    assert all(over.acquire(timeout=60) for _ in range(2 + len(ended)))
    stop()
    _, names = model.journal.names(kept.conversation.journal_id or 0, [tip or 0])
    by_reply: dict[str, list[Event]] = {}
    for event in heard:
        if event.kind.startswith("reply."):
            by_reply.setdefault(event.data["reply"], []).append(event)
    told = list(by_reply.values())
    assert [each[0].data["branch"] for each in told] == ["one", "two", *[None] * len(ended)]
    assert {each[0].data["parent"] for each in told} == {names[tip or 0]}
    for each, branch in zip(told, [*found.branches, *ended], strict=True):
        assert [each[0].kind, each[-1].kind] == ["reply.started", "reply.completed"]
        text = "".join(one.data["text"] for one in each if one.kind == "reply.delta")
        assert text == branch.text
        assert branch.reply is not None
        assert each[-1].data["usage"] == branch.reply.usage.to_dict()
        assert each[-1].data["finish_reason"] == "length"
    kept_as = [each[-1].data["item"] for each in told]
    assert None not in kept_as[:2]
    assert kept_as[2:] == [None] * len(ended)


@pytest.mark.slow
def test_cancelling_a_thousand_leaves_nothing_behind(kept: Session, model: Model) -> None:
    """No block, no thread and no row; each at a random moment, some in the middle of another."""
    for task in model.engine.tasks():
        task.join()
    chance = random.Random(7)  # noqa: S311 - a test
    before, nodes, threads = rows(model), len(kept.tree), set(threading.enumerate())
    endless = replace(HOT, max_tokens=1000, seed=None)
    passes = model.engine.forward_passes

    async def one(number: int) -> None:
        how: dict[str, Any] = {"params": endless, "keep": 0}
        if number % 3 == 0:
            how |= {"params": replace(endless, max_tokens=2), "depth": 50, "keep": 1}
            how["score"] = lambda branch: branch.index
        async for _ in kept.explore_async([f"{number % 7} a", "b"], **how):
            pass

    async def all_of_them() -> None:
        for start in range(0, 1000, 8):
            tasks = [asyncio.create_task(one(start + number)) for number in range(8)]
            for task in tasks:
                await asyncio.sleep(chance.random() * 0.004)
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) for each in ended)

    asyncio.run(all_of_them())
    # Many had begun; on a busy machine more are cancelled before that.
    assert model.engine.forward_passes > passes + 100
    gc.collect()
    check(model)
    assert (rows(model), len(kept.tree)) == (before, nodes)
    # The engine's own thread may have ended before, and be another one now.
    left = [one for one in set(threading.enumerate()) - threads if one.name != "recollect"]
    assert left == []
    kept.conversation.check()

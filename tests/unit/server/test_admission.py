"""Turns: first come, first served within a key, and no key without one while another has many."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.server import hub as admission_module
from recollect.server.hub import Admission, Ticket
from recollect.server.refusals import ApiError


def test_a_turn_comes_when_one_is_given_back() -> None:
    async def run() -> None:
        admission = Admission(concurrent=2, queue=9)
        first, second = await admission.enter(), await admission.enter()
        third = asyncio.create_task(admission.enter())
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (2, 1)
        first.release()
        first.release()
        (await third).release()
        second.release()
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


def test_who_finds_the_queue_full_is_told_when_to_come_back() -> None:
    async def run() -> None:
        admission = Admission(concurrent=1, queue=0)
        await admission.enter()
        with pytest.raises(ApiError) as refused:
            await admission.enter()
        assert refused.value.status == 429
        assert 1 <= int(refused.value.sent_headers["Retry-After"]) <= 60

    asyncio.run(run())


def test_one_request_may_need_more_turns_than_there_are() -> None:
    async def run() -> None:
        admission = Admission(concurrent=2, queue=9)
        large = await admission.enter(5)
        small = asyncio.create_task(admission.enter())
        await asyncio.sleep(0)
        assert admission.waiting == 1
        large.release()
        await small

    asyncio.run(run())


@given(st.lists(st.tuples(st.sampled_from(["enter", "cancel", "release"]), st.integers(1, 3))))
def test_however_they_come_and_go_no_turn_is_lost(steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        admission = Admission(concurrent=3, queue=99)
        waiting: list[asyncio.Task[Ticket]] = []
        for what, number in steps:
            if what == "enter":
                waiting.append(asyncio.create_task(admission.enter(number)))
            elif waiting and what == "cancel":
                waiting[number % len(waiting)].cancel()
            elif done := [one for one in waiting if one.done() and not one.cancelled()]:
                waiting.remove(done[0])
                done[0].result().release()
            await asyncio.sleep(0)
            assert admission.running <= 3
        while waiting:
            await asyncio.sleep(0)
            ended = [one for one in waiting if one.done()]
            assert ended, "somebody waits while nothing runs"
            for one in ended:
                waiting.remove(one)
                if not one.cancelled():
                    one.result().release()
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


async def in_line(admission: Admission, count: int, key: str) -> list[asyncio.Task[Ticket]]:
    tasks = [asyncio.create_task(admission.enter(key=key)) for _ in range(count)]
    for _ in range(2):  # for what they ask, and for what others are told then
        await asyncio.sleep(0)
    return tasks


def test_a_key_with_nothing_running_waits_for_nobody_and_is_not_refused() -> None:
    async def run() -> None:
        admission = Admission(concurrent=4, queue=6)
        flood = await in_line(admission, 200, "a")
        assert (admission.running, admission.waiting) == (4, 6)
        for key in "bcd":
            await asyncio.wait_for(admission.enter(key=key), 1)
        assert (admission.running, admission.waiting) == (7, 6)
        refused = [task for task in flood if task.done() and task.exception() is not None]
        assert len(refused) == 190
        for task in flood:
            task.cancel()

    asyncio.run(run())


def test_no_more_keys_have_turns_at_once_than_there_are_turns() -> None:
    async def run() -> None:
        admission = Admission(concurrent=2, queue=9)
        tickets = [await admission.enter(key=key) for key in "aab"]
        (late,) = await in_line(admission, 1, "c")
        assert not late.done()
        tickets[2].release()
        (await late).release()
        for ticket in tickets:
            ticket.release()
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


def test_the_next_turn_goes_to_the_key_with_the_fewest() -> None:
    async def run() -> None:
        admission = Admission(concurrent=4, queue=99)
        of_a = [await admission.enter(key="a") for _ in range(4)]
        waiting_a = await in_line(admission, 5, "a")
        of_b = await in_line(admission, 3, "b")
        assert [task.done() for task in of_b] == [True, False, False]
        for number in range(2):
            of_a[number].release()
        await asyncio.sleep(0)
        assert [task.done() for task in of_b] == [True, True, False]
        assert not any(task.done() for task in waiting_a)
        for task in (*waiting_a, *of_b):
            task.cancel()

    asyncio.run(run())


def test_of_a_full_line_the_key_with_the_most_gives_up_its_newest_place() -> None:
    async def run() -> None:
        admission = Admission(concurrent=1, queue=4)
        await admission.enter(key="a")
        of_a = await in_line(admission, 4, "a")
        of_b = await in_line(admission, 3, "b")  # the one key that may have a turn is a
        refused = [task.done() and isinstance(task.exception(), ApiError) for task in of_a]
        assert refused == [False, False, True, True]
        assert [task.done() for task in of_b] == [False, False, True]
        with pytest.raises(ApiError):
            of_b[2].result()
        assert admission.waiting == 4
        for task in (*of_a, *of_b):
            task.cancel()

    asyncio.run(run())


def test_nobody_is_told_how_long_the_replies_of_others_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(admission_module, "monotonic", lambda: now)

    async def told(key: str) -> str:
        nonlocal now
        admission = Admission(concurrent=1, queue=0)
        for _ in range(20):
            ticket = await admission.enter(key="slow")
            now += 50
            ticket.release()
        await admission.enter(key="slow")
        with pytest.raises(ApiError) as refused:
            await admission.enter(key=key)
        return refused.value.sent_headers["Retry-After"]

    assert asyncio.run(told("slow")) == "50"
    assert asyncio.run(told("other")) == "1"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["enter", "cancel", "release"]),
            st.integers(1, 3),
            st.sampled_from("abc"),
        )
    )
)
def test_however_keys_come_and_go_no_turn_is_lost(steps: list[tuple[str, int, str]]) -> None:
    async def run() -> None:
        admission = Admission(concurrent=2, queue=5)
        waiting: list[asyncio.Task[Ticket]] = []
        for what, number, key in steps:
            if what == "enter":
                waiting.append(asyncio.create_task(admission.enter(number, key=key)))
            elif waiting and what == "cancel":
                waiting[number % len(waiting)].cancel()
            elif done := [one for one in waiting if has_turn(one)]:
                waiting.remove(done[0])
                done[0].result().release()
            await asyncio.sleep(0)
            assert admission.waiting <= 5
            admission.check()
        while waiting:
            await asyncio.sleep(0)
            ended = [one for one in waiting if one.done()]
            assert ended, "somebody waits while nothing runs"
            for one in ended:
                waiting.remove(one)
                if has_turn(one):
                    one.result().release()
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


def has_turn(task: asyncio.Task[Ticket]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None

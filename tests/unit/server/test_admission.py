"""Turns: first come, first served, and no more at once than there are."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.server.admission import Admission, Ticket
from recollect.server.errors import ApiError


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

"""Which live generator serves a row: decisions as a table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.runtime.genai import (
    LiveHistory,
    ReusePlan,
    TokenArray,
    common_length,
    is_beyond,
    plan_reuse,
)


def ids(text: str) -> TokenArray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def held(*texts: str) -> list[LiveHistory]:
    return [LiveHistory(ids(text)) for text in texts]


NEW = ReusePlan(None, 0)


@pytest.mark.parametrize(
    ("history", "past", "live", "has_room", "expected"),
    [
        ("abcd", 0, [], True, NEW),
        ("abcd", 3, ["abc"], True, ReusePlan(0, 3)),  # goes on
        ("abcd", 3, ["abcxy"], True, ReusePlan(0, 3)),  # rewound
        ("abcd", 3, ["ab"], True, ReusePlan(0, 2)),  # has less than the engine takes for computed
        ("abcd", 2, ["abcd"], True, ReusePlan(0, 2)),  # never more than that
        ("abcd", 0, ["abcd"], True, NEW),  # another namespace, or a fresh prefill
        ("abcd", 3, ["xyz"], True, NEW),
        ("abcd", 3, ["xyz", "abz"], True, ReusePlan(1, 2)),
        ("abcd", 3, ["ab", "abc"], True, ReusePlan(1, 3)),  # the longest
        ("abcd", 2, ["abxyz", "abx"], False, ReusePlan(1, 2)),  # of equals what gives up less
        ("abcd", 2, ["abx", "aby"], False, ReusePlan(1, 2)),  # of those the last used
        ("abcd", 2, ["abxyzxyz"], True, ReusePlan(0, 2)),  # an undo
        ("abcd", 2, ["abxyzxyzxyz"], True, NEW),  # another conversation, and there is room
        ("abcd", 2, ["abxyzxyzxyz"], False, ReusePlan(0, 2)),  # and there is none
    ],
)
def test_the_plan(
    history: str, past: int, live: list[str], has_room: bool, expected: ReusePlan
) -> None:
    assert plan_reuse(ids(history), past, held(*live), has_room=has_room) == expected


@pytest.mark.parametrize(
    ("length", "live_is_beyond", "expected"),
    [
        (4, False, ReusePlan(0, 3)),
        (5, False, NEW),  # the history crosses: all of it anew
        (5, True, ReusePlan(0, 3)),
        (4, True, NEW),  # a rewind comes back below: likewise
    ],
)
def test_kv_of_one_position_encoding_never_serves_the_other(
    length: int, live_is_beyond: bool, expected: ReusePlan
) -> None:
    live = [LiveHistory(ids("abc"), live_is_beyond)]
    plan = plan_reuse(ids("abcdefgh")[:length], 3, live, has_room=False, turn=4)
    assert plan == expected


def test_the_turn_is_the_last_length_of_the_short_side() -> None:
    assert [is_beyond(length, 4096) for length in (4095, 4096, 4097)] == [False, False, True]
    assert not is_beyond(10**6, None)


TOKENS = st.lists(st.integers(0, 2), max_size=8).map(lambda items: np.array(items, np.int32))


@given(TOKENS.filter(len), st.data(), st.lists(TOKENS, max_size=4), st.booleans())
def test_what_is_kept_is_always_a_prefix_that_was_computed(
    history: TokenArray, data: st.DataObject, live: list[TokenArray], has_room: bool
) -> None:
    past = data.draw(st.integers(0, len(history) - 1))
    plan = plan_reuse(history, past, [LiveHistory(one) for one in live], has_room=has_room)
    assert plan.keep <= past
    if plan.index is None:
        assert plan.keep == 0
    else:
        assert live[plan.index][: plan.keep].tolist() == history[: plan.keep].tolist()


@given(TOKENS, TOKENS)
def test_the_common_length_is_that_of_the_common_prefix(
    first: TokenArray, second: TokenArray
) -> None:
    length = common_length(first, second)
    assert first[:length].tolist() == second[:length].tolist()
    assert first[length : length + 1].tolist() != second[
        length : length + 1
    ].tolist() or length in {
        len(first),
        len(second),
    }

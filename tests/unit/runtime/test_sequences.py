"""
Runtimes that own their KV: which of a library's sequences serves a row, as a table; and the adapter.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence
from recollect.errors import RuntimeFailure
from recollect.runtime.base import Row, SequenceId
from recollect.runtime.sequences import (
    LiveHistory,
    ReusePlan,
    SequenceAdapter,
    TokenArray,
    common_length,
    plan_reuse,
    uses_long_rope,
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
    ("wanted", "has_room", "can_copy", "expected"),
    [
        (0, True, False, ReusePlan(0, 2)),
        (2, True, False, ReusePlan(0, 2)),  # another needs no more than stays
        (3, True, False, NEW),  # another goes on beyond
        (3, False, False, ReusePlan(0, 2)),  # and there is no room
        (0, True, True, ReusePlan(0, 2)),
        (2, True, True, ReusePlan(0, 2, copies=True)),
        (3, False, True, ReusePlan(0, 2, copies=True)),
    ],
)
def test_what_another_sequence_wants_is_copied_or_left_to_it_while_there_is_room(
    wanted: int, has_room: bool, can_copy: bool, expected: ReusePlan
) -> None:
    live = [LiveHistory(ids("abx"), wanted=wanted)]
    plan = plan_reuse(ids("abcd"), 2, live, has_room=has_room, can_copy=can_copy)
    assert plan == expected


@pytest.mark.parametrize("has_room", [True, False])
def test_what_would_lose_far_more_than_it_keeps_is_copied_while_there_is_room(
    has_room: bool,
) -> None:
    plan = plan_reuse(ids("abcd"), 2, held("abxyzxyzxyz"), has_room=has_room, can_copy=True)
    assert plan == ReusePlan(0, 2, copies=has_room)


@pytest.mark.parametrize(
    ("length", "live_is_long", "expected"),
    [
        (4, False, ReusePlan(0, 3)),
        (5, False, NEW),  # the history crosses: all of it anew
        (5, True, ReusePlan(0, 3)),
        (4, True, NEW),  # a rewind comes back below: likewise
    ],
)
def test_kv_of_one_position_encoding_never_serves_the_other(
    length: int, live_is_long: bool, expected: ReusePlan
) -> None:
    live = [LiveHistory(ids("abc"), live_is_long)]
    plan = plan_reuse(ids("abcdefgh")[:length], 3, live, has_room=False, short_rope_length=4)
    assert plan == expected


def test_the_short_rope_length_is_the_last_of_the_short_side() -> None:
    assert [uses_long_rope(length, 4096) for length in (4095, 4096, 4097)] == [False, False, True]
    assert not uses_long_rope(10**6, None)


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


def adapter_of(listed: Any, num_blocks: int = 32) -> SequenceAdapter:
    adapter = SequenceAdapter(listed)
    adapter.allocate(num_blocks)
    return adapter


Make = Callable[..., Any]


@pytest.mark.parametrize("copies", [True, False])
def test_a_fork_leaves_what_its_origin_goes_on_from(make_sequences: Make, copies: bool) -> None:
    """It is copied where the library can, and computed again where it cannot."""
    listed = make_sequences(copies=copies)
    adapter = adapter_of(listed)
    trunk = SequenceId()
    adapter.forward([Row([1, 2, 3, 4, 5], 0, [0, 1], sequence=trunk)])
    fork = trunk.fork()
    adapter.copy_blocks([(0, 2), (1, 3)])
    adapter.forward([Row([6], 5, [0, 1], sequence=trunk)])
    listed.computed = 0
    result = adapter.forward(
        [Row([7], 5, [2, 3], sequence=fork), Row([8], 6, [0, 1], sequence=trunk)]
    )
    assert np.array_equal(result.logits[0], listed.logits_of([1, 2, 3, 4, 5, 7]))
    assert np.array_equal(result.logits[1], listed.logits_of([1, 2, 3, 4, 5, 6, 8]))
    assert listed.computed - 1 == (1 if copies else 6)
    assert result.starts == ([5, 6] if copies else [0, 6])


@pytest.mark.parametrize("gone", [SequenceId.release, lambda trunk: trunk.rewind_to(5)])
def test_a_fork_takes_what_its_origin_wants_no_more(
    make_sequences: Make, gone: Callable[[SequenceId], None]
) -> None:
    listed = make_sequences(copies=False)
    adapter = adapter_of(listed)
    trunk = SequenceId()
    adapter.forward([Row([1, 2, 3, 4, 5, 6], 0, [0, 1], sequence=trunk)])
    fork = trunk.fork()
    gone(trunk)
    assert adapter.forward([Row([7], 5, [0, 1], sequence=fork)]).starts == [5]
    assert len([held for held in listed.held.values() if held]) == 1


def test_two_forks_in_one_pass_compute_one_token_each(make_sequences: Make) -> None:
    """The first takes what its origin left, the second a copy of that before it goes on."""
    listed = make_sequences(copies=True)
    adapter = adapter_of(listed)
    trunk = SequenceId()
    adapter.forward([Row([1, 2, 3, 4], 0, [0], sequence=trunk)])
    forks = [trunk.fork(), trunk.fork()]
    trunk.release()
    listed.computed = 0
    rows = [Row([5 + n], 4, [0, 1 + n], sequence=fork) for n, fork in enumerate(forks)]
    assert adapter.forward(rows).starts == [4, 4]
    assert listed.computed == 2


def test_after_a_failure_what_the_pass_touched_is_computed_anew(make_sequences: Make) -> None:
    listed = make_sequences(copies=True)
    adapter = adapter_of(listed)
    one, other = SequenceId(), SequenceId()
    adapter.forward([Row([1, 2], 0, [0], sequence=one), Row([3, 4], 0, [1], sequence=other)])
    listed.fails = True
    with pytest.raises(RuntimeFailure):
        adapter.forward([Row([5], 2, [0], sequence=one)])
    rows = [Row([5], 2, [0], sequence=one), Row([6], 2, [1], sequence=other)]
    result = adapter.forward(rows)
    assert result.starts == [0, 2]
    assert np.array_equal(result.logits[0], listed.logits_of([1, 2, 5]))


@pytest.mark.few(12)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "kind",
    [{"copies": True}, {"copies": False}, {"copies": False, "can_cut": False}],
    ids=["copies", "cuts", "neither"],
)
@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_forks_and_rewinds_are_as_fresh_and_all_that_is_computed_is_counted(
    make_sequences: Make, kind: dict[str, bool], sequences: int, seed: int
) -> None:
    """Random work over an engine: more sequences than the library holds, some released."""
    rng = random.Random(seed)  # noqa: S311 - which work, no secrets
    listed = make_sequences(sequences=sequences, **kind)
    engine = Engine(SequenceAdapter(listed), num_blocks=96)
    alive: list[Sequence] = []

    def begin() -> None:
        alive.append(engine.new_sequence(rng.choice(["", "other"])))
        alive[-1].append([rng.randrange(2) for _ in range(rng.randint(1, 12))])

    begin()
    for _ in range(60):
        one = rng.choice(alive)
        match rng.randrange(6):
            case 0 if len(alive) < 6:
                begin()
            case 1 if len(alive) < 6:
                alive.append(one.fork())
            case 2 if len(alive) > 1:
                alive.remove(one)
                one.release()
            case 3 if len(one) > 1:
                one.rewind_to(rng.randint(1, len(one) - 1))
            case 4 if len(one) < 100:
                one.append([rng.randrange(2) for _ in range(rng.randint(1, 3))])
            case _:
                some = rng.sample(alive, rng.randint(1, len(alive)))
                engine.compute(some)
                for sequence in some:
                    assert sequence.logits is not None
                    expected = listed.logits_of(sequence.token_ids)
                    assert np.array_equal(sequence.logits, expected)
    assert engine.computed_tokens == listed.computed
    engine.check()
    engine.close()

"""A history and its KV are always consistent, and a rewind is exact."""

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recollect.engine.engine import Engine
from recollect.engine.sequence import FeedPlan, Sequence, plan_feed
from recollect.errors import ContextFullError, MisuseError, RewindError, TokenIdError
from recollect.runtime.base import Logits, Reuse


def same(logits: Logits | None, expected: Logits) -> bool:
    return logits is not None and np.array_equal(logits, expected)


def computed(engine: Engine, ids: list[int]) -> Sequence:
    sequence = engine.new_sequence()
    sequence.append(ids)
    engine.compute([sequence])
    return sequence


def state(sequence: Sequence) -> tuple[Any, ...]:
    return (
        sequence.token_ids,
        sequence.computed,
        None if sequence.logits is None else sequence.logits.tobytes(),
        list(sequence.blocks),
        sequence.fed_tokens,
    )


@pytest.mark.parametrize(
    ("length", "done", "multiple", "expected"),
    [
        (1, 0, 1, FeedPlan(0, 1)),
        (9, 0, 1, FeedPlan(0, 9)),
        (9, 5, 1, FeedPlan(5, 9)),
        (9, 8, 1, FeedPlan(8, 9)),
        (9, 9, 1, FeedPlan(8, 9)),
        (1, 1, 1, FeedPlan(0, 1)),
        (9, 9, 4, FeedPlan(8, 9)),
        (8, 8, 4, FeedPlan(4, 8)),
        (7, 7, 4, FeedPlan(4, 7)),
        (3, 3, 4, FeedPlan(0, 3)),
        (9, 4, 4, FeedPlan(4, 9)),
        (9, 6, 4, FeedPlan(6, 9)),
    ],
)
def test_at_least_one_token_is_fed_and_none_twice_without_need(
    length: int, done: int, multiple: int, expected: FeedPlan
) -> None:
    assert plan_feed(length, done, Reuse(unit=multiple)) == expected


def test_a_new_sequence_is_empty_and_has_no_plan(engine: Engine) -> None:
    sequence = engine.new_sequence()
    assert (len(sequence), sequence.computed, sequence.logits) == (0, 0, None)
    with pytest.raises(MisuseError):
        sequence.plan()


def test_append_computes_nothing(engine: Engine) -> None:
    sequence = engine.new_sequence()
    sequence.append([1, 2, 3])
    assert (sequence.token_ids, sequence.computed, engine.forward_passes) == ([1, 2, 3], 0, 0)
    assert engine.pool.used_blocks == 0


def test_append_after_the_logits_are_known_makes_them_unknown(engine: Engine) -> None:
    sequence = computed(engine, [1, 2, 3])
    assert sequence.logits is not None
    sequence.append([4])
    assert sequence.logits is None
    assert sequence.computed == 3


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], TokenIdError),
        ([-1], TokenIdError),
        ([50], TokenIdError),
        ([1, 2, 50], TokenIdError),
        ([1, -1, 2], TokenIdError),
        ([1] * 126, ContextFullError),
    ],
)
def test_an_append_that_is_refused_changes_nothing(
    engine: Engine, ids: list[int], error: type[Exception]
) -> None:
    sequence = computed(engine, [1, 2, 3])
    before = state(sequence)
    with pytest.raises(error):
        sequence.append(ids)
    assert state(sequence) == before
    engine.check()


@pytest.mark.parametrize("ids", [[1.5], ["a"], [None], [2**70]])
def test_an_append_of_what_is_no_token_id_changes_nothing(engine: Engine, ids: Any) -> None:
    sequence = computed(engine, [1, 2, 3])
    before = state(sequence)
    with pytest.raises((TokenIdError, TypeError)):
        sequence.append([4, *ids])
    assert state(sequence) == before


def test_numpy_ids_are_taken(engine: Engine) -> None:
    sequence = engine.new_sequence()
    sequence.append(np.array([1, 2, 3]))  # type: ignore[arg-type]
    assert sequence.token_ids == [1, 2, 3]


def test_the_context_can_be_filled_to_the_last_place(engine: Engine) -> None:
    sequence = computed(engine, [1] * 128)
    assert sequence.computed == 128
    with pytest.raises(ContextFullError) as raised:
        sequence.append([1])
    assert (raised.value.needed, raised.value.limit) == (129, 128)


@pytest.mark.parametrize("length", range(10))
def test_a_rewind_is_exact_and_the_logits_there_are_those_of_a_fresh_prefill(
    engine: Engine, fresh_logits: Callable[..., Any], length: int
) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    sequence = computed(engine, ids)
    sequence.rewind_to(length)
    assert sequence.token_ids == ids[:length]
    assert sequence.computed == length
    engine.check()
    if length:
        engine.compute([sequence])
        assert same(sequence.logits, fresh_logits(ids[:length]))
        assert sequence.fed_tokens - len(ids) == (0 if length == len(ids) else 1)


@pytest.mark.parametrize("namespace", ["", None])
def test_a_rewind_copies_no_history(
    namespace: str | None, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(num_blocks=48, block_size=512, context_length=10_000)
    sequence = engine.new_sequence(namespace)
    sequence.append([number % 50 for number in range(9999)])
    engine.compute([sequence])
    fork = sequence.fork()
    tracemalloc.start()
    try:
        fork.rewind_to(100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000, "a list of all ids takes 80 kB"


@pytest.mark.parametrize("length", [-1, 10, -(2**70), 2**70])
def test_a_rewind_beyond_the_history_changes_nothing(engine: Engine, length: int) -> None:
    sequence = computed(engine, [1] * 9)
    before = state(sequence)
    with pytest.raises(RewindError):
        sequence.rewind_to(length)
    assert state(sequence) == before


def test_a_rewind_to_the_end_keeps_the_logits(engine: Engine) -> None:
    sequence = computed(engine, [1, 2, 3])
    sequence.rewind_to(3)
    assert sequence.logits is not None


def test_a_rewind_gives_blocks_back(engine: Engine) -> None:
    sequence = engine.new_sequence(namespace=None)
    sequence.append([1] * 9)
    engine.compute([sequence])
    assert engine.pool.used_blocks == 3
    sequence.rewind_to(4)
    assert engine.pool.used_blocks == 1
    sequence.rewind_to(0)
    assert engine.pool.used_blocks == 0


def test_what_a_rewind_gives_up_can_be_found_again_to_the_last_token(engine: Engine) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    sequence = computed(engine, ids)
    sequence.rewind_to(3)
    assert engine.warm_tokens(ids) == 10
    sequence.append(ids[3:])
    fed = engine.computed_tokens
    engine.compute([sequence])
    assert engine.computed_tokens == fed
    assert engine.cache.evictable_blocks < engine.pool.used_blocks == 3


def test_park_gives_all_blocks_to_the_cache_and_the_next_pass_takes_them_back(
    engine: Engine, fresh_logits: Callable[..., Any]
) -> None:
    sequence = computed(engine, [1, 2, 3, 4, 5, 6])
    sequence.park()
    assert (sequence.computed, list(sequence.blocks), len(sequence)) == (0, [], 6)
    assert engine.cache.evictable_blocks == engine.pool.used_blocks == 2
    sequence.append([7])
    fed = engine.computed_tokens
    engine.compute([sequence])
    assert engine.computed_tokens == fed + 1
    assert same(sequence.logits, fresh_logits([1, 2, 3, 4, 5, 6, 7]))


def test_is_warm_says_whether_all_of_the_history_has_kv(engine: Engine) -> None:
    sequence = computed(engine, [1, 2, 3, 4, 5, 6])
    other = engine.new_sequence()
    other.append([1, 2, 3, 4, 5])
    stranger = engine.new_sequence("other")
    stranger.append([1, 2, 3, 4, 5])
    assert sequence.is_warm()
    assert other.is_warm()
    assert not stranger.is_warm()
    other.append([9])
    assert not other.is_warm()


def test_a_rewind_of_tokens_without_kv_keeps_all_kv(engine: Engine) -> None:
    sequence = computed(engine, [1] * 5)
    sequence.append([2] * 5)
    sequence.rewind_to(7)
    assert sequence.computed == 5


@pytest.mark.parametrize(("length", "kept"), [(9, 9), (8, 8), (7, 4), (4, 4), (3, 0)])
def test_where_only_whole_blocks_can_be_kept_a_rewind_keeps_those(
    make_engine: Callable[..., Engine], fresh_logits: Callable[..., Any], length: int, kept: int
) -> None:
    engine = make_engine(whole_blocks_only=True)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    sequence = computed(engine, ids)
    sequence.rewind_to(length)
    assert (len(sequence), sequence.computed) == (length, kept)
    engine.compute([sequence])
    assert same(sequence.logits, fresh_logits(ids[:length], whole_blocks_only=True))


def test_a_fork_costs_no_forward_pass_and_no_block(engine: Engine) -> None:
    sequence = computed(engine, [1] * 9)
    passes, used = engine.forward_passes, engine.pool.used_blocks
    fork = sequence.fork()
    assert (engine.forward_passes, engine.pool.used_blocks) == (passes, used)
    assert fork.token_ids == sequence.token_ids
    assert fork.logits is not None
    assert fork.fed_tokens == 0


@pytest.mark.parametrize("length", [3, 4, 5])
def test_forks_do_not_see_what_the_other_writes(
    engine: Engine, fresh_logits: Callable[..., Any], length: int
) -> None:
    ids = [1, 2, 3, 4, 5][:length]
    first = computed(engine, ids)
    second, third = first.fork(), first.fork()
    first.append([10])
    second.append([20, 21])
    third.rewind_to(length - 1)
    third.append([30])
    for order in ([first], [second], [third]):
        engine.compute(order)
    engine.check()
    for sequence in (first, second, third):
        assert same(sequence.logits, fresh_logits(sequence.token_ids))


def test_a_released_sequence_is_of_no_use_and_holds_no_blocks(engine: Engine) -> None:
    sequence = computed(engine, [1] * 9)
    sequence.release()
    sequence.release()
    assert sequence.closed
    assert engine.pool.used_blocks == engine.cache.evictable_blocks == 3
    for use in (
        lambda: sequence.append([1]),
        lambda: sequence.rewind_to(0),
        sequence.fork,
        lambda: engine.compute([sequence]),
    ):
        with pytest.raises(MisuseError):
            use()
    assert engine.pool.used_blocks == engine.cache.evictable_blocks == 3
    engine.check()


def test_releasing_a_fork_leaves_the_other_its_kv(
    engine: Engine, fresh_logits: Callable[..., Any]
) -> None:
    sequence = computed(engine, [1, 2, 3, 4, 5])
    sequence.fork().release()
    sequence.append([6])
    engine.compute([sequence])
    assert same(sequence.logits, fresh_logits([1, 2, 3, 4, 5, 6]))


@pytest.mark.slow
def test_a_forgotten_sequence_gives_its_blocks_back(engine: Engine) -> None:
    computed(engine, [1] * 9)
    gc.collect()
    assert engine.pool.used_blocks == engine.cache.evictable_blocks
    engine.check()


def test_what_a_caller_gets_is_a_copy(engine: Engine) -> None:
    sequence = computed(engine, [1, 2, 3])
    sequence.token_ids.append(9)
    sequence.history[0] = 9
    sequence.tokens(0).append(9)
    assert sequence.token_ids == [1, 2, 3]

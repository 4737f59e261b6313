"""However work is cut and mixed, and whatever fails, the logits are those of a fresh prefill."""

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recollect.engine.decoder import Task
from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence
from recollect.errors import MisuseError, OutOfBlocksError, RuntimeFailure
from recollect.runtime.base import Logits, Pace, PassResult


def same(logits: Logits | None, expected: Logits) -> bool:
    return logits is not None and np.array_equal(logits, expected)


def appended(engine: Engine, ids: list[int]) -> Sequence:
    sequence = engine.new_sequence()
    sequence.append(ids)
    return sequence


def ids_of(length: int, seed: int = 0) -> list[int]:
    return [(7 * place + 13 * seed + place * place) % 50 for place in range(length)]


def cancel_after(engine: Engine, sequence: Sequence, passes: int) -> None:
    """Have a sequence computed, and cancel that after some forward passes."""
    task = Task(sequence, lambda: False)
    runtime: Any = engine.runtime
    forward, done = runtime.forward, []

    def forward_then_cancel(rows: Any) -> PassResult:
        result: PassResult = forward(rows)
        done.append(rows)
        if len(done) == passes:
            task.cancel()
        return result

    runtime.forward = forward_then_cancel
    engine.submit(task)
    task.join()
    runtime.forward = forward
    assert (task.state, len(done)) == ("cancelled", passes)


def test_a_batch_of_any_rows_equals_each_of_them_alone(
    engine: Engine, fresh_logits: Callable[..., Any]
) -> None:
    decode = appended(engine, ids_of(9, 1))
    engine.compute([decode])
    decode.append([5])
    fork = decode.fork()
    batch = [appended(engine, ids_of(13, 2)), decode, appended(engine, [7]), fork]
    passes = engine.forward_passes
    engine.compute(batch)
    assert engine.forward_passes == passes + 1
    for sequence in batch:
        assert same(sequence.logits, fresh_logits(sequence.token_ids))
    engine.check()


@pytest.mark.parametrize("pace", [Pace(n, n) for n in (4, 5, 7, 8, 20, 100)], ids=str)
@pytest.mark.parametrize("whole_blocks_only", [False, True])
def test_the_chunk_size_does_not_matter(
    make_engine: Callable[..., Engine],
    fresh_logits: Callable[..., Any],
    pace: Pace,
    whole_blocks_only: bool,
) -> None:
    chunk = pace.prefill_chunk
    engine = make_engine(whole_blocks_only=whole_blocks_only)
    batch = [appended(engine, ids_of(length, length)) for length in (17, 2, 8)]
    engine.compute(batch)
    assert engine.computed_tokens == 27
    assert engine.forward_passes >= -(-27 // (chunk + 3))
    assert chunk >= 27 or engine.forward_passes > 1
    for sequence in batch:
        expected = fresh_logits(sequence.token_ids, whole_blocks_only=whole_blocks_only)
        assert same(sequence.logits, expected)


@pytest.mark.parametrize("pace", [Pace(prefill_chunk=4)], ids=[""])
def test_between_chunks_everything_is_consistent_and_work_can_change_its_mind(
    engine: Engine, fresh_logits: Callable[..., Any]
) -> None:
    sequence = appended(engine, ids_of(20))
    cancel_after(engine, sequence, 2)
    assert (sequence.computed, sequence.logits) == (8, None)
    engine.check()
    sequence.rewind_to(5)
    sequence.append([1, 2])
    fork = sequence.fork()
    engine.compute([fork, sequence])
    for one in (sequence, fork):
        assert same(one.logits, fresh_logits([*ids_of(5), 1, 2]))


def test_the_runtime_is_warmed_up_once_and_before_anything_else(
    engine: Engine, fresh_logits: Callable[..., Any]
) -> None:
    runtime: Any = engine.runtime
    calls: list[str] = []
    forward = runtime.forward
    runtime.warm_up = lambda: calls.append("warm up")

    def noted(rows: Any) -> PassResult:
        calls.append("forward")
        result: PassResult = forward(rows)
        return result

    runtime.forward = noted
    engine.start()
    engine.wait_until_warm()
    for ids in ([1, 2, 3], [1, 2, 3, 4]):
        assert same(appended_and_computed(engine, ids), fresh_logits(ids))
    assert calls == ["warm up", "forward", "forward"]
    assert engine.computed_tokens == 4, "what warms up is not counted: nothing of it is kept"


def appended_and_computed(engine: Engine, ids: list[int]) -> Logits | None:
    sequence = appended(engine, ids)
    engine.compute([sequence])
    return sequence.logits


def test_known_logits_cost_nothing(engine: Engine) -> None:
    sequence = appended(engine, [1, 2, 3])
    engine.compute([sequence])
    engine.compute([sequence])
    engine.compute([])
    assert (engine.forward_passes, engine.computed_tokens) == (1, 3)


def test_the_counters_count_what_was_fed(engine: Engine) -> None:
    sequence = appended(engine, ids_of(10))
    engine.compute([sequence])
    sequence.rewind_to(6)
    engine.compute([sequence])
    assert (engine.computed_tokens, sequence.fed_tokens, engine.forward_passes) == (11, 11, 2)


def test_a_sequence_named_twice_is_computed_once(engine: Engine) -> None:
    sequence = appended(engine, [1, 2, 3])
    engine.compute([sequence, sequence])
    assert engine.computed_tokens == 3


def test_an_empty_sequence_is_misuse_and_the_others_are_as_they_were(engine: Engine) -> None:
    other = appended(engine, [1, 2])
    with pytest.raises(MisuseError):
        engine.compute([other, engine.new_sequence()])
    assert other.computed == 0
    engine.check()


def test_a_sequence_of_another_engine_is_misuse(make_engine: Callable[..., Engine]) -> None:
    ours, theirs = make_engine(), make_engine()
    sequence = appended(theirs, [1, 2, 3])
    with pytest.raises(MisuseError):
        ours.compute([sequence])
    ours.check()
    theirs.check()


def test_out_of_blocks_says_what_was_needed_and_keeps_what_was_computed(
    make_engine: Callable[..., Engine], fresh_logits: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=4)
    first = appended(engine, ids_of(9))
    engine.compute([first])
    second, third = appended(engine, ids_of(4, 1)), appended(engine, ids_of(5, 2))
    with pytest.raises(OutOfBlocksError) as raised:
        engine.compute([second, third])
    assert (raised.value.needed, raised.value.total) == (2, 4)
    assert same(second.logits, fresh_logits(ids_of(4, 1)))
    assert third.logits is None
    assert engine.computed_tokens == 13
    engine.check()
    first.release()
    engine.compute([second, third])
    assert same(third.logits, fresh_logits(ids_of(5, 2)))


@pytest.mark.parametrize("pace", [Pace(prefill_chunk=4)], ids=[""])
def test_a_prompt_that_cannot_fit_fails_and_what_was_computed_of_it_stays_findable(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(num_blocks=4)
    sequence = appended(engine, ids_of(17))
    with pytest.raises(OutOfBlocksError):
        engine.compute([sequence])
    engine.check()
    sequence.release()
    assert engine.cache.evictable_blocks == engine.pool.used_blocks == 4
    assert engine.warm_tokens(ids_of(17)) == 16


def test_a_fork_can_go_on_with_the_last_free_block(make_engine: Callable[..., Engine]) -> None:
    """Of two that share a block only the first to write needs a copy."""
    engine = make_engine(num_blocks=2)
    first = appended(engine, [1, 2])
    engine.compute([first])
    second = first.fork()
    first.append([3])
    second.append([4])
    engine.compute([first])
    engine.compute([second])
    engine.check()


def test_a_sequence_fills_the_pool_though_the_cache_holds_its_tail_too(
    make_engine: Callable[..., Engine], fresh_logits: Callable[..., Any]
) -> None:
    """With no block left for a copy, the cache gives its share of the block up."""
    for ids in (ids_of(6), ids_of(7), ids_of(8)):
        engine = make_engine(num_blocks=2)
        sequence = appended(engine, ids)
        engine.compute([sequence])
        sequence.rewind_to(len(ids) - 1)
        sequence.append([49])
        engine.compute([sequence])
        engine.check()
        assert same(sequence.logits, fresh_logits([*ids[:-1], 49]))


FAILURES = [
    {"forward_in": 0},
    {"forward_in": 1},
    {"copy": True},
]


@pytest.mark.parametrize("failure", FAILURES, ids=str)
@pytest.mark.parametrize("error", [RuntimeFailure, ZeroDivisionError])
@pytest.mark.parametrize("whole_blocks_only", [False, True])
@pytest.mark.parametrize("start", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("pace", [Pace(prefill_chunk=5)], ids=[""])
def test_after_a_failure_nothing_that_was_written_wrong_counts_as_computed(
    make_engine: Callable[..., Engine],
    fresh_logits: Callable[..., Any],
    faults: Any,
    *,
    failure: dict[str, Any],
    error: type[Exception],
    whole_blocks_only: bool,
    start: int,
) -> None:
    engine = make_engine(whole_blocks_only=whole_blocks_only)
    first = appended(engine, ids_of(start))
    engine.compute([first])
    second, third = first.fork(), first.fork()
    third.rewind_to(start - 1)
    first.append([1, 2, 3])
    second.append([4, 5, 6, 7, 8, 9])
    third.append([10])
    batch = [first, second, third]
    faults.error = error
    for name, value in failure.items():
        setattr(faults, name, value)
    with contextlib.suppress(error):
        engine.compute(batch)
        # A batch that fails is tried again one by one; a copy may not be needed at all.
        assert "forward_in" in failure or (failure == {"copy": True} and whole_blocks_only)
    faults.copy, faults.forward_in = False, None
    engine.check()
    assert [len(sequence) for sequence in batch] == [start + 3, start + 6, start]
    engine.compute(batch)
    engine.check()
    for sequence in batch:
        expected = fresh_logits(sequence.token_ids, whole_blocks_only=whole_blocks_only)
        assert same(sequence.logits, expected)


def test_a_failed_pass_is_not_counted(engine: Engine, faults: Any) -> None:
    faults.forward_in = 0
    sequence = appended(engine, [1, 2, 3])
    with pytest.raises(RuntimeFailure):
        engine.compute([sequence])
    assert (engine.forward_passes, engine.computed_tokens, sequence.fed_tokens) == (0, 0, 0)
    assert engine.pool.used_blocks == len(engine.cache) == 0


def test_refeeding_the_last_token_may_fail_too(
    engine: Engine, fresh_logits: Callable[..., Any], faults: Any
) -> None:
    sequence = appended(engine, ids_of(9))
    engine.compute([sequence])
    sequence.rewind_to(7)
    faults.forward_in = 0
    with pytest.raises(RuntimeFailure):
        engine.compute([sequence])
    engine.check()
    engine.compute([sequence])
    assert same(sequence.logits, fresh_logits(ids_of(7)))


def test_a_closed_engine_is_of_no_use_and_its_histories_can_still_be_read(engine: Engine) -> None:
    sequence = appended(engine, [1, 2, 3])
    engine.compute([sequence])
    engine.close()
    engine.close()
    assert sequence.token_ids == [1, 2, 3]
    sequence.append([4])
    with pytest.raises(MisuseError):
        engine.compute([sequence])
    with pytest.raises(MisuseError):
        engine.compute([appended(engine, [1])])


def test_threads_with_sequences_of_their_own_do_not_disturb_each_other(
    make_engine: Callable[..., Engine], fresh_logits: Callable[..., Any]
) -> None:
    engine = make_engine(num_blocks=256)
    base = appended(engine, ids_of(10))
    engine.compute([base])
    results: list[tuple[list[int], Any]] = []

    def work(number: int, sequence: Sequence) -> None:
        for turn in range(12):
            sequence.append([number, turn, number + turn])
            engine.compute([sequence])
            if turn % 3 == 2:
                sequence.rewind_to(len(sequence) - 2)
                fork = sequence.fork()
                sequence = fork
        engine.compute([sequence])
        results.append((sequence.token_ids, sequence.logits))

    threads = [threading.Thread(target=work, args=(number, base.fork())) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for ids, logits in results:
        assert same(logits, fresh_logits(ids))
    engine.check()


# The tests above must be able to fail: three faults on purpose, each of which they would see.


def test_a_token_left_without_kv_is_seen(
    engine: Engine, fresh_logits: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classic: a sampled token enters the history as if it had been computed."""
    sequence = appended(engine, ids_of(6))
    engine.compute([sequence])
    sequence.append([1])
    sequence.computed = 7
    sequence.append([2])
    engine.compute([sequence])
    assert not same(sequence.logits, fresh_logits(sequence.token_ids))


def test_a_shared_block_written_without_a_copy_is_seen(
    engine: Engine, fresh_logits: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.pool, "is_shared", lambda _: False)
    first = appended(engine, ids_of(6))
    engine.compute([first])
    second = first.fork()
    first.append([1])
    second.append([2])
    engine.compute([first, second])
    assert not same(first.logits, fresh_logits(first.token_ids))


def test_a_copy_that_is_skipped_is_seen(
    engine: Engine, fresh_logits: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.runtime, "copy_blocks", lambda _: None)
    first = appended(engine, ids_of(6))
    engine.compute([first])
    second = first.fork()
    first.append([1])
    engine.compute([first])
    assert not same(first.logits, fresh_logits(first.token_ids))
    del second


def test_a_stale_block_is_seen(
    engine: Engine, fresh_logits: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewind that forgets to lower `computed`: other tokens over the old KV."""
    sequence = appended(engine, ids_of(12))
    engine.compute([sequence])
    monkeypatch.setattr(sequence, "park", lambda _: None)
    sequence.rewind_to(3)
    sequence.append([40] * 9)
    monkeypatch.undo()
    sequence.append([41])
    engine.compute([sequence])
    assert not same(sequence.logits, fresh_logits(sequence.token_ids))


@pytest.mark.slow
def test_a_leak_is_seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.pool, "drop", lambda _: None)
    sequence = appended(engine, ids_of(6))
    engine.compute([sequence])
    del sequence
    gc.collect()
    with pytest.raises(AssertionError, match="counts 2 references and is held 1 times"):
        engine.check()

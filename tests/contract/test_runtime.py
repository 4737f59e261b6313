"""
What the engine relies on, checked on every runtime.

Whoever writes another runtime adds it to the conftest beside this file.
"""

from collections.abc import Callable

import numpy as np
import pytest

from recollect.errors import MisuseError, RuntimeFailure
from recollect.runtime.base import Logits, PagedRuntime, Row

TOLERANCE = 1e-3
"""Between passes cut or mixed differently, in the exact profile. A wrong slot is off by more than 1."""
TOLERANCES = {"llama-gemma-3-270m": 0.05}
"""ggml reads GELU from a table of 16-bit numbers, so that rounding jumps; at logits that vary by 4."""
allowed = [TOLERANCE]


@pytest.fixture(autouse=True)
def tolerance(runtime_name: str) -> None:
    allowed[0] = TOLERANCES.get(runtime_name, TOLERANCE)


def ids_of(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(10, 250, length)]


def run(
    runtime: PagedRuntime, ids: list[int], blocks: list[int], cuts: tuple[int, ...] = ()
) -> Logits:
    """Compute some ids from nothing, in the passes that the cuts make; return the last logits."""
    ends = [*cuts, len(ids)]
    logits = np.empty(0, np.float32)
    for start, end in zip([0, *cuts], ends, strict=True):
        logits = runtime.forward([Row(ids[start:end], start, blocks)]).logits[0]
    return logits


def same(first: Logits, second: Logits) -> bool:
    return bool(np.abs(first - second).max() <= allowed[0])


def test_the_info_is_usable(runtime: PagedRuntime) -> None:
    info = runtime.info
    assert info.name
    assert min(info.block_size, info.bytes_per_block, info.vocab_size, info.context_length) > 0
    assert runtime.info == info


def test_logits_are_one_row_each_new_and_in_f32(runtime: PagedRuntime) -> None:
    first = runtime.forward([Row(ids_of(5), 0, [0])]).logits
    assert first.shape == (1, runtime.info.vocab_size)
    assert first.dtype == np.float32
    kept = first.copy()
    runtime.forward([Row(ids_of(5, 1), 0, [1])])
    assert np.array_equal(first, kept)
    assert np.isfinite(first).all()


@pytest.mark.parametrize("cuts", [(1,), (31,), (32,), (33,), (64,), (7, 32, 70), (32, 64), (72,)])
def test_chunks_equal_one_pass(runtime: PagedRuntime, cuts: tuple[int, ...]) -> None:
    ids = ids_of(73)
    assert same(run(runtime, ids, [0, 1, 2]), run(runtime, ids, [3, 4, 5], cuts))


def test_token_by_token_equals_one_pass(runtime: PagedRuntime) -> None:
    ids = ids_of(40)
    assert same(run(runtime, ids, [0, 1]), run(runtime, ids, [2, 3], tuple(range(1, 40))))


def test_the_order_of_blocks_does_not_matter(runtime: PagedRuntime) -> None:
    ids = ids_of(90)
    expected = run(runtime, ids, [0, 1, 2])
    assert same(expected, run(runtime, ids, [20, 3, 11]))
    assert same(expected, run(runtime, ids, [5, 4, 3, 2, 1]))


def test_other_tokens_give_other_logits(runtime: PagedRuntime) -> None:
    """So that the comparisons in this file can fail."""
    ids = ids_of(40)
    expected = run(runtime, ids, [0, 1])
    for place in (0, 20, 39):
        assert not same(expected, run(runtime, [*ids[:place], 9, *ids[place + 1 :]], [2, 3]))
    run(runtime, ids_of(40, 5), [4, 5])
    assert not same(expected, runtime.forward([Row(ids[32:], 32, [4, 1])]).logits[0])


def test_a_mixed_batch_equals_each_row_alone(runtime: PagedRuntime) -> None:
    short, middle, long = ids_of(1, 1), ids_of(33, 2), ids_of(70, 3)
    alone = [run(runtime, ids, [0, 1, 2]) for ids in (short, middle, long)]
    run(runtime, middle[:-1], [3, 4])
    run(runtime, long[:40], [5, 6])
    batch = runtime.forward(
        [
            Row(middle[-1:], 32, [3, 4]),
            Row(short, 0, [8]),
            Row(long[40:], 40, [5, 6, 7]),
        ]
    ).logits
    for logits, expected in zip(batch, (alone[1], alone[0], alone[2]), strict=True):
        assert same(logits, expected)


def test_a_long_row_changes_no_short_one_beside_it(runtime: PagedRuntime) -> None:
    """Whatever a model does with how long a context is, it does with each sequence's own."""
    short, long = ids_of(20, 4), ids_of(300, 5)
    alone = run(runtime, short, [0])
    beside = runtime.forward([Row(long, 0, list(range(1, 11))), Row(short, 0, [11])]).logits
    assert same(beside[1], alone)
    then = runtime.forward(
        [Row(ids_of(1, 6), 20, [11]), Row(ids_of(1, 7), 300, list(range(1, 11)))]
    ).logits
    assert same(then[0], run(runtime, [*short, *ids_of(1, 6)], [12]))


def test_only_rows_that_want_logits_have_them_in_their_order(runtime: PagedRuntime) -> None:
    rows = [ids_of(6, seed) for seed in range(4)]
    alone = [run(runtime, ids, [10]) for ids in rows]
    wants = [False, True, False, True]
    batch = runtime.forward(
        [
            Row(ids, 0, [number], wants_logits=want)
            for number, (ids, want) in enumerate(zip(rows, wants, strict=True))
        ]
    ).logits
    assert len(batch) == 2
    assert same(batch[0], alone[1])
    assert same(batch[1], alone[3])
    nothing = runtime.forward([Row(rows[0], 0, [0], wants_logits=False)]).logits
    assert nothing.shape == (0, runtime.info.vocab_size)


def test_a_row_without_logits_has_its_kv(runtime: PagedRuntime) -> None:
    ids = ids_of(40)
    runtime.forward([Row(ids[:-1], 0, [0, 1], wants_logits=False)])
    assert same(run(runtime, ids, [2, 3]), runtime.forward([Row(ids[-1:], 39, [0, 1])]).logits[0])


def test_a_shared_prefix_is_read_through_two_tables(runtime: PagedRuntime) -> None:
    prefix, first, second = ids_of(32), ids_of(9, 1), ids_of(5, 2)
    run(runtime, prefix, [0])
    batch = runtime.forward([Row(first, 32, [0, 1]), Row(second, 32, [0, 2])]).logits
    assert same(batch[0], run(runtime, prefix + first, [3, 4]))
    assert same(batch[1], run(runtime, prefix + second, [3, 4]))


def test_copied_blocks_are_the_same_and_independent(runtime: PagedRuntime) -> None:
    ids, other = ids_of(40), ids_of(4, 1)
    run(runtime, ids, [0, 1])
    runtime.copy_blocks([(0, 5), (1, 6)])
    expected = run(runtime, ids + other, [7, 8])
    run(runtime, ids_of(64, 9), [0, 1])  # the source is written over
    assert same(expected, runtime.forward([Row(other, 40, [5, 6])]).logits[0])


def test_copies_happen_in_order(runtime: PagedRuntime) -> None:
    ids, other = ids_of(32), ids_of(3, 1)
    run(runtime, ids, [0])
    runtime.copy_blocks([(0, 1), (1, 2)])
    expected = run(runtime, ids + other, [7, 8])
    assert same(expected, runtime.forward([Row(other, 32, [2, 3])]).logits[0])


def test_copying_nothing_does_nothing(runtime: PagedRuntime) -> None:
    runtime.copy_blocks([])


def test_the_last_token_can_be_fed_again(runtime: PagedRuntime) -> None:
    if not runtime.info.reuse.inside_blocks:
        return  # there whole blocks are fed again, which the chunk tests cover
    ids = ids_of(41)
    expected = run(runtime, ids[:37], [0, 1])
    run(runtime, ids, [2, 3])
    assert same(expected, runtime.forward([Row(ids[36:37], 36, [2, 3])]).logits[0])


def test_a_whole_block_can_be_fed_again(runtime: PagedRuntime) -> None:
    ids = ids_of(60)
    expected = run(runtime, ids[:37], [0, 1])
    run(runtime, ids, [2, 3])
    assert same(expected, runtime.forward([Row(ids[32:37], 32, [2, 3])]).logits[0])


def drafted_or_refused(runtime: PagedRuntime) -> bool:
    """Return whether rows can have guesses; one that cannot refuses them."""
    if not runtime.info.most_drafted:
        with pytest.raises(RuntimeFailure):
            runtime.forward([Row(ids_of(3), 0, [0], drafted=1)])
    return bool(runtime.info.most_drafted)


@pytest.mark.parametrize("past", [0, 5, 29, 32])
@pytest.mark.parametrize("drafted", [1, 3, 7, 31])
def test_guesses_have_logits_each(runtime: PagedRuntime, past: int, drafted: int) -> None:
    """Those after a token do not depend on the guesses behind it."""
    if not drafted_or_refused(runtime):
        return
    ids = ids_of(past + 1 + drafted)
    if past:
        run(runtime, ids[:past], [0, 1, 2])
    row = Row(ids[past:], past, [0, 1, 2], drafted=drafted)
    logits = runtime.forward([row]).logits
    assert logits.shape == (1 + drafted, runtime.info.vocab_size)
    # A prefill for each place takes minutes with real weights.
    places = range(1 + drafted) if runtime.info.vocab_size < 1000 else {0, 1, drafted - 1, drafted}
    for number in places:
        assert same(logits[number], run(runtime, ids[: past + 1 + number], [3, 4, 5]))


@pytest.mark.parametrize("agreed", [0, 2, 6])
def test_guesses_are_written_over(runtime: PagedRuntime, agreed: int) -> None:
    """Going on behind the guesses that were right finds nothing of the others."""
    if not drafted_or_refused(runtime):
        return
    ids, guesses, then = ids_of(30), ids_of(6, 1), ids_of(9, 2)
    run(runtime, ids[:-1], [0, 1])
    runtime.forward([Row([ids[-1], *guesses], 29, [0, 1], drafted=6)])
    kept = ids + guesses[:agreed]
    for number, token in enumerate(then):
        found = runtime.forward([Row([token], len(kept) + number, [0, 1])]).logits[0]
        assert same(found, run(runtime, kept + then[: number + 1], [2, 3]))


def test_guesses_beside_other_rows_keep_the_order(runtime: PagedRuntime) -> None:
    if not drafted_or_refused(runtime):
        return
    rows = [ids_of(6, seed) for seed in range(5)]
    alone = [run(runtime, ids, [10]) for ids in rows]
    batch = runtime.forward(
        [
            Row(rows[0], 0, [0], wants_logits=False),
            Row(rows[1], 0, [1]),
            Row(rows[2], 0, [2], drafted=2),
            Row(rows[3], 0, [3], drafted=3, wants_logits=False),
            Row(rows[4], 0, [4], drafted=1),
        ]
    ).logits
    assert len(batch) == 1 + 3 + 2
    assert same(batch[0], alone[1])
    assert same(batch[1], run(runtime, rows[2][:4], [10]))
    assert same(batch[3], alone[2])
    assert same(batch[5], alone[4])


def test_guesses_leave_the_blocks_of_others_alone(runtime: PagedRuntime) -> None:
    """The block that guesses reach into can be copied, read and shared up to where it counts."""
    if not drafted_or_refused(runtime):
        return
    ids, guesses, other = ids_of(20), ids_of(4, 1), ids_of(3, 2)
    run(runtime, ids[:-1], [0])
    runtime.forward([Row([ids[-1], *guesses], 19, [0], drafted=4)])
    runtime.copy_blocks([(0, 1)])
    expected = run(runtime, ids + other, [2])
    assert same(expected, runtime.forward([Row(other, 20, [1])]).logits[0])
    assert same(expected, runtime.forward([Row(other, 20, [0])]).logits[0])


BAD_ROWS = {
    "none": [],
    "no tokens": [Row([], 0, [0])],
    "no tokens beside a good row": [Row([1, 2], 0, [0]), Row([], 0, [1])],
    "too few blocks": [Row([1] * 40, 0, [0])],
    "no blocks": [Row([1], 0, [])],
    "past beyond the blocks": [Row([1], 32, [0])],
    "negative past": [Row([1], -1, [0])],
    "unknown block": [Row([1], 0, [10_000])],
    "unknown block later": [Row([1] * 40, 0, [0, 24])],
    "negative block": [Row([1], 0, [-1])],
    "beyond the context": [Row([1] * 513, 0, list(range(17)))],
    "unknown token": [Row([10**7], 0, [0])],
    "negative token": [Row([-1], 0, [0])],
    "no token before its guesses": [Row([1, 2], 0, [0], drafted=2)],
    "less than no guesses": [Row([1, 2], 0, [0], drafted=-1)],
}


def test_bad_rows_are_a_runtime_failure_and_other_kv_is_as_it_was(runtime: PagedRuntime) -> None:
    ids = ids_of(40)
    whole = run(runtime, ids, [22, 23])
    for case, rows in BAD_ROWS.items():
        run(runtime, ids[:-1], [20, 21])
        try:
            runtime.forward(rows)
        except RuntimeFailure:
            again = runtime.forward([Row(ids[-1:], 39, [20, 21])]).logits[0]
            assert same(whole, again), case
        else:
            pytest.fail(f"not refused: {case}")


def test_copying_blocks_that_do_not_exist_is_a_runtime_failure(runtime: PagedRuntime) -> None:
    for pair in [(0, 24), (24, 0), (-1, 0), (0, -1)]:
        with pytest.raises(RuntimeFailure):
            runtime.copy_blocks([pair])


def test_before_allocate_and_after_close_it_is_misuse(
    make_runtime: Callable[[], PagedRuntime],
) -> None:
    runtime = make_runtime()
    with pytest.raises(MisuseError):
        runtime.forward([Row([1], 0, [0])])
    with pytest.raises(MisuseError):
        runtime.copy_blocks([(0, 1)])
    runtime.allocate(2)
    runtime.forward([Row([1], 0, [0])])
    runtime.close()
    runtime.close()
    with pytest.raises(MisuseError):
        runtime.forward([Row([1], 0, [0])])
    with pytest.raises(MisuseError):
        runtime.copy_blocks([(0, 1)])


def test_a_runtime_with_more_rows_than_ever_before_still_works(runtime: PagedRuntime) -> None:
    rows = [Row([number + 10], 0, [number]) for number in range(24)]
    batch = runtime.forward(rows).logits
    assert same(batch[7], run(runtime, [17], [0]))


def test_warming_up_changes_nothing_that_is_computed_later(
    make_runtime: Callable[[], PagedRuntime],
) -> None:
    cold, warm = make_runtime(), make_runtime()
    for runtime in (cold, warm):
        runtime.allocate(4)
    warm.warm_up()
    ids = ids_of(40)
    assert same(run(cold, ids, [0, 1]), run(warm, ids, [0, 1]))
    make_runtime().close()


def test_a_block_read_as_bytes_means_the_same_in_another_runtime(
    make_runtime: Callable[[], PagedRuntime],
) -> None:
    here, there = make_runtime(), make_runtime()
    if not here.info.reuse.as_bytes:
        pytest.skip("gives no KV away, which the next test is about")
    here.allocate(4)
    there.allocate(8)
    ids = ids_of(70)
    expected = run(here, ids, [2, 0, 3], (64,))
    for source, target in ((2, 5), (0, 7)):
        content = bytearray(here.info.bytes_per_block)
        here.read_block(source, memoryview(content))
        there.write_block(target, memoryview(content))
    assert same(there.forward([Row(ids[64:], 64, [5, 7, 1])]).logits[0], expected)
    here.read_block(2, memoryview(content))
    there.write_block(7, memoryview(content))  # a block of other tokens changes what comes after it
    assert not same(there.forward([Row(ids[64:], 64, [5, 7, 1])]).logits[0], expected)


def test_bytes_of_another_length_and_blocks_that_are_not_there_are_refused(
    runtime: PagedRuntime,
) -> None:
    whole = bytearray(runtime.info.bytes_per_block)
    if not runtime.info.reuse.as_bytes:
        with pytest.raises(RuntimeFailure, match="to itself"):
            runtime.write_block(0, memoryview(whole))
        with pytest.raises(RuntimeFailure, match="to itself"):
            runtime.read_block(0, memoryview(whole))
        return
    with pytest.raises(RuntimeFailure, match="bytes of KV"):
        runtime.write_block(0, memoryview(whole)[1:])
    with pytest.raises(RuntimeFailure, match="bytes of KV"):
        runtime.read_block(0, memoryview(whole + b"x"))
    for block in (-1, 24):
        with pytest.raises(RuntimeFailure, match="block number"):
            runtime.write_block(block, memoryview(whole))
        with pytest.raises(RuntimeFailure, match="block number"):
            runtime.read_block(block, memoryview(whole))

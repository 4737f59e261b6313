"""Blocks are handed out once, shared by count, and copied before a shared one is written."""

import threading

import pytest

from recollect.engine.audit import check_pool
from recollect.engine.sequence import FeedPlan, Memory, Sequence
from recollect.errors import OutOfBlocksError
from recollect.kv.blocks import BlockPool, blocks_for
from recollect.kv.prefix import PrefixCache
from recollect.kv.record import Names
from recollect.runtime.base import RuntimeInfo

INFO = RuntimeInfo("none", block_size=4, bytes_per_block=4, vocab_size=1, context_length=100)


def filled(pool: BlockPool, slots: int) -> Sequence:
    """Return a sequence whose slots `[0, slots)` were written."""
    table = Sequence(Memory(INFO, pool, PrefixCache(pool, Names("model"))), None)
    if slots:
        table.append([0] * slots)
        table.prepare_write(0, slots)
        table.written(FeedPlan(0, slots), None)
    return table


def fork_of(table: Sequence, slots: int) -> Sequence:
    """Return a sequence over the blocks of the first slots, shared."""
    fork = table.fork()
    fork.truncate(slots)
    return fork


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_blocks_for_rounds_up(tokens: int, expected: int) -> None:
    assert blocks_for(tokens, 4) == expected


def test_allocated_blocks_are_all_different() -> None:
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate(2) + pool.allocate(3)) == [0, 1, 2, 3, 4]
    assert (pool.free_blocks, pool.used_blocks) == (0, 5)


def test_allocate_takes_all_or_nothing() -> None:
    pool = BlockPool(3, 4)
    held = pool.allocate(2)
    with pytest.raises(OutOfBlocksError) as raised:
        pool.allocate(2)
    assert (raised.value.needed, raised.value.free, raised.value.total) == (2, 1, 3)
    assert pool.free_blocks == 1
    check_pool(pool, [held])


def test_allocating_nothing_takes_nothing_even_of_an_empty_pool() -> None:
    assert BlockPool(0, 4).allocate(0) == []


def test_a_block_is_free_after_its_last_release_and_not_before() -> None:
    pool = BlockPool(1, 4)
    blocks = pool.allocate(1)
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.free_blocks == 0
    pool.release(blocks)
    assert pool.free_blocks == 1


def test_releasing_too_often_is_caught() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)


def test_sharing_a_free_block_is_caught() -> None:
    with pytest.raises(AssertionError, match="is free"):
        BlockPool(2, 4).retain([0])


def test_dropped_blocks_are_free_when_next_asked_for() -> None:
    pool = BlockPool(2, 4)
    pool.drop(pool.allocate(2))
    assert len(pool.allocate(2)) == 2


def test_blocks_dropped_from_other_threads_all_come_back() -> None:
    pool = BlockPool(64, 4)
    tables = [pool.allocate(4) for _ in range(16)]
    threads = [threading.Thread(target=pool.drop, args=[table]) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.free_blocks == 64
    check_pool(pool, [])


def test_check_finds_a_block_that_is_held_and_not_counted() -> None:
    pool = BlockPool(3, 4)
    held = pool.allocate(1)
    with pytest.raises(AssertionError, match="held 2 times"):
        check_pool(pool, [held, held])


def test_check_finds_a_leak() -> None:
    pool = BlockPool(3, 4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="held 0 times"):
        check_pool(pool, [])


# Blocks of 4 slots. `slots` of the table are written, of which a fork shares the first `shared`.
PLANS = [
    # slots, shared, start, end, (kept blocks, new ones, whether one is copied)
    (0, 0, 0, 1, (0, 1, False)),
    (0, 0, 0, 9, (0, 3, False)),
    (3, 0, 3, 4, (1, 0, False)),
    (3, 0, 3, 9, (1, 2, False)),
    (4, 0, 4, 5, (1, 1, False)),
    (3, 3, 3, 4, (0, 1, True)),
    (3, 3, 2, 3, (0, 1, True)),
    (4, 4, 4, 5, (1, 1, False)),
    (8, 4, 5, 9, (2, 1, False)),
    (8, 8, 4, 8, (1, 1, False)),
    (8, 8, 5, 9, (1, 2, True)),
    (8, 8, 0, 8, (0, 2, False)),
    (8, 5, 7, 8, (1, 1, True)),
    # the last token once more, after its KV was complete
    (4, 0, 3, 4, (1, 0, False)),
    (4, 4, 3, 4, (0, 1, True)),
]


@pytest.mark.parametrize(("slots", "shared", "start", "end", "expected"), PLANS)
def test_a_write_copies_a_shared_block_and_only_that(
    slots: int, shared: int, start: int, end: int, expected: tuple[int, int, bool]
) -> None:
    table = filled(BlockPool(16, 4), slots)
    fork = fork_of(table, shared)
    keep, new, _ = expected
    assert (table.kept_blocks(start), table.blocks_to_allocate(start, end)) == (keep, new)
    assert fork.blocks == table.blocks[: blocks_for(shared, 4)]


@pytest.mark.parametrize(("slots", "shared", "start", "end", "expected"), PLANS)
def test_after_a_write_is_prepared_no_other_table_holds_what_is_written(
    slots: int, shared: int, start: int, end: int, expected: tuple[int, int, bool]
) -> None:
    pool = BlockPool(16, 4)
    table = filled(pool, slots)
    fork = fork_of(table, shared)
    before, of_fork = list(table.blocks), list(fork.blocks)
    copies = table.prepare_write(start, end)
    written = table.blocks[start // 4 : blocks_for(end, 4)]
    assert set(written) & set(of_fork) == set()
    assert table.blocks[: start // 4] == before[: start // 4]
    assert fork.blocks == of_fork
    keep, new, copied = expected
    assert (bool(copies), len(table.blocks), table.blocks[:keep]) == (
        copied,
        keep + new,
        before[:keep],
    )
    assert all((s, t) == (before[start // 4], table.blocks[start // 4]) for s, t in copies)
    assert len(table.blocks) == blocks_for(end, 4)
    check_pool(pool, [table.blocks, fork.blocks])


def test_the_second_writer_of_a_shared_block_keeps_it() -> None:
    pool = BlockPool(4, 4)
    first = filled(pool, 3)
    second = fork_of(first, 3)
    shared = second.blocks[0]
    assert len(first.prepare_write(3, 4)) == 1
    assert second.prepare_write(3, 4) == []
    assert second.blocks == [shared]


def test_a_write_without_enough_blocks_changes_nothing() -> None:
    pool = BlockPool(3, 4)
    table = filled(pool, 7)
    fork = fork_of(table, 7)
    before = list(table.blocks)
    with pytest.raises(OutOfBlocksError):
        table.prepare_write(7, 9)
    assert table.blocks == before
    assert fork.blocks == before
    check_pool(pool, [table.blocks, fork.blocks])


@pytest.mark.parametrize("length", range(10))
def test_truncating_keeps_the_blocks_of_the_first_slots(length: int) -> None:
    pool = BlockPool(4, 4)
    table = filled(pool, 9)
    before = list(table.blocks)
    table.truncate(length)
    assert table.blocks == before[: blocks_for(length, 4)]
    check_pool(pool, [table.blocks])


def test_truncating_a_fork_leaves_the_other_its_blocks() -> None:
    pool = BlockPool(4, 4)
    table = filled(pool, 9)
    fork = fork_of(table, 9)
    fork.truncate(0)
    assert len(table.blocks) == 3
    check_pool(pool, [table.blocks, fork.blocks])


def test_releasing_a_sequence_twice_releases_its_blocks_once() -> None:
    pool = BlockPool(4, 4)
    table = filled(pool, 5)
    table.release()
    table.release()
    assert pool.free_blocks == 4
    check_pool(pool, [])

"""On the reference runtime every mistake in KV bookkeeping changes the logits."""

import numpy as np
import pytest

from recollect.errors import MisuseError, RuntimeFailure
from recollect.runtime.base import ReferenceRuntime, Row


@pytest.fixture
def runtime() -> ReferenceRuntime:
    made = ReferenceRuntime(vocab_size=50, context_length=64, block_size=4)
    made.allocate(8)
    return made


IDS = [1, 2, 3, 4, 5, 6]


def test_the_same_history_gives_the_same_logits(runtime: ReferenceRuntime) -> None:
    first = runtime.forward([Row(IDS, 0, [0, 1])]).logits
    second = runtime.forward([Row(IDS, 0, [5, 3])]).logits
    assert first.dtype == np.float32
    assert first.shape == (1, 50)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("place", range(len(IDS)))
def test_another_token_anywhere_gives_other_logits(runtime: ReferenceRuntime, place: int) -> None:
    other = [*IDS[:place], 9, *IDS[place + 1 :]]
    first = runtime.forward([Row(IDS, 0, [0, 1])]).logits
    assert not np.array_equal(first, runtime.forward([Row(other, 0, [2, 3])]).logits)


def test_a_hole_gives_other_logits(runtime: ReferenceRuntime) -> None:
    whole = runtime.forward([Row(IDS, 0, [0, 1])]).logits
    runtime.forward([Row(IDS[:4], 0, [2, 3])])
    assert not np.array_equal(whole, runtime.forward([Row(IDS[5:], 5, [2, 3])]).logits)


def test_a_stale_slot_gives_other_logits(runtime: ReferenceRuntime) -> None:
    whole = runtime.forward([Row(IDS, 0, [0, 1])]).logits
    runtime.forward([Row([1, 2, 3, 9, 5], 0, [2, 3])])
    assert not np.array_equal(whole, runtime.forward([Row(IDS[5:], 5, [2, 3])]).logits)


def test_kv_of_the_same_tokens_after_other_ones_gives_other_logits(
    runtime: ReferenceRuntime,
) -> None:
    whole = runtime.forward([Row(IDS, 0, [0, 1])]).logits
    runtime.forward([Row([9, 9, 9, 9, *IDS[4:]], 0, [2, 3])])
    runtime.forward([Row(IDS[:4], 0, [4])])
    # Block 3 holds the right tokens at the right positions, computed in another context.
    assert not np.array_equal(whole, runtime.forward([Row(IDS[5:], 5, [4, 3])]).logits)


def test_a_block_of_another_history_gives_other_logits(runtime: ReferenceRuntime) -> None:
    whole = runtime.forward([Row(IDS, 0, [0, 1])]).logits
    runtime.forward([Row([7, 8, 9, 10], 0, [2])])
    assert not np.array_equal(whole, runtime.forward([Row(IDS[4:], 4, [2, 3])]).logits)


def test_what_lies_after_the_end_does_not_matter(runtime: ReferenceRuntime) -> None:
    runtime.forward([Row([*IDS, 30, 31], 0, [0, 1])])
    refed = runtime.forward([Row(IDS[-1:], 5, [0, 1])]).logits
    assert np.array_equal(refed, runtime.forward([Row(IDS, 0, [2, 3])]).logits)


def test_with_whole_blocks_only_a_cut_inside_a_block_gives_other_logits() -> None:
    """As where scales cover a block: what was written later has changed the slots before it."""
    runtime = ReferenceRuntime(
        vocab_size=50, context_length=64, block_size=4, whole_blocks_only=True
    )
    runtime.allocate(8)
    runtime.forward([Row([*IDS, 30], 0, [0, 1])])
    refed = runtime.forward([Row(IDS[-1:], 5, [0, 1])]).logits
    fresh = runtime.forward([Row(IDS, 0, [2, 3])]).logits
    assert not np.array_equal(refed, fresh)
    assert np.array_equal(runtime.forward([Row(IDS[4:], 4, [0, 1])]).logits, fresh)


def test_with_whole_blocks_only_a_prefill_may_still_be_split_anywhere() -> None:
    runtime = ReferenceRuntime(
        vocab_size=50, context_length=64, block_size=4, whole_blocks_only=True
    )
    runtime.allocate(8)
    whole = runtime.forward([Row(IDS, 0, [0, 1])]).logits
    for cut in range(1, len(IDS)):
        runtime.forward([Row(IDS[:cut], 0, [2, 3])])
        assert np.array_equal(whole, runtime.forward([Row(IDS[cut:], cut, [2, 3])]).logits)


def test_before_allocate_and_after_close_it_is_misuse() -> None:
    runtime = ReferenceRuntime(vocab_size=50, block_size=4)
    with pytest.raises(MisuseError):
        runtime.forward([Row([1], 0, [0])])
    runtime.allocate(1)
    runtime.close()
    runtime.close()
    with pytest.raises(MisuseError):
        runtime.forward([Row([1], 0, [0])])


def test_no_rows_are_refused(runtime: ReferenceRuntime) -> None:
    with pytest.raises(RuntimeFailure):
        runtime.forward([])

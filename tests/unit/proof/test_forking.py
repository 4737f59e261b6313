"""Forks and rewinds run no forward pass, and share the blocks of their trunk."""

from collections.abc import Callable

from forking import measure_forks
from recollect.conversation.model import Model


def test_forks_of_a_trunk_take_one_block_each(make_model: Callable[..., Model]) -> None:
    """2,048 tokens are 64 blocks of 32; each fork, one token longer, adds one."""
    model = make_model(context_length=8192, num_blocks=600, block_size=32)
    ids = [number % 250 for number in range(8000)]
    result = measure_forks(model, ids)
    assert result.forward_passes == 0
    assert result.fork_count == 100
    assert result.fork_blocks <= 64 + 100
    assert model.engine.pool.used_blocks == 0


def test_a_trunk_that_ends_inside_a_block_copies_that_block_alone(model: Model) -> None:
    """Blocks of 8: 20 tokens are 3 blocks; the trunk keeps the third, and each fork has its own."""
    result = measure_forks(model, list(range(60)), trunk_tokens=20)
    assert result.fork_blocks == 3 + 100

"""
How many blocks of KV a memory budget holds, those of a model that guesses included.

On its own because whoever asks where memory goes looks for it, and the engine only takes a number.
"""

from bisect import bisect_right
from typing import Final

from recollect import config
from recollect.errors import ConfigError
from recollect.kv.blocks import blocks_for
from recollect.runtime.base import RuntimeInfo

CONTEXTS_IN_POOL: Final = 4
"""By default the pool holds at most this many full contexts: one for a conversation, the rest for its
branches and for others. Pages that are never written take no memory."""


def pool_size(
    info: RuntimeInfo, kv_memory: int | None, *, beside: RuntimeInfo | None = None
) -> int:
    """
    Return how many blocks a memory budget in bytes holds.

    What a runtime takes besides the blocks counts too, and so does KV for as many tokens *beside* it.

    Raises:
        ConfigError: The budget holds not even one, or is more than the machine has.
    """
    if kv_memory is None:
        most = CONTEXTS_IN_POOL * blocks_for(info.context_length, info.block_size)
        return max(1, _blocks_within(config.default_kv_memory_bytes(), info, most, beside))
    machine = config.machine_memory_bytes()
    if kv_memory > machine:
        raise ConfigError(
            f"{kv_memory:,} bytes for KV are more than the {machine:,} bytes of memory that this machine "
            "has: give less."
        )
    blocks = _blocks_within(kv_memory, info, kv_memory // info.bytes_per_block, beside)
    if blocks < 1:
        besides = "" if info.lanes is None else " and what computes on it"
        least = _bytes_of(1, info, beside)
        raise ConfigError(
            f"{kv_memory:,} bytes hold no KV block{besides}: give at least {least:,}."
        )
    return blocks


def blocks_beside(blocks: int, info: RuntimeInfo, beside: RuntimeInfo) -> int:
    """Return how many blocks of another runtime have room for as many tokens."""
    return blocks_for(blocks * info.block_size, beside.block_size)


def _blocks_within(budget: int, info: RuntimeInfo, most: int, beside: RuntimeInfo | None) -> int:
    return bisect_right(
        range(1, most + 1), budget, key=lambda blocks: _bytes_of(blocks, info, beside)
    )


def _bytes_of(blocks: int, info: RuntimeInfo, beside: RuntimeInfo | None) -> int:
    other = 0 if beside is None else beside.kv_bytes(blocks_beside(blocks, info, beside))
    return info.kv_bytes(blocks) + other

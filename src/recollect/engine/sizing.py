"""
How many blocks a memory budget holds.

Reads the machine's free memory where nobody gives a budget.
"""

from typing import Final

from recollect import config
from recollect.errors import ConfigError
from recollect.kv.blocks import blocks_for
from recollect.runtime.base import RuntimeInfo

CONTEXTS_IN_POOL: Final = 4
"""By default the pool holds at most this many full contexts: one conversation, and room for its
branches and for others. Pages that are never written take no memory."""


def pool_size(info: RuntimeInfo, kv_memory: int | None) -> int:
    """
    Return how many blocks a memory budget in bytes holds.

    Raises:
        ConfigError: Not even one, or it is more than the machine has.
    """
    if kv_memory is None:
        blocks_of_contexts = CONTEXTS_IN_POOL * blocks_for(info.context_length, info.block_size)
        budget = config.default_kv_memory_bytes()
        return max(1, min(budget // info.bytes_per_block, blocks_of_contexts))
    machine = config.machine_memory_bytes()
    if kv_memory > machine:
        raise ConfigError(
            f"{kv_memory:,} bytes for KV are more than the {machine:,} bytes of memory that this machine "
            "has: give less."
        )
    blocks = kv_memory // info.bytes_per_block
    if blocks < 1:
        raise ConfigError(
            f"{kv_memory:,} bytes hold no KV block: give at least {info.bytes_per_block:,}."
        )
    return blocks

"""
What forks and rewinds cost: time, forward passes, blocks.

Prints nothing; says nothing about what is cheap enough.
"""

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Final

from recollect.conversation.model import Model
from recollect.engine.sequence import Sequence
from recollect.proof.bench import Summary, summarize

TRUNK_TOKENS: Final = 2048
FORKS: Final = 100
"""Of the trunk, each one token longer; as many are timed."""


@dataclass(frozen=True, slots=True)
class ForkResult:
    """What was measured."""

    history_tokens: int
    fork_s: Summary
    rewind_s: Summary
    """Of a fork, to half of its history."""
    forward_passes: int
    """By all those forks and rewinds together."""
    trunk_tokens: int
    fork_count: int
    fork_blocks: int
    """In use by the trunk and its forks together."""

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def measure_forks(model: Model, ids: list[int], *, trunk_tokens: int = TRUNK_TOKENS) -> ForkResult:
    """
    Fork and rewind a history of these tokens, then count the blocks of many forks of a trunk.

    Raises:
        ContextFullError: The tokens do not fit the context.
        OutOfBlocksError: They do not fit the KV memory.
    """
    engine = model.engine
    with ExitStack() as stack:
        sequence = _computed(model, ids, stack)
        passes_before = engine.forward_passes
        times = [_time_fork(sequence, len(ids) // 2) for _ in range(FORKS)]
        passes = engine.forward_passes - passes_before
    return ForkResult(
        history_tokens=len(ids),
        fork_s=summarize([fork_s for fork_s, _ in times]),
        rewind_s=summarize([rewind_s for _, rewind_s in times]),
        forward_passes=passes,
        trunk_tokens=trunk_tokens,
        fork_count=FORKS,
        fork_blocks=_blocks_of_forks(model, ids[:trunk_tokens]),
    )


def _computed(model: Model, ids: list[int], stack: ExitStack) -> Sequence:
    """Return a sequence with the KV of these tokens; *stack* releases it."""
    sequence = model.engine.new_sequence(namespace=None)  # what is cached would count as in use
    stack.callback(sequence.release)
    sequence.append(ids)
    model.engine.compute([sequence])
    return sequence


def _time_fork(sequence: Sequence, length: int) -> tuple[float, float]:
    """Return how long a fork takes, and then a rewind of the fork, in seconds."""
    begun = time.perf_counter()
    fork = sequence.fork()
    forked = time.perf_counter()
    fork.rewind_to(length)
    rewound = time.perf_counter()
    fork.release()
    return forked - begun, rewound - forked


def _blocks_of_forks(model: Model, trunk_ids: list[int]) -> int:
    """Return the blocks that a trunk and its forks hold, each fork computed one token further."""
    engine = model.engine
    with ExitStack() as stack:
        used_before = engine.pool.used_blocks
        trunk = _computed(model, trunk_ids, stack)
        forks = []
        for number in range(FORKS):
            fork = trunk.fork()
            stack.callback(fork.release)
            fork.append([number])
            forks.append(fork)
        engine.compute(forks)
        return engine.pool.used_blocks - used_before

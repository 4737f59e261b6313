"""
Decide which live generator of a linear runtime serves a row, and how much of it stays.

Pure: token ids in, a plan out. Does not know the library whose generators they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LiveHistory:
    """What a live generator holds KV for."""

    token_ids: TokenArray
    beyond_turn: bool = False
    """Whether it was computed with the position encoding of long histories; see `is_beyond`."""


@dataclass(frozen=True, slots=True)
class ReusePlan:
    """Rewind the generator at `index` to `keep` tokens; with no index, make a new one."""

    index: int | None
    keep: int


def is_beyond(length: int, turn: int | None) -> bool:
    """
    Return whether a history of that length is computed with another position encoding.

    LongRoPE has two sets of factors and chooses by the length of the whole history, so that KV of
    one side is wrong on the other. `turn` is the last length of the short side; None: there is none.
    """
    return turn is not None and length > turn


def common_length(first: TokenArray, second: TokenArray) -> int:
    """Return how many leading ids two histories share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def plan_reuse(
    history: TokenArray,
    past: int,
    live: Sequence[LiveHistory],
    *,
    has_room: bool,
    turn: int | None = None,
) -> ReusePlan:
    """
    Return the plan for computing `history[past:]`: never more is kept than *past*, and never a wrong token.

    The longest common prefix wins; of equals the one that gives up the least, then the one used last.
    Where a rewind would give up more than it keeps, another conversation has merely begun alike:
    while there is room it keeps its generator, and a new one replays the common part.

    Args:
        history: All ids up to the end of the row, shape `(n,)`, n > past.
        past: Leading ids that the engine takes for computed. More than those are never kept: they
            could be another namespace's.
        live: The live generators, the least recently used first.
        has_room: Whether another generator may be made without giving one up.
        turn: See `is_beyond`.
    """
    beyond = is_beyond(len(history), turn)
    best = ReusePlan(None, 0)
    best_lost = 0
    for index, held in enumerate(live):
        if held.beyond_turn is not beyond:
            continue
        keep = min(common_length(held.token_ids, history[:past]), past)
        lost = len(held.token_ids) - keep
        if keep and (keep > best.keep or (keep == best.keep and lost <= best_lost)):
            best, best_lost = ReusePlan(index, keep), lost
    if has_room and best_lost > best.keep:
        return ReusePlan(None, 0)
    return best

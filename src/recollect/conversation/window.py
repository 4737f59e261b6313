"""
Which turns of a conversation still fit the context.

Pure: the caller measures prompts; this decides what to leave out.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from recollect.conversation.tree import Node

Overflow = Literal["error", "drop_oldest"]
"""What happens when the context is full: an error, or whole oldest turns are left out."""


def turn_starts(path: Sequence[Node]) -> list[int]:
    """Return where the turns of a path begin: the user's messages that follow something else."""
    return [
        index
        for index, node in enumerate(path)
        if node.role == "user" and (index == 0 or path[index - 1].role != "user")
    ]


class Window:
    """
    The turns of a session's path that its prompts are made of.

    Owned by the session. What is left out once stays out, so that the prompts after it begin alike.
    """

    def __init__(self) -> None:
        self._first: Node | None = None  # the oldest turn that is shown; None: all are

    def shown(self, path: Sequence[Node]) -> list[Node]:
        """Return the path without the turns that were left out before."""
        if self._first is None or self._first not in path:
            return list(path)
        return [*path[: turn_starts(path)[0]], *path[path.index(self._first) :]]

    def fitting(
        self,
        path: Sequence[Node],
        limit: int,
        measure: Callable[[Sequence[Node]], int],
        overflow: Overflow,
    ) -> list[Node]:
        """Return what is shown of a path, fewer turns of it where *limit* tokens are too many."""
        shown = self.shown(path)
        if overflow == "drop_oldest" and measure(shown) >= limit:
            return self.leave_out(shown, limit // 2, measure)
        return shown

    def leave_out(
        self, path: Sequence[Node], limit: int, measure: Callable[[Sequence[Node]], int]
    ) -> list[Node]:
        """Leave out the oldest turns of a path, as `without_oldest` does, from now on."""
        shown = without_oldest(path, limit, measure)
        starts = turn_starts(shown)
        self._first = shown[starts[0]] if starts else None
        return shown


def without_oldest(
    path: Sequence[Node], limit: int, measure: Callable[[Sequence[Node]], int]
) -> list[Node]:
    """
    Return the path without its oldest turns, so that at most *limit* tokens are left.

    The instructions before the first turn stay. So does the last turn, though it may be too long.

    Args:
        path: Messages from the first on.
        limit: Tokens that the prompt may have.
        measure: Returns the tokens of a prompt of these messages.
    """
    starts = turn_starts(path)
    instructions = path[: starts[0]] if starts else path
    for start in starts[:-1]:
        shortened = [*instructions, *path[start:]]
        if start > len(instructions) and measure(shortened) <= limit:
            return shortened
    return [*instructions, *path[starts[-1] :]] if starts else list(path)

"""
Which turns of a conversation have their KV in memory, and which have it on disk.

Pure: the caller measures; this decides where, and as seldom as it can: a measurement encodes
everything up to a turn.
"""

from collections.abc import Callable
from typing import Final, Literal

from recollect.conversation.tree import Node, Tree

Warmth = Literal["warm", "disk", "partly", "cold"]
"""Whether the tokens of a turn, message and reply, have KV in memory: all, some or none; `disk`: not
all in memory, but all there or on disk."""

Measure = Callable[[Node], tuple[int, int]]
"""Returns how many tokens up to a node have KV, and how many there are."""

MOST_MEASUREMENTS: Final = 200
"""Of each kind in one drawing, so that it is quick on a tree of many branches: the newest are looked at."""


def warmth(
    tree: Tree, measure: Measure, *, stored: Measure | None = None, slack: int = 2
) -> dict[int, Warmth]:
    """
    Return what is known of the replies in a tree, by their ids.

    KV is that of a prefix: before a warm turn all are warm, after a cold one all are cold. So a
    branch takes one measurement where it is warm, and a bisection where it is not. (A template
    that shows old replies otherwise breaks this rule; its turns are told by their newest tip.)

    Args:
        tree: The conversation.
        measure: Counts what is in memory.
        stored: Counts what is in memory or on disk; None: nothing is on disk.
        slack: Tokens that may lack KV at the end of a warm turn.
    """
    known = _states(tree, measure, slack)
    if stored is not None and set(known.values()) - {"warm"}:
        reach = _states(tree, stored, slack)
        for node_id, state in known.items():
            if state != "warm" and reach.get(node_id) == "warm":
                known[node_id] = "disk"
    return known


def _states(tree: Tree, measure: Measure, slack: int) -> dict[int, Warmth]:
    counted = _Counted(measure, slack)
    known: dict[int, Warmth] = {}
    for node in reversed(list(tree.nodes())):  # children before parents, so branches from their end
        if counted.calls >= MOST_MEASUREMENTS:
            break
        if node.role == "assistant" and node.id not in known:
            _measure_branch(node, counted, known)
    return known


class _Counted:
    """Measures, and counts how often."""

    def __init__(self, measure: Measure, slack: int) -> None:
        self._measure = measure
        self._slack = slack
        self.calls = 0

    def __call__(self, node: Node) -> tuple[int, int]:
        self.calls += 1
        return self._measure(node)

    def is_warm(self, node: Node) -> bool:
        warm, total = self(node)
        return total - warm < self._slack


def _measure_branch(tip: Node, measure: _Counted, known: dict[int, Warmth]) -> None:
    """Find out about the replies from the last known one to the tip."""
    before, branch = _unknown(tip, known)
    ids = [node.id for node in branch]
    if known.get(before.id, "warm") != "warm":
        known |= dict.fromkeys(ids, "cold")
        return
    if measure.is_warm(tip):
        known |= dict.fromkeys(ids, "warm")
        return
    low, high = 0, len(branch) - 1  # all before low are warm, and the one at high is not
    while low < high:
        middle = (low + high) // 2
        if measure.is_warm(branch[middle]):
            low = middle + 1
        else:
            high = middle
    last_warm = branch[low - 1] if low else before
    has_some = measure(branch[low])[0] > measure(last_warm)[1]
    known |= dict.fromkeys(ids[:low], "warm")
    known |= dict.fromkeys(ids[low:], "cold")
    known[ids[low]] = "partly" if has_some else "cold"


def _unknown(tip: Node, known: dict[int, Warmth]) -> tuple[Node, list[Node]]:
    """Return the node before the replies that nothing is known of, and those."""
    branch: list[Node] = []
    node = tip
    while node.parent is not None and node.role != "system" and node.id not in known:
        if node.role == "assistant":
            branch.append(node)
        node = node.parent
    return node, branch[::-1]

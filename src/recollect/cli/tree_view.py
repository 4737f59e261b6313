"""
Draws a conversation's tree in lines, one a turn.

Pure: nodes in, styled lines out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.text import Text

from recollect.cli.terminal import printable
from recollect.cli.warmth import Warmth
from recollect.conversation.tree import Node, Tree

_SHORT: Final = 10
"""Fewest columns that a message gets, however narrow the terminal."""
MARKS: Final[Mapping[Warmth, str]] = {"warm": "●", "disk": "◎", "partly": "◐", "cold": "○"}


@dataclass(frozen=True, slots=True)
class _Line:
    """A turn and where it hangs."""

    node: Node
    """The reply, or the message where it has none."""
    number: int
    first: str
    """What is drawn before it."""
    rest: str
    """What is drawn before the turns after it."""


def draw_tree(
    tree: Tree,
    sessions: Mapping[str, Node],
    current: str,
    width: int,
    warmth: Mapping[int, Warmth] | None = None,
    numbers: Mapping[int, int] | None = None,
) -> list[Text]:
    """
    Return the tree as lines of at most *width* columns.

    Turns that follow each other stay in one column; only where a conversation branches is it
    indented, so long ones keep room for text.

    Args:
        sessions: Names and tips of the sessions in this tree.
        current: The one that is spoken to.
        width: Columns of the terminal.
        warmth: Of the replies, by their ids; they get a mark.
        numbers: By which people name the nodes, by their ids; None: their ids.
    """
    here = sessions.get(current)
    on_path = set() if here is None else {node.id for node in [tree.root, *here.path()]}
    marks = {node_id: MARKS[state] for node_id, state in (warmth or {}).items()}
    names = {} if numbers is None else numbers
    lines = [_line(_Line(tree.root, 0, "", ""), sessions, current, width, on_path, "", 0)]
    pending = _turns_after(_Line(tree.root, 0, "", ""))
    while pending:
        turn = pending.pop()
        mark = marks.get(turn.node.id, "")
        lines.append(
            _line(
                turn, sessions, current, width, on_path, mark, names.get(turn.node.id, turn.node.id)
            )
        )
        pending += _turns_after(turn)
    return lines


def _turns_after(line: _Line) -> list[_Line]:
    """Return the next turns, the last one first, as a stack takes them."""
    following = list(_next_nodes(line.node))
    if len(following) == 1:
        return [_Line(following[0], line.number + 1, line.rest, line.rest)]
    turns = []
    for index, node in enumerate(following):
        is_last = index == len(following) - 1
        first, rest = ("└ ", "  ") if is_last else ("├ ", "│ ")
        turns.append(_Line(node, line.number + 1, line.rest + first, line.rest + rest))
    return turns[::-1]


def _next_nodes(node: Node) -> Iterator[Node]:
    """Yield the replies after a node, and messages that have none."""
    for child in node.children:
        if child.role == "system":
            yield from _next_nodes(child)
        elif child.role == "user" and child.children:
            yield from child.children
        else:
            yield child


def _line(
    line: _Line,
    sessions: Mapping[str, Node],
    current: str,
    width: int,
    on_path: set[int],
    mark: str,
    name: int,
) -> Text:
    names = [session for session, tip in sessions.items() if _stands_at(tip, line.node)]
    here = ", ".join(f"{one} (here)" if one == current else one for one in names)
    suffix = f"  ← {printable(here)}" if here else ""
    label = _label(line, width - cell_len(suffix), mark, name)
    style = "" if line.node.id in on_path else "dim"
    text = Text(label, style, no_wrap=True, overflow="ellipsis")
    return text.append(suffix, "bold" if current in names else "not dim")


def _stands_at(tip: Node, node: Node) -> bool:
    """Return whether a tip is drawn at this node's line; instructions are part of the root's."""
    return tip is node or (node.role is None and tip.role == "system")


def _label(line: _Line, width: int, mark: str, name: int) -> str:
    node = line.node
    if node.role is None:
        system = node.children[0].content if _has_system(node) else ""
        return _shorten(f"0 start {f'({system})' if system else ''}".rstrip(), width)
    # Where branches nest deeper than half the screen, only the innermost are drawn.
    hang = line.first if len(line.first) <= width // 2 else "…" + line.first[-(width // 2) :]
    head = f"{hang}{mark}{' ' if mark else ''}{line.number} "
    tail = f"  #{name}"
    room = max(2 * _SHORT, width - len(head) - len(tail) - 3)
    if node.role == "user":
        return head + _shorten(node.content, room) + tail
    assert node.parent is not None, "a reply follows a message"
    said = _shorten(node.parent.content, max(_SHORT, room // 2))
    return f"{head}{said} → {_shorten(node.content, room - cell_len(said))}{tail}"


def _has_system(root: Node) -> bool:
    return bool(root.children) and root.children[0].role == "system"


def _shorten(text: str, width: int) -> str:
    """Return the text on one line of at most *width* columns."""
    line = Text(" ".join(printable(text).split()))
    line.truncate(max(1, width), overflow="ellipsis")
    return line.plain

"""
What commands and chats show on the terminal: numbers, tables, progress, words and the tree.

Progress is drawn on stderr and only on a terminal; it leaves nothing behind.
The tree has one line for each turn, with a mark for where its KV is. Finding that out encodes everything up
to a turn, so it is measured as seldom as possible.
Knows no commands and no sessions; it is given what measures.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Final, Literal, Protocol

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from recollect.conversation.tree import Node, Tree
from recollect.errors import ConfigError
from recollect.types import Progress

_CONTROLS: Final = (*range(0x20), *range(0x7F, 0xA0))
_DIRECTIONS: Final = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Embeddings, overrides and isolates: they reorder what is shown. Source: "Trojan Source", CVE-2021-42574."""
_HIDDEN: Final = (*range(0x206A, 0x2070), *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080))
"""Deprecated format characters, annotations and tags, by which text is there and not seen."""
_UNPRINTABLE: Final[Mapping[int, str | None]] = {
    **dict.fromkeys((*_CONTROLS, *_DIRECTIONS, *_HIDDEN)),
    ord("\n"): "\n",
    ord("\t"): "\t",
    **dict.fromkeys((0x2028, 0x2029), "\n"),  # the separators of lines and paragraphs
}


def printable(text: str) -> str:
    """
    Return *text* without control characters other than newline and tab, and without hidden text.

    What a model writes must not move the cursor, or set the title, of the terminal it is shown on, nor be
    read there in another order than it is written in. Joiners and marks of direction, which the spelling of
    Persian, Hindi, Hebrew and others needs, stay.
    """
    return text.translate(_UNPRINTABLE)


def format_bytes(size: int) -> str:
    """Return a size for people, in powers of ten as disks are sold and `--kv-memory` reads them."""
    if size < 1000:
        return f"{size} B"
    if round(size, -3) < 10**6:
        return f"{size / 10**3:.0f} kB"
    return f"{size / 10**6:.0f} MB" if round(size, -6) < 10**9 else f"{size / 10**9:.1f} GB"


def format_duration(seconds: float) -> str:
    """Return a duration for people: milliseconds below a second."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def format_time(moment: datetime) -> str:
    """Return a moment in the time zone of this machine, to the minute."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 turn`, `2 turns`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def make_table(*headings: str, right: Collection[str] = (), whole: Collection[str] = ()) -> Table:
    """
    Return an empty table with these columns.

    Args:
        headings: Of all columns, from left to right.
        right: Headings of the columns with numbers: aligned to the right, never wrapped.
        whole: Headings of the other columns that are never wrapped.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in right else "left",
            no_wrap=heading in right or heading in whole,
            overflow="fold",
        )
    return table


_NAME_WIDTH: Final = 16
"""Fewest columns of a name, so that lists below each other are in line."""


def definitions(
    rows: Iterable[Sequence[str]], *, styles: Sequence[str] = ("bold", ""), indent: int = 2
) -> Padding:
    """
    Return names with what they mean, in columns: long texts go on below themselves.

    Args:
        rows: The name and the columns after it, each as many as there are styles.
        styles: Of the columns.
        indent: Columns before the names.
    """
    grid = Table.grid(padding=(0, 2, 0, 0))
    for number, style in enumerate(styles):
        least = None if number else _NAME_WIDTH
        grid.add_column(style=style, no_wrap=number < len(styles) - 1, min_width=least)
    for row in rows:
        grid.add_row(*map(Text, row))
    return Padding(grid, (0, 0, 0, indent), expand=False)


def confirm(question: str, *, yes: bool, to: str) -> bool:
    """
    Return whether the user agrees to something that cannot be undone.

    Args:
        question: As it is asked on a terminal.
        yes: Whether --yes was given; nothing is asked then.
        to: What --yes would allow, as in "Add --yes to delete."

    Raises:
        ConfigError: There is no terminal to ask on.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError(f"Not a terminal, so I cannot ask. Add --yes to {to}.")
    return typer.confirm(question)


class _SizeColumn(ProgressColumn):
    """How many bytes or tokens are done; empty for a step whose size is not known."""

    def __init__(self, sizes: DownloadColumn | MofNCompleteColumn) -> None:
        super().__init__()
        self._sizes = sizes

    def render(self, task: Task) -> Text:
        """Return the sizes as text."""
        counted = task.total is not None and task.total > 1
        return self._sizes.render(task) if counted else Text("")


@contextmanager
def progress_bar(waiting: str, *, tokens: bool = False) -> Iterator[Progress]:
    """
    Show a spinner beside *waiting*, and a bar for each step that reports its progress.

    Args:
        waiting: What is being done.
        tokens: Whether the steps count tokens rather than bytes.

    Yields:
        What to pass as `progress`.
    """
    console = Console(stderr=True)
    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        _SizeColumn(MofNCompleteColumn() if tokens else DownloadColumn()),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int | None) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    with bars:
        bars.add_task(waiting, total=None)
        yield report


_USUAL_WIDTH: Final = 80
"""Columns of a terminal that does not say how many it has."""


class WordWrapper:
    """
    Text that arrives in pieces, with line breaks between words.

    A word is held back until it ends, as only then is it known whether it fits the line.

    Invariants:
        1. What comes out is what went in, but for breaks in place of the spaces they replace.
        2. No line is wider than `width`, except where one word and its indentation are.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._spaces = ""
        self._word = ""

    @property
    def column(self) -> int:
        """Return how many columns of the line are written; what is held back does not count."""
        return self._column

    def push(self, text: str) -> str:
        """Return what can be written now."""
        return "".join(self._take(character) for character in text)

    def finish(self) -> str:
        """Return what was held back."""
        spaces, word = self._spaces, self._word
        self._spaces = self._word = ""
        end = self._column + cell_len(spaces.expandtabs()) + cell_len(word)
        if end > self._width and self._column > 0:
            self._column = cell_len(word)
            return "\n" + word
        self._column = end
        return spaces + word

    def _take(self, character: str) -> str:
        if character == "\n":
            out = self.finish() + "\n"
            self._column = 0
            return out
        if character.isspace():
            out = self.finish() if self._word else ""
            self._spaces += character
            return out
        if cell_len(character) > 1:  # scripts without spaces: a line may break before any of these
            out = self.finish() if self._word else ""
            self._word = character
            return out + self.finish()
        self._word += character
        return ""


def fitted(text: str, out: IO[str]) -> str:
    """
    Return a sentence of ours as *out* shows it best.

    A terminal breaks lines anywhere and obeys what stands in the name of a file; so for one the lines are
    broken between words here, and only what is printable is left. For anything else it is the text as it is.
    """
    if not out.isatty():
        return text
    try:
        width = os.get_terminal_size(out.fileno()).columns
    except OSError:
        width = 0
    wrapper = WordWrapper(width or _USUAL_WIDTH)
    return wrapper.push(printable(text)) + wrapper.finish()


class Writer(Protocol):
    """Shows a reply that comes in pieces."""

    def push(self, text: str) -> None:
        """Show more of it."""

    def finish(self) -> None:
        """Show what was held back; the cursor is at the start of a line then."""


class PlainWriter:
    """Shows a reply as the text that it is, with line breaks between words."""

    def __init__(self, out: IO[str], width: int) -> None:
        self._out = out
        self._wrapper = WordWrapper(width)

    def push(self, text: str) -> None:
        """Show more of it, up to the last whole word."""
        self._out.write(self._wrapper.push(printable(text)))
        self._out.flush()

    def finish(self) -> None:
        """Show the last word."""
        self._out.write(self._wrapper.finish() + ("\n" if self._wrapper.column else ""))
        self._out.flush()


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
    closed: Collection[str] = (),
) -> list[Text]:
    """
    Return the tree as lines of at most *width* columns.

    Turns that follow each other stay in one column; only where a conversation branches is it
    indented, so long ones keep room for text.

    Args:
        sessions: Names and tips of the branches in this tree.
        current: The one that is spoken to.
        width: Columns of the terminal.
        warmth: Of the replies, by their ids; they get a mark.
        numbers: By which people name the nodes, by their ids; None: their ids.
        closed: The branches that are not open; it is said beside their names.
    """
    here = sessions.get(current)
    on_path = set() if here is None else {node.id for node in [tree.root, *here.path()]}
    marks = {node_id: MARKS[state] for node_id, state in (warmth or {}).items()}
    names = {} if numbers is None else numbers
    shown = {name: f"{name} (closed)" for name in closed} | {current: f"{current} (here)"}
    tips = [(name, shown.get(name, name), tip) for name, tip in sessions.items()]
    lines = [_line(_Line(tree.root, 0, "", ""), tips, current, width, on_path, "", 0)]
    pending = _turns_after(_Line(tree.root, 0, "", ""))
    while pending:
        turn = pending.pop()
        mark = marks.get(turn.node.id, "")
        lines.append(
            _line(turn, tips, current, width, on_path, mark, names.get(turn.node.id, turn.node.id))
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
    tips: Sequence[tuple[str, str, Node]],
    current: str,
    width: int,
    on_path: set[int],
    mark: str,
    name: int,
) -> Text:
    standing = [(name, shown) for name, shown, tip in tips if _stands_at(tip, line.node)]
    here = ", ".join(shown for _, shown in standing)
    suffix = f"  ← {printable(here)}" if here else ""
    label = _label(line, width - cell_len(suffix), mark, name)
    style = "" if line.node.id in on_path else "dim"
    text = Text(label, style, no_wrap=True, overflow="ellipsis")
    return text.append(suffix, "bold" if current in dict(standing) else "not dim")


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

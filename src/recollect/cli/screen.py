"""
Rows of styled text on a terminal, of which the last ones can be drawn again.

`wrap` breaks text into rows, and a `Screen` writes them: what is settled once and for all, what is still open
again and again, from where it changes. Knows nothing of what the text means. The sixteen colours of the
terminal are used, which its owner has chosen to be readable on its background. Rows have no spaces at their
end, so that what is selected on the screen is clean.
"""

import re
from collections.abc import Callable, Sequence
from typing import IO, Final, NamedTuple

from rich.cells import cell_len
from rich.color import ColorSystem
from rich.style import Style

Span = tuple[str, Style]
Row = list[Span]

TAB: Final = 4
"""Columns of a tab."""


class Start(NamedTuple):
    """Where the next word goes: the column, and the spaces that are written if it fits the row."""

    column: int
    spaces: tuple[Span, ...] = ()


def wrap(spans: Sequence[Span], start: Start, width: int, hang: Row) -> tuple[list[Row], Start]:
    """
    Return rows of at most *width* columns, except where one word is wider, and where they end.

    Args:
        spans: The text; a line may break at spaces, and around characters that are two columns wide.
        start: Where the first row goes on.
        width: Columns of the screen.
        hang: What the other rows begin with.
    """
    rows: list[Row] = [[]]
    indent = width_of(hang)
    column, spaces = start.column, list(start.spaces)
    word: Row = []

    def end_row() -> None:
        nonlocal column
        rows.append(list(hang))
        column = indent
        spaces.clear()

    def end_word() -> None:
        nonlocal column
        if not word:
            return
        if column + width_of(spaces) + width_of(word) > width and column > indent:
            end_row()
        if column > indent:
            word[:0] = spaces
        rows[-1].extend(word)
        column += width_of(word)
        spaces.clear()
        word.clear()

    for text, style in spans:
        for part in _PARTS.findall(text):
            if part == "\n":
                end_word()
                end_row()
            elif part.isspace():
                end_word()
                spaces.append((part.replace("\t", TAB * " "), style))
            elif len(part) == 1 and cell_len(part) > 1:
                end_word()
                word.append((part, style))
                end_word()
            else:
                word.append((part, style))
    end_word()
    return rows, Start(column, tuple(spaces))


WIDE: Final = (
    "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
)
"""The scripts that are written without spaces, two columns a character."""
_PARTS: Final = re.compile(rf"\n|[^\S\n]+|[{WIDE}]|[^\s{WIDE}]+")
BREAKS: Final = re.compile(rf"[\s{WIDE}]")
"""Where a line may break."""


class Screen:
    """
    Where rows are written: the last ones can be drawn again until they are settled.

    Owns what stands between the last settled character and the cursor. Writes once for each `flush`.
    """

    def __init__(self, out: IO[str], size: Callable[[], tuple[int, int]]) -> None:
        """
        Write here.

        Args:
            out: The terminal; the cursor is at the start of an empty row.
            size: Returns its columns and rows.
        """
        self._out = out
        self._size = size
        self._columns, self._rows = size()
        self._written: list[str] = []
        self._drawn: list[Row] = []
        self._column = 0
        """Where the settled text ends; what is drawn begins there."""
        self._is_fresh = True
        """Whether the cursor is at the start of a row that nothing was drawn on, not even nothing."""
        self.is_empty = True
        """Whether nothing at all was drawn."""

    @property
    def width(self) -> int:
        """Return the columns of the screen."""
        return max(1, self._columns)

    def fits(self, rows: Sequence[Row]) -> bool:
        """Return whether rows can be drawn again later: none of them scrolls off."""
        return sum(self._height(row, index) for index, row in enumerate(rows)) < self._rows

    def draw(self, rows: Sequence[Row]) -> None:
        """Write rows in place of those that were drawn; what is the same stays untouched."""
        new, old = [joined(row) for row in rows], self._drawn
        self._is_fresh = self.is_empty = False
        same = 0
        while same < min(len(old), len(new)) and old[same] == new[same]:
            same += 1
        if same < len(old):
            rest = _rest(old[same], new[same]) if len(new) > same == len(old) - 1 else None
            if rest is None:  # something else stands there now
                same = min(same, len(new) - 1)
                self._back_to(same)
                rest = new[same]
            self._write(rest)
            same += 1
        for index in range(same, len(new)):
            if index:
                self._written.append("\n")
            self._write(new[index])
        self._drawn = new

    def settle(self, rows: Sequence[Row] | None = None) -> None:
        """Draw rows, or leave what is drawn, and never touch it again."""
        if rows is not None:
            self.draw(rows)
        if self._drawn:
            begin = self._column if len(self._drawn) == 1 else 0
            self._column = _end_of(self._drawn[-1], begin, self.width)
        self._drawn = []

    def next_row(self) -> None:
        """Go to the start of a row of its own, if the cursor is not there; what is drawn is settled."""
        self.settle()
        if not self._is_fresh:
            self._written.append("\n")
            self._column, self._is_fresh = 0, True

    def flush(self) -> None:
        """Show it."""
        if self._written:
            self._out.write("".join(self._written))
            self._written.clear()
        self._out.flush()
        self._columns, self._rows = self._size()

    def _write(self, row: Row) -> None:
        self._written += [style.render(text, color_system=_COLOUR_SYSTEM) for text, style in row]

    def _back_to(self, index: int) -> None:
        """Move to where a drawn row begins, and erase from there on."""
        up = sum(
            self._height(row, number) for number, row in enumerate(self._drawn) if number >= index
        )
        start = self._column if index == 0 else 0
        # From a row that wrapped by itself the first of its rows is the one to go to.
        first = start // self.width
        self._written.append("\r")
        if up - 1 - first > 0:
            self._written.append(f"\x1b[{up - 1 - first}A")
        if start % self.width:
            self._written.append(f"\x1b[{start % self.width}C")
        self._written.append("\x1b[J")

    def _height(self, row: Row, index: int) -> int:
        end = _end_of(row, self._column if index == 0 else 0, self.width)
        return max(1, -(-end // self.width))


_COLOUR_SYSTEM: Final = ColorSystem.STANDARD


def joined(row: Sequence[Span]) -> Row:
    """Return the row with neighbours of one style as one span."""
    joined: Row = []
    for text, style in row:
        if joined and joined[-1][1] == style:
            joined[-1] = (joined[-1][0] + text, style)
        elif text:
            joined.append((text, style))
    return joined


def _rest(old: Row, new: Row) -> Row | None:
    """Return what of *new* follows *old*; None if it does not begin with it."""
    if not old:
        return new
    last, (text, style) = len(old) - 1, old[-1]
    if len(new) < len(old) or new[:last] != old[:last] or new[last][1] != style:
        return None
    if not new[last][0].startswith(text):
        return None
    return [(new[last][0][len(text) :], style), *new[last + 1 :]]


def width_of(spans: Sequence[Span]) -> int:
    """Return how many columns spans take."""
    return sum(cell_len(text) for text, _ in spans)


def _end_of(row: Row, column: int, width: int) -> int:
    """
    Return where a row ends that begins at a column, counted on through the rows that it wraps to.

    A character of two columns that only one is left for goes to the next row, and leaves that one free.
    """
    for text, _ in row:
        cells = cell_len(text)
        if cells == len(text) or column % width + cells <= width:
            column += cells
            continue
        for cells in map(cell_len, text):
            column += (cells == 2 <= width and column % width == width - 1) + cells
    return column


def stripped(row: Row) -> Row:
    """Return the row without spaces at its end."""
    row = joined(row)
    while row and not row[-1][0].strip():
        row.pop()
    return [*row[:-1], (row[-1][0].rstrip(), row[-1][1])] if row else row

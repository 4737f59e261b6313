"""
What the blocks of a reply in Markdown look like on a terminal, while they are written.

Paragraphs, code and tables become rows of styled text, and a `Screen` writes them: what is settled once and
for all, what is still open again and again, where it changes. What is inside a line is parsed by
markdown-it, and code is highlighted by Pygments, both in pieces of bounded length. Knows nothing of how the
lines of Markdown make blocks.

Rows have no padding, and code has no frame at its sides, so that what is selected on the screen is clean. The
sixteen colours of the terminal are used, which its owner has chosen to be readable on its background.
HTML, images and reference links are shown as they are written, so that no text is lost.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import IO, Any, Final, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.lexers.special import TextLexer
from pygments.token import Comment, Generic, Keyword, Name, Number, String
from pygments.util import ClassNotFound
from rich.cells import cell_len
from rich.color import ColorSystem
from rich.style import Style

from recollect.cli.display import printable

Span = tuple[str, Style]
Row = list[Span]

MOST_OPEN: Final = 400
"""Most characters that wait for the end of an emphasis, a code span, a link or a word."""
MOST_TABLE_ROWS: Final = 40
"""Most rows of a table that are drawn again for each new one; then its columns stay as they are."""
WINDOW_LINES: Final = 20
WINDOW_CHARACTERS: Final = 1200
"""How much of the code before a line tells how the line is coloured; a longer string or comment loses its
colour."""
TAB: Final = 4
RULE_WIDTH: Final = 60

PLAIN: Final = Style()
DIM: Final = Style(dim=True)
_BOLD: Final = Style(bold=True)
_ITALIC: Final = Style(italic=True)
_STRUCK: Final = Style(strike=True)
_LINK: Final = Style(underline=True)
_CODE: Final = Style(color="cyan")
MARKER: Final = Style(color="cyan")
HEADINGS: Final = (Style(bold=True, underline=True), _BOLD, _BOLD + _ITALIC)
"""Of the first levels; the deeper ones look like the last."""
_COLOURS: Final = {
    Comment: Style(dim=True, italic=True),
    Keyword: Style(color="magenta"),
    Name.Builtin: Style(color="cyan"),
    Name.Class: _BOLD,
    Name.Decorator: Style(color="yellow"),
    Name.Function: _BOLD,
    Name.Tag: Style(color="magenta"),
    Number: Style(color="cyan"),
    String: Style(color="green"),
    Generic.Deleted: Style(color="red"),
    Generic.Inserted: Style(color="green"),
}


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough")
    return parser.disable(["html_inline", "image"])


def _parse(text: str) -> Sequence[Token]:
    tokens = _parser().parseInline(text)
    return tokens[0].children or [] if tokens else []


def _spans(tokens: Sequence[Token], base: Style = PLAIN) -> list[Span]:
    """Return what is in a line with its styles; line ends are spans of their own."""
    styles, spans, links = [base], list[Span](), list[tuple[str, int]]()
    for token in tokens:
        if token.type in _OPENED:
            styles.append(styles[-1] + _OPENED[token.type])
        if token.type == "link_open":
            links.append((str(token.attrs.get("href", "")), len(spans)))
        elif token.type == "link_close":
            href, start = links.pop()
            shown = "".join(text for text, _ in spans[start:])
            if href.removeprefix("mailto:") != shown:  # whatever the text says, it leads there
                spans.append((printable(f" ({href})"), styles[0] + DIM))
        if token.type.endswith("_close") and len(styles) > 1:
            styles.pop()
        elif token.type in {"softbreak", "hardbreak"}:
            spans.append(("\n", styles[-1]))
        elif token.type == "code_inline":
            spans.append((printable(token.content), styles[-1] + _CODE))
        elif token.content:
            spans.append((printable(token.content), styles[-1]))
    return spans


_OPENED: Final = {"strong_open": _BOLD, "em_open": _ITALIC, "s_open": _STRUCK, "link_open": _LINK}

_SPECIAL: Final = re.compile(r"[*_~`\[<&\\]")
_DELIMITER: Final = re.compile(r"`+|(?<!\w)_+(?=\S)|\*+(?=\S)|~~(?=\S)|\[(?![^\]]*\])")
"""What may still begin a style or a link where nothing has closed it; an `_` inside a word cannot."""


def _open_delimiter(tokens: Sequence[Token]) -> str | None:
    """Return the first delimiter that a later one may close, or None."""
    found = (_DELIMITER.search(token.content) for token in tokens if token.type == "text")
    return next((match[0] for match in found if match), None)


class _Start(NamedTuple):
    """Where the next word goes: the column, and the spaces that are written if it fits the row."""

    column: int
    spaces: tuple[Span, ...] = ()


def wrap(spans: Sequence[Span], start: _Start, width: int, hang: Row) -> tuple[list[Row], _Start]:
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
    return rows, _Start(column, tuple(spaces))


_WIDE: Final = (
    "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
)
"""The scripts that are written without spaces, two columns a character."""
_PARTS: Final = re.compile(rf"\n|[^\S\n]+|[{_WIDE}]|[^\s{_WIDE}]+")
_BREAKS: Final = re.compile(rf"[\s{_WIDE}]")


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
            last = width_of(self._drawn[-1])
            self._column = last if len(self._drawn) > 1 else self._column + last
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
        cells = width_of(row) + (self._column if index == 0 else 0)
        return max(1, -(-cells // self.width))


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


class Paragraph:
    """Text that flows: a paragraph, a heading or an item of a list."""

    def __init__(self, screen: Screen, first: Row, hang: Row, base: Style = PLAIN) -> None:
        self._screen = screen
        self._hang = hang
        self._base = base
        self._source = ""
        """What is not settled yet."""
        screen.next_row()
        screen.settle([first])
        self._start = _Start(width_of(first))

    def push(self, text: str) -> None:
        """Show more of it, up to the last whole word."""
        self._source += text
        ends = [match.end() for match in _BREAKS.finditer(self._source)]
        if len(self._source) > MOST_OPEN:
            self._settle(len(self._source))
        elif ends:
            self._show(ends[-1])

    def finish(self) -> None:
        """Show the rest."""
        self._settle(len(self._source))

    def _show(self, end: int) -> None:
        text = self._source[:end]
        special = _SPECIAL.search(text)
        if special is None:
            self._settle(end)
            return
        tokens = _parse(text)
        delimiter = _open_delimiter(tokens)
        if delimiter is None:
            self._settle(end)
            return
        before = [match.end() for match in _BREAKS.finditer(text, 0, special.start())]
        if before:
            self._settle(before[-1])
            text = text[before[-1] :]
        closed = _parse(text.rstrip() + delimiter)
        rows, _ = self._wrapped(_parse(text) if _open_delimiter(closed) else closed)
        if self._screen.fits(rows):
            self._screen.draw(rows)
        else:
            self._settle(len(text))

    def _settle(self, end: int) -> None:
        text, self._source = self._source[:end], self._source[end:]
        if not text:
            return
        # The parser would drop spaces at both ends, which may stand between two parts of a paragraph.
        inner = text.strip(" \t\n")
        lead, trail = (text, "") if not inner else text.split(inner, 1)
        spans = [(lead, self._base), *_spans(_parse(inner), self._base), (trail, self._base)]
        rows, self._start = wrap(
            [span for span in spans if span[0]], self._start, self._screen.width, self._hang
        )
        self._screen.settle(rows)

    def _wrapped(self, tokens: Sequence[Token]) -> tuple[list[Row], _Start]:
        return wrap(_spans(tokens, self._base), self._start, self._screen.width, self._hang)


class Code:
    """A block of code: each line is coloured as it is written, and settled at its end."""

    def __init__(self, screen: Screen, indent: Row, label: str | None) -> None:
        """
        Begin it.

        Args:
            screen: Where it is shown.
            indent: What each row begins with.
            label: What stands behind the mark that opens it, the language first; None: the block is
                only indented, and has no rows around it.
        """
        self._screen = screen
        self._is_fenced = label is not None
        self._indent = indent
        self._lexer = _lexer((label or " ").split(" ")[0][:_MOST_LANGUAGE])
        self._before: list[str] = []
        self._line = ""
        self._is_new = True
        self._margin = indent
        self._rule(f"── {label} " if label else "")

    def push(self, text: str) -> None:
        """Show more of the line."""
        self._begin()
        self._line += text
        rows = [self._indent + self._coloured(_UNFINISHED.sub("", self._line))]
        if len(self._line) <= MOST_OPEN and self._screen.fits(rows):
            self._screen.draw(rows)
        else:  # the line is too long to be drawn again; the rest of it goes on behind
            self._screen.settle([self._indent + self._coloured(self._line)])
            self._indent, self._line = [], ""

    def end_line(self) -> None:
        """Settle the line."""
        self._begin()
        self._screen.settle([self._indent + self._coloured(self._line)])
        self._before.append(self._line)
        while len(self._before) > WINDOW_LINES or sum(map(len, self._before)) > WINDOW_CHARACTERS:
            self._before.pop(0)
        self._line, self._is_new, self._indent = "", True, self._margin

    def finish(self) -> None:
        """Close the block."""
        if not self._is_new:
            self.end_line()
        self._rule("")

    def _begin(self) -> None:
        if self._is_new:
            self._screen.next_row()
            self._is_new = False

    def _rule(self, label: str) -> None:
        if not self._is_fenced:
            return
        self._screen.next_row()
        width = min(RULE_WIDTH, self._screen.width - width_of(self._margin))
        self._screen.settle([[*self._margin, (label.ljust(width, "─")[:width], DIM)]])

    def _coloured(self, line: str) -> Row:
        before = "".join(line + "\n" for line in self._before)
        row: Row = []
        place = 0
        for kind, text in self._lexer.get_tokens(before + line):
            shown = text[max(0, len(before) - place) :].rstrip("\n")
            place += len(text)
            if shown and place > len(before):
                row.append((shown, _colour(kind)))
        return row


_MOST_LANGUAGE: Final = 32
"""Most characters in the name of a language: those that Pygments knows have fewer."""
_UNFINISHED: Final = re.compile(r"\w{1,40}$")
"""A word whose colour is known when it ends."""


def _lexer(language: str) -> Lexer:
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return TextLexer(stripnl=False, ensurenl=False)


@cache
def _colour(kind: Any) -> Style:  # Pygments makes its types of tokens while it runs
    while kind is not None:
        if kind in _COLOURS:
            return _COLOURS[kind]
        kind = kind.parent
    return PLAIN


class Table:
    """A table: drawn again with each new row, until it has too many; then its columns stay."""

    def __init__(self, screen: Screen, indent: Row, header: list[str], aligned: list[str]) -> None:
        self._screen = screen
        self._indent = indent
        self._aligned = aligned
        self._rows: list[list[list[Span]]] = [[_spans(_parse(cell), _BOLD) for cell in header]]
        self._widths: list[int] | None = None
        """Of the columns, once the rows above are no longer drawn again; a longer word still widens them."""
        screen.next_row()
        self._draw()

    def add(self, cells: list[str]) -> None:
        """Show a row; cells without a heading are left out, as on GitHub."""
        count = len(self._aligned)
        cells = [*cells, *[""] * count][:count]
        row = [_spans(_parse(cell)) for cell in cells]
        if self._widths is None:
            self._rows.append(row)
            self._draw()
        else:
            self._rows = [row]
            self._widths = [*map(max, self._widths, self._fitting())]
            self._screen.next_row()
            self._screen.settle(self._laid_out(row, self._widths))

    def finish(self) -> None:
        """Leave it as it is."""
        self._screen.settle()

    def _draw(self) -> None:
        widths = self._fitting()
        head, *body = [self._laid_out(row, widths) for row in self._rows]
        rule = [(("─" * (sum(widths) + 2 * len(widths) - 2)), DIM)]
        rows = [*head, self._indent + rule, *[line for row in body for line in row]]
        if len(self._rows) <= MOST_TABLE_ROWS and self._screen.fits(rows):
            self._screen.draw(rows)
        else:
            self._widths = widths
            self._screen.settle(rows)

    def _fitting(self) -> list[int]:
        """Return the widths of the columns: the widest are made narrower until all fit."""
        room = self._screen.width - width_of(self._indent) - 2 * (len(self._aligned) - 1)
        widths = [
            max(1, min(room, max(width_of(row[index]) for row in self._rows)))
            for index in range(len(self._aligned))
        ]
        while sum(widths) > room and max(widths) > 1:
            widths[widths.index(max(widths))] -= 1
        return widths

    def _laid_out(self, row: list[list[Span]], widths: list[int]) -> list[Row]:
        cells = [
            wrap(_chopped(spans, width), _Start(0), width, [])[0]
            for spans, width in zip(row, widths, strict=True)
        ]
        lines = []
        for index in range(max(map(len, cells))):
            line: Row = list(self._indent)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True)):
                spans = cell[index] if index < len(cell) else []
                room = width - width_of(spans)
                left = {"right": room, "center": room // 2}.get(self._aligned[number], 0)
                gap = "  " if number < len(cells) - 1 else ""
                line += [(" " * left, PLAIN), *spans, (" " * (room - left) + gap, PLAIN)]
            lines.append(stripped(line))
        return lines


def width_of(spans: Sequence[Span]) -> int:
    """Return how many columns spans take."""
    return sum(cell_len(text) for text, _ in spans)


def _chopped(spans: Sequence[Span], width: int) -> list[Span]:
    """Return the spans with breaks in words that are too long for a cell."""
    return [
        (re.sub(rf"([^\s{_WIDE}]{{{width}}})(?=\S)", "\\1\n", text), style) for text, style in spans
    ]


def stripped(row: Row) -> Row:
    """Return the row without spaces at its end."""
    row = joined(row)
    while row and not row[-1][0].strip():
        row.pop()
    return [*row[:-1], (row[-1][0].rstrip(), row[-1][1])] if row else row

"""
What the blocks of a reply in Markdown look like on a terminal, while they are written.

Paragraphs, code and tables become rows on a `Screen`. What is inside a line is parsed by markdown-it, and
code is coloured by Pygments, both in pieces of bounded length. Code has no frame at its sides, so that what
is selected on the screen is clean. HTML, images and reference links are shown as they are written, so that no
text is lost. Knows nothing of how the lines of Markdown make blocks.
"""

import re
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.lexers.special import TextLexer
from pygments.token import Comment, Generic, Keyword, Name, Number, String
from pygments.util import ClassNotFound
from rich.cells import cell_len, set_cell_size
from rich.style import Style

from recollect.cli.display import printable
from recollect.cli.screen import (
    BREAKS,
    TAB,
    WIDE,
    Row,
    Screen,
    Span,
    Start,
    stripped,
    width_of,
    wrap,
)

MOST_OPEN: Final = 400
"""Most characters that wait for the end of an emphasis, a code span, a link or a word."""
MOST_TABLE_ROWS: Final = 40
"""Most rows of a table that are drawn again for each new one; then its columns stay as they are."""
WINDOW_CHARACTERS: Final = 400
"""How much of the code before a line tells how the line is coloured."""
MOST_WINDOW_CHARACTERS: Final = 4800
"""The same at the end of a line in a string or a comment; one that is longer loses its colour."""
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
        self._start = Start(width_of(first))

    def push(self, text: str) -> None:
        """Show more of it, up to the last whole word."""
        self._source += text
        ends = [
            match.end()
            for match in BREAKS.finditer(self._source)
            if self._source[match.start() - 1 : match.end()] != "\\\n"  # is one if text follows
        ]
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
        before = [match.end() for match in BREAKS.finditer(text, 0, special.start())]
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

    def _wrapped(self, tokens: Sequence[Token]) -> tuple[list[Row], Start]:
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
        self._before = ""
        """The lines before, as far back as they tell how the next one is coloured."""
        self._cuts = deque[int]()
        """The ends of those lines that are in no string and no comment."""
        self._inside = PLAIN
        """How the last line ended."""
        self._line = ""
        self._shown = ""
        """What of the line was drawn last."""
        self._is_new = True
        self._margin = indent
        self._rule(f"── {label} " if label else "")

    def push(self, text: str) -> None:
        """Show more of the line, up to the last whole word."""
        self._begin()
        self._line += text.replace("\t", TAB * " ")
        if len(self._line) > MOST_OPEN:
            self._go_on_behind()
            return
        shown = _UNFINISHED.sub("", self._line)
        if shown == self._shown:
            return
        self._shown = shown
        is_long = len(self._before) > WINDOW_CHARACTERS  # inside a string or a comment
        rows = [self._indent + ([(shown, self._inside)] if is_long else self._coloured(shown)[0])]
        if self._screen.fits(rows):
            self._screen.draw(rows)
        else:
            self._go_on_behind()

    def end_line(self) -> None:
        """Settle the line."""
        self._begin()
        row, last = self._coloured(self._line + "\n")
        self._screen.settle([self._indent + row])
        self._before += self._line + "\n"
        self._inside = _colour(last)
        if last not in String and last not in Comment:
            self._cuts.append(len(self._before))
        self._forget()
        self._line, self._shown, self._is_new, self._indent = "", "", True, self._margin

    def finish(self) -> None:
        """Close the block."""
        if not self._is_new:
            self.end_line()
        self._rule("")

    def _go_on_behind(self) -> None:
        """Settle a line that is too long to be drawn again; the rest of it is written behind."""
        self._screen.settle([self._indent + self._coloured(self._line)[0]])
        self._indent, self._line, self._shown = [], "", ""

    def _forget(self) -> None:
        """Drop the oldest lines before, up to the end of one that is in no string and no comment."""
        while len(self._before) > WINDOW_CHARACTERS and self._cuts:
            cut = self._cuts.popleft()
            self._before = self._before[cut:]
            self._cuts = deque(place - cut for place in self._cuts)
        if len(self._before) > MOST_WINDOW_CHARACTERS:
            self._before = ""

    def _begin(self) -> None:
        if self._is_new:
            self._screen.next_row()
            self._is_new = False

    def _rule(self, label: str) -> None:
        if not self._is_fenced:
            return
        self._screen.next_row()
        width = min(RULE_WIDTH, self._screen.width - width_of(self._margin))
        label = set_cell_size(label, min(width, cell_len(label)))
        self._screen.settle([[*self._margin, (label + "─" * (width - cell_len(label)), DIM)]])

    def _coloured(self, line: str) -> tuple[Row, Any]:
        """Return the line in colours, and the type of its last token."""
        before = self._before
        row: Row = []
        place, kind = 0, None
        for kind, text in self._lexer.get_tokens(before + line):
            shown = text[max(0, len(before) - place) :].rstrip("\n")
            place += len(text)
            if shown and place > len(before):
                row.append((shown, _colour(kind)))
        return row, kind


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
        natural = [
            max(1, *(width_of(row[index]) for row in self._rows))
            for index in range(len(self._aligned))
        ]
        most = max(1, min(room, max(natural)))
        while most > 1 and sum(min(width, most) for width in natural) > room:
            most -= 1
        return [min(width, most) for width in natural]

    def _laid_out(self, row: list[list[Span]], widths: list[int]) -> list[Row]:
        cells = [
            wrap(_chopped(spans, width), Start(0), width, [])[0]
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


def _chopped(spans: Sequence[Span], width: int) -> list[Span]:
    """Return the spans with breaks in words that are too long for a cell."""
    return [
        (re.sub(rf"([^\s{WIDE}]{{{width}}})(?=\S)", "\\1\n", text), style) for text, style in spans
    ]

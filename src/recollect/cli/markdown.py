"""
A reply as Markdown on a terminal, while it is generated.

What is known to be final is written once and never touched again. Only the last words of a paragraph
whose emphasis, code or link is still open, the line of code being written, and a table's rows are drawn
again, and never more rows than the screen has. Each piece of a reply costs work within a bound, however
long the reply is.

Tells blocks apart, line by line, as far as a line's beginning says what it is; where it does not, the line
is held back. Differs from CommonMark where a chat does: a line end stays one, a nested list may be indented
by two columns, a table begins with a pipe, and there are no headings by underlining. What blocks look like is
in `markdown_blocks`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Final

from rich.console import Console

from recollect.cli.display import PlainWriter, Writer, printable
from recollect.cli.markdown_blocks import (
    DIM,
    HEADINGS,
    MARKER,
    PLAIN,
    RULE_WIDTH,
    Code,
    Paragraph,
    Table,
)
from recollect.cli.screen import TAB, Row, Screen, joined, stripped, width_of

_MOST_UNDECIDED: Final = 200
"""Most characters at a line's start of which it is still open what they begin: `- - -`, spaces."""
_QUOTE: Final = re.compile(r" {0,3}> ?")
_FENCE: Final = re.compile(r"(`{3,}|~{3,})(.*)")
_HEADING: Final = re.compile(r"(#{1,6})(?:[ \t]+|$)")
_RULE: Final = re.compile(r"(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,}")
_ITEM: Final = re.compile(r"([-+*]|\d{1,9}[.)])(?:[ \t]+|$)")
_UNDECIDED: Final = re.compile(r"[-*_][-*_ \t]*|\+|\d{1,9}[.)]?|#{1,6}|`{1,2}|~{1,2}|=+")
_DELIMITERS: Final = re.compile(r"\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")
_MOST_DELIMITERS: Final = 2000
"""Most characters of the line under a table's heading."""
_MOST_COLUMNS: Final = 40
"""Of a table; a screen has no room for more."""
_MOST_QUOTES: Final = 8
"""Most bars before a quotation; a deeper one has no more."""


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|")
    inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


@dataclass(frozen=True, slots=True)
class _Level:
    """An open list: where its markers stand in the source, and where its text stands on the screen."""

    marker: int
    text: int


@dataclass(slots=True)
class _Fence:
    """An open block of code: how it is closed, and how far its lines are indented in the source."""

    mark: str
    indent: int
    quotes: int

    def is_closed_by(self, body: str) -> bool:
        """Return whether a line without its indentation ends the block."""
        body = body.rstrip()
        return len(body) >= len(self.mark) and not body.strip(self.mark[0])


@dataclass(slots=True)
class _Line:
    """The beginning of a line, taken apart: what it is quoted by, its indentation, and the rest."""

    quotes: int
    indent: int
    body: str

    @classmethod
    def of(cls, text: str, most_quotes: int | None = None) -> "_Line":
        """Take a line apart; more marks of quotation than *most_quotes* are text."""
        quotes, place = 0, 0
        while quotes != most_quotes and (match := _QUOTE.match(text, place)):
            quotes, place = quotes + 1, match.end()
        rest = text[place:]
        body = rest.lstrip(" \t")
        return cls(quotes, len(rest[: len(rest) - len(body)].expandtabs(TAB)), body)


class MarkdownWriter:
    """
    Shows a reply that comes in pieces as Markdown.

    Invariants:
        1. How the reply is cut into pieces changes nothing of what stands there at the end.
        2. All its text is shown, but for marks that are shown as what they mean.
        3. No control character of the reply reaches the terminal.
    """

    def __init__(self, out: IO[str], size: Callable[[], tuple[int, int]]) -> None:
        """
        Write to a terminal whose cursor is at the start of an empty row.

        Args:
            out: The terminal.
            size: Returns its columns and rows.
        """
        self._screen = Screen(out, size)
        self._held: list[str] = []
        """The start of a line of which it is not known yet what it is."""
        self._is_decided = False
        """Whether the line that is being written goes on in the open block."""
        self._whole = False
        """Whether it can be told only at its end what the line is."""
        self._paragraph: Paragraph | None = None
        self._code: Code | None = None
        self._table: Table | None = None
        self._fence: _Fence | None = None
        self._header: _Line | None = None
        """A line that begins a table if the next one says so."""
        self._levels: list[_Level] = []
        self._quotes = 0
        self._shared_quotes = 0
        """How deep a quotation the next block has in common with the one before."""
        self._gap = False
        """Whether a row is left free before the next block."""
        self._ends_with_line = False
        """Whether the open block is a heading."""

    def push(self, text: str) -> None:
        """Show more of the reply."""
        first, *others = printable(text).split("\n")
        self._add(first)
        for line in others:
            self._end_line()
            self._add(line)
        self._screen.flush()

    def finish(self) -> None:
        """Show the rest; the cursor is at the start of a row then."""
        if self._held or self._is_decided:
            self._end_line()
        self._end_header()
        if self._fence is not None:
            self._end_fence()
        self._end_block()
        self._screen.next_row()
        self._screen.flush()

    def _add(self, text: str) -> None:
        if not text:
            return
        if self._is_decided:
            self._continue(text)
            return
        self._held.append(text)
        if self._whole:
            return
        held = "".join(self._held)
        self._held = [held]
        if self._fence is not None:
            self._decide_code(held, self._fence)
        elif self._header is None:
            self._decide(held)
        else:
            self._whole = True

    def _continue(self, text: str) -> None:
        if self._code is not None:
            self._code.push(text)
        elif self._paragraph is not None:
            self._paragraph.push(text)

    def _decide(self, held: str) -> None:
        """Find out what a line is from its beginning, if that is possible already."""
        line = _Line.of(held)
        body = line.body
        item = _ITEM.match(body)
        rest = body[item.end() :] if item else ""
        if body.startswith("|") or _FENCE.match(body) or _FENCE.match(rest):
            self._whole = True
        elif item and not rest.strip("`~") and len(held) <= _MOST_UNDECIDED:
            pass  # maybe a block of code in a list
        elif len(held) > _MOST_UNDECIDED or (body and not _UNDECIDED.fullmatch(body)):
            self._begin(line)
            self._is_decided, self._held = True, []

    def _decide_code(self, held: str, fence: _Fence) -> None:
        line = _Line.of(held, fence.quotes)
        if (line.body and line.body.strip(fence.mark[0] + " \t")) or len(held) > _MOST_UNDECIDED:
            self._code_text(line, fence)
            self._is_decided, self._held = True, []

    def _code_text(self, line: _Line, fence: _Fence) -> None:
        assert self._code is not None, "a fence has its block"
        self._code.push(" " * max(0, line.indent - fence.indent) + line.body)

    def _end_line(self) -> None:
        held, self._held = "".join(self._held), []
        was_decided, self._is_decided, self._whole = self._is_decided, False, False
        if self._fence is not None:
            self._end_code_line(held, self._fence, was_decided=was_decided)
        elif was_decided:
            if self._code is not None:
                self._code.end_line()
            if self._ends_with_line:
                self._end_block()
        else:
            self._take_whole(_Line.of(held))

    def _end_code_line(self, held: str, fence: _Fence, *, was_decided: bool) -> None:
        assert self._code is not None, "a fence has its block"
        line = _Line.of(held, fence.quotes)
        if not was_decided:
            if fence.is_closed_by(line.body):
                self._end_fence()
                return
            if line.body:
                self._code_text(line, fence)
        self._code.end_line()

    def _take_whole(self, line: _Line) -> None:
        """Do what a whole line says of which the beginning did not tell."""
        if self._header is not None and self._begin_table(self._header, line):
            self._header = None
            return
        self._end_header()
        body = line.body
        fence = _FENCE.fullmatch(body)
        if not body:
            self._blank()
        elif fence and not (fence[1][0] == "`" and "`" in fence[2]):
            self._begin_fence(line, fence)
        elif _RULE.fullmatch(body) or (self._paragraph and not body.strip("= \t")):
            self._begin_rule(line)
        elif not body.startswith("|"):
            self._begin(line)
            if self._ends_with_line:
                self._end_block()
        elif self._table is not None and line.quotes == self._quotes:
            self._table.add(_cells(body))
        else:
            self._header = line

    def _end_header(self) -> None:
        """Take a line for text that no table has followed."""
        if self._header is not None:
            header, self._header = self._header, None
            self._begin_text(header)

    def _blank(self) -> None:
        self._end_block()
        self._gap = True

    def _begin(self, line: _Line) -> None:
        """Begin, or go on with, what a line belongs to that can be told by its beginning."""
        heading, item = _HEADING.match(line.body), _ITEM.match(line.body)
        if heading:
            self._begin_heading(line, heading)
        elif item and self._may_begin_item(line, item[1]):
            self._begin_item(line, item)
        elif line.indent >= TAB and not self._levels and self._paragraph is None:
            self._begin_verbatim(line)
        else:
            self._begin_text(line)

    def _may_begin_item(self, line: _Line, marker: str) -> bool:
        if self._levels:
            return True
        if line.indent >= TAB:
            return False
        return self._paragraph is None or not marker[0].isdigit() or marker[:-1] == "1"

    def _begin_text(self, line: _Line) -> None:
        if self._paragraph is not None and line.quotes in {0, self._quotes}:
            self._paragraph.push("\n" + line.body)
            return
        self._open(line)
        self._paragraph = Paragraph(self._screen, self._prefix(), self._prefix())
        self._paragraph.push(line.body)

    def _begin_heading(self, line: _Line, heading: re.Match[str]) -> None:
        self._gap = True
        self._open(line)
        style = HEADINGS[min(len(heading[1]), len(HEADINGS)) - 1]
        self._paragraph = Paragraph(self._screen, self._prefix(), self._prefix(), style)
        self._paragraph.push(line.body[heading.end() :])
        self._ends_with_line = True

    def _begin_item(self, line: _Line, item: re.Match[str]) -> None:
        self._open(line)
        marker = f"{item[1]} " if item[1][0].isdigit() else "• "
        outer = self._prefix()
        indent = self._levels[-1].text if self._levels else 0
        self._levels.append(_Level(line.indent, indent + len(marker)))
        self._paragraph = Paragraph(self._screen, [*outer, (marker, MARKER)], self._prefix())
        rest = line.body[item.end() :]
        if fence := _FENCE.fullmatch(rest):
            self._begin_fence(_Line(line.quotes, line.indent + item.end(), rest), fence)
        else:
            self._paragraph.push(rest)

    def _begin_rule(self, line: _Line) -> None:
        self._open(line)
        width = min(RULE_WIDTH, self._screen.width - width_of(self._prefix()))
        self._screen.next_row()
        self._screen.settle([[*self._prefix(), ("─" * width, DIM)]])

    def _begin_fence(self, line: _Line, match: re.Match[str]) -> None:
        self._open(line)
        self._code = Code(self._screen, self._prefix(), " ".join(match[2].split()))
        self._fence = _Fence(match[1], line.indent, line.quotes)

    def _end_fence(self) -> None:
        assert self._code is not None, "a fence has its block"
        self._code.finish()
        self._code = self._fence = None

    def _begin_table(self, header: _Line, line: _Line) -> bool:
        """Return whether the line under a header makes a table of it, and begin the table then."""
        names, dashes = _cells(header.body), _cells(line.body)
        is_small = len(line.body) <= _MOST_DELIMITERS and len(dashes) <= _MOST_COLUMNS
        if not is_small or not _DELIMITERS.fullmatch(line.body) or len(names) != len(dashes):
            return False
        aligned = [
            {(True, True): "center", (False, True): "right"}.get(
                (dash.startswith(":"), dash.endswith(":")), "left"
            )
            for dash in dashes
        ]
        self._open(header)
        self._table = Table(self._screen, self._prefix(), names, aligned)
        return True

    def _begin_verbatim(self, line: _Line) -> None:
        if self._code is None:
            self._open(line)
            self._code = Code(self._screen, self._prefix(), None)
        self._code.push(" " * line.indent + line.body)

    def _open(self, line: _Line) -> None:
        """End the block before, and go to the quotation and the list that a line belongs to."""
        self._end_block()
        if line.quotes != self._quotes:
            self._shared_quotes = min(self._shared_quotes, line.quotes)
            self._quotes = line.quotes
            self._levels.clear()
        while self._levels and line.indent < self._levels[-1].marker + 2:
            self._levels.pop()
        self._space()

    def _space(self) -> None:
        """Leave the row free that a blank line asked for."""
        if self._gap and not self._screen.is_empty:
            self._screen.next_row()
            self._screen.settle([stripped(_bars(self._shared_quotes))])
        self._gap, self._shared_quotes = False, self._quotes

    def _end_block(self) -> None:
        for block in (self._paragraph, self._table, self._code):
            if block is not None:
                block.finish()
        self._paragraph = self._table = self._code = None
        self._ends_with_line = False

    def _prefix(self) -> Row:
        """Return what rows of the open quotation and list begin with."""
        indent = self._levels[-1].text if self._levels else 0
        shown = min(indent, self._screen.width // 2)  # text needs room, however deep a list is
        return joined([*_bars(self._quotes), (" " * shown, PLAIN)])


def _bars(quotes: int) -> Row:
    return [("│ " * min(quotes, _MOST_QUOTES), DIM)] if quotes else []


def make_writer(console: Console, *, plain: bool = False) -> Writer:
    """
    Return what shows a reply: as Markdown on a terminal that has colours, or else as plain text.

    Args:
        console: Where it is shown.
        plain: Whether plain text was asked for.
    """
    has_colours = console.color_system is not None and not console.no_color
    is_able = console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows
    if plain or not has_colours or not is_able:
        return PlainWriter(console.file, console.width)
    return MarkdownWriter(console.file, lambda: (console.width, console.height))

"""Replies as Markdown, seen on the screen of a small terminal, and counted."""

import io
import random
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pygments.lexer import Lexer
from rich.cells import cell_len
from rich.console import Console

from recollect.cli.display import PlainWriter
from recollect.cli.markdown import MarkdownWriter, make_writer
from recollect.cli.markdown_blocks import MOST_OPEN, MOST_TABLE_ROWS, MOST_WINDOW_CHARACTERS

WIDTH, HEIGHT = 40, 12
STEP = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[([0-9;]*)m|(\n)|(\r)|([^\x1b\n\r])")


class Terminal(io.StringIO):
    """A screen as terminals have it: what is written, what scrolls off, and what is written again."""

    def __init__(self, width: int = WIDTH, height: int = HEIGHT) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        """The characters by columns; behind one that is two columns wide stands nothing."""
        self.row = self.column = 0
        self.erased = 0
        """Characters that were written and taken away again."""
        self.written = 0

    def write(self, text: str) -> int:
        self.written += len(text)
        place = 0
        for step in STEP.finditer(text):
            assert step.start() == place, f"no terminal of ours knows {text[place:]!r}"
            place = step.end()
            self.take(step)
        assert place == len(text)
        return len(text)

    def take(self, step: re.Match[str]) -> None:
        number, letter, style, newline, start, character = step.groups()
        if newline:
            self.down()
        elif start:
            self.column = 0
        elif character:
            self.put(character)
        elif style is None and letter == "A":
            self.row -= int(number)
            assert self.row >= max(0, len(self.rows) - self.height), "that row has scrolled off"
        elif letter == "C":
            self.column += int(number)
        elif letter == "J":
            self.erased += len(self.rows[self.row][self.column :])
            self.erased += sum(map(len, self.rows[self.row + 1 :]))
            self.rows[self.row] = self.rows[self.row][: self.column]
            del self.rows[self.row + 1 :]
        else:
            assert letter in {None, "m"}, letter

    def put(self, character: str) -> None:
        if self.column + cell_len(character) > self.width:
            self.down()
        assert self.column <= len(self.rows[self.row])
        cells = [character, ""][: cell_len(character)]
        self.rows[self.row] = self.rows[self.row][: self.column] + cells
        self.column += len(cells)

    def down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([])

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows)


def pieces_of(text: str, seed: int) -> list[str]:
    chance, pieces = random.Random(seed), []  # noqa: S311 - the same pieces every time
    while text:
        size = chance.randint(1, 7)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def shown(pieces: Sequence[str], width: int = WIDTH, height: int = HEIGHT) -> Terminal:
    terminal = Terminal(width, height)
    writer = MarkdownWriter(terminal, lambda: (width, height))
    for piece in pieces:
        writer.push(piece)
    writer.finish()
    return terminal


SAMPLES = {
    "words": (
        "One **two** *three* `four` [five](https://six.example), seven_eight and 2 * 3 * 4.",
        "One two three four five\n(https://six.example), seven_eight and 2\n* 3 * 4.\n",
    ),
    "heading": ("# One `two`\nthree\n## Four", "One two\nthree\n\nFour\n"),
    "list": (
        "- one **two** three four five six seven eight nine\n  - ten\n- eleven\n\n3. twelve\n4. x",
        "• one two three four five six seven\n  eight nine\n  • ten\n• eleven\n\n3. twelve\n4. x\n",
    ),
    "lines": ("one\ntwo  \nthree\n\n\n\nfour", "one\ntwo\nthree\n\nfour\n"),
    "code": (
        "a\n```python\ndef f():\n\n    return '**'\n```\nb",
        f"a\n{'── python '.ljust(40, '─')}\ndef f():\n\n    return '**'\n{'─' * 40}\nb\n",
    ),
    "code in a list": (
        "1. do\n   ```\n   x = [1]\n     y\n   ```\n   then\n2. ```\n   z\n   ```",
        f"1. do\n   {'─' * 37}\n   x = [1]\n     y\n   {'─' * 37}\n   then\n2.\n   {'─' * 37}\n   z\n"
        f"   {'─' * 37}\n",
    ),
    "a label": ("``` a\tb 漢", f"── a b 漢 {'─' * 30}\n{'─' * 40}\n"),
    "code that nothing closes": ("```\n# a\n", f"{'─' * 40}\n# a\n{'─' * 40}\n"),
    "table": (
        "| a | **b** |\n|---|--:|\n| `one` | 2 |\n| three | 10 |\nend",
        "a       b\n─────────\none     2\nthree  10\nend\n",
    ),
    "no table": ("| a | b |\nc", "| a | b |\nc\n"),
    "quotation": ("> one *two*\n> three\n\nfour", "│ one two\n│ three\n\nfour\n"),
    "rule": ("one\n\n---\n***\ntwo", f"one\n\n{'─' * 40}\n{'─' * 40}\ntwo\n"),
    "html": (
        "<b>bold</b> & &lt; <br>\n<div>\nx\n</div>",
        "<b>bold</b> & < <br>\n<div>\nx\n</div>\n",
    ),
    "what nothing closes": ("**one `two [three", "**one `two [three\n"),
    "wide": ("漢**字**漢字" * 8, "漢字" * 10 + "\n" + "漢字" * 6 + "\n"),
    "indented code": ("one\n\n    a *b* c\n    d", "one\n\n    a *b* c\n    d\n"),
    "numbers": ("12 monkeys\n1985. A year\n-5 degrees", "12 monkeys\n1985. A year\n-5 degrees\n"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_marks_are_shown_as_what_they_mean(name: str) -> None:
    source, expected = SAMPLES[name]
    assert shown([source]).text == expected
    assert shown(list(source)).text == expected


INLINE = [
    "*",
    "**",
    "_",
    "`",
    "~~",
    "\\",
    "&amp;",
    "<b>",
    "https://a.b/c",
    "[a](b)",
    "word ",
    "漢",
    "x",
    "\\\n",
]
STARTS = ["```", "- ", "1. ", "# ", "> ", " ", "    ", "---", "| a | b |\n", "|--|:-:|\n"]
MARKS = st.sampled_from([*INLINE, *STARTS, "\n", "\n\n", "\t"])
replies = st.lists(MARKS, max_size=40).map("".join)


@given(replies, st.integers(0, 1000), st.integers(8, 60), st.integers(3, 20))
def test_how_a_reply_is_cut_into_pieces_changes_nothing(
    source: str, seed: int, width: int, height: int
) -> None:
    whole = shown([source], width, height).text
    assert shown(pieces_of(source, seed), width, height).text == whole


@pytest.mark.few(3)
@pytest.mark.parametrize("width", [21, 40, 41])
@pytest.mark.parametrize("count", range(1, 100, 7))
def test_code_of_wide_characters_is_drawn_again_where_it_stands(width: int, count: int) -> None:
    """A key is coloured as one when its colon comes, in rows that the terminal has wrapped itself."""
    for indent in range(4):
        source = f'a\n```json\n{indent * " "}"{count * "。。"}": 1\n```\n'
        whole = shown([source], width, 30).text
        assert shown(list(source), width, 30).text == whole


def letters(text: str) -> str:
    return "".join(re.findall(r"[a-z漢]", text))


@given(replies)
def test_no_text_is_lost(source: str) -> None:
    plain = source.replace("&amp;", "").replace("[a](b)", "a").replace("```", "```\n")
    assert letters(shown([plain]).text) == letters(plain)


@pytest.mark.slow
def test_what_a_paragraph_says_is_what_markdown_it_says() -> None:
    chance = random.Random(5)  # noqa: S311 - the same every time
    parts = ["*", "**", "`", "_", " ", "a", "bc ", "d, ", "~", "\\*", "[x](y)"]
    for _ in range(300):
        source = "x " + "".join(chance.choices(parts, k=12)).strip()
        (inline,) = MarkdownIt("commonmark", {"html": False}).parseInline(source)
        said = "".join(token.content or "" for token in inline.children or [])
        said = re.sub(r"~~", "~~", said)
        ours = shown(list(source), 200).text.rstrip().replace(" (y)", "")
        assert ours.split() == said.split(), source


HOSTILE = [
    "\x1b[2J\x1b]0;title\x07gone",
    "`\x1b[31m`",
    "```\x1b[5m\n\x9b2J\n```",
    "| \x1b[1A | b |\n|--|--|\n| \x1b]52;c;AAAA\x07 | x |",
    "&#27;[2J &#x1b;[2J &#155;2J &#x9b;2J",
    "[x](<\x1b[2J>) [y](&#27;[2J) [z](https://a.b/%1b)",
    "# \x1b[2J\n> \x1b[2J\n- \x1b[2J",
    "\r\r\x08\x08\x7f\x00",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_escape_sequences_in_a_reply_do_nothing(source: str) -> None:
    terminal = shown(list(source))  # it knows no other sequences than ours, and says so
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", terminal.text)


def counted(monkeypatch: pytest.MonkeyPatch, source: str) -> tuple[int, Terminal]:
    """Return how many characters were parsed and coloured, and the screen."""
    work = 0
    parse, colour = MarkdownIt.parseInline, Lexer.get_tokens

    def count_parsed(self: MarkdownIt, src: str, env: object = None) -> object:
        nonlocal work
        work += len(src)
        return parse(self, src)

    def count_coloured(self: Lexer, text: str, unfiltered: bool = False) -> object:
        nonlocal work
        work += len(text)
        return colour(self, text, unfiltered)

    with monkeypatch.context() as patch:
        patch.setattr(MarkdownIt, "parseInline", count_parsed)
        patch.setattr(Lexer, "get_tokens", count_coloured)
        terminal = shown(pieces_of(source, 1), 80, 30)
    return work, terminal


LONG = {
    "one paragraph": "words and *some* more of them, ",
    "emphasis that never ends": "**",
    "a code span that never ends": "word ` word, ",
    "one word": "x",
    "dashes": "-",
    "spaces": " ",
    "code": "    call(argument, 'text')  # why\n",
    "one line of code": "call(1); ",
    "a table": "| one | two |\n",
    "a list": "- item with **bold** and `code`\n",
    "brackets": "[",
    "quotations": "> ",
}
BEFORE = {
    "code": "```python\n",
    "one line of code": "```python\n",
    "a table": "| a | b |\n|--|--|\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
def test_work_grows_with_the_length_of_a_reply_and_not_with_its_square(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    part = LONG[kind]
    most = max(MOST_OPEN, MOST_WINDOW_CHARACTERS)
    works, sizes = [], (4_000, 16_000)
    for size in sizes:
        source = BEFORE.get(kind, "") + part * (size // len(part))
        work, terminal = counted(monkeypatch, source)
        assert work <= 2 * most * size
        assert terminal.written <= 12 * MOST_TABLE_ROWS * size
        works.append(work + terminal.written)
    assert works[1] <= 5 * works[0]  # four times the length


@pytest.mark.slow
def test_depth_and_columns_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "".join(f"{'  ' * depth}- {'> ' * depth}item\n" for depth in range(150))
    quoted = "".join(f"{'>' * depth} text\n\n" for depth in range(150))
    wide = "|a" * 1500 + "|\n" + "|-" * 900 + "|\n" + "|b" * 1500
    fitting = "|a" * 40 + "|\n" + "|-" * 40 + "|\n" + ("|w" * 40 + "\n") * 20
    for source in (deep, quoted, wide, fitting):
        work, terminal = counted(monkeypatch, source)
        assert work <= 2 * MOST_OPEN * len(source)
        assert terminal.written <= 60 * len(source)
        assert letters(terminal.text) == letters(source)


def test_what_is_finished_is_not_drawn_again() -> None:
    """Of plain words nothing is, and of emphasis no more than the marks."""
    plain = shown(pieces_of("just words, and then some more of them\n\n" * 20, 2))
    assert plain.erased == 0
    bold = shown(pieces_of("some **bold words here** and `code` and *more*\n\n" * 20, 3))
    assert bold.erased < len(bold.text) / 4


def test_rows_have_no_spaces_at_their_end() -> None:
    source = "one **two**\n\n- a\n\n```\nx\n```\n\n| a | b |\n|--|--|\n| long cell | c |\n\n> q"
    assert not any(row.endswith(" ") for row in map("".join, shown([source]).rows))


def styled(source: str, text: str) -> str:
    """Return the escape sequence before a text on the screen."""
    out = io.StringIO()
    writer = MarkdownWriter(out, lambda: (WIDTH, HEIGHT))
    for piece in pieces_of(source, 4):
        writer.push(piece)
    writer.finish()
    styles: list[str] = re.findall(r"\x1b\[([0-9;]*)m" + re.escape(text), out.getvalue())
    return styles[-1]


@pytest.mark.slow
def test_code_is_coloured_by_what_comes_before_it() -> None:
    documented = '```python\ndef f():\n    """\n' + "    many words of a docstring\n" * 80
    after = '    """\n    return 1\n'
    assert styled(documented, "docstring") == "32"
    assert styled(documented + after * 3 + "```", "return") == "35"
    assert styled(documented + after + "# why\n" * 300, "why").startswith("2")


def test_a_table_longer_than_the_screen_goes_on_with_its_columns() -> None:
    rows = "".join(f"| {number} | word |\n" for number in range(30))
    lines = shown(["| n | w |\n|--|--|\n" + rows + "| 1000 | longer |"]).text.splitlines()
    assert len(lines) == 33
    assert [line.split()[0] for line in lines[2:32]] == [str(number) for number in range(30)]


@pytest.mark.parametrize(
    ("settings", "environment", "is_plain"),
    [
        ({}, {"TERM": "xterm"}, False),
        ({}, {"TERM": "xterm-256color"}, False),
        ({}, {"TERM": "dumb"}, True),
        ({}, {"TERM": "xterm", "NO_COLOR": "1"}, True),
        ({"force_terminal": False}, {"TERM": "xterm"}, True),
        ({"legacy_windows": True}, {"TERM": "xterm"}, True),
    ],
)
def test_where_markdown_is_shown(
    settings: dict[str, bool], environment: dict[str, str], is_plain: bool
) -> None:
    given = {"force_terminal": True, **settings}
    console = Console(file=io.StringIO(), _environ=environment, **given)  # type: ignore[arg-type]
    assert isinstance(make_writer(console), PlainWriter) is is_plain
    assert isinstance(make_writer(console, plain=True), PlainWriter)

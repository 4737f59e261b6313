"""Text for terminals."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from recollect.cli.display import WordWrapper, printable

pieces_of_text = st.lists(st.text(alphabet="ab漢é \n", max_size=12))


def wrap(pieces: list[str], width: int) -> str:
    wrapper = WordWrapper(width)
    return "".join([*(wrapper.push(piece) for piece in pieces), wrapper.finish()])


@given(st.text())
def test_what_is_printable_has_no_control_characters_but_newline_and_tab(text: str) -> None:
    shown = printable(text)
    assert all(c in "\n\t" or unicodedata.category(c) != "Cc" for c in shown)
    assert printable(shown) == shown


def test_an_escape_sequence_is_made_harmless() -> None:
    assert printable("a\x1b]0;title\x07b\x9b1mc\r") == "a]0;titleb1mc"


def test_what_is_written_cannot_change_the_order_in_which_it_is_read() -> None:
    """Source: "Trojan Source", CVE-2021-42574, and the characters that Unicode deprecates or hides."""
    turned = "".join(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x2070)]))
    hidden = "\ufff9\ufffa\ufffb\U000e0041\U000e007f"
    assert printable(f"rm {turned}-rf{hidden} x") == "rm -rf x"
    assert printable("one\u2028two\u2029three") == "one\ntwo\nthree"


@pytest.mark.parametrize(
    "text",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0915\u094d\u200d\u0937",
        "\U0001f469\u200d\U0001f52c",
        "\u05e9\u05dc\u05d5\u05dd\u200f!",
        "\u0600\u0661\u0662",
    ],
)
def test_format_characters_that_letters_need_stay(text: str) -> None:
    """Joiners, marks of direction and signs before numbers belong to how a text is spelled."""
    assert text == printable(text)


@given(pieces_of_text)
def test_a_wrapper_changes_nothing_but_spaces_into_breaks(pieces: list[str]) -> None:
    expected = "".join(pieces).split()
    wrapped = wrap(pieces, 10).split()
    assert "".join(expected) == "".join(wrapped)


@given(pieces_of_text)
def test_a_wrapper_adds_nothing_where_the_line_is_long_enough(pieces: list[str]) -> None:
    assert "".join(pieces) == wrap(pieces, 10_000)


@given(pieces_of_text, st.integers(4, 20))
def test_lines_fit_where_words_do(pieces: list[str], width: int) -> None:
    for line in wrap(pieces, width).split("\n"):
        longest = max((cell_len(word) for word in line.split()), default=0)
        indentation = len(line) - len(line.lstrip())
        assert cell_len(line.rstrip()) <= max(width, longest + indentation)


@given(pieces_of_text, st.integers(4, 20))
def test_how_the_text_is_cut_into_pieces_makes_no_difference(pieces: list[str], width: int) -> None:
    assert wrap(["".join(pieces)], width) == wrap(pieces, width)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", ["one two", "three"]),
        ("  one", ["  one"]),
        ("seven77 one", ["seven77", "one"]),
        ("eleven chars", ["eleven", "chars"]),
        ("漢字漢字漢字", ["漢字漢字", "漢字"]),
    ],
)
def test_breaks_fall_between_words(text: str, lines: list[str]) -> None:
    assert lines == wrap([text], 8).split("\n")

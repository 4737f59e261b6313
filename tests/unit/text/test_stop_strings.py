"""Stop strings are found however the text is cut into pieces."""

import sys
from collections.abc import Callable
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from recollect.text.tokenizer import StopMatcher

TEXT = st.text("ab.é", max_size=20)
STOPS = st.lists(st.text("ab.é", min_size=1, max_size=4), max_size=4).map(tuple)


def dumb(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Read letter by letter; as soon as what was read ends with a stop string, cut that off."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    out = "".join(matcher.push(piece) for piece in pieces)
    return out + matcher.finish(), matcher.matched


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


@given(TEXT, STOPS, st.lists(st.integers(0, 20)))
@example("abc", ("abc", "b"), [])
@example("abc", ("abc", "b"), [1, 2])
def test_any_cutting_into_pieces_gives_what_reading_letter_by_letter_gives(
    text: str, stops: tuple[str, ...], places: list[int]
) -> None:
    assert run(cut(text, places), stops) == dumb(text, stops)


@given(TEXT, STOPS, st.lists(st.integers(0, 20)))
def test_what_is_let_through_is_never_taken_back_and_never_holds_a_stop_string(
    text: str, stops: tuple[str, ...], places: list[int]
) -> None:
    matcher, out, pushed = StopMatcher(stops), "", ""
    for piece in cut(text, places):
        out += matcher.push(piece)
        pushed += piece
        assert text.startswith(out)
        assert not any(stop in out for stop in stops)
        held = "" if matcher.matched else pushed[len(out) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ((), ["a", "b"], ("ab", None)),
        (("b",), ["a", "b", "c"], ("a", "b")),
        (("END",), ["xE", "N", "D", "y"], ("x", "END")),
        (("END",), ["xE", "N", "x"], ("xENx", None)),
        (("aab",), ["a", "a", "a", "b"], ("a", "aab")),
        (("ab", "b"), ["a", "b"], ("", "ab")),
    ],
)
def test_examples(
    stops: tuple[str, ...], pieces: list[str], expected: tuple[str, str | None]
) -> None:
    assert run(pieces, stops) == expected


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["x"])
    assert matcher.push("axb") == "a"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


def lines_run(work: Callable[[], object]) -> int:
    """Return how many lines of Python some work runs."""
    count = 0

    def trace(_frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(former)
    return count


def test_a_piece_costs_the_same_however_many_stop_strings_there_are_and_however_long() -> None:
    text = "a plain reply, which nothing stops but its end. " * 5

    def cost(stops: list[str]) -> int:
        matcher = StopMatcher(stops)
        return lines_run(lambda: [matcher.push(letter) for letter in text])

    few = cost([f"{number}a plain" for number in range(10)])
    assert cost([f"{number}a plain" for number in range(100)]) == few
    assert cost([f"{number}a plain" + "x" * 1000 for number in range(10)]) == few

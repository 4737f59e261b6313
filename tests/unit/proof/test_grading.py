"""Facts are found whatever their case, and bullets are counted by line."""

import pytest

from recollect.proof.grading import Expectation, Fact, count_bullets, grade


def test_each_pattern_gets_a_verdict_whatever_the_case() -> None:
    facts = grade("You live in BERLIN.", Expectation(("berlin", "piano")))
    assert facts == (Fact("berlin", True), Fact("piano", False))


@pytest.mark.parametrize(
    ("reply", "recalled"),
    [("28,800 apples", True), ("28800", True), ("28.800", False), ("2,880", False)],
)
def test_patterns_are_regular_expressions(reply: str, recalled: bool) -> None:
    assert grade(reply, Expectation(("28,?800",)))[0].recalled is recalled


@pytest.mark.parametrize(
    ("text", "bullets"),
    [
        ("- a\n- b\n- c", 3),
        ("Here:\n* a\n  • b\n\n+ c", 3),
        ("1. a\n2) b", 2),
        ("**bold** is no bullet\n-5 is a number\n- ", 0),
        ("", 0),
    ],
)
def test_counts_lines_that_begin_with_a_bullet_or_a_number(text: str, bullets: int) -> None:
    assert count_bullets(text) == bullets


@pytest.mark.parametrize(("reply", "recalled"), [("- a\n- b\n- c", True), ("- a\n- b", False)])
def test_the_number_of_bullets_is_a_fact(reply: str, recalled: bool) -> None:
    assert grade(reply, Expectation(bullets=3)) == (Fact("3 bullets", recalled),)


def test_nothing_expected_gives_no_verdict() -> None:
    assert grade("anything", Expectation()) == ()

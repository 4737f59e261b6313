"""Facts are found whatever their case, and bullets are counted by line."""

import pytest

from recollect.proof.scenarios import Expectation, Fact, count_bullets, grade, load_scenarios


def test_each_pattern_gets_a_verdict_whatever_the_case() -> None:
    facts = grade("You live in BERLIN.", Expectation(("berlin", "piano")))
    assert facts == (Fact("berlin", True), Fact("piano", False))


@pytest.mark.parametrize(
    ("reply", "recalled"),
    [
        ("28,800 apples", True),
        ("28800.", True),
        ("28.800", False),
        ("2,880", False),
        ("128,800", False),
        ("3,28,800", False),
        ("28,800,000", False),
        ("28800th", False),
    ],
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


@pytest.mark.parametrize(
    ("reply", "recalled"),
    [
        ("Alice works in biology.", True),
        ("She is a biologist at Genomix Lab, and reports to Dr. Patel.", True),
        ("Dr. Patel is a biologist.", False),
        ("Alice works at Genomix Lab, and Martin is a biologist.", False),
        ("Alice works in microbiology.", False),
    ],
)
def test_an_answer_about_somebody_else_is_no_answer(reply: str, recalled: bool) -> None:
    (scenario,) = [one for one in load_scenarios() if one.name == "role-tracking"]
    assert grade(reply, scenario.expected[4])[0].recalled is recalled


@pytest.mark.parametrize(
    ("name", "turn", "reply", "recalled"),
    [
        ("entity-linking", 1, "James is Sarah's manager.", True),
        ("entity-linking", 1, "Sarah is James's manager.", False),
        ("list-recall", 1, "The fourth item was eggs.", True),
        ("list-recall", 1, "The fourth item was milk, then eggs.", False),
        ("list-recall", 2, "There are two dairy items: milk and cheese.", True),
        ("list-recall", 2, "There are 12 items, of which three dairy.", False),
        ("identity-recall", 2, "You live in Berlin and enjoy playing the piano.", True),
        ("identity-recall", 2, "You live in Munich, not in Berlin, and play the piano.", False),
    ],
)
def test_whole_answers_are_graded(name: str, turn: int, reply: str, recalled: bool) -> None:
    (scenario,) = [one for one in load_scenarios() if one.name == name]
    assert grade(reply, scenario.expected[turn])[0].recalled is recalled

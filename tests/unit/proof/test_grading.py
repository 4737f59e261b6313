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


@pytest.mark.parametrize(
    ("reply", "recalled"),
    [
        ("It is 84.", True),
        ("The answer is 84, not 48.", True),
        ("It is not 48 but 84.", True),
        ("It is not 48, it is 84.", True),
        ("No, it is 84.", True),
        ("It isn't 48. It's 84.", True),
        ("I am not sure. It is 84", True),
        ("I don't remember everything, but it is 84.", True),
        ("Answer: 84", True),
        ("- 84", True),
        ("There are only 84 of them.", True),
        ("It is not 84.", False),
        ("It isn't 84.", False),
        ("It isn\u2019t 84.", False),
        ("It is NOT 84!", False),
        ("It was never 84.", False),
        ("It is neither 48 nor 84.", False),
        ("It is not 48, 50, or 84.", False),
        ("It is not 84, 50, or 48.", False),
        ("It cannot be 84.", False),
        ("-84", False),
        ("It is -84.", False),
        ("It is \u221284.", False),
        ("It is minus 84.", False),
        ("1/84", False),
        ("Is it 84?", False),
        ("I don't know whether it is 84.", False),
        ("I don't know if it is 84.", False),
        ("I do not know, whether it is 84 or 48.", False),
        ("I am unsure whether 84 is right.", False),
        ("It is not 84. It is 48.", False),
        ("It is not 84. No: it is 84.", True),
        ("If each tree bears two then there are 84.", True),
        ("Please tell me if it is 84.", False),
    ],
)
def test_what_is_denied_asked_or_unknown_is_not_stated(reply: str, recalled: bool) -> None:
    assert grade(reply, Expectation(("84",)))[0].recalled is recalled


@pytest.mark.parametrize(
    ("reply", "pattern", "recalled"),
    [
        ("I don't know whether it is Paris.", "Paris", False),
        ("She does not report to Dr. Patel.", "Patel", False),
        ("She reports to Dr. Patel, and not to Martin.", "Patel", True),
        ("You don't live in Munich, you live in Berlin.", "Berlin", True),
        ("You live in Berlin and don't play the piano.", "Berlin", True),
        ("You live in Berlin and don't play the piano.", "piano", False),
        ("The AI-team.", "AI", True),
    ],
)
def test_denials_reach_as_far_as_their_clause(reply: str, pattern: str, recalled: bool) -> None:
    assert grade(reply, Expectation((pattern,)))[0].recalled is recalled

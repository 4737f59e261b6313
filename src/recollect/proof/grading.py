"""
Grade a reply: which of the expected facts does it state, and does it state a wrong one?

Pure: text in, verdicts out. Does not know who wrote the reply.
"""

import re
from dataclasses import dataclass
from typing import Final

_BULLET: Final = re.compile(r"^\s*(?:[-*+•–]|\d+[.)])\s+\S", re.MULTILINE)  # noqa: RUF001 - models write en dashes
"""A line that begins with a bullet or a number, and says something."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a reply has to say."""

    patterns: tuple[str, ...] = ()
    """Regular expressions, each of which has to occur as whole words or numbers, whatever the case."""
    wrong: tuple[str, ...] = ()
    """Likewise; a reply in which one occurs says the contrary, and states none of the facts."""
    bullets: int | None = None
    """How many bullet lines it has; None: any number."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One expected fact and whether the reply states it."""

    what: str
    recalled: bool


def grade(reply: str, expected: Expectation) -> tuple[Fact, ...]:
    """
    Return a verdict for each expected fact, in order; bullets last.

    "Dr. Patel is a biologist" has the word that was asked for, and is no answer to what Alice works
    in: so what a reply must not say counts as well.
    """
    says_wrong = any(_occurs(pattern, reply) for pattern in expected.wrong)
    facts = [
        Fact(pattern, _occurs(pattern, reply) and not says_wrong) for pattern in expected.patterns
    ]
    if expected.bullets is not None:
        facts.append(Fact(f"{expected.bullets} bullets", count_bullets(reply) == expected.bullets))
    return tuple(facts)


def _occurs(pattern: str, text: str) -> bool:
    """Return whether a pattern occurs, and not as a part of a longer word or number."""
    whole = rf"(?<!\w)(?<!\d[,.])(?:{pattern})(?!\w|[,.]\d)"
    return re.search(whole, text, re.IGNORECASE) is not None


def count_bullets(text: str) -> int:
    """Return how many lines are list items, with a bullet or a number."""
    return len(_BULLET.findall(text))

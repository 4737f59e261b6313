"""
Grade a reply: which of the expected facts does it state?

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
    """Regular expressions that occur anywhere, whatever the case."""
    bullets: int | None = None
    """How many bullet lines it has; None: any number."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One expected fact and whether the reply states it."""

    what: str
    recalled: bool


def grade(reply: str, expected: Expectation) -> tuple[Fact, ...]:
    """Return a verdict for each expected fact, in order; bullets last."""
    facts = [
        Fact(pattern, re.search(pattern, reply, re.IGNORECASE) is not None)
        for pattern in expected.patterns
    ]
    if expected.bullets is not None:
        facts.append(Fact(f"{expected.bullets} bullets", count_bullets(reply) == expected.bullets))
    return tuple(facts)


def count_bullets(text: str) -> int:
    """Return how many lines are list items, with a bullet or a number."""
    return len(_BULLET.findall(text))

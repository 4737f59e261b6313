"""A reply that only repeats itself is noticed; a text that may repeat is not."""

import json
import random
import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import pytest
from tests.unit.engine.repeating_texts import TEXTS

from recollect.engine.repetition import (
    CYCLE_WINDOW,
    PROSE_CYCLE_TIMES,
    PROSE_CYCLE_WINDOW,
    REPETITION_WINDOW,
    SAME_LENGTH,
    SAME_TIMES,
    Repetition,
)

RUNAWAYS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "runaways.jsonl").read_text("utf-8").splitlines()
]
"""Greedy replies of SmolLM2-135M-Instruct and sampled ones, as text, cut after 1,400 tokens."""


def split(text: str) -> list[tuple[int, str]]:
    """Return each word, digit, run of spaces and mark with a number: about the tokens of a model."""
    ids: dict[str, int] = {}
    return [
        (ids.setdefault(piece.group(), len(ids)), piece.group())
        for piece in re.finditer(r" ?[A-Za-z]+|\d|([^\w\s])\1*|\s+", text)
    ]


def words(token_ids: Iterable[int]) -> list[tuple[int, str]]:
    """Return tokens of which each is a word."""
    return [(token, " word") for token in token_ids]


def end_of(tokens: Iterable[tuple[int, str]]) -> int | None:
    """Return after how many tokens a reply is taken to have run away."""
    repetition = Repetition()
    return next((n for n, token in enumerate(tokens, 1) if repetition.push(*token)), None)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_may_repeat_goes_on(name: str) -> None:
    """Tables, code, refrains and lists, all of them longer than what is looked at, are let through."""
    assert end_of(split(TEXTS[name]())) is None


@pytest.mark.parametrize("runaway", RUNAWAYS, ids=lambda one: one["prompt"][:40])
def test_a_real_runaway_is_ended(runaway: dict[str, str]) -> None:
    """What a small model really wrote without an end is noticed before 1,200 tokens."""
    tokens = split(runaway["text"])
    end = end_of(tokens)
    assert end is not None
    assert end / len(tokens) * 1400 <= 1200  # of the model's tokens, 1,400 of which the text was


@pytest.mark.parametrize("item", ["{}. ", "**{}:** ", "- {}) ", "## {}. "])
def test_a_list_of_one_item_again_and_again_is_ended(item: str) -> None:
    """Items that are the same but for their numbers are a loop, however the numbers are written."""
    line = "Roman Colosseum: the largest amphitheater of Rome, with a massive dome.\n"
    assert end_of(split("".join(item.format(n) + line for n in range(1, 90)))) is not None


@pytest.mark.parametrize("line", ["{}.\n", "{}. \n\n", "{}: yes\n", "- {}) [ ]\n", "{} {}. "])
def test_lines_that_do_nothing_but_count_go_on(line: str) -> None:
    """Somebody may ask for numbered lines to fill in."""
    assert end_of(split("".join(line.format(n, n) for n in range(1, 400)))) is None


@pytest.mark.parametrize("period", [1, 2, 7, 31, 32, 33, 100, 128])
def test_an_exact_cycle_is_ended(period: int) -> None:
    """A cycle is noticed once it has come four times and fills the window."""
    head = list(range(1000, 1100))
    end = end_of(words(head + list(range(period)) * (2048 // period + 1)))
    assert end is not None
    assert end <= len(head) + SAME_TIMES * max(period, SAME_LENGTH) + REPETITION_WINDOW


@pytest.mark.parametrize("period", [1, 2, 7, 31, 48, 100])
def test_prose_that_is_an_exact_cycle_is_ended_soon(period: int) -> None:
    """The loop that a small model falls into most: a sentence or a paragraph, word for word."""
    head = list(range(1000, 1100))
    end = end_of(words(head + list(range(period)) * (1000 // period + 1)))
    assert end is not None
    assert end <= len(head) + period + max(PROSE_CYCLE_WINDOW, PROSE_CYCLE_TIMES * period)


def test_most_real_runaways_are_ended_within_a_few_hundred_tokens() -> None:
    ends = [end_of(split(runaway["text"])) or 1400 for runaway in RUNAWAYS]
    assert sorted(ends)[len(ends) // 2] < 500


@pytest.mark.parametrize("seed", range(5))
def test_a_cycle_with_a_counter_is_ended(seed: int) -> None:
    """A loop that counts is noticed where enough tokens in a row stay the same."""
    chosen = random.Random(seed)  # noqa: S311 - tokens, no secrets
    paragraph = [chosen.randrange(1000) for _ in range(120)]
    counter = count(5000)
    tokens = [t for _ in range(20) for t in (next(counter), *paragraph)]
    assert end_of(words(tokens)) is not None


@pytest.mark.parametrize("period", [1, 7, 60, 300])
def test_a_cycle_of_marks_is_ended(period: int) -> None:
    """Nothing in it is prose, and nothing changes."""
    tokens = [(token, " .") for token in [*range(500, 600), *list(range(period)) * 2000]]
    end = end_of(tokens)
    assert end is not None
    assert end <= 100 + period + CYCLE_WINDOW


@pytest.mark.parametrize("period", [7, 60, 300])
def test_a_cycle_of_marks_that_counts_goes_on(period: int) -> None:
    """Records have the same marks and digits again and again, and each has a number of its own."""
    tokens = [t for n in range(40) for t in ((1000 + n, "7"), *((t, " .") for t in range(period)))]
    assert end_of(tokens) is None


@pytest.mark.slow
def test_random_tokens_go_on() -> None:
    """Text without repetition is never ended, however long it is, and what is held stays bounded."""
    chosen = random.Random(0)  # noqa: S311 - tokens, no secrets
    repetition = Repetition()
    for _ in range(50_000):
        assert not repetition.push(chosen.randrange(50_000), " word")
    repetition.check()

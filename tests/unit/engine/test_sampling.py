"""Sampling does what a slow and plain version of it does, and depends on its arguments alone."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.engine.sampling import choose_token, most_likely, random_numbers
from recollect.errors import InvalidParameterError, RuntimeFailure
from recollect.types import SamplingParams

SETTINGS_WITH_MASKS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 2.0, "top_k": 3, "repetition_penalty": 1.4},
    {"temperature": 1.0, "top_p": 0.7, "min_p": 0.05, "presence_penalty": 0.5},
]
EMPTY = np.zeros(0, np.int64)


def some_logits(size: int = 12, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 2


def plain_distribution(
    logits: np.ndarray, params: SamplingParams, history: list[int], reply_start: int
) -> dict[int, float]:
    """Return the probability of each token that may be chosen: lists, loops and nothing clever."""
    scores = [float(score) for score in logits]
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in set(history):
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(history[reply_start:]).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    if params.temperature == 0:
        return {max(range(len(scores)), key=lambda token: scores[token]): 1.0}
    best = max(scores)
    weights = {
        token: math.exp((score - best) / params.temperature) for token, score in enumerate(scores)
    }
    ranked = sorted(weights, key=lambda token: -weights[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if params.top_p == 1 or mass < params.top_p:
            kept.append(token)
        mass += weights[token] / total
    kept = [token for token in kept if weights[token] >= params.min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept if weights[token] > 0}


def draw(
    logits: np.ndarray, params: SamplingParams, history: list[int], reply_start: int, count: int
) -> Counter[int]:
    ids = np.array(history, np.int64)
    return Counter(
        choose_token(logits, params, history=ids, reply_start=reply_start, seed=seed)
        for seed in range(count)
    )


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.3},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.7, "min_p": 0.1, "temperature": 1.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.8},
    {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "top_p": 0.9},
    {"logit_bias": {0: -math.inf, 3: 2.5}},
    {"logit_bias": {0: -math.inf, 1: -math.inf}, "repetition_penalty": 2.0, "presence_penalty": 1},
]


@pytest.mark.few(3)
@pytest.mark.parametrize("draws", [600, pytest.param(6000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_plain_distribution(case: dict[str, Any], draws: int) -> None:
    params = SamplingParams(**{"temperature": 1.0, **case})
    history, reply_start = [1, 2, 2, 5, 5, 5, 7], 3
    expected = plain_distribution(some_logits(), params, history, reply_start)
    drawn = draw(some_logits(), params, history, reply_start, draws)
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        # Five standard deviations: the seeds are fixed, so this fails always or never.
        tolerance = 5 * math.sqrt(probability * (1 - probability) / draws) + 1e-9
        assert drawn[token] / draws == pytest.approx(probability, abs=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_takes_the_best_after_bias_and_penalties(case: dict[str, Any]) -> None:
    for logits_seed in range(20):
        logits = some_logits(seed=logits_seed)
        params = SamplingParams(**{**case, "temperature": 0.0})
        history = [1, 2, 2, 5, 5, 5, 7]
        (expected,) = plain_distribution(logits, params, history, 3)
        assert draw(logits, params, history, 3, 1) == {expected: 1}


@pytest.mark.few(1)
@pytest.mark.parametrize(("top_p", "spread"), [(0.2, 0.0), (0.9, 0.01), (0.999, 1e-4)])
def test_top_p_of_a_flat_distribution_keeps_as_many_as_hold_the_mass(
    top_p: float, spread: float
) -> None:
    """Far more candidates than are sorted at first: a wrong first guess would show."""
    size = 49_152
    logits = (some_logits(size) * spread).astype(np.float32)
    params = SamplingParams(temperature=1.0, top_p=top_p)
    drawn = draw(logits, params, [], 0, 60)
    weights = np.sort(np.exp(logits.astype(np.float64)))[::-1]
    expected = int(np.searchsorted(np.cumsum(weights) / weights.sum(), top_p)) + 1
    threshold = weights[expected - 1]
    assert all(np.exp(np.float64(logits[token])) >= threshold * (1 - 1e-9) for token in drawn)
    # Of 60 draws out of more than 9,000 nearly all differ: the guess of 256 was left behind.
    assert len(drawn) > 55


def test_choosing_changes_nothing() -> None:
    logits, history = some_logits(), np.array([1, 2, 2], np.int64)
    logits_before, history_before = logits.copy(), history.copy()
    params = SamplingParams(
        temperature=1.0, repetition_penalty=2, presence_penalty=1, logit_bias={1: 5}, top_p=0.5
    )
    first = choose_token(logits, params, history=history, reply_start=0, seed=3)
    assert first == choose_token(logits, params, history=history, reply_start=0, seed=3)
    assert np.array_equal(logits, logits_before)
    assert np.array_equal(history, history_before)


def test_read_only_logits_will_do() -> None:
    logits = some_logits()
    logits.flags.writeable = False
    params = SamplingParams(temperature=1, repetition_penalty=2, logit_bias={1: 1})
    choose_token(logits, params, history=np.array([1]), reply_start=0, seed=0)


def test_presence_and_frequency_look_at_the_reply_alone_and_repetition_at_everything() -> None:
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    history = np.array([0, 0, 1], np.int64)

    def greedy(params: SamplingParams, reply_start: int) -> int:
        return choose_token(logits, params, history=history, reply_start=reply_start, seed=0)

    assert greedy(SamplingParams(presence_penalty=0.5), 3) == 0
    assert greedy(SamplingParams(presence_penalty=0.5), 2) == 0
    assert greedy(SamplingParams(frequency_penalty=0.5), 0) == 1
    assert greedy(SamplingParams(repetition_penalty=50.0), 3) == 0
    only_zero = np.array([0], np.int64)
    params = SamplingParams(repetition_penalty=1.5)
    assert choose_token(logits, params, history=only_zero, reply_start=1, seed=0) == 1


def test_of_equal_logits_the_first_is_the_greedy_choice() -> None:
    logits = np.array([0, 3, 3, 3], np.float32)
    assert choose_token(logits, SamplingParams(), history=EMPTY, reply_start=0, seed=0) == 1


@pytest.mark.parametrize("case", [{"top_k": 2}, {"top_p": 0.4}, {"top_k": 3, "top_p": 0.5}])
def test_ties_fall_the_same_way_every_time(case: dict[str, Any]) -> None:
    logits = np.full(1000, 1.0, np.float32)
    params = SamplingParams(temperature=1.0, **case)
    first = [
        choose_token(logits, params, history=EMPTY, reply_start=0, seed=seed) for seed in range(50)
    ]
    again = [
        choose_token(logits.copy(), params, history=EMPTY, reply_start=0, seed=seed)
        for seed in range(50)
    ]
    assert first == again


def test_top_k_keeps_exactly_that_many_of_equal_logits() -> None:
    drawn = draw(np.ones(100, np.float32), SamplingParams(temperature=1, top_k=3), [], 0, 300)
    assert len(drawn) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_a_runtime_failure(bad: float, temperature: float) -> None:
    logits = some_logits()
    logits[4] = bad
    with pytest.raises(RuntimeFailure):
        choose_token(
            logits, SamplingParams(temperature=temperature), history=EMPTY, reply_start=0, seed=0
        )


@pytest.mark.parametrize("settings", SETTINGS_WITH_MASKS)
def test_a_mask_is_as_if_nothing_else_were_in_the_vocabulary(settings: dict[str, Any]) -> None:
    logits, params = some_logits(), SamplingParams(**settings)
    allowed = np.zeros(len(logits), np.bool_)
    allowed[[2, 3, 7, 11]] = True
    banned = dict.fromkeys(np.flatnonzero(~allowed).tolist(), -math.inf)
    as_bans = replace(params, logit_bias=banned)
    history = np.array([1, 2, 7, 7])
    chosen = [
        choose_token(logits, params, history=history, reply_start=1, seed=seed, allowed=allowed)
        for seed in range(200)
    ]
    assert set(chosen) <= {2, 3, 7, 11}
    assert chosen == [
        choose_token(logits, as_bans, history=history, reply_start=1, seed=seed)
        for seed in range(200)
    ]


def test_when_everything_is_banned_it_is_the_callers_mistake() -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(12), -math.inf))
    with pytest.raises(InvalidParameterError, match="lift a ban"):
        choose_token(some_logits(), params, history=EMPTY, reply_start=0, seed=0)


def test_when_the_model_gives_no_number_it_is_a_runtime_failure() -> None:
    for logit in (math.nan, -math.inf):
        logits = np.full(12, logit, np.float32)
        with pytest.raises(RuntimeFailure, match="damaged"):
            choose_token(logits, SamplingParams(), history=EMPTY, reply_start=0, seed=0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30, 1e30])
def test_the_smallest_and_the_largest_temperature_give_a_token(temperature: float) -> None:
    logits = some_logits()
    token = choose_token(
        logits, SamplingParams(temperature=temperature), history=EMPTY, reply_start=0, seed=1
    )
    assert 0 <= token < len(logits)
    if temperature < 1:
        assert token == int(logits.argmax())


def test_a_low_temperature_tends_to_greedy() -> None:
    drawn = draw(some_logits(), SamplingParams(temperature=0.001), [], 0, 100)
    assert drawn == {int(some_logits().argmax()): 100}


def test_random_numbers_belong_to_seed_and_position_and_are_exponential() -> None:
    numbers = [random_numbers(7, position, 0, 2).tolist() for position in range(4000)]
    assert numbers == [random_numbers(7, position, 0, 2).tolist() for position in range(4000)]
    assert random_numbers(7, 5, 3, 9)[:2].tolist() == random_numbers(7, 5, 3, 2).tolist()
    tenths = Counter(int(10 * math.exp(-number)) for pair in numbers for number in pair)
    assert all(abs(count - 800) < 140 for count in tenths.values())
    assert random_numbers(2**64 - 1, 10**6, 600, 1)[0] > 0


def test_neighbouring_seeds_positions_and_groups_do_not_share_numbers() -> None:
    numbers = [
        number
        for seed in range(10)
        for position in range(10)
        for group in range(10)
        for number in random_numbers(seed, position, group, 8)
    ]
    assert len(set(numbers)) == 8000


def test_numbers_that_are_rounded_otherwise_give_the_same_token() -> None:
    """As those of a pass of another width: also where most is on tokens that are rare one by one."""
    dice = np.random.default_rng(1)
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.95)):
        different = 0
        for seed in range(500):
            logits = dice.standard_normal(49_152).astype(np.float32) * 3
            rounded = logits + dice.standard_normal(49_152).astype(np.float32) * np.float32(3e-5)
            first, second = (
                choose_token(one, params, history=EMPTY, reply_start=0, seed=seed)
                for one in (logits, rounded)
            )
            different += first != second
        assert different <= 1


def test_the_draw_depends_on_the_position_and_not_on_the_tokens_before() -> None:
    params, logits = SamplingParams(temperature=1.0), some_logits(1000)

    def at(history: list[int]) -> int:
        return choose_token(
            logits, params, history=np.array(history, np.int64), reply_start=0, seed=5
        )

    assert at([1, 2, 3]) == at([4, 5, 6])
    assert len({at([0] * length) for length in range(50)}) > 25


def test_parameters_that_are_off_change_nothing() -> None:
    base = SamplingParams(temperature=1.0)
    off = replace(base, top_k=len(some_logits()), min_p=0.0, top_p=1.0, repetition_penalty=1.0)
    assert draw(some_logits(), base, [1, 2], 0, 200) == draw(some_logits(), off, [1, 2], 0, 200)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 511, 512, 513, 49_152, 151_936])
def test_the_last_and_the_first_of_a_block_are_drawn_as_often_as_they_should(size: int) -> None:
    """Of as many likely tokens as there are borders, each as often as the others."""
    borders = sorted({0, size - 1} | {one for one in (255, 256, 511, 512) if one < size})
    logits = np.full(size, -40, np.float32)
    logits[borders] = 0
    drawn = draw(logits, SamplingParams(temperature=1.0), [], 0, 300)
    expected = 300 / len(borders)
    assert sorted(drawn) == borders
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in drawn.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"top_p": 0.9},
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ({}, {"top_k": 500}, {"min_p": 1e-3}, {"presence_penalty": 2.0})
        ),
    ],
    ids=str,
)
def test_draws_from_a_large_vocabulary_pass_a_chi_square_test(case: dict[str, Any]) -> None:
    """Classes of tokens with twenty expected draws each."""
    size, draws = 8000, 4000
    random = np.random.default_rng(5)
    logits = (-1.1 * np.log(random.permutation(size) + 1)).astype(np.float32)
    params = SamplingParams(**{"temperature": 1.0, **case})
    history = [int(logits.argmax()), 3, 3]
    expected = plain_distribution(logits, params, history, 0)
    drawn = draw(logits, params, history, 0, draws)
    assert set(drawn) <= set(expected)
    share, seen, statistic, classes = 0.0, 0, 0.0, 0
    for token, probability in expected.items():
        share, seen = share + probability, seen + drawn[token]
        if share * draws >= 20:
            statistic += (seen - share * draws) ** 2 / (share * draws)
            share, seen, classes = 0.0, 0, classes + 1
    assert classes > 50
    # Its mean is the number of classes; seven standard deviations, with fixed seeds.
    assert statistic < classes + 7 * math.sqrt(2 * classes)


@pytest.mark.parametrize("place", [0, 255, 256, 511, 512, 999])
def test_what_has_no_weight_is_never_drawn_at_the_edge_of_a_block(place: int) -> None:
    bans = dict.fromkeys(set(range(1000)) - {place}, -math.inf)
    params = SamplingParams(temperature=1e30, logit_bias=bans)
    assert draw(some_logits(1000), params, [], 0, 50) == {place: 50}


@given(
    values=st.lists(st.integers(0, 6), min_size=1, max_size=900),
    count=st.integers(0, 1000),
)
def test_the_most_likely_are_those_that_sorting_gives(values: list[int], count: int) -> None:
    scores = np.array(values, np.float32)
    assert (
        most_likely(scores, count).tolist()
        == (sorted(range(len(values)), key=lambda place: (-values[place], place))[:count])
    )

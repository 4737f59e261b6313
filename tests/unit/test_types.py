"""Parameters are checked where they are made; values that everybody shares behave as values."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recollect.errors import InvalidParameterError
from recollect.types import (
    Grammar,
    SamplingParams,
    Usage,
    common_prefix_length,
    recommended,
    tokens_per_second,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [1, None, 10**6]),
        ("temperature", [0, 0.7, 100.0]),
        ("top_k", [0, 1, 10**9]),
        ("top_p", [1e-9, 0.5, 1]),
        ("min_p", [0, 0.5, 1]),
        ("repetition_penalty", [0.5, 1, 2]),
        ("presence_penalty", [-2, 0, 2]),
        ("frequency_penalty", [-2, 0, 2]),
        ("logit_bias", [{}, {3: -INF}, {0: 5}]),
        ("seed", [None, 0, 2**64 - 1]),
        ("stop", [(), ("a",), ["a", "b"], ("a" * 128,) * 64]),
    ],
)
def test_a_value_in_range_is_taken(name: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1]),
        ("temperature", [-0.1, NAN, INF]),
        ("top_k", [-1]),
        ("top_p", [0, -1, 1.1, NAN]),
        ("min_p", [-0.1, 1.1, NAN]),
        ("repetition_penalty", [0, -1, NAN, INF]),
        ("presence_penalty", [NAN, INF, -INF]),
        ("frequency_penalty", [NAN, INF, -INF]),
        ("logit_bias", [{3: NAN}, {3: INF}]),
        ("seed", [-1, 2**64]),
        ("stop", ["a", ("",), ("a", ""), ("a",) * 65, ("a" * 8193,)]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidParameterError, match=name):
            SamplingParams(**{name: value})


def test_a_refusal_does_not_repeat_what_was_too_much() -> None:
    for stop in (("abc",) * 100_000, ("a" * 100_000,)):
        with pytest.raises(InvalidParameterError) as refused:
            SamplingParams(stop=stop)
        assert len(str(refused.value)) < 200


def test_parameters_cannot_be_changed_after_the_check() -> None:
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.temperature = -1  # type: ignore[misc]


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_the_common_prefix_is_the_longest_that_both_begin_with(a: list[int], b: list[int]) -> None:
    length = common_prefix_length(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


def test_a_rate_of_nothing_is_none() -> None:
    assert tokens_per_second(10, 2.0) == 5.0
    assert tokens_per_second(0, 2.0) is None
    assert tokens_per_second(10, 0.0) is None
    assert tokens_per_second(-1, 1.0) is None


def test_usage_is_plain_json_values() -> None:
    usage = Usage(
        prompt_tokens=3,
        reused_tokens=2,
        computed_tokens=1,
        generated_tokens=4,
        ttft_s=0.5,
        prefill_tps=2.0,
        decode_tps=None,
        reason="evicted",
        difference="5 tokens",
    )
    assert usage.to_dict() == {
        "prompt_tokens": 3,
        "reused_tokens": 2,
        "restored_tokens": 0,
        "computed_tokens": 1,
        "read_ahead_tokens": 0,
        "generated_tokens": 4,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "reasoning_tokens": 0,
        "ttft_s": 0.5,
        "prefill_tps": 2.0,
        "decode_tps": None,
        "reason": "evicted",
        "difference": "5 tokens",
        "lost_tokens": 0,
        "sampling": None,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"stop": ("",)},
        {"seed": -1},
        {"logprobs": 99},
        {"ignore_eos": True, "grammar": Grammar.json_object()},
    ],
)
def test_what_is_wrong_is_told_without_words_of_python(wrong: dict[str, Any]) -> None:
    """Clients of the server read these sentences, and know no None and no tuples."""
    with pytest.raises(InvalidParameterError) as refused:
        SamplingParams(**wrong)
    assert next(iter(wrong)) in str(refused.value)
    for word in ("None", "True", "False", "**", "('"):
        assert word not in str(refused.value)


@pytest.mark.parametrize(
    ("said", "recommended_"),
    [
        ({}, {}),
        ({"temperature": None, "top_p": None}, {}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1},
            {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1},
        ),
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, {}),
        ({"temperature": 0.6, "top_k": 50.0, "min_p": "0.1"}, {"temperature": 0.6, "top_k": 50}),
        ({"temperature": 0.6, "top_p": 7, "top_k": -1, "min_p": True}, {"temperature": 0.6}),
        ({"temperature": float("nan"), "top_k": float("inf")}, {}),
        ({"temperature": 10**400}, {}),
        ({"temperature": 0.5, "top_k": float("inf"), "top_p": 10**400}, {"temperature": 0.5}),
        ({"temperature": 0.699999988079071}, {"temperature": 0.7}),
    ],
)
def test_what_makers_recommend_is_taken_where_it_can_be(
    said: dict[str, Any], recommended_: dict[str, float]
) -> None:
    assert recommended(said) == recommended_


def test_what_somebody_asks_for_comes_before_what_makers_recommend() -> None:
    makers = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    plain = SamplingParams()
    assert plain.with_recommended(makers, ()) == SamplingParams(
        temperature=0.7, top_k=20, repetition_penalty=1.1
    )
    assert plain.with_recommended(makers, {"temperature"}) == plain, "0 is greedy in all"
    warm = SamplingParams(temperature=0.3, max_tokens=5)
    assert warm.with_recommended(makers, {"temperature"}) == SamplingParams(
        temperature=0.3, top_k=20, repetition_penalty=1.1, max_tokens=5
    )
    assert plain.with_recommended(makers, {"repetition_penalty"}).repetition_penalty == 1.0


def test_what_is_told_of_the_sampling_gives_the_reply_again() -> None:
    params = SamplingParams(temperature=0.5, top_p=0.9)
    assert params.told(7) == {"temperature": 0.5, "top_p": 0.9, "seed": 7}
    assert SamplingParams(top_p=0.9).told(7) is None
    assert SamplingParams(frequency_penalty=0.5, top_k=3).told(7) == {"frequency_penalty": 0.5}

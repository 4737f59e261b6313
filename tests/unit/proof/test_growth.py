"""The growth curve: every turn both ways over the same tokens."""

import pytest

from recollect.conversation.model import Model
from recollect.proof.bench import BenchConfig, GrowthSample, run_growth, summarize_growth


@pytest.fixture
def samples(model: Model) -> list[GrowthSample]:
    config = BenchConfig(
        input_tokens=1,
        output_tokens=1,
        input2_tokens=20,
        output2_tokens=8,
        growth_turns=3,
        growth_iterations=2,
    )
    return run_growth(model, config, "some text")


def test_with_reuse_a_turn_computes_what_is_new_however_long_the_history(
    samples: list[GrowthSample],
) -> None:
    assert [sample.reuse.computed_tokens for sample in samples[:3]] == [20, 21, 21]


def test_without_reuse_a_turn_computes_the_whole_history(samples: list[GrowthSample]) -> None:
    assert [sample.without.computed_tokens for sample in samples[:3]] == [20, 48, 76]


def test_both_ways_have_the_same_prompt(samples: list[GrowthSample]) -> None:
    for sample in samples:
        assert sample.without.prompt_tokens == sample.reuse.prompt_tokens


def test_conversations_are_summarized_turn_by_turn(samples: list[GrowthSample]) -> None:
    turns = summarize_growth(samples)
    assert [(turn.turn, turn.prompt_tokens) for turn in turns] == [(1, 20), (2, 48), (3, 76)]
    assert {turn.reuse_latency_s.count for turn in turns} == {2}


def test_no_turns_give_no_curve(model: Model) -> None:
    assert (
        run_growth(model, BenchConfig(growth_turns=0, input_tokens=9, input2_tokens=9), "a") == []
    )

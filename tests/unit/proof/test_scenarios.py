"""Scenarios: reuse changes nothing where KV is right, and shows where it is wrong."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from recollect.conversation.model import Model
from recollect.proof.scenarios import (
    Expectation,
    Fact,
    Scenario,
    Turn,
    load_scenarios,
    play,
    play_all,
)

SHORT = Scenario("short", ("One?", "Two?", "Three?"), {1: Expectation(("a|[^a]",))})


@pytest.fixture
def turns(model: Model) -> tuple[Turn, ...]:
    return play(model, SHORT).turns


def test_the_package_brings_six_scenarios_with_facts() -> None:
    scenarios = load_scenarios()
    assert len(scenarios) == 6
    assert scenarios[0].expected[2].patterns == ("Berlin", "piano")
    assert scenarios[1].expected[1] == Expectation(bullets=3)
    for scenario in scenarios:
        assert all(0 <= turn < len(scenario.prompts) for turn in scenario.expected)


@pytest.mark.slow
def test_reuse_and_rewinding_change_no_token(turns: tuple[Turn, ...]) -> None:
    assert [turn.changed_by_reuse for turn in turns] == [(), (), ()]


@pytest.mark.slow
def test_the_full_prefill_reuses_nothing_and_computes_the_same_prompt(
    turns: tuple[Turn, ...],
) -> None:
    for turn in turns:
        assert turn.full.usage.reused_tokens == 0
        assert turn.full.usage.computed_tokens == turn.reuse.usage.prompt_tokens
        assert turn.full.usage.prompt_tokens == turn.reuse.usage.prompt_tokens


@pytest.mark.slow
def test_reuse_computes_what_is_new_alone(turns: tuple[Turn, ...]) -> None:
    for before, turn in pairwise(turns):
        # The last token of a reply has no KV when it ends. Idle work adds it, and what the template
        # puts before the next message, if there was time for that.
        known = before.reuse.usage.prompt_tokens + len(before.reuse.token_ids)
        idle = len(
            "<|im_end|>"[:1] + "\n" + "<|im_start|>"[:1] + "user\n"
        )  # special tokens are one
        assert turn.reuse.usage.reused_tokens in {known, known - 1, known + idle}


@pytest.mark.slow
def test_only_the_second_turn_is_asked_again(turns: tuple[Turn, ...]) -> None:
    assert [turn.rewound is not None for turn in turns] == [False, True, False]


@pytest.mark.slow
def test_facts_are_graded_in_every_mode(turns: tuple[Turn, ...]) -> None:
    second = turns[1]
    assert second.rewound is not None
    assert second.reuse.facts == second.full.facts == second.rewound.facts
    assert second.full.facts == (Fact("a|[^a]", True),)
    assert second.model_wrong == ()


@pytest.mark.slow
def test_what_the_model_gets_wrong_is_told_apart_from_what_reuse_changes(
    turns: tuple[Turn, ...],
) -> None:
    turn = turns[1]
    missed = replace(turn.full, facts=(Fact("piano", False),))
    other = replace(turn.full, token_ids=(*turn.full.token_ids[:3], 7, 8))
    assert replace(turn, full=missed).model_wrong == ("piano",)
    changed = replace(turn, reuse=other)
    assert changed.model_wrong == ()
    assert changed.changed_by_reuse == ("reuse",)
    assert changed.first_difference("reuse") == 3
    assert changed.first_difference("rewound") is None


@pytest.mark.slow
def test_a_planted_hole_in_the_kv_is_a_change(model: Model, plant_hole: Callable[[], None]) -> None:
    plant_hole()
    turns = play(model, SHORT).turns
    assert turns[0].changed_by_reuse == ()
    assert "reuse" in turns[1].changed_by_reuse
    assert turns[1].first_difference("reuse") is not None


@pytest.mark.slow
def test_play_all_reports_progress_and_every_scenario(model: Model) -> None:
    seen: list[tuple[str, int, int | None]] = []
    results = list(play_all(model, (SHORT, SHORT), progress=lambda *step: seen.append(step)))
    assert [result.name for result in results] == ["short", "short"]
    assert seen == [("short", 0, 2), ("short", 1, 2)]


@pytest.mark.slow
def test_playing_gives_all_blocks_back(model: Model) -> None:
    play(model, SHORT)
    assert model.engine.pool.used_blocks == len(model.engine.cache)

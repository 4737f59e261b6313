"""The two-turn benchmark: what is run, what is counted, and what the saving is a share of."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.conversation.model import Model
from recollect.errors import (
    ConfigError,
    ContextFullError,
    InvalidParameterError,
    OutOfBlocksError,
)
from recollect.proof.bench import (
    BenchConfig,
    Iteration,
    bench_text,
    check_room,
    cut_to_length,
    run_iterations,
    summarize_iterations,
)

SMALL = BenchConfig(
    input_tokens=40,
    output_tokens=12,
    input2_tokens=20,
    output2_tokens=8,
    iterations=3,
    growth_turns=4,
    growth_iterations=2,
)


@pytest.fixture
def iterations(model: Model) -> list[Iteration]:
    return run_iterations(model, SMALL, "some text")


def test_the_saving_is_a_share_of_the_prefill_of_what_was_reused(
    iteration: Callable[..., Iteration],
) -> None:
    """Medians of (10 - 1, 12 - 2, 11 - 1.5) = 9.5 over 10."""
    warm_up = iteration(100.0, 90.0, 1.0)
    summary = summarize_iterations(
        [
            warm_up,
            iteration(10.0, 1.0, 10.0),
            iteration(12.0, 2.0, 10.0),
            iteration(11.0, 1.5, 12.0),
        ]
    )
    assert summary.saving_s.median == pytest.approx(9.5)
    assert summary.ideal_s.median == pytest.approx(10.0)
    assert summary.share_of_ideal == pytest.approx(0.95)
    assert summary.ttft_share_of_ideal == pytest.approx(0.95)
    assert summary.ttft_ratio == pytest.approx(1.5 / 11)
    assert summary.without_second.latency_s.median == pytest.approx(12.0)
    assert summary.without_second.energy_j is None


def test_the_first_iteration_does_not_count(iteration: Callable[..., Iteration]) -> None:
    summary = summarize_iterations([iteration(99.0, 99.0, 99.0), iteration(3.0, 1.0, 2.0)])
    assert summary.ideal_s.count == 1
    assert summary.share_of_ideal == pytest.approx(1.0)


def test_reuse_computes_the_second_prompt_and_the_token_that_had_no_kv(
    iterations: list[Iteration],
) -> None:
    for each in iterations:
        second = each.reuse.second
        assert second.prompt_tokens == 40 + 12 + 20
        assert second.computed_tokens == 20 + 1
        assert second.reused_tokens == each.ideal_tokens == 40 + 12 - 1


def test_without_reuse_everything_is_computed_again(iterations: list[Iteration]) -> None:
    for each in iterations:
        assert each.without.first.computed_tokens == each.reuse.first.computed_tokens == 40
        assert each.without.second.prompt_tokens == each.without.second.computed_tokens == 72


def test_responses_have_their_fixed_lengths(iterations: list[Iteration]) -> None:
    for each in iterations:
        for case in (each.without, each.reuse):
            assert case.first.generated_tokens == 12
            assert case.second.generated_tokens == 8


def test_the_cases_take_turns_in_going_first(iterations: list[Iteration]) -> None:
    assert [each.reuse_went_first for each in iterations] == [False, True, False]


def test_all_blocks_are_given_back(model: Model) -> None:
    run_iterations(model, SMALL, "some text")
    assert model.engine.pool.used_blocks == 0


def test_a_context_that_is_too_small_is_said_before_any_work(
    make_model: Callable[..., Model],
) -> None:
    small = make_model(context_length=64)
    with pytest.raises(ContextFullError) as caught:
        run_iterations(small, SMALL, "text")
    assert (caught.value.needed, caught.value.limit) == (4 * 28, 64)
    assert small.engine.forward_passes == 0


def test_kv_memory_that_is_too_small_is_said_before_any_work(
    make_model: Callable[..., Model],
) -> None:
    small = make_model(num_blocks=27)
    with pytest.raises(OutOfBlocksError):
        check_room(small, SMALL)
    check_room(make_model(num_blocks=28), SMALL)


@pytest.mark.parametrize(
    "wrong", [{"input_tokens": 0}, {"output2_tokens": -1}, {"iterations": 1}, {"growth_turns": -1}]
)
def test_lengths_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidParameterError, match="at least"):
        BenchConfig(**wrong)


def test_a_text_is_repeated_to_the_length_wanted(model: Model) -> None:
    assert cut_to_length(model, "abc", 7) == [97, 98, 99, 97, 98, 99, 97]
    assert cut_to_length(model, "abc", 2) == [97, 98]
    with pytest.raises(InvalidParameterError, match="empty"):
        cut_to_length(model, "", 2)


def test_the_package_brings_a_text() -> None:
    assert len(bench_text().split()) > 1000


def test_a_text_file_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        bench_text(tmp_path / "nothing.txt")
    (tmp_path / "some.txt").write_text("words", encoding="utf-8")
    assert bench_text(tmp_path / "some.txt") == "words"

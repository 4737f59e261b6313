"""The rewind test passes where KV is right and fails where a hole was planted."""

from collections.abc import Callable

import pytest

from recollect.conversation.model import Model
from recollect.proof.scenarios import first_difference, run_rewind_test


def test_the_answer_is_the_same_after_a_rewind_and_from_a_fresh_prefill(model: Model) -> None:
    result = run_rewind_test(model)
    assert result.answer
    assert result.answer == result.after_rewind == result.fresh
    assert result.rewind_differs_at is None
    assert result.fresh_differs_at is None


@pytest.mark.slow
def test_neither_a_rewind_nor_the_question_asked_again_computes_anything(model: Model) -> None:
    """Whether it is right is seen beside a fresh prefill: see the planted hole."""
    result = run_rewind_test(model)
    assert result.rewind_computed_tokens == 0
    assert result.again_computed_tokens == 0


def test_a_planted_hole_fails_against_the_fresh_prefill(
    model: Model, plant_hole: Callable[[], None]
) -> None:
    plant_hole()
    assert run_rewind_test(model).fresh_differs_at is not None


def test_a_template_that_rewrites_its_past_is_tested_all_the_same(
    make_model: Callable[..., Model],
) -> None:
    """Here only the last message is ever shown."""
    template = "{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}"
    result = run_rewind_test(make_model(template=template))
    assert result.answer == result.after_rewind == result.fresh


def test_blocks_are_given_back(model: Model) -> None:
    run_rewind_test(model)
    assert model.engine.pool.used_blocks == len(model.engine.cache)


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1, 2, 3), 2), ((), (1,), 0)],
)
def test_the_first_different_token_is_named(
    first: tuple[int, ...], second: tuple[int, ...], place: int | None
) -> None:
    assert first_difference(first, second) == place

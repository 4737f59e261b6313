"""The proofs on the default model: reuse is right with real weights, and saves what it can."""

from collections.abc import Iterator

import pytest

import recollect
from forking import measure_forks
from recollect.conversation.model import Model
from recollect.proof.bench import BenchConfig, run_iterations
from recollect.proof.scenarios import load_scenarios, play, run_rewind_test

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with recollect.load("smollm2", profile="exact", kv_disk=0) as model:
        yield model


def test_a_rewound_conversation_answers_as_a_fresh_prefill_does(exact: Model) -> None:
    result = run_rewind_test(exact)
    assert len(result.answer) > 5
    assert result.answer == result.after_rewind == result.fresh
    assert result.rewind_computed_tokens == 0


def test_reuse_changes_no_token_of_a_scenario(exact: Model) -> None:
    """The shortest; `recollect scenarios --profile exact` plays all six."""
    shortest = min(load_scenarios(), key=lambda scenario: sum(map(len, scenario.prompts)))
    turns = play(exact, shortest).turns
    assert [turn.changed_by_reuse for turn in turns] == [()] * len(turns)
    assert turns[-1].reuse.usage.reused_tokens > 0


@pytest.mark.slow
def test_a_turn_on_reused_tokens_begins_several_times_sooner() -> None:
    """Half of what is promised for a quiet machine, because tests run on busy ones."""
    config = BenchConfig(
        input_tokens=1024, output_tokens=8, input2_tokens=64, output2_tokens=4, iterations=2
    )
    with recollect.load("smollm2", profile="fast", kv_disk=0) as model:
        _, counted = run_iterations(model, config, "The harbour lies at the end of a long bay.")
        assert counted.reuse.second.computed_tokens == 64 + 1
        assert counted.reuse.second.ttft_s < counted.without.second.ttft_s / 2


def test_forks_run_no_forward_pass_and_share_their_trunk() -> None:
    with recollect.load("smollm2", profile="fast", kv_disk=0) as model:
        result = measure_forks(model, [number % 1000 for number in range(600)], trunk_tokens=512)
        assert result.forward_passes == 0
        assert result.fork_blocks <= 512 // 32 + result.fork_count

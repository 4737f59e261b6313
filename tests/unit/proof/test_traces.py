"""Claims about `benchmarks/traces.py`, and what it finds of the engine on the reference runtime."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import recollect
from recollect.engine.sequence import Sequence
from traces import TRACES, Trace, run_trace


@pytest.fixture
def model(tmp_path: Path) -> Iterator[recollect.Model]:
    with recollect.load("reference", home=tmp_path, kv_memory=50_000_000) as loaded:
        yield loaded


@pytest.mark.slow
@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_nothing_is_computed_twice(model: recollect.Model, trace: Trace) -> None:
    result = run_trace(model, trace)
    assert result.recomputed_tokens == 0
    assert result.computed_tokens + result.reused_tokens == result.prompt_tokens
    assert model.engine.cache.evicted_blocks == 0
    model.engine.check()


@pytest.mark.slow
def test_a_system_prompt_of_eight_sessions_is_held_once(model: recollect.Model) -> None:
    trace = next(trace for trace in TRACES if trace.name == "8 on one system prompt")
    result = run_trace(model, trace)
    shared = result.prompt_tokens // result.requests  # nearly all of each prompt is the shared part
    assert result.computed_tokens < 2 * shared
    assert result.blocks_held * model.engine.block_size < 2 * shared


@pytest.mark.slow
def test_a_cache_that_finds_nothing_shows(
    model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sequence, "reuse", lambda self: 0)
    result = run_trace(model, TRACES[0])
    assert result.recomputed_tokens > result.prompt_tokens // 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_trace(model: recollect.Model) -> None:
    first, second = (run_trace(model, TRACES[0], seed=5) for _ in range(2))
    assert first.prompt_tokens == second.prompt_tokens
    assert run_trace(model, TRACES[0], seed=6).prompt_tokens != first.prompt_tokens

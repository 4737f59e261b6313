"""Claims about `benchmarks/default_model.py`: it counts what a model does, and says it in a table."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import recollect
from default_model import lengths, scenarios, start_of, table, times
from first_replies import PROMPTS
from recollect.proof.scenarios import load_scenarios
from recollect.types import SamplingParams


@pytest.fixture
def model(tmp_path: Path) -> Iterator[recollect.Model]:
    with recollect.load("reference", home=tmp_path, kv_memory=50_000_000) as loaded:
        yield loaded


def test_what_has_to_be_fetched_takes_as_long_as_the_speed_says() -> None:
    assert start_of("smollm2", 10.0) == {"fetch_bytes": 98_362_432, "fetch_s": 9.8362432}


@pytest.mark.slow
def test_replies_are_counted_and_timed(
    model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = SamplingParams(ignore_eos=True)
    monkeypatch.setattr(model, "sampling", endless)
    found = lengths(model, 2, 2)
    assert (found["prompts"], found["long_replies"], found["median_tokens"]) == (2, 2, 2048)
    assert [reply["prompt"] for reply in found["replies"]] == PROMPTS[:2]
    timed = times(model, PROMPTS[:2])
    assert timed["first_token_s"] > 0
    assert timed["tokens_per_s"] > 0


@pytest.mark.slow
def test_scenarios_of_a_model_that_knows_nothing_are_not_passed(model: recollect.Model) -> None:
    found = scenarios(model, 2)
    assert (found["scenarios"], found["passed"], found["facts_right"]) == (2, 0, 0)
    expected = [one for one in load_scenarios()[:2] for _ in one.expected]
    assert found["facts"] >= len(expected)


def test_the_table_says_who_can_begin_in_time(model: recollect.Model) -> None:
    one = {
        **start_of("smollm2", 5.0),
        "ready_s": 10.0,
        **times(model, []),
        **lengths(model, 0, 1),
        **scenarios(model, 0),
        "peak_bytes": 10**9,
        "converting_peak_bytes": 2 * 10**9,
    }
    found = {
        name: json.loads(json.dumps(one)) | {"start_s": start}
        for name, start in (("a", 30.0), ("b", 121.0))
    }
    rows = {
        line.strip().partition("  ")[0]: line.split() for line in table(found, 5.0).splitlines()
    }
    assert rows["within 120 s"][-2:] == ["yes", "no"]
    assert rows["to fetch, MB"][-2:] == ["98", "98"]
    assert rows["peak memory, MB"][-2:] == ["1,000", "1,000"]

"""Results for people say what was measured, and JSON holds everything."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from recollect.conversation.model import Model
from recollect.errors import ConfigError
from recollect.proof import report
from recollect.proof.bench import Iteration, Unreadable, summarize_iterations
from recollect.proof.report import machine_card


@pytest.fixture
def iterations(iteration: Callable[..., Iteration]) -> list[Iteration]:
    return [iteration(9.0, 9.0, 9.0), iteration(10.0, 1.0, 10.0), iteration(10.0, 1.0, 10.0)]


def test_the_saving_is_said_in_seconds_and_as_a_share(iterations: list[Iteration]) -> None:
    text = "\n".join(report.saving_lines(summarize_iterations(iterations), iterations))
    assert "2 iterations; one more went before and was discarded" in text
    assert "90 of 100 prompt tokens reused, 10 computed; without: 100 computed" in text
    assert "9.000 s (sd 0.000); ideal (prefill of 90 tokens): 10.000 s" in text
    assert "share of the ideal: 90.0%" in text
    assert "first-token time is 0.100 of that without reuse" in text
    text = report.saving_lines(summarize_iterations(iterations[:2]), iterations[:2])[0]
    assert text.startswith("1 iteration; one more went before")


def test_the_table_fits_a_terminal_of_80_columns(iterations: list[Iteration]) -> None:
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(report.responses_table(summarize_iterations(iterations)))
    assert "…" not in captured.get()
    assert "with reuse, 2" in captured.get()


def test_energy_that_cannot_be_read_is_said_with_its_reason(iterations: list[Iteration]) -> None:
    lines = report.energy_lines(summarize_iterations(iterations), Unreadable("there is no counter"))
    assert lines == ["Energy: cannot be read here, because there is no counter."]


def test_json_holds_all_samples(iterations: list[Iteration], model: Model, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    report.write_json(path, machine=machine_card(model), iterations=iterations)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["machine"]["model"] == "reference"
    assert len(result["iterations"]) == 3
    assert result["iterations"][1]["without"]["second"]["ttft_s"] == 10.0


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        report.require_writable(tmp_path / "nowhere" / "result.json")
    with pytest.raises(ConfigError, match="is a folder"):
        report.require_writable(tmp_path)
    report.require_writable(tmp_path / "result.json")


def test_the_machine_card_names_machine_versions_and_kv(model: Model) -> None:
    text = "\n".join(report.card_lines(machine_card(model)))
    for part in ("CPU", "memory", "openvino", "profile exact", "bytes per token", "reference"):
        assert part in text

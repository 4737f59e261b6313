"""The proofs as commands: what they print, write, and return."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from recollect.cli import prove
from recollect.errors import ContextFullError, InvalidParameterError, OutOfBlocksError
from recollect.proof.reference_model import Outcome
from recollect.proof.scenarios import ScenarioResult
from recollect.proof.verify import FileReport

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    runner = CliRunner()

    def invoke(command: str, *arguments: str) -> Result:
        return runner.invoke(prove.app, [command, "--model", "reference", *arguments])

    return invoke


SHORT = ("--input", "50", "--output", "9", "--input2", "20", "--output2", "5", "--turns", "3")


def test_rewind_test_prints_ok(run: Run) -> None:
    result = run("rewind-test")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "rewind test OK"


def test_rewind_test_fails_and_names_the_first_different_token(
    run: Run, plant_hole: Callable[[], None]
) -> None:
    plant_hole()
    result = run("rewind-test")
    assert result.exit_code == 1
    assert "a fresh prefill differs from A2 at token" in result.stdout
    assert result.stdout.splitlines()[-1] == "rewind test FAILED"


@pytest.mark.slow
def test_scenarios_say_apart_what_the_model_and_what_reuse_did(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "scenarios.json"
    result = run("scenarios", "--profile", "exact", "--json", str(path))
    assert result.exit_code == 0
    assert "The model got" in result.stdout
    assert "Reuse changed 0 of" in result.stdout
    written = json.loads(path.read_text(encoding="utf-8"))
    assert len(written["scenarios"]) == 6
    assert written["summary"]["changed_by_reuse"] == []
    assert written["summary"]["facts"] == 16
    turn = written["scenarios"][0]["turns"][1]
    assert turn["rewound"]["token_ids"] == turn["full"]["token_ids"]


@pytest.mark.slow
def test_scenarios_fail_in_exact_where_reuse_changed_something(
    run: Run, plant_hole: Callable[[], None]
) -> None:
    plant_hole()
    result = run("scenarios", "--profile", "exact")
    assert result.exit_code == 1
    assert "reuse differs at token" in result.stdout


@pytest.mark.slow
def test_scenarios_report_a_change_in_other_profiles_with_a_remark(
    run: Run, plant_hole: Callable[[], None]
) -> None:
    plant_hole()
    result = run("scenarios", "--profile", "fast")
    assert result.exit_code == 0
    assert "--profile exact" in " ".join(result.stdout.split())


def test_bench_prints_a_card_and_a_table_and_writes_all_samples(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = run("bench", *SHORT, "--iterations", "3", "--json", str(path))
    assert result.exit_code == 0
    assert result.stdout.startswith("CPU")
    assert "share of the ideal" in result.stdout
    assert "Energy" in result.stdout
    assert "iteration 1 of 3" in result.stderr
    written = json.loads(path.read_text(encoding="utf-8"))
    assert len(written["iterations"]) == 3
    assert written["summary"]["saving_s"]["count"] == 2
    assert len(written["growth"]) == 3


def test_bench_without_a_growth_curve(run: Run) -> None:
    result = run("bench", *SHORT[:-1], "0", "--iterations", "2")
    assert result.exit_code == 0
    assert "turn" not in result.stdout.split("Energy")[1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(("--input", "9000"), ContextFullError), (("--iterations", "1"), InvalidParameterError)],
)
def test_bench_refuses_what_cannot_be_run(
    run: Run, arguments: tuple[str, str], error: type[Exception]
) -> None:
    result = run("bench", *arguments)
    assert isinstance(result.exception, error)
    assert "iteration 1" not in result.stderr


def test_no_result_is_a_summary_of_nothing() -> None:
    nothing: list[ScenarioResult] = []
    assert prove.summary(nothing)["facts"] == 0


@pytest.mark.slow
def test_verify_prints_what_it_did_and_passes(run: Run, tmp_path: Path) -> None:
    result = run("verify", "--operations", "40", "--json", str(tmp_path / "report.json"))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "reference · against its file"
    assert lines[1].startswith("Model against its file: NOT COMPARED: ")
    assert lines[3] == "reference · exact · 40 operations · seed 0"
    assert lines[-2:] == [
        "Reuse: PASS",
        "NOT COMPARED  (model against its file: NOT COMPARED; reuse: PASS)",
    ]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] is None, "no proof, and no failure"
    assert written["file"]["outcome"] == "NOT COMPARED"
    assert written["reuse"]["passed"] is True


@pytest.mark.slow
def test_verify_fails_on_one_token_without_kv(run: Run, plant_hole: Callable[[], None]) -> None:
    plant_hole()
    result = run("verify", "--operations", "40")
    assert result.exit_code == 1
    assert "Reuse: FAIL" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAIL  (")


def a_report(outcome: Outcome, largest: float = 0.5) -> FileReport:
    return FileReport(
        outcome=outcome,
        reason="a logit is 0.5 off" if outcome == "FAIL" else "",
        file="tiny.gguf",
        architecture="llama",
        tensor_types={"Q4_1": 4096},
        tokens=192,
        places=56,
        largest=largest,
        limit=1e-3,
    )


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[FileReport], None]:
    """Have the comparison with the file come out like this."""
    return lambda report: monkeypatch.setattr(prove, "compare", lambda _model: report)


def test_a_model_that_fails_against_its_file_fails_as_a_whole(
    run: Run, found: Callable[[FileReport], None], tmp_path: Path
) -> None:
    """Whatever reads the JSON or the last line sees it, and not the exit status alone."""
    found(a_report("FAIL"))
    result = run("verify", "-n", "5", "--json", str(tmp_path / "report.json"))
    assert result.exit_code == 1
    assert "Model against its file: FAIL: a logit is 0.5 off" in result.stdout
    assert "Reuse: PASS" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last == "FAIL  (model against its file: FAIL; reuse: PASS)"
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] is False
    assert written["reuse"]["passed"] is True


def test_numbers_that_are_none_are_null_in_json(
    run: Run, found: Callable[[FileReport], None], tmp_path: Path
) -> None:
    found(a_report("FAIL", largest=math.nan))
    assert run("verify", "-n", "1", "--json", str(tmp_path / "report.json")).exit_code == 1
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["file"]["largest"] is None


def test_what_is_known_is_written_where_the_second_part_is_cut_off(
    run: Run,
    found: Callable[[FileReport], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found(a_report("PASS"))
    refused = OutOfBlocksError(needed=2, free=1, total=3)
    monkeypatch.setattr("recollect.proof.verify.verify", lambda *_, **__: _raise(refused))
    result = run("verify", "--json", str(tmp_path / "report.json"))
    assert result.exception is refused
    assert "Model against its file: PASS" in result.stdout
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["passed"], written["reuse"]) == (False, None)
    assert written["file"]["outcome"] == "PASS"


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.slow
def test_one_operation_is_one_and_no_difference_is_nowhere(run: Run) -> None:
    result = run("verify", "-n", "1", "--no-model")
    assert result.exit_code == 0
    assert "reference · exact · 1 operation · seed 0" in result.stdout
    assert "(no operation differed)" in result.stdout
    assert result.stdout.splitlines()[-1] == "PASS  (model against its file: left out; reuse: PASS)"


def test_help_says_how_long_it_takes_and_what_json_does(run: Run) -> None:
    shown = " ".join(run("verify", "--help").stdout.replace("│", " ").split())
    assert "minutes" in shown
    assert "to FILE as JSON" in shown

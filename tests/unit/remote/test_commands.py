"""The proofs as commands with `--engine`: what they print, and what they cannot say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from recollect.cli import prove
from recollect.conversation.model import Model
from recollect.errors import ConfigError
from recollect.proof.bench import BenchConfig, bench_text, run_growth, run_iterations

BLOCK = 16
LENGTHS = ("--input", "90", "--output", "9", "--input2", "40", "--output2", "5", "--turns", "3")
SHORT = BenchConfig(
    input_tokens=90,
    output_tokens=9,
    input2_tokens=40,
    output2_tokens=5,
    iterations=3,
    growth_turns=3,
    growth_iterations=2,
)
MakeStub = Callable[..., tuple[Any, str]]
Load = Callable[..., Model]


@pytest.fixture(params=["vllm", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(command: str, engine: str, *arguments: str) -> Result:
    said = [command, "--model", "reference", "--engine", engine, *arguments]
    return CliRunner().invoke(prove.app, said)


@pytest.mark.few(1)
def test_bench_tells_times_and_tokens_of_an_engine_elsewhere_and_no_energy(
    kind: str, make_stub: MakeStub, tmp_path: Path
) -> None:
    _, url = make_stub(kind)
    path = tmp_path / "bench.json"
    result = run("bench", f"{kind}={url}", *LENGTHS, "--iterations", "3", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "energy: cannot be read here, because an engine elsewhere" in result.stdout.lower()
    assert "elsewhere: it computes, and has the KV" in result.stdout
    assert "profile" not in result.stdout
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["machine"]["kv_bytes_per_token"] is None
    assert written["machine"]["profile"] == "elsewhere"
    for one in written["iterations"]:
        without, reuse = one["without"]["second"], one["reuse"]["second"]
        assert without["prompt_tokens"] == without["computed_tokens"] == 90 + 9 + 40
        # What is found again, in whole blocks where the engine has such; the last token had no KV.
        found = (90 + 9 - 1) // BLOCK * BLOCK if kind == "vllm" else 90 + 9 - 1
        assert (reuse["reused_tokens"], reuse["computed_tokens"]) == (found, 139 - found)
        assert one["ideal_tokens"] == found
        for first in (one["without"]["first"], one["reuse"]["first"]):
            assert first["reused_tokens"] == 0, "of an earlier conversation nothing is found"


@pytest.mark.few(1)
def test_turns_of_a_conversation_that_grows_are_measured_both_ways(
    kind: str, make_stub: MakeStub, load: Load
) -> None:
    samples = run_growth(load(f"{kind}={make_stub(kind)[1]}"), SHORT, bench_text())
    assert [sample.turn for sample in samples] == [1, 2, 3] * 2
    for sample in samples:
        assert sample.without.reused_tokens == 0
        assert sample.without.prompt_tokens == sample.reuse.prompt_tokens == 45 * sample.turn - 5
        could = max(0, 45 * (sample.turn - 1) - 1)
        assert sample.reuse.reused_tokens == (could // BLOCK * BLOCK if kind == "vllm" else could)


@pytest.mark.slow
def test_what_was_evicted_meanwhile_is_told_and_not_measured(
    make_stub: MakeStub, load: Load
) -> None:
    """One slot holds one conversation: the other case takes it in between."""
    model = load(f"llama={make_stub('llama', slots=1)[1]}")
    assert len(run_iterations(model, SHORT, bench_text())) == 3
    with pytest.raises(ConfigError, match="--parallel 2"):
        run_growth(model, SHORT, bench_text())


@pytest.mark.slow
def test_prompts_below_a_block_are_told_to_be_too_short(make_stub: MakeStub, load: Load) -> None:
    model = load(f"vllm={make_stub()[1]}")
    config = BenchConfig(input_tokens=8, output_tokens=2, iterations=2, growth_turns=0)
    with pytest.raises(ConfigError, match="longer prompts"):
        run_iterations(model, config, bench_text())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["rewind-test", "scenarios"])
def test_the_other_proofs_claim_no_profile(command: str, kind: str, make_stub: MakeStub) -> None:
    _, url = make_stub(kind, slots=8, context=8192)
    result = run(command, f"{kind}={url}")
    assert result.exit_code == 0, result.output
    assert "profile" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0.0, 0.3])
def test_an_answer_that_other_kv_has_changed_fails(
    rounds: float, kind: str, make_stub: MakeStub
) -> None:
    """Whatever rounding does: the tokens where the answers part are not about as likely."""
    stub, url = make_stub(kind)
    stub.spoils_reuse, stub.rounds = True, rounds
    result = run("rewind-test", f"{kind}={url}")
    assert "a fresh prefill differs from A2" in result.stdout
    assert "rounding does not explain it" in result.stdout
    assert result.exit_code == 1


@pytest.mark.parametrize(("rounds", "status"), [(0.3, 0), (0.0, 1)])
def test_an_answer_that_parts_at_a_near_tie_passes_where_passes_round(
    rounds: float, status: int, make_stub: MakeStub
) -> None:
    """Going back computes one token where many were computed; where nothing rounds, that changes nothing."""
    stub, url = make_stub("llama")
    stub.ties, stub.rounds = True, rounds
    result = run("rewind-test", f"llama={url}")
    assert "A2' differs from A2 at token 0" in result.stdout
    assert result.exit_code == status, result.output

"""The examples run with the default model, and say what they saved."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("last_good_state.py", (), r"(\d+) steps taken, .* (\d+)% saved"),
        ("tree_search.py", (), r"(\d+) -> .*Solved\..* (\d+)% saved"),
        (
            "best_of_n.py",
            ("--model", "smollm2", "--n", "3", "--max-tokens", "60"),
            r"(\d+) programs in one batch.* (\d+) of [\d,]+ prompt tokens saved",
        ),
    ],
)
def test_an_example_runs_and_says_what_it_saved(
    name: str, options: tuple[str, ...], expected: str
) -> None:
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(  # noqa: S603 - our own command
        command, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = re.search(expected, done.stdout, re.DOTALL)
    assert found is not None, done.stdout
    assert int(found[2]) > 50

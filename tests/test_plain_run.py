"""What a run without options reads."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_a_plain_run_reads_nothing_in_slow_folders(pytestconfig: pytest.Config) -> None:
    """The clients that are imported there take seconds to load, in each worker."""
    if pytestconfig.getoption("markexpr").strip() != "not model and not slow":
        pytest.skip("slow tests were asked for")
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    read = {file for file in files if Path(file).is_relative_to(TESTS / "e2e")}
    assert read == set()

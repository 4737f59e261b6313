"""What a run without options reads, and how little it repeats."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
MOST_STEPS = 300
"""Of a property: examples times steps."""
MOST_OF_ONE = 100
"""Tests of one function; the marker `few` leaves the others out."""


@pytest.fixture
def _plain(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("markexpr").strip() != "not model and not slow":
        pytest.skip("slow tests were asked for")


@pytest.mark.usefixtures("_plain")
def test_a_plain_run_reads_nothing_in_slow_folders() -> None:
    """The clients that are imported there take seconds to load, in each worker."""
    assert {"anthropic", "openai"}.isdisjoint(sys.modules)
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    read = {file for file in files if Path(file).is_relative_to(TESTS / "e2e")}
    assert read == set()


@pytest.mark.usefixtures("_plain")
def test_a_plain_run_tries_few_examples(request: pytest.FixtureRequest) -> None:
    """Many more are tried where tests are asked for."""
    if "HYPOTHESIS_PROFILE" in os.environ:
        pytest.skip("another number was asked for")
    classes = {getattr(item, "cls", None) for item in request.session.items}
    machines = [getattr(one, "settings", None) for one in classes]
    for one in (settings(), *(one for one in machines if isinstance(one, settings))):
        assert one.max_examples * one.stateful_step_count <= MOST_STEPS


@pytest.mark.usefixtures("_plain")
def test_a_plain_run_repeats_no_function_often(request: pytest.FixtureRequest) -> None:
    names = Counter(item.nodeid.partition("[")[0] for item in request.session.items)
    assert {name: count for name, count in names.items() if count > MOST_OF_ONE} == {}


@pytest.mark.few(2)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("letter", "abc")
def test_of_parameters_few_are_taken_and_the_others_are_slow(
    letter: str, number: int, request: pytest.FixtureRequest
) -> None:
    taken = request.node.get_closest_marker("slow") is None
    assert taken == (f"{letter}{number}" in {"a1", "b2"})

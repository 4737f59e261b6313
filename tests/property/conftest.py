"""
How the machines find planted faults: by stored examples, or by looking for them anew.

`planted.json` has an example for each fault of each machine, the shortest that was found, as
`make_planted.py` wrote it.
"""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine

PLANTED = Path(__file__).with_name("planted.json")
MOST_STEPS = 15
"""In an example: what takes longer to be seen is not understood by whoever reads it."""


@pytest.fixture
def fault_search() -> Callable[[int], settings]:
    """Return a maker of settings: the same way every time, without shrinking, up to the first failure."""

    def make(max_examples: int) -> settings:
        return settings(
            max_examples=max_examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )

    return make


@pytest.fixture(scope="session")
def replay() -> Callable[[type[RuleBasedStateMachine], str], None]:
    """Return what runs the stored example of a fault on a machine, with all invariants at each step."""
    stored: dict[str, dict[str, list[str]]] = json.loads(PLANTED.read_text("utf-8"))

    def run(kind: type[RuleBasedStateMachine], fault: str) -> None:
        steps = stored[f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"][fault]
        assert 0 < len(steps) <= MOST_STEPS
        machine, values = kind(), dict[str, object]()
        try:
            for step in steps:
                take(machine, step, values)
                for invariant in machine.invariants:
                    invariant.function(machine)
        finally:
            machine.teardown()

    return run


def take(machine: RuleBasedStateMachine, step: str, values: dict[str, object]) -> None:
    """Take one step as Hypothesis writes it: `name = state.rule(argument=value)`."""
    (line,) = ast.parse(step).body
    assert isinstance(line, ast.Assign | ast.Expr)
    call = line.value
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Attribute)
    rule: Callable[..., Any] = getattr(machine, call.func.attr)
    made = rule(**{str(one.arg): value_of(one.value, values) for one in call.keywords})
    if isinstance(line, ast.Assign):
        values[ast.unparse(line.targets[0])] = made


def value_of(node: ast.expr, values: dict[str, object]) -> object:
    """Return what an argument stands for: an earlier step's value, a list, or a plain value."""
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.List):
        return [value_of(one, values) for one in node.elts]
    return ast.literal_eval(node)

"""
Write `planted.json`: for each planted fault the shortest example that Hypothesis finds.

Run it from the root of the repository after a machine's rules or faults have changed. It looks for
faults that have no example, and anew for those that are named; an engine's takes a minute:

    python tests/property/make_planted.py "a leak"
"""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import INVARIANT_MARKER, run_state_machine_as_test

HERE = Path(__file__).parent
MACHINES = [
    ("test_prefix_machine", "PrefixMachine", "FAULTS"),
    ("test_engine_machine", "EngineMachine", "FAULTS"),
    ("test_engine_machine", "DiskMachine", "DISK_FAULTS"),
    ("test_session_machine", "SessionMachine", "FAULTS"),
    ("test_disk_machine", "DiskMachine", "FAULTS"),
]
SEARCH = settings(
    max_examples=3000,
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def load(name: str) -> ModuleType:
    """Import a module of tests by its file."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def plant(fault: Any, patch: pytest.MonkeyPatch) -> None:
    """Plant a fault: what patches something, or what is to be patched with what."""
    if isinstance(fault, tuple):
        patch.setattr(*fault)
    else:
        fault(patch)


def is_step(machine: Any, line: str) -> bool:
    """Return whether a line of Hypothesis calls a rule: no invariant, and not the end."""
    called = re.fullmatch(r"(?:\w+ = )?state\.(\w+)\(.*\)", line)
    rule = called and getattr(machine, called[1])
    return bool(rule) and rule is not machine.teardown and not hasattr(rule, INVARIANT_MARKER)


def example(machine: Any, expected: tuple[type[BaseException], ...], fault: Any) -> list[str]:
    """Return the steps of the shortest example that shows a fault."""
    with pytest.MonkeyPatch.context() as patch:
        plant(fault, patch)
        try:
            run_state_machine_as_test(machine, settings=SEARCH)
        except expected as failure:
            lines = "\n".join(failure.__notes__).splitlines()
            return [line for line in lines if is_step(machine, line)]
    raise LookupError("this fault is not found any more")


def main(chosen: list[str], say: Callable[[str], object] = print) -> None:
    """Look for the examples of some faults and of those that have none; write each beside the others."""
    path = HERE / "planted.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    stored: dict[str, dict[str, list[str]]] = {}
    for name, kind, faults in MACHINES:
        module = load(name)
        before = kept.get(f"{name}.{kind}", {})
        of_machine = stored[f"{name}.{kind}"] = {}
        for fault, planted in getattr(module, faults).items():
            if fault in before and fault not in chosen:
                of_machine[fault] = before[fault]
                continue
            of_machine[fault] = example(getattr(module, kind), module.EXPECTED, planted)
            say(f"{kind}: {fault}: {len(of_machine[fault])} steps")
        path.write_text(json.dumps({**kept, **stored}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

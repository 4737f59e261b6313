"""
What libraries would report is switched off before they are loaded, and nobody's choice is undone.

That it works is seen by the kernel, in tests/e2e/test_nothing_leaves.py.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest


def run(program: str, **variables: str) -> str:
    """Run a program in a process of its own, where nothing is switched off yet."""
    unset = {"CI", "ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", program],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_package_loads_none_of_the_libraries_before_it_has_switched_them_off() -> None:
    program = (
        "import recollect, sys;"
        "print({'openvino', 'onnxruntime', 'onnxruntime_genai', 'huggingface_hub'} & {*sys.modules})"
    )
    assert run(program) == "set()\n"


def test_openvino_takes_its_own_stand_in_and_writes_nothing(tmp_path: Path) -> None:
    program = (
        "import recollect, openvino;"
        "from openvino.tools.ovc import telemetry_utils;"
        "print(telemetry_utils.tm.__name__)"
    )
    assert run(program, HOME=str(tmp_path)) == "openvino.tools.ovc.telemetry_stub\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_child_processes_are_told(tmp_path: Path) -> None:
    program = (
        "import recollect, os; print(os.environ['ORT_DISABLE_TELEMETRY'],"
        "os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    assert run(program) == "1 1\n"


@pytest.mark.slow
def test_what_the_user_has_decided_stays(tmp_path: Path) -> None:
    program = "import recollect, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(program, ORT_DISABLE_TELEMETRY="0") == "0\n"


def test_what_the_user_has_imported_stays() -> None:
    try:
        distribution("openvino-telemetry")
    except PackageNotFoundError:
        pytest.skip("OpenVINO came without it")
    program = (
        "import openvino_telemetry, recollect, sys;"
        "print(sys.modules['openvino_telemetry'] is openvino_telemetry)"
    )
    assert run(program) == "True\n"

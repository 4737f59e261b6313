"""
What happens when the package is imported: little is loaded, and nothing reports to its makers.

That nothing leaves the machine is seen by the kernel, in tests/e2e/test_nothing_leaves.py.
"""

import ast
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import recollect


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


LOADED = """
import sys
before = set(sys.modules)
{program}
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names))
print(sorted(name for name in sys.modules if name.partition(".")[0] == "recollect"))
print("sqlite3" in sys.modules, "asyncio" in sys.modules)
"""
FRONT = ["recollect", "recollect.errors", "recollect.starting"]
STAND_IN = "openvino_telemetry"  # no module: what keeps one from being found


def loaded_by(program: str) -> tuple[set[str], list[str]]:
    """Return the packages of others, and the modules of ours, that a program loads."""
    *_, others, ours, unneeded = run(LOADED.format(program=program)).splitlines()
    assert unneeded == "False False"
    return set(ast.literal_eval(others)) - {"recollect", STAND_IN}, ast.literal_eval(ours)


def test_importing_the_package_loads_errors_and_no_package_of_others() -> None:
    assert loaded_by("import recollect") == (set(), FRONT)


def test_an_export_loads_its_own_module_and_not_all() -> None:
    others, ours = loaded_by("from recollect import Message, SamplingParams")
    assert (others, ours) == (set(), sorted([*FRONT, "recollect.types"]))


HELP = """
from recollect.cli.main import app
for option in ("--help", "--version"):
    try:
        app([option])
    except SystemExit as end:
        assert not end.code
"""


def test_help_and_version_load_the_table_of_commands_and_what_prints_it() -> None:
    others, ours = loaded_by(HELP)
    assert ours == sorted([*FRONT, "recollect.cli", "recollect.cli.main"])
    assert {"typer", "rich"} <= others
    unneeded = {
        "numpy",
        "openvino",
        "pydantic",
        "fastapi",
        "prompt_toolkit",
        "lmdb",
        "jinja2",
        "yaml",
    }
    assert not others & (unneeded | {"gguf", "psutil", "xxhash", "cryptography", "keyring"})


def test_each_export_is_the_object_that_its_module_has() -> None:
    """A checker is told by imports and Python by a table; both name the same modules."""
    told: dict[str, str] = {}
    source = ast.parse(Path(recollect.__file__).read_text("utf-8"))
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and node.module:
            told |= {alias.name: node.module for alias in node.names if alias.name != "starting"}
    assert {*told, "__version__"} == set(recollect.__all__)
    for name, module in told.items():
        assert getattr(recollect, name) is getattr(import_module(module), name)


def test_what_is_not_exported_is_an_attribute_error() -> None:
    assert run("import recollect; print(hasattr(recollect, 'nonsense'))") == "False\n"
    assert run("import recollect; print('load' in dir(recollect))") == "True\n"


@pytest.mark.slow
def test_the_package_loads_none_of_the_libraries_before_it_has_switched_them_off() -> None:
    program = (
        "import sys; from recollect import *;"
        "print({'openvino', 'onnxruntime', 'onnxruntime_genai', 'huggingface_hub'} & {*sys.modules})"
    )
    assert run(program) == "set()\n"


@pytest.mark.slow
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

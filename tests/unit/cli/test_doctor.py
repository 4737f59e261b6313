"""`recollect doctor`: what it says is what the machine and a loaded model say themselves."""

import json
from pathlib import Path
from typing import Any

import openvino as ov
import psutil
import pytest
from typer.testing import CliRunner, Result

from recollect import __version__, config
from recollect.cli.main import app
from recollect.models.catalog import DEFAULT_MODEL


def examine(*options: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *options], catch_exceptions=False)


@pytest.fixture
def found(home: Path) -> dict[str, Any]:
    """Return what it found where the data folder is not there yet."""
    result = examine("--json")
    assert result.exit_code == 0, result.output
    assert not home.exists()
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_it_says_what_the_machine_says(found: dict[str, Any], home: Path) -> None:
    core = ov.Core()
    assert [one["name"] for one in found["devices"]] == core.available_devices
    (used,) = (one for one in found["devices"] if one["is_used"])
    assert used["name"] == "CPU"
    assert used["called"] == core.get_property("CPU", "FULL_DEVICE_NAME")
    assert found["machine"]["memory_bytes"] == psutil.virtual_memory().total
    assert found["machine"]["versions"]["recollect"] == __version__
    assert found["home"] == str(home)
    assert found["extras"]["recollect-llm[server]"] is True
    assert found["problems"] == []
    assert found["is_encrypted"] is False
    free = psutil.disk_usage(str(home.parent)).free
    assert abs(found["free_disk_bytes"] - free) < free / 4
    assert found["kv_disk_bytes"] <= 10 * 10**9


def test_it_says_what_would_be_used_and_why(found: dict[str, Any]) -> None:
    used = found["would_use"]
    assert used["model"].startswith(f"{DEFAULT_MODEL}, because it is the default")
    assert used["model"].endswith("98 MB are fetched first")
    assert "OpenVINO's CPU, because" in used["device"]
    assert used["arithmetic"].startswith(f"profile {config.DEFAULT_PROFILE}: f16 KV")
    assert all("--kv-" in used[f"cache {where}"] for where in ("in memory", "on disk"))


@pytest.mark.usefixtures("home")
def test_for_people_it_names_the_same() -> None:
    told = " ".join(examine().output.split())
    for words in ("processor", "memory", "versions recollect", "device CPU", "would use model"):
        assert words in told


def test_what_would_stop_a_chat_is_a_problem(home: Path) -> None:
    home.write_text("no folder")
    result = examine("--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert str(home) in found["problems"][0]
    assert found["kv_disk_bytes"] is found["home"] is None
    assert found["would_use"]["device"].startswith("OpenVINO's CPU")
    assert "Problem: " in examine().output

"""What converting to ONNX GenAI refuses; that it works is shown by the tests that use its folders."""

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from recollect.cli.main import app
from recollect.errors import ConfigError, UnsupportedModelError
from recollect.models import onnx_folder
from recollect.models.onnx_folder import convert_to_onnx, is_onnx_folder


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_folder, "LIBRARIES", ())


def test_a_missing_library_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx_folder, "LIBRARIES", ("no_such_library",))
    with pytest.raises(UnsupportedModelError, match=r"no_such_library.*recollect-llm\[convert"):
        convert_to_onnx(tmp_path / "x.gguf", tmp_path / "out")


@pytest.mark.usefixtures("all_there")
def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="is there already"):
        convert_to_onnx(tmp_path / "x.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


@pytest.mark.usefixtures("all_there")
def test_a_folder_without_float_weights_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(UnsupportedModelError, match="no Hugging Face folder"):
        convert_to_onnx(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_reference_model_has_nothing_to_convert() -> None:
    result = CliRunner().invoke(app, ["convert", "reference", "out"])
    assert isinstance(result.exception, UnsupportedModelError)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnx_ir") is None,
    reason='pip install "recollect-llm[convert]"',
)
def test_a_tiny_gguf_becomes_a_folder_that_loads(
    make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["convert", str(make_gguf()), "--to", "onnx-genai", str(out), "--precision", "fp32"]
    )
    assert result.exit_code == 0, result.exception
    assert "is ready" in result.output
    assert is_onnx_folder(out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("all_there")
def test_python_in_the_folder_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(
        '{"auto_map": {"AutoConfig": "evil.Config"}}'
    )
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "not today")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UnsupportedModelError, match="not today"):
        convert_to_onnx(tmp_path / "original", tmp_path / "out")
    (command,) = commands
    place = command.index("--extra_options")
    assert command[place + 1] == "hf_remote=false"

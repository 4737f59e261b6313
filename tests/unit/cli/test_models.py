"""What `recollect models` shows of the models that other programs keep."""

import json
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import pytest
from typer.testing import CliRunner

from recollect import files
from recollect.cli.main import app
from recollect.cli.options import model_names
from recollect.runtime import llama_library


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return llama.cpp's cache with models for OpenVINO and for llama.cpp, and what is none."""
    for name, architecture in (("a-Q4_K_M.gguf", "llama"), ("b.gguf", "mamba")):
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        writer.add_context_length(64)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    (tmp_path / "c.gguf").write_text("<html>")
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path))
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "person")
    return tmp_path


def test_the_table_names_them_with_what_would_run_them() -> None:
    text = CliRunner().invoke(app, ["models"], env={"COLUMNS": "140"}).output
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert rows["llamacpp:a-Q4_K_M.gguf"].split()[1:3] == ["llama", "Q4_K_M"]
    assert rows["llamacpp:a-Q4_K_M.gguf"].split()[-1] == "OpenVINO"
    assert rows["llamacpp:b.gguf"].split()[-1] == "llama.cpp"
    assert "not a GGUF file" in " ".join(text.split())


def test_json_has_all_of_it(cache: Path) -> None:
    rows: list[dict[str, Any]] = json.loads(CliRunner().invoke(app, ["models", "--json"]).output)
    mine = [row for row in rows if row["program"] is not None]
    assert [row["name"] for row in mine] == [f"llamacpp:{n}.gguf" for n in ("a-Q4_K_M", "b", "c")]
    assert mine[0] == {
        "name": "llamacpp:a-Q4_K_M.gguf",
        "program": "llama.cpp",
        "format": "gguf",
        "architecture": "llama",
        "type": "Q4_K_M",
        "installed": False,
        "disk_bytes": (cache / "a-Q4_K_M.gguf").stat().st_size,
        "path": str(cache / "a-Q4_K_M.gguf"),
        "runs_with": "OpenVINO",
        "reason": None,
    }
    assert [row["runs_with"] for row in mine[1:]] == ["llama.cpp", None]


def test_many_are_shown_in_part_and_only_those_are_opened(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    open_regular = files.open_regular

    def counting(path: Path) -> BinaryIO:
        opened.append(path)
        return open_regular(path)

    monkeypatch.setattr(files, "open_regular", counting)
    for number in range(250):
        (cache / f"many{number}.gguf").hardlink_to(cache / "b.gguf")
    text = CliRunner().invoke(app, ["models"], env={"COLUMNS": "140"}).output
    assert "and 53 more; --json lists all" in text
    assert len(set(opened)) == 200
    assert len(model_names("llamacpp:many")) == 250


def test_a_llama_cpp_that_is_refused_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is here, in a release that is not used."""
    monkeypatch.setattr(llama_library, "refusal_of", lambda _: "it is another release")
    rows = json.loads(CliRunner().invoke(app, ["models", "--json"]).output)
    runs = {row["name"]: row["runs_with"] for row in rows if row["program"] is not None}
    assert runs["llamacpp:a-Q4_K_M.gguf"] == "OpenVINO"
    assert runs["llamacpp:b.gguf"] is None

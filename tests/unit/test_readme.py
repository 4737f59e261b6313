"""What the README shows is true: its Python runs, its commands and options exist."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import recollect
from recollect.cli.main import app
from recollect.models.catalog import CATALOG

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONCEPTS = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], list[str]]]:
    """Return what runs Python of the README on the reference model and returns the lines it prints."""
    load = recollect.load
    models = []

    def load_reference() -> recollect.Model:
        models.append(load("reference", home=tmp_path))
        return models[-1]

    def run_code(code: str) -> list[str]:
        exec(code, {})  # noqa: S102 - our own README
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(recollect, "load", load_reference)
    yield run_code
    for model in models:
        model.engine.check()
        model.close()


def test_the_ten_lines_run(run: Callable[[str], list[str]]) -> None:
    *_, reused = run(blocks("python")[0])
    assert int(reused) > 50


def test_json_and_tools_run(run: Callable[[str], list[str]]) -> None:
    first = run(blocks("python")[1])[0]
    answer, _, logprob = first.rpartition(" ")
    assert isinstance(json.loads(answer)["name"], str)
    assert float(logprob) < 0


def test_the_example_of_the_concepts_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path))
    exec(blocks("python", CONCEPTS)[0], {})  # noqa: S102 - our own documentation


def test_every_command_that_it_shows_exists() -> None:
    shown = set(re.findall(r"recollect ([a-z][a-z-]+)(?=[ `]|$)", "\n".join(blocks("console"))))
    shown |= set(re.findall(r"`recollect ([a-z][a-z-]+)", README))
    assert {"chat", "verify", "bench"} <= shown
    runner = CliRunner()
    for command in shown:
        assert runner.invoke(app, [command, "--help"]).exit_code == 0, command


def test_every_model_of_the_catalog_is_in_it() -> None:
    for name in CATALOG:
        assert f"`{name}`" in README


def test_the_files_that_it_links_to_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link

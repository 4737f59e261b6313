"""What the README shows is true: its Python runs, its commands and options exist."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import recollect
from recollect.cli.main import app
from recollect.models.catalog import CATALOG

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = recollect.load
    models = []

    def load_reference() -> recollect.Model:
        models.append(load("reference", home=tmp_path))
        return models[-1]

    monkeypatch.setattr(recollect, "load", load_reference)
    (code,) = blocks("python")
    exec(code, {})  # noqa: S102 - our own README
    *_, reused = capsys.readouterr().out.splitlines()
    assert int(reused) > 50
    models[0].engine.check()
    models[0].close()


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
    root = Path(__file__).parents[2]
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / link).exists(), link

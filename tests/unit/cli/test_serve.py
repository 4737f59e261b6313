"""What `recollect serve` is told before it listens."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from recollect.cli.main import app
from recollect.conversation.model import Model
from recollect.errors import ConfigError
from recollect.server.hub import ModelHub


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))


def test_a_public_file_that_cannot_be_read_is_told_at_the_start(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for file, told in ((tmp_path / "none.txt", "cannot be read"), (empty, "no text in it")):
        result = CliRunner().invoke(app, ["serve", "-m", "reference", "--public", str(file)])
        assert isinstance(result.exception, ConfigError)
        assert told in str(result.exception)
        assert file.name in str(result.exception)


def test_public_files_reach_each_model_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "one.txt", tmp_path / "other.txt"]
    for file in files:
        file.write_text(f"You are {file.stem}.\n")
    published: list[list[str]] = []

    def note(_model: Model, prompts: Sequence[str]) -> None:
        published.append(list(prompts))

    async def load(hub: ModelHub) -> None:
        (await hub.acquire(None)).release()
        await hub.close()

    def run(_settings: Any, hub: ModelHub, _keys: Any, **_options: Any) -> None:
        asyncio.run(load(hub))

    monkeypatch.setattr("recollect.server.public.publish_later", note)
    monkeypatch.setattr("recollect.server.run.serve", run)
    options = [option for file in files for option in ("--public", str(file))]
    result = CliRunner().invoke(app, ["serve", "-m", "reference", *options])
    assert result.exit_code == 0, result.output
    assert published == [["You are one.", "You are other."]]


@pytest.mark.parametrize("port", ["99999", "-1", "65536"])
def test_a_port_that_there_is_not_is_a_wrong_option(port: str) -> None:
    result = CliRunner().invoke(app, ["serve", "-m", "reference", "--port", port])
    assert result.exit_code == 2
    assert "--port" in result.output
    assert "Input should be" in result.output


def test_the_memory_of_models_given_by_their_paths_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / side / "model.gguf" for side in "ab"]
    for size, file in enumerate(files, 1):
        file.parent.mkdir()
        file.write_bytes(b"x" * 1000 * size)
    hubs: list[ModelHub] = []
    monkeypatch.setattr(
        "recollect.server.run.serve", lambda _settings, hub, _keys, **_options: hubs.append(hub)
    )
    options = [option for file in files for option in ("-m", str(file))]
    result = CliRunner().invoke(app, ["serve", *options, "--alias", "gpt=b/model.gguf"])
    assert result.exit_code == 0, result.output
    assert hubs[0].names == ("a/model.gguf", "b/model.gguf")
    assert hubs[0].resolve("gpt") == "b/model.gguf"
    assert [hubs[0].weight_bytes(name) for name in hubs[0].names] == [1000, 2000]


def test_keys_say_what_was_done() -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["keys", *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    assert run("list") == "There is no key yet: `recollect keys add NAME` makes one.\n"
    run("add", "ann")
    assert run("list") == "ann\n"
    assert run("remove", "ann") == (
        "The key 'ann' was removed. A server that is running takes it until it is restarted.\n"
    )
    assert "There is no key yet" in run("list")

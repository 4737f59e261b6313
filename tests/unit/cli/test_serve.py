"""What `recollect serve` is told before it listens."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from recollect.cli.main import app
from recollect.cli.serve import public_names, weight_bytes
from recollect.conversation.model import Model
from recollect.errors import ConfigError, MissingPackageError, RecollectError
from recollect.server.hub import ModelHub


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httptools", None)
    result = CliRunner().invoke(app, ["serve", "-m", "reference"])
    assert isinstance(result.exception, MissingPackageError)
    assert "recollect-llm[server]" in str(result.exception)


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

    monkeypatch.setattr("recollect.server.hub.publish_later", note)
    monkeypatch.setattr("recollect.server.app.serve", run)
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


@pytest.mark.slow
def test_the_memory_of_models_given_by_their_paths_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / side / "model.gguf" for side in "ab"]
    for size, file in enumerate(files, 1):
        file.parent.mkdir()
        file.write_bytes(b"x" * 1000 * size)
    hubs: list[ModelHub] = []
    monkeypatch.setattr(
        "recollect.server.app.serve", lambda _settings, hub, _keys, **_options: hubs.append(hub)
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
        "The key 'ann' was deleted. A running server accepts it until it is restarted.\n"
    )
    assert "There is no key yet" in run("list")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the keyrings of servers that would have begun to listen."""
    rings: list[Any] = []
    monkeypatch.setattr(
        "recollect.server.app.serve", lambda _settings, _hub, keys, **_options: rings.append(keys)
    )
    return rings


@pytest.mark.parametrize("key", ["", "  ", "\t", "a\x07b"])
def test_a_key_that_is_none_is_refused_at_the_start(started: list[Any], key: str) -> None:
    """An unset variable of a shell must not let everybody in."""
    serve = ["serve", "-m", "reference"]
    for arguments, environment in (
        ([*serve, "--api-key", key], {}),
        (serve, {"RECOLLECT_API_KEY": key}),
    ):
        result = CliRunner().invoke(app, arguments, env=environment)
        assert isinstance(result.exception, ConfigError), result.output
        assert "API key" in str(result.exception)
    assert started == []


def test_a_variable_may_hold_several_keys(started: list[Any]) -> None:
    environment = {"RECOLLECT_API_KEY": "one other"}
    result = CliRunner().invoke(app, ["serve", "-m", "reference"], env=environment)
    assert result.exit_code == 0, result.output
    (keys,) = started
    assert [bool(keys.client(key)) for key in ("one", "other", "one other")] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "nosuch"], "nosuch"),
        (["-m", "reference", "--model", "nosuch"], "nosuch"),
        (["-m", "reference", "--draft-model", "nosuch"], "nosuch"),
        (["-m", "reference", "--draft-model", "reference", "--no-draft"], "--no-draft"),
        (["-m", "reference", "--draft-model", "reference", "--profile", "small"], "small"),
        (["-m", "reference", "--kv-memory", "10x"], "10x"),
        (["-m", "reference", "--kv-disk", "lots"], "lots"),
        (["-m", "reference", "--memory", "10x"], "10x"),
        (["-m", "reference", "--temperature", "-1"], "temperature"),
        (["-m", "reference", "--cors", "foo"], "--cors 'foo'"),
    ],
)
def test_what_can_be_checked_is_checked_before_the_server_listens(
    started: list[Any], options: list[str], told: str
) -> None:
    result = CliRunner().invoke(app, ["serve", *options])
    assert isinstance(result.exception, RecollectError), result.output
    assert told in str(result.exception)
    assert started == []


def test_a_model_of_another_program_is_served_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path))
    (tmp_path / "org_repo_a.gguf").write_bytes(bytes(1000))
    name = "llamacpp:org_repo_a.gguf"
    assert public_names([name]) == {name: name}
    assert weight_bytes(name, tmp_path / "home") == 1000


def test_keeping_chats_and_keeping_no_words_are_not_both_possible() -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        CliRunner().invoke(app, ["serve", "--keep-chats", "--no-save"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("host", "page"),
    [
        ("0.0.0.0", "http://127.0.0.1:80/"),  # noqa: S104 - which nothing listens on here
        ("::", "http://[::1]:80/"),
        ("::1", "http://[::1]:80/"),
        ("localhost", "http://localhost:80/"),
    ],
)
def test_the_address_of_the_page_is_one_that_a_browser_opens(
    monkeypatch: pytest.MonkeyPatch, host: str, page: str
) -> None:
    def run(_settings: Any, _hub: ModelHub, _keys: Any, **options: Any) -> None:
        options["on_listening"](80)

    monkeypatch.setattr("recollect.server.app.serve", run)
    result = CliRunner().invoke(app, ["serve", "-m", "reference", "--host", host, "--api-key", "k"])
    assert f"Conversations as trees: {page}\n" in result.output

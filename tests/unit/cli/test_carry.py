"""`recollect export` and `recollect import` from one home to another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recollect import config
from recollect.cli.main import app
from recollect.cli.options import ModelOptions
from recollect.errors import (
    ConfigError,
    ConversationError,
    ConversationFileError,
    NameTakenError,
    RecollectError,
    UnknownConversationError,
)
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import NewNode

At = Callable[[str], None]


@pytest.fixture(autouse=True)
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> At:
    """Return what goes to a home; the tests begin in the first one."""

    def go(name: str) -> None:
        monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / name))

    monkeypatch.chdir(tmp_path)
    go("first")
    return go


def run(*arguments: str, typed: str | None = None) -> str:
    result = CliRunner().invoke(app, arguments, input=typed, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fail(error: type[RecollectError], *arguments: str) -> str:
    with pytest.raises(error) as caught:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    return str(caught.value)


def say(text: str, *arguments: str) -> list[dict[str, dict[str, int]]]:
    """Say the lines to the reference model; return its turns."""
    chat = ("chat", "-m", "reference", "-n", "8", "--ignore-eos", "--json", *arguments)
    return [json.loads(line) for line in run(*chat, typed=text).splitlines()]


def kept() -> list[str]:
    with Journal.open(config.home() / JOURNAL_NAME) as journal:
        return [info.name for info in journal.conversations()]


def test_what_is_exported_here_goes_on_there_without_being_read(at: At) -> None:
    say("one\ntwo\n", "--name", "poem")
    said = run("export", "poem", "poem.safetensors")
    assert said.startswith("The conversation 'poem' was written to poem.safetensors, with the KV")
    at("second")
    said = run("import", "poem.safetensors", "--name", "mine")
    assert "'mine' was imported, with 2 turns." in said
    tokens = int(said.partition("need not read ")[2].split()[0])
    (warm,) = say("three\n", "--resume", "mine")
    assert warm["usage"]["restored_tokens"] == tokens
    assert warm["usage"]["computed_tokens"] == warm["usage"]["prompt_tokens"] - tokens
    at("first")
    (cold,) = say("three\n", "--resume", "poem", "--kv-disk", "0")
    assert cold["usage"]["reused_tokens"] == 0
    assert cold["reply"] == warm["reply"]


@pytest.mark.slow
def test_another_branch_and_no_kv_are_options(at: At) -> None:
    say("one\n", "--name", "poem")
    assert "no branch 'idea'" in fail(ConversationError, "export", "poem", "f", "--branch", "idea")
    fail(ConfigError, "export", "poem", "f", "--branch", "main", "--no-kv")
    assert not Path("f").exists()
    assert "without KV" in run("export", "poem", "f", "--no-kv")
    at("second")
    said = run("import", "f")
    assert "'poem' was imported, with 1 turn." in said
    assert "Its KV was not imported: the file has none." in said


@pytest.mark.slow
def test_with_another_model_the_text_is_imported_and_it_says_so(at: At) -> None:
    with Journal.open(config.home() / JOURNAL_NAME) as journal:
        chat = journal.create("old", model="bard", fingerprint="f00d").id
        asked = NewNode(role="user", content="one")
        reply = NewNode(role="assistant", content="uno", token_ids=[7], fingerprint="f00d")
        journal.append(chat, None, [asked, reply], tip="main")
    run("export", "old", "f", "--model", "reference")
    at("second")
    assert "Its KV was not imported: bard is not here." in run("import", "f")
    assert "Its KV was imported, too" in run("import", "f", "--name", "b", "--model", "reference")
    assert "(--kv-disk)" in run("import", "f", "--name", "c", "-m", "reference", "--kv-disk", "0")
    assert run("import", "f", "--name", "d", "--no-kv").count("\n") == 1
    assert sorted(kept()) == ["b", "c", "d", "old"]


@pytest.mark.slow
def test_a_damaged_file_changes_nothing(at: At) -> None:
    say("one\n", "--name", "poem")
    run("export", "poem", "f")
    content = bytearray(Path("f").read_bytes())
    content[-100] ^= 1
    Path("f").write_bytes(content)
    at("second")
    assert "f cannot be imported" in fail(ConversationFileError, "import", "f")
    assert not config.home().exists()


@pytest.mark.slow
def test_a_name_that_is_taken_changes_nothing(at: At) -> None:
    say("one\n", "--name", "poem")
    run("export", "poem", "f")
    at("second")
    say("other\n", "--name", "poem")
    fail(NameTakenError, "import", "f")
    assert kept() == ["poem"]


def test_mistakes_are_told_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    say("one\n", "--name", "poem")
    monkeypatch.setattr(ModelOptions, "load", None)
    Path("f").write_text("mine")
    fail(ConversationFileError, "export", "poem", "f")
    fail(UnknownConversationError, "export", "nowhere", "g")
    assert Path("f").read_text() == "mine"

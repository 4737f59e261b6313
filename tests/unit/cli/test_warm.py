"""`recollect warm` and what begins with what it has read."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recollect.cli.main import app
from recollect.errors import ConfigError, RecollectError, StoreError

pytestmark = pytest.mark.usefixtures("home")

REFERENCE = ("-m", "reference")


def run(*arguments: str, typed: str | None = None) -> str:
    result = CliRunner().invoke(app, arguments, input=typed, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fail(error: type[RecollectError], *arguments: str) -> str:
    with pytest.raises(error) as caught:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    return str(caught.value)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "handbook.txt"
    path.write_text("All that one has to know. " * 20 + "\n")
    return path


def test_a_document_is_read_once(document: Path) -> None:
    said = run("warm", str(document), *REFERENCE)
    assert said.startswith("'handbook.txt' is warm: ")
    tokens = int(said.split(": ")[1].split()[0].replace(",", ""))
    assert f"{tokens:,} of them were read in " in said
    again = run("warm", str(document), *REFERENCE)
    assert again.startswith("'handbook.txt' is warm already, since 20")
    question = document.read_text().strip() + " What was it?\n"
    chat = run("chat", *REFERENCE, "-n", "4", "--json", typed=question)
    assert json.loads(chat)["usage"]["restored_tokens"] == tokens


def test_instructions_are_what_a_chat_takes_from_the_same_file(document: Path) -> None:
    said = run("warm", "--system", str(document), "--name", "rules", *REFERENCE)
    assert said.startswith("'rules' is warm: ")
    tokens = int(said.split(": ")[1].split()[0].replace(",", ""))
    options = ("--system-file", str(document), "-n", "4", "--json")
    chat = run("chat", *REFERENCE, *options, typed="hello\n")
    assert json.loads(chat)["usage"]["restored_tokens"] == tokens
    both = run("warm", str(document), "--system", str(document), *REFERENCE)
    assert both.startswith("'handbook.txt' is warm: ")


def test_what_cannot_be_read_is_refused(document: Path, tmp_path: Path) -> None:
    assert "give a file" in fail(ConfigError, "warm", *REFERENCE)
    assert "check the path" in fail(ConfigError, "warm", "nowhere.txt", *REFERENCE)
    (tmp_path / "empty").write_text(" \n")
    assert "no text in it" in fail(ConfigError, "warm", str(tmp_path / "empty"), *REFERENCE)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    assert "not UTF-8" in fail(ConfigError, "warm", str(tmp_path / "binary"), *REFERENCE)
    assert "--kv-disk" in fail(StoreError, "warm", str(document), *REFERENCE, "--kv-disk", "0")
    both = ("--system", "x", "--system-file", str(document))
    assert "leave one of them out" in fail(ConfigError, "chat", *REFERENCE, *both)


@pytest.mark.slow
def test_commands_that_prove_and_measure_write_no_kv(home: Path) -> None:
    run("rewind-test", *REFERENCE)
    run("verify", *REFERENCE, "-n", "5")
    assert not home.exists()
    run("rewind-test", *REFERENCE, "--kv-disk", "10MB")
    assert (home / "kv" / "data.mdb").exists()

"""Encrypting a folder by a command: what it says, and when it is not done."""

from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recollect import encryption
from recollect.cli.main import app
from recollect.errors import ConfigError, OfflineError, UnknownConversationError
from recollect.journal.journal import JOURNAL_NAME
from recollect.models.catalog import DEFAULT_MODEL


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much work a passphrase is does not matter here."""
    monkeypatch.setattr(encryption, "Scrypt", partial(encryption.Scrypt, n=2))
    monkeypatch.setenv(encryption.PASSPHRASE_VARIABLE, "open sesame")


def test_encrypting_says_what_to_keep_and_what_was_deleted(home: Path) -> None:
    said = CliRunner().invoke(app, ["encrypt"], catch_exceptions=False).output
    assert f"Keep a copy of {home / encryption.KEY_FILE} somewhere else" in said
    assert "The cache on disk and the history of typed lines were deleted" in said
    again = CliRunner().invoke(app, ["encrypt"], catch_exceptions=False).output
    assert "Keep a copy of" in again
    assert "were deleted" not in again


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["chat", "--encrypt", "--offline", "-m", DEFAULT_MODEL], OfflineError),
        (["serve", "--encrypt", "--offline", "-m", DEFAULT_MODEL], OfflineError),
        (["chat", "--encrypt", "-m", "reference", "--resume", "nothing"], UnknownConversationError),
        (["chat", "--encrypt", "-m", "reference", "--prompts", "nothing.txt"], ConfigError),
        (["chat", "--encrypt", "-m", "reference", "--kv-disk", "much"], ConfigError),
        (["serve", "--encrypt", "-m", "reference", "--kv-memory", "much"], ConfigError),
        (["chat", "--encrypt", "-m", "reference", "--long-context"], ConfigError),
        (["serve", "--encrypt", "-m", "reference", "--long-context"], ConfigError),
    ],
)
def test_a_folder_stays_plain_where_the_command_cannot_go_on(
    home: Path, arguments: list[str], error: type[Exception]
) -> None:
    result = CliRunner().invoke(app, arguments, input="hello\n")
    assert isinstance(result.exception, error)
    assert not encryption.is_encrypted(home)


@pytest.mark.slow
def test_a_chat_with_a_model_that_is_here_encrypts(home: Path) -> None:
    arguments = ["chat", "--encrypt", "-m", "reference", "--name", "map", "--max-tokens", "4"]
    result = CliRunner().invoke(app, arguments, input="hello\n", catch_exceptions=False)
    assert result.exit_code == 0
    assert encryption.is_encrypted(home)
    assert b"hello" not in (home / JOURNAL_NAME).read_bytes()

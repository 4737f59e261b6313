"""`kill -9` while a journal is encrypted loses nothing, and what is encrypted leaves no plain text."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from recollect.encryption import Cipher
from recollect.errors import ConfigError
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.journal.records import NewNode

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a way to start quickly")

CIPHER = Cipher(bytes(32))
PHRASE = "the treasure lies below the oak"
ROUNDS = 30


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Return a plain journal of a few hundred pages, some of them freed."""
    path = tmp_path / "plain" / JOURNAL_NAME
    with Journal.open(path) as journal:
        for name in ("kept", "deleted"):
            chat = journal.create(name, model="m", fingerprint="f00d").id
            nodes = [NewNode(role="user", content=f"{PHRASE} {number}") for number in range(1500)]
            journal.append(chat, None, nodes, tip="main")
        journal.delete("deleted")
    return path


def is_plain(path: Path) -> bool:
    """Return whether the journal opens without a key."""
    try:
        Journal.open(path).close()
    except ConfigError:
        return False
    return True


def test_a_kill_while_it_is_encrypted_leaves_it_plain_or_encrypted(
    plain: Path, tmp_path: Path, convert_and_kill: Callable[[str, Path, float], int]
) -> None:
    with Journal.open(plain) as journal:
        before = journal.load("kept")
    chance = random.Random(20261125)  # noqa: S311 - moments, no secrets
    states = []
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        shutil.copytree(plain.parent, folder)
        path = folder / JOURNAL_NAME
        ended = convert_and_kill("journal", path, chance.uniform(0, 0.2))
        states.append((ended, is_plain(path)))
        with Journal.open(path, cipher=CIPHER, convert=True) as journal:
            assert journal.check() == []
            assert journal.load("kept") == before
            files = [file.read_bytes() for file in folder.iterdir()]
            assert not any(PHRASE.encode() in data for data in files)
    killed = {was_plain for ended, was_plain in states if ended == -signal.SIGKILL}
    assert True in killed, "no process was killed before it had encrypted anything"

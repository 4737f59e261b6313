"""
The user's data folder as commands use it: unlocked, encrypted, and its journal and KV store opened.

Commands that load a model only unlock it; the model opens the rest. The passphrase is asked for on
the terminal, wherever stdin and stdout lead, and once for each process: a process is one command,
which may open several files. Also the command `recollect encrypt`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from getpass import getpass
from pathlib import Path
from typing import Annotated, Final

import typer

from recollect import config, encryption
from recollect.encryption import KV_PURPOSE, Cipher
from recollect.errors import ConfigError, StoreError
from recollect.journal.checkpoints import Checkpoints
from recollect.journal.encrypt import encrypt as encrypt_home
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.kv.disk import STORE_FOLDER, DiskStore
from recollect.kv.maintenance import is_there, open_existing

NO_KV: Final = "There is no cache on this disk yet: `recollect chat` makes one."

_COPY: Final = (
    "Keep a copy of {} somewhere else: it is not secret, but without it nothing can be decrypted."
)
_DELETED: Final = (
    "The cache on disk and the history of typed lines were deleted: the model reads a conversation "
    "once more when it goes on."
)
_unlocked: dict[Path, Cipher] = {}
"""What each folder was unlocked with, so that nobody is asked twice."""

app = typer.Typer()


def unlock_home(*, encrypt: bool = False) -> Cipher | None:
    """
    Return what reads and writes the data folder; None if it is not encrypted.

    Args:
        encrypt: Whether to encrypt the folder first if it is not encrypted yet.

    Raises:
        ConfigError: The passphrase is wrong, or there is no terminal to ask on. Nothing was changed.
        StoreError: The folder cannot be encrypted.
    """
    home = config.home()
    if encrypt:
        was_encrypted = encryption.is_encrypted(home)
        encrypted = _encrypt(keyring=False)
        if not was_encrypted and sys.stderr.isatty():
            typer.echo(f"{_COPY.format(home / encryption.KEY_FILE)}\n{_DELETED}", err=True)
        return encrypted
    if home in _unlocked and encryption.is_encrypted(home):
        return _unlocked[home]
    cipher = encryption.unlock(home, ask=_ask if _has_terminal() else None)
    if cipher is not None:
        _unlocked[home] = cipher
    return cipher


@app.command()
def encrypt(
    keyring: Annotated[
        bool,
        typer.Option(
            "--keyring", help="Make a random key and keep it in the keyring of this system."
        ),
    ] = False,
) -> None:
    """
    Encrypt conversations and the cache on disk.

    The key comes from a passphrase: RECOLLECT_PASSPHRASE, or you are asked for one.
    From then on, every command that reads the data folder needs it. A lost passphrase cannot be
    replaced.
    """
    was_encrypted = encryption.is_encrypted()
    _encrypt(keyring=keyring)
    where = (
        "in the keyring of this system" if encryption.source() == "keyring" else "the passphrase"
    )
    typer.echo(
        f"{config.home()} is encrypted. The key is {where}: without it nobody can read the folder."
    )
    typer.echo(_COPY.format(config.home() / encryption.KEY_FILE))
    if not was_encrypted:
        typer.echo(_DELETED)


def store_folder() -> Path:
    """Return the folder of the KV store."""
    return config.home() / STORE_FOLDER


def has_store() -> bool:
    """Return whether there is a KV store."""
    return is_there(store_folder())


@contextmanager
def open_store() -> Iterator[DiskStore]:
    """
    Open the KV store.

    Raises:
        StoreError: There is none, or it cannot be opened.
    """
    if not has_store():
        raise StoreError(NO_KV)
    cipher = unlock_home()
    sealer = None if cipher is None else cipher.for_purpose(KV_PURPOSE)
    with closing(open_existing(store_folder(), sealer)) as store:
        yield store


@contextmanager
def open_journal() -> Iterator[Journal]:
    """
    Open the conversations.

    Raises:
        StoreError: They cannot be opened.
    """
    with Journal.open(config.home() / JOURNAL_NAME, cipher=unlock_home()) as journal:
        yield journal


@contextmanager
def open_checkpoints() -> Iterator[Checkpoints]:
    """
    Open the checkpoints.

    Raises:
        StoreError: There is no KV store, or it or the journal cannot be opened.
    """
    with open_store() as store, open_journal() as journal:
        yield Checkpoints(store, journal)


def _encrypt(*, keyring: bool) -> Cipher:
    ask = _ask if encryption.is_encrypted() else _ask_for_a_new_one
    cipher = encrypt_home(keyring=keyring, ask=ask if _has_terminal() else None)
    _unlocked[config.home()] = cipher
    return cipher


def _ask() -> str:
    return getpass(f"Passphrase of {config.home()}: ")


def _ask_for_a_new_one() -> str:
    first = getpass(f"New passphrase for {config.home()}: ")
    if getpass("The same again: ") != first:
        raise ConfigError("The two passphrases differ: try again; nothing was changed.")
    return first


def _has_terminal() -> bool:
    """Return whether somebody can be asked; getpass would read a pipe that holds prompts."""
    if sys.platform == "win32":
        return sys.stdin.isatty()
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True

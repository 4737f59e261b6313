"""
Unlock the data folder for a command, and `recollect encrypt`.

Asks for a passphrase on the terminal, where there is one, whatever stdin and stdout are.
"""

import os
import sys
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from recollect import config, encryption
from recollect.errors import ConfigError

if TYPE_CHECKING:  # the library behind it is an extra
    from recollect.encryption import Cipher

EncryptOption = Annotated[
    bool,
    typer.Option(
        "--encrypt",
        help="Encrypt what is kept with a passphrase, if it is not yet; `recollect encrypt` says more.",
    ),
]


_COPY: Final = (
    "Keep a copy of {} somewhere else: it is no secret, and without it nothing can be read either."
)
_DELETED: Final = (
    "KV on disk and the history of what was typed were deleted: conversations are read once more when "
    "they go on."
)
_unlocked: "dict[Path, Cipher]" = {}
"""A process is one command, which opens several files and asks once."""


def unlock_home(*, encrypt: bool = False) -> "Cipher | None":
    """
    Return what reads and writes the data folder; None for one that is not encrypted.

    Args:
        encrypt: Whether to encrypt it first where it is not.

    Raises:
        ConfigError: The passphrase is wrong, or there is nobody to ask for it. Nothing was changed.
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


def encrypt(
    keyring: Annotated[
        bool,
        typer.Option("--keyring", help="Draw a key and keep it in the keyring of this system."),
    ] = False,
) -> None:
    """
    Encrypt what is kept: conversations, and KV on disk.

    The key comes from a passphrase: that in RECOLLECT_PASSPHRASE, or one that is asked for.
    From then on every command that reads what is kept needs it. A lost passphrase cannot be replaced.
    """
    was_encrypted = encryption.is_encrypted()
    _encrypt(keyring=keyring)
    where = (
        "in the keyring of this system" if encryption.source() == "keyring" else "the passphrase"
    )
    typer.echo(
        f"{config.home()} is encrypted. The key is {where}: without it nobody can read what is kept."
    )
    typer.echo(_COPY.format(config.home() / encryption.KEY_FILE))
    if not was_encrypted:
        typer.echo(_DELETED)


def _encrypt(*, keyring: bool) -> "Cipher":
    from recollect.journal.encrypt import encrypt as encrypt_home  # noqa: PLC0415 - as above

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

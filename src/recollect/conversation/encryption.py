"""
Encrypt a data folder that is not encrypted.

Knows what in the folder holds content. Models are not content.
"""

import shutil
from pathlib import Path

from recollect import config, keyfile
from recollect.cipher import Cipher
from recollect.conversation.journal import JOURNAL_NAME, Journal
from recollect.errors import StoreError
from recollect.kv.disk import STORE_FOLDER


def encrypt(
    home: Path | None = None,
    *,
    passphrase: str | None = None,
    keyring: bool = False,
    ask: keyfile.Ask | None = None,
) -> Cipher:
    """
    Encrypt a data folder, once and for good, and return its cipher; one that is encrypted is unlocked.

    All conversations are converted. KV on disk and the history of what was typed are deleted: they
    come again. Other programs that use the folder have to be closed before.

    Args:
        home: None: `RECOLLECT_HOME` or the user's data folder.
        passphrase: None: `RECOLLECT_PASSPHRASE`. Whoever loses it loses what is in the folder.
        keyring: Whether the key is drawn at random and put into the keyring of this system instead.
        ask: Called for a passphrase where there is none.

    Raises:
        ConfigError: The passphrase is wrong or missing, there is no keyring, or a library is not
            installed. Nothing was changed.
        StoreError: Something in the folder cannot be written. What was converted by then is
            encrypted, and calling this again goes on with the rest.
    """
    home = home or config.home()
    cipher = None
    if keyfile.is_encrypted(home):
        cipher = keyfile.unlock(home, passphrase=passphrase, ask=ask)
    if cipher is None:
        source: keyfile.Source = "keyring" if keyring else "passphrase"
        cipher, key_file = keyfile.new_key(source, passphrase=passphrase, ask=ask)
        _remove_plain(home)  # before the folder counts as encrypted: it may end here
        keyfile.save(home, key_file)
    if (home / JOURNAL_NAME).exists():
        Journal.open(home / JOURNAL_NAME, cipher=cipher, convert=True).close()
    return cipher


def _remove_plain(home: Path) -> None:
    """Delete what holds content and is no loss."""
    try:
        (home / config.HISTORY_NAME).unlink(missing_ok=True)
        if (home / STORE_FOLDER).exists():
            shutil.rmtree(home / STORE_FOLDER)
    except OSError as error:
        raise StoreError(
            f"{error.filename} cannot be deleted ({error.strerror}): delete it, since it shows what "
            "was said."
        ) from error

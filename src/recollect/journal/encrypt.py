"""
Encrypt a data folder that is not encrypted.

Knows what in the folder holds content. Models are not content.
"""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from recollect import config, encryption
from recollect.encryption import KV_PURPOSE, Cipher
from recollect.errors import StoreCorruptError, StoreError
from recollect.journal.checkpoints import is_checkpoint
from recollect.journal.journal import JOURNAL_NAME, Journal, remove_history
from recollect.kv.disk import STORE_FOLDER, DiskStore
from recollect.kv.maintenance import is_there, open_existing, remove_damaged
from recollect.kv.record import Pin, disguised_key


def encrypt(
    home: Path | None = None,
    *,
    passphrase: str | None = None,
    keyring: bool = False,
    ask: encryption.Ask | None = None,
) -> Cipher:
    """
    Encrypt a data folder, once and for good, and return its cipher; one that is encrypted is unlocked.

    All conversations are converted. KV on disk and the history of what was typed are deleted; KV comes
    again. In a folder that is encrypted already, a history and damaged KV that were left there go too.
    Checkpoints stay as places, without KV. Other programs that use the folder have to be closed before.

    Args:
        home: None: `RECOLLECT_HOME` or the user's data folder.
        passphrase: None: `RECOLLECT_PASSPHRASE`. Whoever loses it loses what is in the folder.
        keyring: Whether the key is drawn at random and put into the keyring of this system instead.
        ask: Called for a passphrase where there is none.

    Raises:
        ConfigError: The passphrase is wrong or missing, there is no keyring, or a library is not
            installed; or the file that says which key it is has gone. Nothing was changed.
        StoreError: Something in the folder cannot be written. What was converted by then is
            encrypted, and calling this again goes on with the rest.
    """
    home = home or config.home()
    cipher = None
    if encryption.is_encrypted(home):
        cipher = encryption.unlock(home, passphrase=passphrase, ask=ask)
        if cipher is not None:
            _remove_plain_kv(home / STORE_FOLDER, cipher)  # which may put a damaged store aside
            _remove_leftovers(home)
    if cipher is None:
        _require_plain(home / JOURNAL_NAME)
        source: encryption.Source = "keyring" if keyring else "passphrase"
        cipher, key_file = encryption.new_key(source, passphrase=passphrase, ask=ask)
        kept = _checkpoints(home / STORE_FOLDER)
        _remove_plain(home)  # before the folder counts as encrypted: it may end here
        encryption.save(home, key_file)
        _remove_leftovers(home)  # a chat that is still open may have written one meanwhile
        _keep(kept, home / STORE_FOLDER, cipher)
    if (home / JOURNAL_NAME).exists():
        Journal.open(home / JOURNAL_NAME, cipher=cipher, convert=True).close()
    return cipher


def _require_plain(journal: Path) -> None:
    """
    Check that a journal is not encrypted with a key that the folder does not know any more.

    Raises:
        ConfigError: It is; with a new key nobody could ever read it again.
        StoreError: It cannot be read.
    """
    if journal.exists():
        Journal.open(journal).close()


def _checkpoints(folder: Path) -> list[Pin]:
    """Return the places that have a name in a store, and nowhere else."""
    if not is_there(folder):
        return []
    try:
        with closing(open_existing(folder, None)) as store:
            return [pin for pin in store.pins() if is_checkpoint(pin)]
    except StoreCorruptError:
        return []  # it could not have been used either


def _keep(found: list[Pin], folder: Path, cipher: Cipher) -> None:
    """Name places again, sealed; their KV is not there, and would have other names."""
    if not found:
        return
    sealer, least = cipher.for_purpose(KV_PURPOSE), config.LEAST_KV_DISK_BYTES
    with closing(DiskStore(folder, budget_bytes=least, sealer=sealer)) as store:
        for pin in found:  # under its former name, tokens could be tried
            tail = disguised_key(pin.tail, sealer.name_secret)
            store.add_pin(replace(pin, tail=tail))


def _remove_plain(home: Path) -> None:
    """Delete what holds content and is no loss."""
    _remove_leftovers(home)
    with _deleting():
        if (home / STORE_FOLDER).exists():
            shutil.rmtree(home / STORE_FOLDER)


def _remove_leftovers(home: Path) -> None:
    """Delete what no encrypted folder holds: a history, and stores that were put aside as damaged."""
    with _deleting():
        remove_history(home / config.HISTORY_NAME)
        remove_damaged(home / STORE_FOLDER)


def _remove_plain_kv(folder: Path, cipher: Cipher) -> None:
    """Delete a store in which a program without the key has kept blocks; its checkpoints stay as places."""
    if not is_there(folder):
        return
    try:
        with closing(open_existing(folder, cipher.for_purpose(KV_PURPOSE))) as store:
            with store.reading() as tables:
                heads = tables.heads().values()
            is_plain = any(not head.is_sealed for head in heads)
            kept = [pin for pin in store.pins() if is_checkpoint(pin)]
    except StoreCorruptError:  # what is in there cannot be told
        is_plain, kept = True, []
    if is_plain:
        with _deleting():
            shutil.rmtree(folder)
        _keep(kept, folder, cipher)


@contextmanager
def _deleting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{error.filename} cannot be deleted ({error.strerror}): delete it, since it shows what "
            "was said."
        ) from error

"""
What lies in the user's data folder, opened for commands that load no model.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from recollect import config
from recollect.cli.passphrase import unlock_home
from recollect.encryption import KV_PURPOSE
from recollect.errors import StoreError

if TYPE_CHECKING:  # imported where they are used: `--help` answers without SQLite and LMDB
    from recollect.journal.checkpoints import Checkpoints
    from recollect.journal.journal import Journal
    from recollect.kv.disk import DiskStore


def store_folder() -> Path:
    """Return where KV is kept."""
    from recollect.kv.disk import STORE_FOLDER  # noqa: PLC0415 - see above

    return config.home() / STORE_FOLDER


def has_store() -> bool:
    """Return whether any KV was ever kept here."""
    from recollect.kv.maintenance import is_there  # noqa: PLC0415 - see above

    return is_there(store_folder())


@contextmanager
def open_store() -> "Iterator[DiskStore]":
    """
    Open the KV that is kept on disk.

    Raises:
        StoreError: There is none, or it cannot be opened.
    """
    from recollect.kv.maintenance import open_existing  # noqa: PLC0415 - see above

    if not has_store():
        raise StoreError("No KV is kept on disk here yet: `recollect chat` does that.")
    cipher = unlock_home()
    sealer = None if cipher is None else cipher.for_purpose(KV_PURPOSE)
    with closing(open_existing(store_folder(), sealer)) as store:
        yield store


@contextmanager
def open_journal() -> "Iterator[Journal]":
    """
    Open the conversations.

    Raises:
        StoreError: They cannot be opened.
    """
    from recollect.journal.journal import JOURNAL_NAME, Journal  # noqa: PLC0415 - see above

    with Journal.open(config.home() / JOURNAL_NAME, cipher=unlock_home()) as journal:
        yield journal


@contextmanager
def open_places() -> "Iterator[Checkpoints]":
    """
    Open the checkpoints.

    Raises:
        StoreError: No KV is kept, or it or the journal cannot be opened.
    """
    from recollect.journal.checkpoints import Checkpoints  # noqa: PLC0415 - see above

    with open_store() as store, open_journal() as journal:
        yield Checkpoints(store, journal)

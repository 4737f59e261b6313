"""
What lies in the user's data folder, opened for commands that load no model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from recollect import config
from recollect.cipher import KV_PURPOSE
from recollect.cli.passphrase import unlock_home
from recollect.errors import StoreError

if TYPE_CHECKING:  # imported where they are used: `--help` answers without SQLite and LMDB
    from recollect.conversation.checkpoints import Checkpoints
    from recollect.conversation.journal import Journal
    from recollect.kv.disk import DiskStore

_SPARE_BYTES: Final = 16 << 20
"""Beyond what the file has: LMDB replaces pages before it gives them up, also to remove a block."""


def store_folder() -> Path:
    """Return where KV is kept."""
    from recollect.kv.disk import STORE_FOLDER  # noqa: PLC0415 - see above

    return config.home() / STORE_FOLDER


def has_store() -> bool:
    """Return whether any KV was ever kept here."""
    return (store_folder() / "data.mdb").is_file()


@contextmanager
def open_store() -> "Iterator[DiskStore]":
    """
    Open the KV that is kept on disk.

    Raises:
        StoreError: There is none, or it cannot be opened.
    """
    from recollect.kv.disk import DiskStore  # noqa: PLC0415 - see above

    if not has_store():
        raise StoreError("No KV is kept on disk here yet: `recollect chat` does that.")
    folder = store_folder()
    room = (folder / "data.mdb").stat().st_size + _SPARE_BYTES
    cipher = unlock_home()
    sealer = None if cipher is None else cipher.for_purpose(KV_PURPOSE)
    budget = max(config.default_kv_disk_bytes(folder), room)
    store = DiskStore(folder, budget_bytes=budget, sealer=sealer)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def open_journal() -> "Iterator[Journal]":
    """
    Open the conversations.

    Raises:
        StoreError: They cannot be opened.
    """
    from recollect.conversation.journal import JOURNAL_NAME, Journal  # noqa: PLC0415 - see above

    with Journal.open(config.home() / JOURNAL_NAME, cipher=unlock_home()) as journal:
        yield journal


@contextmanager
def open_places() -> "Iterator[Checkpoints]":
    """
    Open the checkpoints.

    Raises:
        StoreError: No KV is kept, or it or the journal cannot be opened.
    """
    from recollect.conversation.checkpoints import Checkpoints  # noqa: PLC0415 - see above

    with open_store() as store, open_journal() as journal:
        yield Checkpoints(store, journal)

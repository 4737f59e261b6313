"""
A store that is there already, opened without knowing with which budget it was made.

For what looks at it or takes from it; nothing is added.
"""

from pathlib import Path
from typing import Final

from recollect import config
from recollect.kv.disk import DiskStore
from recollect.kv.environment import translated
from recollect.kv.record import Sealer

_SPARE_BYTES: Final = 16 << 20
"""Beyond what the file has: LMDB replaces pages before it gives them up, also to remove a block."""


def is_there(folder: Path) -> bool:
    """Return whether any KV was ever kept in a folder."""
    return (folder / "data.mdb").is_file()


def open_existing(folder: Path, sealer: Sealer | None) -> DiskStore:
    """
    Return the store in a folder; whoever calls closes it.

    Raises:
        StoreError: It cannot be opened.
    """
    with translated(folder):
        room = (folder / "data.mdb").stat().st_size + _SPARE_BYTES
        budget = max(config.default_kv_disk_bytes(folder), room)
    return DiskStore(folder, budget_bytes=budget, sealer=sealer)

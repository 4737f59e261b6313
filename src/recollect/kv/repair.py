"""
Remove from a store what is not as it was written.

Decides nothing itself: what is wrong is for `disk_audit` to say.
"""

from collections.abc import Iterable

from recollect.kv import accounts
from recollect.kv.disk import DiskStore
from recollect.kv.names import Key


def remove_wrong(store: DiskStore, keys: Iterable[Key]) -> int:
    """
    Remove blocks with all that follows them, and derive the accounts anew; return how many went.

    What follows a block that is gone could not be found any more.

    Args:
        store: What to repair.
        keys: Of what is wrong, as `disk_audit.problems` yields them; the empty one stands for the
            accounts.

    Raises:
        StoreError: The files cannot be written; nothing was changed.
    """
    env = store.env
    removed = store.remove({key for key in keys if key})
    with env.writing() as txn:
        accounts.recount(txn, env)
    return removed

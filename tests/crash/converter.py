"""
Converts files until it is killed; run by tests of crashes, never by pytest.

Called with what to convert: `journal` or `store`. Reads the names of files, one a line. For each it
forks a process that converts that file, and says its id; after an empty line, how it has ended.
Forking spares each of them the imports.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from recollect.encryption import Cipher
from recollect.journal.journal import Journal
from recollect.kv.disk import DiskStore

CIPHER = Cipher(bytes(32))


def convert_journal(path: Path) -> None:
    """Encrypt a journal."""
    Journal.open(path, cipher=CIPHER, convert=True).close()


def convert_store(folder: Path) -> None:
    """Give an encrypted store of an earlier version the layout of this one."""
    DiskStore(folder, budget_bytes=64 << 20, sealer=CIPHER).close()


CONVERTERS: dict[str, Callable[[Path], None]] = {
    "journal": convert_journal,
    "store": convert_store,
}


def convert(kind: str, path: Path) -> None:
    """Convert a file and end this process."""
    status = 1
    try:
        CONVERTERS[kind](path)
        status = 0
    finally:
        os._exit(status)  # not into the loop below, which is the parent's


def main() -> None:
    pid = 0
    for line in sys.stdin:
        if path := line.rstrip("\n"):
            pid = os.fork()
            if not pid:
                convert(sys.argv[1], Path(path))
            print(pid, flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()

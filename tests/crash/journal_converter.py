"""
Encrypts journals until it is killed; run by `test_encryption.py`, never by pytest.

Reads the names of files, one a line. For each it forks a process that encrypts that journal, and
says its id; after an empty line, how it has ended. Forking spares each of them the imports.
"""

import os
import sys
from pathlib import Path

from recollect.cipher import Cipher
from recollect.conversation.journal import Journal

CIPHER = Cipher(bytes(32))


def convert(path: Path) -> None:
    """Encrypt a journal and end this process."""
    status = 1
    try:
        Journal.open(path, cipher=CIPHER, convert=True).close()
        status = 0
    finally:
        os._exit(status)  # not into the loop below, which is the parent's


def main() -> None:
    pid = 0
    for line in sys.stdin:
        if path := line.rstrip("\n"):
            pid = os.fork()
            if not pid:
                convert(Path(path))
            print(pid, flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()

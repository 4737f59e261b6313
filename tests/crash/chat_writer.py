"""
Starts `recollect chat` again and again; run by `test_chat.py`, never by pytest.

Reads commands, words between tabs: `start NAME OUT ARGUMENT...` forks a process that is the command
line with these arguments and writes to the file OUT; `wait NAME` says how it has ended. Forking
spares each of a hundred processes the imports. This process itself opens neither a journal nor a
model: nothing of theirs is carried across a fork.
"""

import os
import sys
import traceback

import numpy.random

from recollect.cli import chat, main
from recollect.conversation import loading
from recollect.engine import write_behind

# What the command imports late.
_IMPORTED_BEFORE_THE_FORK = (chat, loading, numpy.random)
# KV goes to disk all the time, so that a kill finds a write under way.
for name in ("_SETTLE_S", "_OVERDUE_S", "_BUSY_PAUSE"):
    setattr(write_behind, name, 0.0)
main.load_command("chat").make_context("chat", ["-n", "5", "--prompts", "x"])


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def start(out: str, arguments: list[str]) -> int:
    """Return the id of a new process that chats."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
        sys.argv = ["recollect", "chat", *arguments]
        main.run()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(1)  # the prompts never end: only a kill is right


def serve() -> None:
    pids = {}
    for line in sys.stdin:
        command, name, *words = line.rstrip("\n").split("\t")
        if command == "start":
            pids[name] = start(words[0], words[1:])
            say(f"{pids[name]}")
        else:
            _, status = os.waitpid(pids.pop(name), 0)
            say(f"{os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    serve()

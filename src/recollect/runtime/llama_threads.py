"""
The threads that llama.cpp computes with: how many, and how long they wait for each other before they sleep.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import sleep
from typing import Final

import psutil

_SPIN_COUNT: Final = "GOMP_SPINCOUNT"
_WAIT_POLICY: Final = "OMP_WAIT_POLICY"
_SPINS: Final = "1000"
"""
How often a waiting thread looks whether the others are done before it sleeps: for about 50 us, and not for
up to 14 ms as by default, in which other work on the same cores holds up all threads. It is what libgomp
itself takes for `OMP_WAIT_POLICY=active` where there are more threads than cores. Source: LOG.md,
2026-11-27, and the manual of libgomp, GOMP_SPINCOUNT.
"""
LOADAVG: Final = Path("/proc/loadavg")
"""Its fourth field says how many threads run or want to, of how many. Source: proc_loadavg(5)."""
_LOOKS: Final = 9
_BETWEEN_LOOKS_S: Final = 0.005
"""An odd number of looks, 45 ms in all: some work comes and goes within."""


def most_threads() -> int:
    """Return how many threads compute: more than there are cores slow each other down."""
    affinity = getattr(os, "sched_getaffinity", None)
    may_use = os.cpu_count() or 1 if affinity is None else len(affinity(0))
    return max(1, min(may_use, psutil.cpu_count(logical=False) or may_use))


@contextmanager
def short_spins() -> Iterator[None]:
    """
    Where others keep all cores busy, let threads of a libgomp that is loaded within wait only shortly.

    On a quiet one they wait as llama-server's do: asleep, they made a token take half as long again.
    libgomp reads the environment once, when it is loaded. Afterwards the variable is taken out again: no
    process that is started later has it. It does nothing where another library, such as PyTorch, has loaded
    the same libgomp before; one that comes later waits as llama.cpp does.
    """
    if {_SPIN_COUNT, _WAIT_POLICY} & os.environ.keys() or not _is_busy():
        yield
        return
    os.environ[_SPIN_COUNT] = _SPINS
    try:
        yield
    finally:
        os.environ.pop(_SPIN_COUNT, None)


def _is_busy() -> bool:
    """
    Return whether other work keeps all cores busy now; False where Linux does not tell.

    The load average tells of the minute before: a server that is started again right after much work would
    be taken for one on a busy machine as long as it runs.
    """
    others = []
    for _ in range(_LOOKS):
        try:
            running, _, _ = LOADAVG.read_text().split()[3].partition("/")
        except OSError:
            return False
        others.append(int(running) - 1)  # this thread runs, too
        sleep(_BETWEEN_LOOKS_S)
    return median(others) >= (os.cpu_count() or 1)

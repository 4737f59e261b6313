"""Memory of the process is put into huge pages where all of it is in use, and nowhere else."""

import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from recollect.runtime.openvino import use_huge_pages

HUGE = 2 << 20
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(
    not ENABLED.exists() or "[madvise]" not in ENABLED.read_text(),
    reason="needs a Linux that makes huge pages where it is asked to, and not elsewhere",
)


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 8 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        yield mapped


def kib(field: str) -> int:
    """Return a number of this process, in KiB, as Linux counts it."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def join() -> None:
    """Join in a thread, as the runtime does: its priority falls."""
    thread = threading.Thread(target=use_huge_pages)
    thread.start()
    thread.join()


@pytest.mark.slow
def test_memory_in_use_is_joined(memory: mmap.mmap) -> None:
    memory[:] = bytes([7]) * len(memory)
    before = kib("AnonHugePages")
    join()
    assert kib("AnonHugePages") - before >= 6 * HUGE // 1024
    assert memory[:] == bytes([7]) * len(memory)


@pytest.mark.slow
def test_memory_that_is_partly_in_use_takes_no_more(memory: mmap.mmap) -> None:
    for place in range(0, len(memory), 2 * mmap.PAGESIZE):
        memory[place] = 7
    before = kib("Anonymous")
    join()
    assert kib("Anonymous") - before < HUGE // 1024

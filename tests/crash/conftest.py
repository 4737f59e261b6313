"""What tests of crashes share."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

CONVERTER = Path(__file__).with_name("converter.py")


@pytest.fixture
def convert_and_kill() -> Iterator[Callable[[str, Path, float], int]]:
    """
    Return what begins to convert a file, kills that after some seconds, and returns how it ended.

    The first argument says what the file is; see `converter.py`.
    """
    running: dict[str, subprocess.Popen[str]] = {}
    with ExitStack() as stack:

        def run(kind: str, path: Path, seconds: float) -> int:
            if kind not in running:
                command = [sys.executable, str(CONVERTER), kind]
                running[kind] = stack.enter_context(
                    subprocess.Popen(  # noqa: S603 - ourselves
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                        bufsize=1,
                    )
                )
            converter = running[kind]
            assert converter.stdin is not None
            assert converter.stdout is not None
            converter.stdin.write(f"{path}\n")
            pid = int(converter.stdout.readline())
            # No sleep for something to happen: the moment is what is tried out.
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
            converter.stdin.write("\n")
            return int(converter.stdout.readline())

        yield run
        for converter in running.values():
            assert converter.stdin is not None
            converter.stdin.close()

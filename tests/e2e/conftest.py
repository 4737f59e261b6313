"""
What the tests of the command line as a user has it share: a home, and a pseudo-terminal.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

TIMEOUT_S = 60


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a home of its own and a terminal that answers no questions."""
    return {
        **os.environ,
        "RECOLLECT_HOME": str(tmp_path / "home"),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "PYTHONUTF8": "1",
    }


@pytest.fixture
def spawn(environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Return what starts a chat on a pseudo-terminal and waits for its prompt."""
    children: list[Any] = []

    def start(*arguments: str) -> Any:
        child = pexpect.spawn(
            sys.executable,
            ["-m", "recollect", "chat", *arguments],
            env=environment,
            dimensions=(50, 100),
            encoding="utf-8",
            codec_errors="replace",
            timeout=TIMEOUT_S,
        )
        children.append(child)
        child.expect_exact("you>")
        return child

    yield start
    for child in children:
        child.close(force=True)

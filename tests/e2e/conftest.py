"""
What the tests of the command line as a user has it share: a home, and a pseudo-terminal.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LARGE = (50, 200)
"""Rows and columns of a terminal in which the line under a reply fits."""
_SIZES = {"COLUMNS", "LINES"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a home of its own and a terminal that answers no questions."""
    # What runs tests in parallel sets these, and a terminal has its own size.
    inherited = {name: value for name, value in os.environ.items() if name not in _SIZES}
    return {
        **inherited,
        "RECOLLECT_HOME": str(tmp_path / "home"),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "PYTHONUTF8": "1",
    }


@pytest.fixture
def spawn(environment: dict[str, str], terminal: Callable[..., Any]) -> Callable[..., Any]:
    """Return what starts a chat on a pseudo-terminal and waits for its prompt."""

    def start(*arguments: str) -> Any:
        chat = [sys.executable, "-m", "recollect", "chat", *arguments]
        child = terminal(*chat, env=environment, dimensions=LARGE)
        child.expect_exact("you>")
        return child

    return start

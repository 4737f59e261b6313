"""
What the tests of the command line share: a chat on the reference model, and its screen.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recollect.cli.state import Chat
from recollect.conversation.model import Model
from recollect.kv.disk import STORE_FOLDER, DiskStore
from recollect.types import SamplingParams


@pytest.fixture
def screen() -> io.StringIO:
    """Return what a chat has printed."""
    return io.StringIO()


@pytest.fixture
def make_chat(make_model: Callable[..., Model], screen: io.StringIO) -> Callable[..., Chat]:
    """Return a maker of chats whose replies are short."""

    def make(
        *, system: str | None = None, max_tokens: int = 8, keep: bool = False, **settings: Any
    ) -> Chat:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        model = make_model(**settings)
        session = model.session(system, params=params, keep=keep)
        return Chat(model, Console(file=screen, width=100), session)

    return make


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the home that the models of these tests and the command line share."""
    monkeypatch.setenv("RECOLLECT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "home"


@pytest.fixture
def open_home_store(home: Path) -> Callable[[], DiskStore]:
    """Return an opener of the home's KV store, for models; they close it."""
    return lambda: DiskStore(home / STORE_FOLDER, budget_bytes=64 << 20)


@pytest.fixture
def chat(make_chat: Callable[..., Chat]) -> Chat:
    return make_chat()

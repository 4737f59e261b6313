"""
What the tests of the command line share: a chat on the reference model, and its screen.
"""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from recollect.cli.state import Chat
from recollect.conversation.model import Model
from recollect.types import SamplingParams


@pytest.fixture
def screen() -> io.StringIO:
    """Return what a chat has printed."""
    return io.StringIO()


@pytest.fixture
def make_chat(make_model: Callable[..., Model], screen: io.StringIO) -> Callable[..., Chat]:
    """Return a maker of chats whose replies are short."""

    def make(
        *, system: str | None = None, max_tokens: int = 8, keep: bool = False, **settings: int
    ) -> Chat:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        model = make_model(**settings)
        session = model.session(system, params=params, keep=keep)
        return Chat(model, Console(file=screen, width=100), session)

    return make


@pytest.fixture
def chat(make_chat: Callable[..., Chat]) -> Chat:
    return make_chat()

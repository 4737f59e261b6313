"""How many modules a chat request enters on its way to the engine."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import httpx
import pytest

import recollect
from recollect.engine.engine import Engine

SOURCE: Final = f"{Path(recollect.__file__).parent}{os.sep}"
VALUES: Final = "types"
"""Has nothing to do on the way but to check values that others make."""
_SUBMIT: Final = Engine.submit.__code__


class Trace:
    """The modules whose functions run, in their order, until the engine is given a task."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self._records = False

    def start(self) -> None:
        """Record from now on."""
        self._records = True

    def note(self, frame: FrameType, event: str, _: object) -> None:
        """Be the profile function of a thread."""
        code = frame.f_code
        if not self._records or not code.co_filename.startswith(SOURCE):
            return
        if threading.current_thread().name not in {"server", "recollect-request"}:
            return  # the engine's own
        if event == "call":
            module = code.co_filename.removeprefix(SOURCE).removesuffix(".py")
            self.entered.append(module.replace(os.sep, "/"))
        elif event == "return" and code is _SUBMIT:
            self._records = False


@pytest.fixture
def trace() -> Iterator[Trace]:
    """Return a trace of the threads that are started from now on."""
    trace = Trace()
    before = sys.getprofile()
    threading.setprofile(trace.note)
    yield trace
    threading.setprofile(before)


@pytest.mark.slow
def test_a_chat_request_enters_at_most_20_modules_on_its_way_to_the_engine(
    trace: Trace, start: Callable[..., httpx.Client], chat: Callable[..., Any]
) -> None:
    client = start()
    asked = ("system", "Be brief."), ("user", "hello")
    said = chat(client, *asked)["choices"][0]["message"]["content"]
    client.get("/health")  # what the server does after the last word is done by now
    trace.start()
    chat(client, *asked, ("assistant", said), ("user", "and then?"))
    modules = set(trace.entered) - {VALUES}
    assert len(modules) <= 20, " ".join(sorted(modules))

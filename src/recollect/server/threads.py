"""
Work on threads of its own, awaited on the event loop.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


async def on_thread(work: Callable[[], _T]) -> _T:
    """
    Return what some work returns, done on a thread of its own.

    The threads of `asyncio.to_thread` are few, so that one client's long work could hold all of
    them, and the loop does not close before they end. Here admission bounds how many there are, and
    nobody waits for them.
    """
    result: Future[_T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            result.set_exception(error)

    threading.Thread(target=run, name="recollect-request", daemon=True).start()
    return await asyncio.wrap_future(result)

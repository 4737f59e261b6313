"""
Events on their way to those who watch: one task each, woken together by the feed's thread.

On its own because the services hold it, and `watching` is made of services.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Final

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from recollect.conversation.event_log import LOST, Event, Watch
from recollect.server.refusals import ApiError, stopping

MOST_WATCHERS: Final = 256
"""Streams of events at once, of all keys together."""
MOST_OF_A_KEY: Final = 64
"""Of one key: as many windows and agents, and no key takes all."""
BEAT_S: Final = 15.0
"""Proxies close a connection that is silent for some tens of seconds, 30 at the least."""
_RECONNECT_MS: Final = 1000


class Watchers:
    """Those who watch. Belongs to the event loop, but for `wake`, which any thread may call."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: set[WatchStream] = set()
        self.is_ending = False
        """Whether every stream ends, and none begins any more."""

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take note of the loop."""
        self._loop = loop

    def add(self, stream: "WatchStream") -> None:
        """
        Wake a stream from now on.

        Raises:
            ApiError: There are as many as may be, or the server stops.
        """
        if self.is_ending:
            raise stopping()
        of_key = sum(one.watch.namespace == stream.watch.namespace for one in self._streams)
        if len(self._streams) >= MOST_WATCHERS or of_key >= MOST_OF_A_KEY:
            raise ApiError(
                "Too many watch already: close another stream of /v1/events.",
                status=429,
                kind="requests",
                code="too_many_watchers",
                headers={"Retry-After": "5"},
            )
        self._streams.add(stream)

    def remove(self, stream: "WatchStream") -> None:
        """Wake it no more."""
        self._streams.discard(stream)

    def wake(self, _: Watch) -> None:
        """Have each stream look what is new."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody watches any more
                self._loop.call_soon_threadsafe(self._wake_all)

    def end(self) -> None:
        """End all streams."""
        self.is_ending = True
        self._wake_all()

    def _wake_all(self) -> None:
        for stream in self._streams:
            stream.news.set()


class WatchStream(StreamingResponse):
    """
    Events as they happen, until the client goes away or the server stops.

    A client that reads slowly is waited for; what it misses meanwhile is told as lost.
    """

    def __init__(
        self, watchers: Watchers, watch: Watch, is_wanted: Callable[[Event], bool]
    ) -> None:
        # Nginx holds responses back unless told otherwise.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._written(), media_type="text/event-stream", headers=headers)
        self.watch: Final = watch
        self.news: Final = asyncio.Event()
        """Set where there may be something new."""
        self._watchers = watchers
        self._is_wanted = is_wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Send the events.

        Raises:
            ApiError: Too many watch already, or the server stops.
        """
        try:
            self._watchers.add(self)  # on the loop, where no other comes in between
            await super().__call__(scope, receive, send)
        finally:
            self._watchers.remove(self)
            self.watch.close()

    async def _written(self) -> AsyncIterator[str]:
        # An id without data: a client that comes back before anything happened says where it was.
        yield f": watching\nretry: {_RECONNECT_MS}\nid: {self.watch.last_id}\n\n"
        while not self._watchers.is_ending:
            self.news.clear()
            if (told := self._new()) is not None:
                if told:
                    yield told
                continue
            try:
                async with asyncio.timeout(BEAT_S):
                    await self.news.wait()
            except TimeoutError:
                yield f": still here\nid: {self.watch.last_id}\n\n"

    def _new(self) -> str | None:
        """Return what is sent of the events that come next, which may be nothing; None: there are none."""
        events = self.watch.take()
        return "".join(one.text for one in events if self._is_wanted(one)) if events else None


def of_conversation(label: str | None) -> Callable[[Event], bool]:
    """Return which events are of a conversation; None: all are."""
    return lambda event: label is None or event.conversation == label or event.kind == LOST

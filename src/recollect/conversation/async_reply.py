"""
A session's replies on an event loop.

Beginning and ending a reply may wait for the engine or the journal, so both happen on threads. The pieces
between are read on the loop, from the same stream that threads read. So nothing blocks the loop.
"""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol, Self, TypeVar

from recollect.conversation.turn import Reply
from recollect.errors import ConversationError, RecollectError
from recollect.types import SamplingParams

_T = TypeVar("_T")


class Streaming(Protocol):
    """A reply while it is generated; `ReplyStream` is one."""

    reply: Reply | None

    def __aiter__(self) -> AsyncIterator[str]:
        """Yield pieces of text on the running event loop."""

    def stop(self) -> None:
        """End it after the forward pass under way."""

    def close(self) -> None:
        """End it and save its text so far; may wait."""


async def to_its_end(
    work: Callable[[], _T], *, cancelled: Callable[[], object] = lambda: None
) -> _T:
    """
    Call on a thread, and go on only when that has returned, however often the task is cancelled.

    So whoever waits for the task finds nothing of it left: no engine's work, no session in use.

    Args:
        work: What is called.
        cancelled: Called when the task is cancelled meanwhile, each time: it makes the work end soon.

    Raises:
        asyncio.CancelledError: The task was cancelled, and the work has ended.
    """
    import asyncio  # noqa: PLC0415 - takes 30 ms, which a program without a loop does not need

    working = asyncio.ensure_future(asyncio.to_thread(work))
    cancellation: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            cancellation = error
            cancelled()
    if cancellation is not None:
        if not working.cancelled():
            working.exception()  # the cancellation is what the task ends with
        raise cancellation
    return working.result()


class _Beginning:
    """
    How a reply begins, on a thread, and whether anybody still reads it.

    On its own, because a thread of a pool may hold what it has called for a while, and the reader is
    noticed to be gone by its last reference.
    """

    def __init__(self, begin: Callable[[], Streaming]) -> None:
        self.stream: Streaming | None = None
        self.is_left = False
        self._begin = begin
        self._leaving = threading.Lock()

    def begin(self) -> None:
        """Have the engine begin; where it was left meanwhile, end it at once."""
        stream = self._begin()
        with self._leaving:
            self.stream = stream
            is_left = self.is_left
        if is_left:
            stream.stop()
            stream.close()

    def leave(self) -> Streaming | None:
        """Return what has to be ended; None: nothing has begun, and what begins later ends at once."""
        with self._leaving:
            self.is_left = True
            return self.stream


class AsyncReply:
    """
    A reply on an event loop: `async for` for pieces of its text, or `read` for all of it.

    It begins when it is first read. Leaving the loop early, cancelling the task, and the end of an
    `async with` block all end what the engine does for it and save its text so far, as with
    `ReplyStream`; whatever the session is asked next waits for that. Used on one event loop.
    """

    def __init__(
        self, begin: Callable[[], Streaming], end_later: Callable[[Streaming], None]
    ) -> None:
        """
        Have it ready to begin.

        Args:
            begin: Has the engine begin it; called on a thread.
            end_later: Called where nobody reads on, and nobody waits for the end.
        """
        self._beginning = _Beginning(begin)
        self._end_later = end_later
        self._pieces: AsyncIterator[str] | None = None

    @property
    def reply(self) -> Reply | None:
        """Return the whole reply, once it has ended; None before, and where nothing came of it."""
        stream = self._beginning.stream
        return None if stream is None else stream.reply

    async def read(self) -> Reply:
        """
        Read to the end and return the whole reply.

        Raises:
            ConversationError: The reply was stopped before it began.
        """
        async with self:
            async for _ in self:
                pass
        if self.reply is None:
            raise ConversationError("The reply was stopped before it began: ask again.")
        return self.reply

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """
        Return the next piece of text.

        Raises:
            RecollectError: As `Session.stream` and its pieces raise it.
        """
        try:
            if self._pieces is None:
                self._pieces = aiter(await self._begun())
            return await anext(self._pieces)
        except StopAsyncIteration:
            await self.aclose()
            raise
        except BaseException:
            with suppress(RecollectError):  # the first error counts
                await self.aclose()
            raise

    async def aclose(self) -> None:
        """
        End the reply and save its text so far. Calling it again does nothing.

        Raises:
            StoreError: The journal cannot save it. The conversation is as it was.
        """
        stream = self._beginning.leave()
        if stream is not None:
            stream.stop()
            await to_its_end(stream.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        """End a reply whose reader has gone, which may be the loop's own thread: it must not wait."""
        beginning = self._beginning
        if not beginning.is_left and (stream := beginning.leave()) is not None:
            stream.stop()
            self._end_later(stream)

    async def _begun(self) -> Streaming:
        begun = self._beginning
        if begun.is_left:
            raise StopAsyncIteration
        await to_its_end(begun.begin, cancelled=begun.leave)  # the thread ends what it has begun
        assert begun.stream is not None, "it has begun"
        return begun.stream


class AsyncSpeaker:
    """Who can be asked on an event loop: a session."""

    _ending: threading.Thread | None = None  # of the reply that was left last

    def stream(self, text: str | None, *, params: SamplingParams | None = None) -> Streaming:
        """Return the reply to a message while it is generated."""
        raise NotImplementedError

    def stream_async(self, text: str | None, *, params: SamplingParams | None = None) -> AsyncReply:
        """
        Add a user's message, and return the reply for `async for`; see `stream`, whose arguments it has.

        Raises what `stream` raises when it is first read.
        """
        return AsyncReply(lambda: self.stream(text, params=params), self._end_later)

    async def respond_async(
        self, text: str | None, *, params: SamplingParams | None = None
    ) -> Reply:
        """Add a user's message and return the whole reply, on an event loop; see `stream`."""
        return await self.stream_async(text, params=params).read()

    def _end_later(self, stream: Streaming) -> None:
        """End a reply on a thread; whatever the session is asked next waits for that."""

        def end() -> None:
            with suppress(RecollectError):  # nobody asks what came of it
                stream.close()

        with suppress(RuntimeError):  # the program ends
            self._ending = threading.Thread(target=end, name="recollect-end", daemon=True)
            self._ending.start()

"""
From the engine's threads to the event loop, and on to the client.

A reply is read by a thread, since reading waits; what it reads becomes events on the loop. Knows
no API: what an event looks like on the wire is the endpoints' business.

Conversations of the journal that a server has open.

A conversation is loaded once and shared by the requests that go on with it. Safe from any thread.
"""

import asyncio
import json
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from recollect.conversation.conversation import Conversation
from recollect.conversation.model import Model
from recollect.conversation.turn import Reply
from recollect.errors import RecollectError
from recollect.server.refusals import ClientGone
from recollect.text.tool_calls import ArgumentsDelta, CallEnded, CallStarted, TextDelta
from recollect.text.tool_calls import Event as ReplyEvent
from recollect.types import TokenLogprob, Usage

_T = TypeVar("_T")

PROGRESS_EVERY_S: Final = 1.0
"""Proxies and clients give up on a connection that is silent for some tens of seconds."""


CallEvent = CallStarted | ArgumentsDelta | CallEnded


class Readable(Protocol):
    """A reply as it is generated; `ReplyStream` is one."""

    reply: Reply | None

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Return how many tokens of the prompt have KV, and how many there are."""

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Return how likely the tokens so far were; None where nobody asked. It only grows."""

    def usage_so_far(self) -> Usage | None:
        """Return what the reply has cost by now; None before its first token."""

    def events(self) -> Iterator[ReplyEvent]:
        """Read the reply as text and calls of tools."""

    def stop(self) -> None:
        """End the reply after the forward pass under way."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@runtime_checkable
class Keeping(Protocol):
    """A reply that may be kept once it is generated."""

    def when_generated(self, call: Callable[[], object]) -> None:
        """Have something called once the reply is generated, before it is kept."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More text of a reply."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens whose text is out now, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Call:
    """More of a call of a tool."""

    choice: int
    event: CallEvent


@dataclass(frozen=True, slots=True)
class Ended:
    """A reply is over; without an error, and without a reply, it was stopped before it began."""

    choice: int
    reply: Reply | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Nothing new; this much of the prompts is read."""

    done: int
    total: int


Event = Piece | Call | Ended | Progress


class Readers:
    """
    Replies that are being read, each by a thread, as events in the order in which they come.

    Made on the event loop, which is where its events are; `stop` may be called from any thread.
    """

    def __init__(
        self,
        streams: Sequence[Readable],
        *,
        on_reply: Callable[[Ended], None],
        on_end: Callable[[], None],
    ) -> None:
        """
        Args:
            streams: What to read.
            on_reply: Called on the event loop when one of them is over, whether anybody listens or not.
            on_end: Called once, when the last of them is.
        """
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._streams = tuple(streams)
        self._open = len(self._streams)
        self._on_reply = on_reply
        self._on_end = on_end
        self._seen: deque[Event] = deque()  # by `first`
        self._ending: Exception | None = None

    def start(self) -> None:
        """Begin to read."""
        for choice, stream in enumerate(self._streams):
            threading.Thread(
                target=self._read, args=(choice, stream), name="recollect-reader", daemon=True
            ).start()

    def stop(self) -> None:
        """End the replies that go on; what was said is kept."""
        for stream in self._streams:
            stream.stop()

    def end(self, error: Exception) -> None:
        """End the replies that go on, and have an error told in place of each that is not complete."""
        self._ending = error
        self.stop()

    async def first(self) -> Event:
        """
        Return the first event, which `events` gives again; a progress where it takes long.

        Of several replies it is given when all have begun, or one has failed, or after a second.
        """
        deadline = self._loop.time() + PROGRESS_EVERY_S
        self._seen.append(await self._get())
        while (
            not isinstance(self._seen[-1], Progress)
            and not (isinstance(self._seen[-1], Ended) and self._seen[-1].error is not None)
            and self._loop.time() < deadline
            and self.usages() is None
        ):
            self._seen.append(await self._get())
        return self._seen[0]

    def usages(self) -> list[Usage] | None:
        """Return what the replies have cost by now; None where one of them has no token yet."""
        found = [stream.usage_so_far() for stream in self._streams]
        known = [usage for usage in found if usage is not None]
        return known if len(known) == len(found) else None

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens until the last reply is over."""
        left = len(self._streams)
        while left:
            event = self._seen.popleft() if self._seen else await self._get()
            left -= isinstance(event, Ended)
            yield event

    async def replies(self) -> list[Reply]:
        """
        Return the whole replies.

        Raises:
            RecollectError: What one of them failed with.
        """
        ended: dict[int, Reply] = {}
        async for event in self.events():
            if isinstance(event, Ended):
                ended[event.choice] = require_reply(event)
        return [ended[choice] for choice in sorted(ended)]

    async def _get(self) -> Event:
        with suppress(asyncio.QueueEmpty):
            return self._events.get_nowait()
        try:
            return await asyncio.wait_for(self._events.get(), PROGRESS_EVERY_S)
        except TimeoutError:
            states = [stream.prefill_progress for stream in self._streams]
            return Progress(sum(done for done, _ in states), sum(total for _, total in states))

    def _read(self, choice: int, stream: Readable) -> None:
        """Be the thread that reads one reply."""
        try:
            sent = 0
            with stream:
                for event in stream.events():
                    if isinstance(event, TextDelta):
                        new = (stream.logprobs or ())[sent:]
                        sent += len(new)
                        self._put(Piece(choice, event.text, new))
                    else:
                        self._put(Call(choice, event))
            if rest := (stream.logprobs or ())[sent:]:
                self._put(Piece(choice, "", rest))
            ended = Ended(choice, stream.reply)
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the reply
            ended = Ended(choice, error=error)
        self._put(ended)

    def _put(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Event) -> None:
        self._events.put_nowait(self._told(event))
        if isinstance(event, Ended):
            self._open -= 1
            self._on_reply(event)
            if not self._open:
                self._on_end()

    def _told(self, event: Event) -> Event:
        """Return what is told of an event: of a reply that `end` has cut short, the error."""
        if self._ending is None or not isinstance(event, Ended) or event.error is not None:
            return event
        is_whole = event.reply is not None and event.reply.finish_reason != "cancelled"
        return event if is_whole else Ended(event.choice, error=self._ending)


def require_reply(event: Ended) -> Reply:
    """
    Return the reply that has ended.

    Raises:
        RecollectError: It failed, or was stopped before anything was said.
    """
    if event.error is not None:
        raise event.error
    if event.reply is None:
        raise RecollectError("The reply was stopped before it began.")
    return event.reply


async def unless_disconnected(request: Request, work: Awaitable[_T]) -> _T:
    """
    Return the result of *work*, which is cancelled where the client goes away first.

    The body of the request has been read. Nobody else may wait for its messages meanwhile.

    Raises:
        ClientGone: It went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; `on_close` is called when they end, also where the client goes away."""

    def __init__(
        self,
        events: AsyncIterator[str],
        *,
        on_close: Callable[[], None],
        headers: Mapping[str, str],
    ) -> None:
        # Nginx holds responses back unless told otherwise.
        quick = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, media_type="text/event-stream", headers=quick)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


def sse(data: Mapping[str, Any] | str, event: str | None = None) -> str:
    """Return a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {text}\n\n"


def progress_comment(progress: Progress) -> str:
    """Return a comment, which clients skip: it tells a proxy, and whoever looks, that work goes on."""
    return f": prefill {progress.done}/{progress.total}\n\n"


_MOST_OPEN: Final = 256
"""Conversations of one model that stay open; an open one is its texts and token ids in memory."""


class KeptConversations:
    """Conversations by model and id; those used longest ago are closed first."""

    def __init__(self) -> None:
        self._open: WeakKeyDictionary[Model, OrderedDict[int, Conversation]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def conversation(
        self, model: Model, kept_as: int, *, namespace: str, node_id: int | None = None
    ) -> Conversation:
        """
        Return a conversation of the journal, open on a model.

        Args:
            model: Goes on with it.
            kept_as: Its id in the journal.
            namespace: Whose it is.
            node_id: In the journal, of a node that it must have; another process may have added it.

        Raises:
            UnknownConversationError: There is none in that namespace.
        """
        while True:
            with self._lock:
                conversations = self._open.setdefault(model, OrderedDict())
                known = conversations.get(kept_as)
                if known is not None and _has(known, node_id):
                    self._remember(conversations, kept_as, known)
                    return known
            # Not under the lock: the journal may be held by others, and those who ask for what is
            # open need not wait for it.
            loaded = model.conversation(kept_as, namespace=namespace)
            loaded.shares_tips = True
            with self._lock:
                conversations = self._open.setdefault(model, OrderedDict())
                if conversations.get(kept_as) is known:  # else another request was faster
                    self._remember(conversations, kept_as, loaded)
                    return loaded

    def add(self, model: Model, conversation: Conversation) -> None:
        """Take over a new conversation, which is in the journal by now."""
        assert conversation.kept_as is not None, "it is kept"
        conversation.shares_tips = True
        with self._lock:
            conversations = self._open.setdefault(model, OrderedDict())
            self._remember(conversations, conversation.kept_as, conversation)

    def forget(self, kept_as: int) -> None:
        """Close a conversation that was deleted."""
        with self._lock:
            for conversations in self._open.values():
                conversations.pop(kept_as, None)

    def _remember(
        self, conversations: OrderedDict[int, Conversation], kept_as: int, known: Conversation
    ) -> None:
        conversations[kept_as] = known
        conversations.move_to_end(kept_as)
        while len(conversations) > _MOST_OPEN:
            conversations.popitem(last=False)


def _has(conversation: Conversation, node_id: int | None) -> bool:
    return node_id is None or conversation.kept_node(node_id) is not None

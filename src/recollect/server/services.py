"""
What the endpoints share, and how a request becomes replies that are sent as they are generated.

A request waits for its turn, then for its model; then a thread finds what is known of it and has
the engine begin. From there on the event loop reads each reply and tells what comes as events: what
those look like on the wire is each API's own business. A thread of its own ends a reply, since that
may wait for the engine and for the journal.
"""

import asyncio
import threading
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import time
from typing import Final, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from recollect.conversation.feed import Feed
from recollect.conversation.model import Model
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.errors import ConfigError, RecollectError, StoreEncryptedError, StoreError
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.server.access import CLIENT, Client
from recollect.server.events import Call, Ended, Event, Failed, Piece, Progress, Thought, Writer
from recollect.server.hub import Admission, Lease, ModelHub, OpenConversations, Ticket, on_thread
from recollect.server.kept_chats import KeptChats
from recollect.server.known_conversations import KnownConversations
from recollect.server.refusals import ClientGone, api_error, stopping
from recollect.server.settings import Settings
from recollect.server.streaming import Watchers
from recollect.server.usage import Cost, Metrics, cost, cost_of
from recollect.text.reasoning import ReasoningDelta
from recollect.text.tool_calls import TextDelta

_T = TypeVar("_T")

Prepare = Callable[[Model], Iterable[ReplyGeneration]]
"""Called on a thread; gives replies that the engine has begun, each as soon as it has."""

_MOST_PATIENT: Final = 64
"""Requests that wait for the journal at once, as many as wait for a turn; threads are made as needed."""

PROGRESS_EVERY_S: Final = 1.0
"""Proxies and clients give up on a connection that is silent for some tens of seconds."""


@dataclass(slots=True)
class Services:
    """Everything that lives as long as the server."""

    settings: Settings
    hub: ModelHub
    admission: Admission
    metrics: Metrics
    feed: Feed
    watchers: Watchers
    conversations: OpenConversations = field(default_factory=OpenConversations)
    known: KnownConversations = field(default_factory=KnownConversations)
    started_at: int = field(default_factory=lambda: int(time()))
    """In seconds since 1970."""
    items_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a conversation is read and written again by what it was."""
    patient: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_MOST_PATIENT, "recollect-waits")
    )
    """Threads that wait for the journal, so that those which begin replies do not."""
    kept_chats: KeptChats = field(default_factory=KeptChats)
    """What keeps the chats of clients that send all of it each time, where the settings say so."""
    is_ending: bool = False
    """Whether nothing begins any more; belongs to the event loop, as does `jobs`."""
    jobs: "set[Job]" = field(default_factory=set)
    """Those whose replies have not all ended."""
    _journal: Journal | None = None
    _opening: threading.Lock = field(default_factory=threading.Lock)

    @property
    def journal(self) -> Journal:
        """
        Return the journal that kept conversations are in; opened when first needed.

        Raises:
            StoreError: It cannot be opened, or the folder was encrypted since the server started.
        """
        with self._opening:
            if self._journal is None:
                path, cipher = self.settings.home / JOURNAL_NAME, self.settings.cipher
                try:
                    self._journal = Journal.open(path, cipher=cipher)
                except ConfigError as cause:  # the key was right when the server started
                    if cipher is None:
                        raise StoreEncryptedError(
                            f"{path} has been encrypted by another program meanwhile: restart the "
                            "server, with the key."
                        ) from cause
                    raise StoreError(str(cause)) from cause
            return self._journal

    def end(self) -> None:
        """End what goes on, and refuse what waits: each client is told that the server stops."""
        self.is_ending = True
        self.hub.give_up()
        for job in list(self.jobs):
            job.end(stopping())

    def close(self) -> None:
        """Close what is open; the hub closes itself."""
        self.feed.close()
        self.patient.shutdown(wait=False)
        with self._opening:
            journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()


def services_of(request: Request) -> Services:
    """Return the services of the app that a request came to."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


def client_of(request: Request) -> Client:
    """Return who a request is from; the security layer has let it through."""
    client = getattr(request.state, CLIENT)
    assert isinstance(client, Client)
    return client


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A turn to generate replies, and a loaded model for it."""

    ticket: Ticket
    lease: Lease

    def release(self) -> None:
        """Give both back; calling it again does nothing."""
        self.lease.release()
        self.ticket.release()


class Job:
    """
    The replies to one request, from when the engine has begun them until the last has ended.

    Belongs to the event loop. They go on where nobody listens any more, until `stop`.
    """

    def __init__(
        self,
        services: Services,
        client: Client,
        turn: _Admitted,
        streams: Sequence[ReplyGeneration],
        *,
        keep: Callable[[GeneratedReply], None] | None = None,
        per_prompt: int | None = None,
    ) -> None:
        """
        Begin to read.

        Args:
            services: Of the server.
            client: Whose request they answer.
            turn: The job's, from now on.
            streams: What to read.
            keep: Called on a thread with each reply that has ended, before anybody is told.
            per_prompt: How many of the replies in a row share a prompt; None: all do.
        """
        self.model: Final = turn.lease.model
        self.model_name: Final = turn.lease.name
        self._services = services
        self._client = client
        self._speed = services.metrics.speed(self.model_name, client.namespace)
        self._turn = turn
        self._streams = tuple(stream.count_from(client.since_s) for stream in streams)
        self._keep = keep
        self._per_prompt = per_prompt
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._seen: deque[Event] = deque()  # by `_begun`
        self._generating = self._open = len(self._streams)
        self._ending: Exception | None = None
        self._loop = asyncio.get_running_loop()
        services.jobs.add(self)
        self._tell_end = services.feed.job(client.namespace, "reply", self.model_name)
        # The loop itself remembers no task that it runs.
        self._reading = [
            self._loop.create_task(self._read(choice, stream))
            for choice, stream in enumerate(self._streams)
        ]
        if services.is_ending:  # since the thread began to prepare
            self.end(stopping())

    def stop(self) -> None:
        """End the replies that go on; what was said is kept."""
        for stream in self._streams:
            stream.stop()

    def end(self, error: Exception) -> None:
        """End the replies that go on, and have an error told in place of each that is not complete."""
        self._ending = error
        self.stop()

    def cost(self, replies: Sequence[GeneratedReply]) -> Cost:
        """Return what the replies cost together; see `usage.cost`."""
        return cost_of(replies, self._speed, per_prompt=self._per_prompt)

    def cost_so_far(self) -> Cost | None:
        """Return what the prompts have cost; None where one of the replies has no token yet."""
        found = [stream.usage_so_far() for stream in self._streams]
        usages = [usage for usage in found if usage is not None]
        if len(usages) < len(found):
            return None
        return cost(usages, self._speed, per_prompt=self._per_prompt)

    async def answer(
        self,
        request: Request,
        writer: Writer,
        *,
        stream: bool,
        failed: Callable[[Failed], str] | None = None,
    ) -> Response:
        """
        Return the replies at once, or as server-sent events; where the client goes away, they end.

        A stream begins when the first token is there, or after a second: so what fails at once is
        told with its own status, and headers tell what prompts cost that were read by then.

        Args:
            request: That is answered.
            writer: Has its words.
            stream: Whether it is events.
            failed: Returns what is sent where one reply of a stream has failed and the others go on; None:
                the first that fails ends them all.

        Raises:
            ClientGone: It went away.
            RecollectError: What one of them failed with.
        """
        try:
            if stream:
                await unless_disconnected(request, self._begun(may_fail=failed is not None))
                spent = self.cost_so_far()
                headers = {} if spent is None else spent.headers()
                return _EventStream(self, self._written(writer, failed), writer.media_type, headers)
            replies = await unless_disconnected(request, self._replies())
        except BaseException:
            self.stop()
            raise
        return JSONResponse(writer.whole(replies), headers=self.cost(replies).headers())

    async def _replies(self) -> list[GeneratedReply]:
        ended: dict[int, GeneratedReply] = {}
        async for event in self.told():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Ended):
                ended[event.choice] = event.reply
        return [ended[choice] for choice in sorted(ended)]

    async def _written(
        self, writer: Writer, failed: Callable[[Failed], str] | None
    ) -> AsyncIterator[str]:
        if beginning := writer.begin():
            yield beginning
        async for event in self.told():
            if isinstance(event, Progress):
                yield writer.waiting(event)
            elif isinstance(event, Failed) and failed is not None:
                yield failed(event)
            elif isinstance(event, Failed):
                yield writer.fail(api_error(event.error))
                return
            else:
                yield writer.write(event)
        yield writer.end()

    async def _begun(self, *, may_fail: bool) -> None:
        """
        Wait until all replies have begun, for a second at most; what comes by then is told later.

        Args:
            may_fail: Whether the others go on where one fails.

        Raises:
            RecollectError: One has failed that may not, and was the first of which anything came.
        """
        deadline = self._loop.time() + PROGRESS_EVERY_S
        is_known = False
        while not is_known and self._loop.time() < deadline:
            self._seen.append(event := await self._next())
            is_known = isinstance(event, Progress | Failed) or self.cost_so_far() is not None
        if isinstance(first := self._seen[0], Failed) and not may_fail:
            raise first.error

    async def told(self) -> AsyncIterator[Event]:
        """Yield what happens until the last reply is over; for one reader."""
        left = len(self._streams)
        while left:
            event = self._seen.popleft() if self._seen else await self._next()
            left -= isinstance(event, Ended | Failed)
            yield event

    async def _next(self) -> Event:
        with suppress(asyncio.QueueEmpty):
            return self._events.get_nowait()
        try:
            async with asyncio.timeout(PROGRESS_EVERY_S):
                return await self._events.get()
        except TimeoutError:
            return Progress(tuple(stream.prefill_progress for stream in self._streams))

    async def _read(self, choice: int, stream: ReplyGeneration) -> None:
        """Read one reply to its end, whether anybody listens or not."""
        sent, error = 0, None
        try:
            async for event in stream.async_events():
                if not isinstance(event, TextDelta | ReasoningDelta):
                    self._events.put_nowait(Call(choice, event))
                    continue
                new = (stream.logprobs or ())[sent:]
                sent += len(new)
                kind = Piece if isinstance(event, TextDelta) else Thought
                self._events.put_nowait(kind(choice, event.text, new))
        except Exception as failed:  # noqa: BLE001 - handed to whoever waits for the reply
            error = failed
        finally:
            closing = on_thread(lambda: self._close(stream))
        try:
            await closing
        except Exception as failed:  # noqa: BLE001 - likewise
            error = failed
        if error is None and (rest := (stream.logprobs or ())[sent:]):
            self._events.put_nowait(Piece(choice, "", rest))
        self._events.put_nowait(self._outcome(choice, stream.reply, error))
        self._open -= 1
        if not self._open:
            self._services.jobs.discard(self)
            self._turn.release()
            self._tell_end()

    def _close(self, stream: ReplyGeneration) -> None:
        """End a reply and keep it, on a thread: both may wait."""
        try:
            stream.finish()
        finally:
            # To keep it can take long, where another program holds the journal: the turn is
            # somebody else's by then.
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._generated)
            stream.close()
        if stream.reply is not None and self._keep is not None:
            self._keep(stream.reply)

    def _generated(self) -> None:
        self._generating -= 1
        if not self._generating:
            self._turn.ticket.release()

    def _outcome(
        self, choice: int, reply: GeneratedReply | None, error: Exception | None
    ) -> Ended | Failed:
        """Return how a reply is over; one that `end` has cut short is told that error."""
        if error is None and reply is not None:
            self._services.metrics.observe(self.model_name, self._client, reply)
            if self._ending is None or reply.finish_reason != "cancelled":
                return Ended(choice, reply)
        stopped = RecollectError("The reply was stopped before it began.")
        return Failed(choice, error or self._ending or stopped)


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


class _EventStream(StreamingResponse):
    """The events of a job, which is stopped when they end: the client may have gone away."""

    def __init__(
        self, job: Job, events: AsyncIterator[str], media_type: str, headers: Mapping[str, str]
    ) -> None:
        # Nginx holds responses back unless told otherwise.
        quick = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, media_type=media_type, headers=quick)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.stop()


async def begin(
    request: Request,
    model_name: str | None,
    prepare: Prepare,
    *,
    choices: int = 1,
    keeps: bool = False,
    keep: Callable[[GeneratedReply], None] | None = None,
    per_prompt: int | None = None,
    on_gone: Callable[[], None] = lambda: None,
) -> Job:
    """
    Have replies to a request begun.

    Args:
        request: Which they answer.
        model_name: As the client says it.
        prepare: See there.
        choices: How many they are.
        keeps: Whether what is said goes to the journal. Where another program holds that, the request
            waits for it without a turn, which others can use.
        keep: See `Job`; None: what keeps chats, where the server does.
        per_prompt: See `Job`.
        on_gone: Called where the client goes away before they have begun; may end what prepares them.

    Raises:
        ClientGone: The client went away.
        ApiError: Too much waits already.
        RecollectError: There is no such model, or the request does not fit it.
    """
    services = services_of(request)
    services.hub.resolve(model_name)  # a wrong name need not wait
    client = client_of(request)

    async def start() -> Job:
        if keeps:
            loop = asyncio.get_running_loop()
            # The journal is opened on that thread too.
            await loop.run_in_executor(services.patient, lambda: services.journal.wait())  # noqa: PLW0108 - see above
        turn = await _enter(services, client.namespace, model_name, choices)
        preparing = on_thread(lambda: _prepared(prepare, turn.lease.model))

        def job(streams: Sequence[ReplyGeneration]) -> Job:
            how = keep
            if how is None and services.settings.keeps_chats:
                how = partial(
                    services.kept_chats.keep,
                    lambda: services.journal,
                    turn.lease.model,
                    client.namespace,
                )
            return Job(services, client, turn, streams, keep=how, per_prompt=per_prompt)

        def abandon(_: object) -> None:
            if preparing.cancelled() or preparing.exception() is not None:
                turn.release()
            else:
                job(preparing.result()).stop()

        try:
            streams = await asyncio.shield(preparing)
        except asyncio.CancelledError:
            on_gone()
            preparing.add_done_callback(abandon)  # the thread goes on; what it begins ends at once
            raise
        except BaseException:
            turn.release()
            raise
        return job(streams)

    return await unless_disconnected(request, start())


def _prepared(prepare: Prepare, model: Model) -> list[ReplyGeneration]:
    """Have all replies to a request begun, or none: where one fails, those before it end at once."""
    streams: list[ReplyGeneration] = []
    try:
        for stream in prepare(model):
            streams.append(stream)
    except BaseException:
        for stream in streams:
            stream.stop()
        for stream in streams:
            with suppress(RecollectError), stream:
                pass  # nothing of it was read, so nothing of it is kept
        raise
    return streams


async def with_model(
    request: Request,
    model_name: str | None,
    work: Callable[[Model], _T],
    *,
    on_gone: Callable[[], None] = lambda: None,
) -> _T:
    """
    Do something with a model on a thread, in turn with everything else, and return the result.

    Args:
        request: From whom; while it waits for its turn, nothing is done for a client that goes away.
        model_name: As the client says it.
        work: What to do. It keeps its turn until it has ended, whether anybody waits or not.
        on_gone: Called where the client goes away meanwhile; may end the work.

    Raises:
        ClientGone: The client went away.
        ApiError: Too much waits already.
        RecollectError: There is no such model, or what the work failed with.
    """
    services = services_of(request)
    services.hub.resolve(model_name)
    namespace = client_of(request).namespace

    async def wait() -> _T:
        turn = await _enter(services, namespace, model_name, 1)
        tell_end = services.feed.job(namespace, "work", turn.lease.name)

        def ended(working: asyncio.Future[_T]) -> None:
            turn.release()
            tell_end()
            if not working.cancelled():
                working.exception()  # nobody else may be left to ask, and asyncio would log that

        working = on_thread(lambda: work(turn.lease.model))
        working.add_done_callback(ended)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            on_gone()
            raise

    return await unless_disconnected(request, wait())


async def _enter(
    services: Services, namespace: str, model_name: str | None, weight: int
) -> _Admitted:
    ticket = await services.admission.enter(weight, key=namespace)
    try:
        return _Admitted(ticket, await services.hub.acquire(model_name))
    except BaseException:
        ticket.release()
        raise

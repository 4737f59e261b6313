"""
What the endpoints share, and how a request becomes replies that are being generated.

A request waits for its turn, then for its model; then a thread finds what is known of it and has
the engine begin. From there on readers hand out what comes.
"""

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from time import time
from typing import Final, TypeVar

from fastapi import Request

from recollect.conversation.model import Model
from recollect.conversation.turn import Reply
from recollect.encryption import KV_PURPOSE
from recollect.errors import ConfigError, RecollectError, StoreEncryptedError, StoreError
from recollect.journal.journal import JOURNAL_NAME, Journal
from recollect.kv.disk import STORE_FOLDER, DiskStore
from recollect.kv.maintenance import is_there, open_existing
from recollect.server.access import CLIENT, Client
from recollect.server.hub import Admission, Lease, ModelHub, Ticket, on_thread
from recollect.server.refusals import stopping
from recollect.server.settings import Settings
from recollect.server.streaming import (
    Ended,
    Event,
    EventStream,
    Keeping,
    KeptConversations,
    Readable,
    Readers,
    unless_disconnected,
)
from recollect.server.usage import Cost, Metrics, PrefillSpeed, cost
from recollect.types import Usage

_T = TypeVar("_T")

Prepare = Callable[[Model], Iterable[Readable]]
"""Called on a thread; gives replies that the engine has begun, each as soon as it has."""


_MOST_PATIENT: Final = 64
"""Requests that wait for the journal at once, as many as wait for a turn; threads are made as needed."""


@dataclass(slots=True)
class Services:
    """Everything that lives as long as the server."""

    settings: Settings
    hub: ModelHub
    admission: Admission
    metrics: Metrics
    kept: KeptConversations
    _speeds: dict[tuple[str, str], PrefillSpeed] = field(
        default_factory=lambda: defaultdict(PrefillSpeed)
    )
    started_at: int = field(default_factory=lambda: int(time()))
    """In seconds since 1970."""
    items_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a conversation is read and written again by what it was."""
    patient: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_MOST_PATIENT, "recollect-waits")
    )
    """Threads that wait for the journal, so that those which begin replies do not."""
    is_ending: bool = False
    """Whether nothing begins any more; belongs to the event loop, as does `readers`."""
    readers: set[Readers] = field(default_factory=set)
    """Of the replies that are being read."""
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

    def speed(self, model_name: str, namespace: str) -> PrefillSpeed:
        """Return how fast a model has read the prompts of a namespace; nobody learns of others' prompts."""
        return self._speeds[model_name, namespace]

    @contextmanager
    def store(self) -> Iterator[DiskStore | None]:
        """
        Show the KV that is kept on disk, whatever models are loaded; None: none ever was.

        Raises:
            StoreError: It cannot be opened.
        """
        folder, cipher = self.settings.home / STORE_FOLDER, self.settings.cipher
        if not is_there(folder):
            yield None
            return
        sealer = None if cipher is None else cipher.for_purpose(KV_PURPOSE)
        with closing(open_existing(folder, sealer)) as store:
            yield store

    def wait_for_journal(self) -> None:
        """
        Wait until no other program writes to the journal.

        Raises:
            StoreError: It does not come free, or cannot be written at all.
        """
        self.journal.wait()

    def end(self) -> None:
        """End what goes on, and refuse what waits: each client is told that the server stops."""
        self.is_ending = True
        self.hub.give_up()
        for readers in list(self.readers):
            readers.end(stopping())

    def close(self) -> None:
        """Close what is open; the hub closes itself."""
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


class Job:
    """The replies to one request, as they are generated."""

    def __init__(
        self, model_name: str, model: Model, readers: Readers, speed: PrefillSpeed
    ) -> None:
        self._readers = readers
        self._speed = speed
        self.model: Final = model
        self.model_name: Final = model_name

    def cost(self, replies: Sequence[Reply], *, per_prompt: int | None = None) -> Cost:
        """Return what the replies cost together; see `usage.cost`."""
        return self._cost([reply.usage for reply in replies], per_prompt)

    def cost_so_far(self, *, per_prompt: int | None = None) -> Cost | None:
        """Return what the prompts have cost; None where one of the replies has not begun."""
        usages = self._readers.usages()
        return None if usages is None else self._cost(usages, per_prompt)

    def _cost(self, usages: Sequence[Usage], per_prompt: int | None) -> Cost:
        return cost(usages, self._speed, per_prompt=per_prompt)

    async def replies(self, request: Request) -> list[Reply]:
        """
        Return the whole replies; where the client goes away first, they end at once.

        Raises:
            ClientGone: It went away.
            RecollectError: What one of them failed with.
        """
        try:
            return await unless_disconnected(request, self._readers.replies())
        except BaseException:
            self._readers.stop()
            raise

    async def stream(
        self,
        request: Request,
        encode: Callable[[AsyncIterator[Event]], AsyncIterator[str]],
        *,
        per_prompt: int | None = None,
    ) -> EventStream:
        """
        Return the replies as server-sent events; where the client goes away, they end at once.

        The response begins when the first token is there, or after a second: so what fails at once
        is told with its own status, and headers tell what prompts cost that were read by then.

        Raises:
            ClientGone, RecollectError: As in `replies`.
        """
        try:
            _require_no_failure(await unless_disconnected(request, self._readers.first()))
        except BaseException:
            self._readers.stop()
            raise
        events = encode(self._readers.events())
        spent = self.cost_so_far(per_prompt=per_prompt)
        headers = {} if spent is None else spent.headers()
        return EventStream(events, on_close=self._readers.stop, headers=headers)


def _require_no_failure(event: Event) -> None:
    if isinstance(event, Ended) and event.error is not None:
        raise event.error


async def begin(
    request: Request,
    model_name: str | None,
    prepare: Prepare,
    *,
    choices: int = 1,
    keeps: bool = False,
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

    Raises:
        ClientGone: The client went away.
        ApiError: Too much waits already.
        RecollectError: There is no such model, or the request does not fit it.
    """
    services = services_of(request)
    services.hub.resolve(model_name)  # a wrong name need not wait
    namespace = client_of(request).namespace
    work = _begin(services, namespace, model_name, prepare, choices, keeps=keeps)
    return await unless_disconnected(request, work)


async def _begin(
    services: Services,
    namespace: str,
    model_name: str | None,
    prepare: Prepare,
    choices: int,
    *,
    keeps: bool,
) -> Job:
    loop = asyncio.get_running_loop()
    if keeps:
        await loop.run_in_executor(services.patient, services.wait_for_journal)
    turn = await _enter(services, namespace, model_name, choices)
    name, model = turn.lease.name, turn.lease.model
    speed = services.speed(name, namespace)

    def on_reply(ended: Ended) -> None:
        if ended.reply is not None:
            speed.learn(ended.reply.usage)
            services.metrics.observe(name, ended.reply.usage)

    def read(streams: Sequence[Readable]) -> Readers:
        def on_end() -> None:
            services.readers.discard(readers)
            turn.release()

        readers = Readers(streams, on_reply=on_reply, on_end=on_end)
        services.readers.add(readers)
        # To keep a reply can take long, where another program holds the journal: the turn is
        # somebody else's by then.
        going_on = len(streams)

        def generated() -> None:
            nonlocal going_on
            going_on -= 1
            if not going_on:
                turn.ticket.release()

        for stream in streams:
            if isinstance(stream, Keeping):
                stream.when_generated(partial(_on_loop, loop, generated))
        readers.start()
        if services.is_ending:  # since the thread began to prepare
            readers.end(stopping())
        return readers

    def abandon(preparing: asyncio.Future[list[Readable]]) -> None:
        if preparing.cancelled() or preparing.exception() is not None:
            turn.release()
        else:
            read(preparing.result()).stop()

    preparing = asyncio.ensure_future(on_thread(lambda: _prepared(prepare, model)))
    try:
        streams = await asyncio.shield(preparing)
    except asyncio.CancelledError:
        preparing.add_done_callback(abandon)  # the thread goes on, and what it begins ends at once
        raise
    except BaseException:
        turn.release()
        raise
    return Job(name, model, read(streams), speed)


def _prepared(prepare: Prepare, model: Model) -> list[Readable]:
    """Have all replies to a request begun, or none: where one fails, those before it end at once."""
    streams: list[Readable] = []
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


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(call)


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

        def ended(working: asyncio.Future[_T]) -> None:
            turn.release()
            if not working.cancelled():
                working.exception()  # nobody else may be left to ask, and asyncio would log that

        working = asyncio.ensure_future(on_thread(lambda: work(turn.lease.model)))
        working.add_done_callback(ended)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            on_gone()
            raise

    return await unless_disconnected(request, wait())


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn, and a model for it."""

    ticket: Ticket
    lease: Lease

    def release(self) -> None:
        """Give both back; calling it again does nothing."""
        self.lease.release()
        self.ticket.release()


async def _enter(services: Services, namespace: str, model_name: str | None, weight: int) -> _Turn:
    ticket = await services.admission.enter(weight, key=namespace)
    try:
        return _Turn(ticket, await services.hub.acquire(model_name))
    except BaseException:
        ticket.release()
        raise

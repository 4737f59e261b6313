"""
Runs a server until it is told to stop.

Graceful: after the first signal no request is taken, and replies may go on for a while. After it, or
after a second signal, they end: what was said is in the journal, each client is told in a last event,
and the models are closed.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import monotonic
from typing import Final

import uvicorn
from fastapi import FastAPI

from recollect.server.app import create_app
from recollect.server.connection import bounded_protocol
from recollect.server.hub import ModelHub
from recollect.server.keys import Keyring
from recollect.server.listening import bind
from recollect.server.services import Services
from recollect.server.settings import Limits, Settings

_KEEP_ALIVE_S: Final = 75
"""Longer than the usual pool of a client keeps a connection, so that the client closes it first."""

_LAST_WORDS_S: Final = 2.0
"""How long a reply that is ended may take: the forward pass under way, and the last event."""
_LOOK_EVERY_S: Final = 0.05
"""How often the server looks whether all have ended: half as long as uvicorn, nobody notices either."""


class _Server(uvicorn.Server):
    """Says where it listens, once it does, and what it waits for before it ends."""

    def __init__(
        self,
        config: uvicorn.Config,
        services: Services,
        on_listening: Callable[[int], None],
        on_stopping: Callable[[int], None],
    ) -> None:
        super().__init__(config)
        self._services = services
        self._on_listening = on_listening
        self._on_stopping = on_stopping
        self.failure: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started and not self.should_exit:
            listening = [one for server in self.servers for one in server.sockets]
            self._on_listening(listening[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """
        Stop listening, let replies end, and close what is open.

        In place of uvicorn's own, which cancels the tasks of requests, and the app's when it is told a
        second time: each of them would leave a traceback, and its client without a last event.
        """
        for one in (*self.servers, *(sockets or ())):
            one.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        admission, tasks = self._services.admission, self.server_state.tasks
        if self.failure is None:  # which is told by itself
            self._on_stopping(admission.running + admission.waiting)
        shutdown_s = self._services.settings.limits.shutdown_s
        await _until(lambda: not tasks or self.force_exit, shutdown_s)
        self._services.end()
        await _until(lambda: not tasks, _LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # the client does not read, or the work cannot be ended
        await _until(lambda: not tasks, _LAST_WORDS_S)
        await self.lifespan.shutdown()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Stop at a signal, and then end as a command that did what it was told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def fail(self, error: Exception) -> None:
        """Stop, because there is no model."""
        self.failure = error
        self.should_exit = True


async def _until(is_so: Callable[[], bool], most_s: float) -> None:
    """Wait until something is so, and no longer than this many seconds."""
    deadline = monotonic() + most_s
    while not is_so() and monotonic() < deadline:
        await asyncio.sleep(_LOOK_EVERY_S)


def serve(
    settings: Settings,
    hub: ModelHub,
    keyring: Keyring,
    *,
    on_listening: Callable[[int], None] = lambda _: None,
    on_stopping: Callable[[int], None] = lambda _: None,
) -> None:
    """
    Serve until SIGINT or SIGTERM.

    Where it listens is taken before the model is loaded, which may take minutes. A load is not
    waited for: where `hub.is_loading` still says so afterwards, a thread goes on with it.

    Args:
        settings: Among others, where to listen; port 0 takes a free one.
        hub: See `create_app`.
        keyring: See `create_app`.
        on_listening: Called with the port when the first request can come.
        on_stopping: Called when no request is taken any more, with the number of replies that may go
            on for `settings.limits.shutdown_s`.

    Raises:
        ConfigError: The address cannot be listened on.
        RecollectError: The default model cannot be loaded.
    """

    def on_failure(error: Exception) -> None:
        server.fail(error)

    app = create_app(settings, hub, keyring, on_failure=on_failure)
    config = uvicorn_config(app, settings.limits)
    server = _Server(config, app.state.services, on_listening, on_stopping)
    sockets = bind(settings.host, settings.port)
    try:
        server.run(sockets)
    finally:
        for one in sockets:
            one.close()
    if server.failure is not None:
        raise server.failure


def uvicorn_config(app: FastAPI, limits: Limits) -> uvicorn.Config:
    """Return how uvicorn runs an app: what it reads is bounded, and only HTTP is spoken."""
    return uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        ws="none",  # no call here is one, and an upgrade would pass by what bounds HTTP
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,  # ours says less: no query strings, no addresses
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(limits.shutdown_s),
    )

"""
Runs a server until it is told to stop.

Graceful: after the first signal no request is taken, replies may go on for a while, then they end
as cancelled, what was said is in the journal, and the models are closed.
"""

import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

import uvicorn
from fastapi import FastAPI

from recollect.server.app import create_app
from recollect.server.connection import bounded_protocol
from recollect.server.hub import ModelHub
from recollect.server.keys import Keyring
from recollect.server.listening import bind
from recollect.server.settings import Limits, Settings

_KEEP_ALIVE_S: Final = 75
"""Longer than the usual pool of a client keeps a connection, so that the client closes it first."""


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self.failure: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started and not self.should_exit:
            listening = [one for server in self.servers for one in server.sockets]
            self._on_listening(listening[0].getsockname()[1])

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


def serve(
    settings: Settings,
    hub: ModelHub,
    keyring: Keyring,
    *,
    on_listening: Callable[[int], None] = lambda _: None,
) -> None:
    """
    Serve until SIGINT or SIGTERM.

    Where it listens is taken before the model is loaded, which may take minutes.

    Args:
        settings: Among others, where to listen; port 0 takes a free one.
        hub: See `create_app`.
        keyring: See `create_app`.
        on_listening: Called with the port when the first request can come.

    Raises:
        ConfigError: The address cannot be listened on.
        RecollectError: The default model cannot be loaded.
    """

    def on_failure(error: Exception) -> None:
        server.fail(error)

    app = create_app(settings, hub, keyring, on_failure=on_failure)
    server = _Server(uvicorn_config(app, settings.limits), on_listening)
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

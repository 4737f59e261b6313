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

from recollect.server.app import create_app
from recollect.server.hub import ModelHub
from recollect.server.keys import Keyring
from recollect.server.settings import Settings

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

    Args:
        settings: Among others, where to listen; port 0 takes a free one.
        hub: See `create_app`.
        keyring: See `create_app`.
        on_listening: Called with the port when the first request can come.

    Raises:
        RecollectError: The default model cannot be loaded.
        SystemExit: The address cannot be listened on.
    """

    def on_failure(error: Exception) -> None:
        server.fail(error)

    app = create_app(settings, hub, keyring, on_failure=on_failure)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,  # ours says less: no query strings, no addresses
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(settings.limits.shutdown_s),
    )
    server = _Server(config, on_listening)
    server.run()
    if server.failure is not None:
        raise server.failure

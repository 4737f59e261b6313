"""
Counts and logs each request: what was asked for, the answer's status, how long it took.

Neither bodies nor keys are logged.
"""

import logging
from time import monotonic
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recollect.server.metrics import Metrics
from recollect.server.security import CLIENT

_log = logging.getLogger(__name__)

_WATCHED: Final = frozenset({"/health", "/metrics"})
"""What is asked for every few seconds, by machines."""


class Counted:
    """An ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the server's own start and end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            # The pattern and not the path, which clients can make up without end.
            route = scope.get("route")
            endpoint = getattr(route, "path", "other")
            self._metrics.requests.labels(endpoint, status).inc()
            client = scope.get("state", {}).get(CLIENT)
            _log.log(
                logging.DEBUG if endpoint in _WATCHED else logging.INFO,
                "%s %s %d %.3f s %s",
                scope["method"],
                endpoint,
                status,
                monotonic() - begun,
                "-" if client is None else client.name,
            )

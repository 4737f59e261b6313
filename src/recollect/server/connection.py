"""
A connection: how much of a request it may bring before the request is understood, and how long it may take.

uvicorn's httptools protocol has neither limit nor deadline for what it has not understood yet, and
joins a header that comes in pieces anew with each piece. Here both are bounded before any key is
looked at, so that whoever can connect can hold a socket for a few seconds, and nothing else.
"""

import asyncio
import json
from http import HTTPStatus
from typing import ClassVar, Final, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from recollect.server.errors import ApiError, openai_body
from recollect.server.settings import Limits

_GRACE_S: Final = 5.0
"""How much later than the app's own deadline a connection is closed: the app's has the better words."""


class BoundedProtocol(HttpToolsProtocol):
    """
    httptools' protocol with a limit on what is not understood yet, and with deadlines.

    What is not understood yet is a header without its end, in front of a body or behind it, and
    what stands between the pieces of a body.

    Belongs to the event loop.

    Invariants:
        1. While a part of a request is awaited there is a timer; between requests uvicorn has one.
        2. Of one request the parser never holds more than `limits.header_bytes` that nothing came of,
           and as much again where it began in the same piece that another ended in.
    """

    limits: ClassVar[Limits]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin to wait for a first request."""
        self._awaited: Literal["header", "body"] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pending_bytes = 0
        super().connection_made(transport)
        self._await("header")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._await(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hand over what came, in pieces that end where the limit is reached."""
        if self._awaited is None:
            self._await("header")
        start, most = 0, self.limits.header_bytes
        while start < len(data) and not self.transport.is_closing():
            piece = data[start : start + most - self._pending_bytes]
            start += len(piece)
            self._pending_bytes += len(piece)
            super().data_received(piece)
            if self._pending_bytes >= most:
                self._refuse(
                    ApiError(
                        f"The headers are larger than {most:,} bytes: send fewer, or shorter ones.",
                        status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                        code="headers_too_large",
                    )
                )

    def on_message_begin(self) -> None:
        """Note that a request has begun."""
        super().on_message_begin()
        self._await("header")

    def on_headers_complete(self) -> None:
        """Note that a body is awaited now, which may be empty."""
        self._await("body")
        self._pending_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Note that a piece of a body was understood."""
        self._pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that a request is whole."""
        self._await(None)
        self._pending_bytes = 0
        super().on_message_complete()

    def _await(self, part: Literal["header", "body"] | None) -> None:
        """Give the client time for a part of a request."""
        self._awaited = part
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if part is not None:
            seconds = self._seconds(part)
            self._timer = self.loop.call_later(seconds, self._too_slow, part, seconds)

    def _seconds(self, part: Literal["header", "body"]) -> float:
        return self.limits.header_s if part == "header" else self.limits.body_s + _GRACE_S

    def _too_slow(self, part: Literal["header", "body"], seconds: float) -> None:
        if self.flow.read_paused or (part == "header" and self._answering() is not None):
            # It is we who make the client wait: another of its requests is being answered.
            self._timer = self.loop.call_later(seconds, self._too_slow, part, seconds)
        else:
            self._refuse(
                ApiError(
                    f"The {part} did not come within {seconds:g} s: send it at once.",
                    status=HTTPStatus.REQUEST_TIMEOUT,
                    code="request_timeout",
                )
            )

    def _answering(self) -> RequestResponseCycle | None:
        """Return the request that is being answered; None where none is."""
        cycle: object = self.cycle  # None before the first, which uvicorn's types do not say
        if isinstance(cycle, RequestResponseCycle) and not cycle.response_complete:
            return cycle
        return None

    def _refuse(self, error: ApiError) -> None:
        """Close the connection, with an answer where none has begun."""
        answering = self._answering()
        has_begun = answering is not None and answering.response_started
        if not self.transport.is_closing() and not has_begun:
            body = json.dumps(openai_body(error)).encode()
            phrase = HTTPStatus(error.status).phrase
            head = (
                f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


def bounded_protocol(limits: Limits) -> type[BoundedProtocol]:
    """Return the protocol with these limits, as uvicorn takes it: a class that it makes objects of."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})

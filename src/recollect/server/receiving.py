"""
Bodies as they come in: how large one may be, how long it may take, and how much all hold together.

Belongs to the event loop.
"""

import asyncio
from http import HTTPStatus
from typing import Final

from starlette.types import Message, Receive

from recollect.server.errors import ApiError
from recollect.server.settings import Limits

_RETRY_S: Final = 5
"""After how many seconds a body is worth another try that found no room: replies take seconds."""


class HeldBytes:
    """How much the bodies of all requests hold that are being received or answered."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    def take(self, count: int) -> bool:
        """Take room, and return whether there was any."""
        if self._taken + count > self._most:
            return False
        self._taken += count
        return True

    def give_back(self, count: int) -> None:
        """Give back what was taken."""
        self._taken -= count


class LimitedBody:
    """Receives a body, and refuses to go on where it grows or takes beyond the limits; `close` it."""

    def __init__(self, receive: Receive, limits: Limits, held: HeldBytes) -> None:
        self._receive = receive
        self._limits = limits
        self._held = held
        self._received = 0
        self._is_whole = False
        self._deadline_s: float | None = None

    async def __call__(self) -> Message:
        """
        Return the next piece, or that the client is gone.

        Raises:
            ApiError: The body is too large, too slow, or all together are too large.
        """
        if self._is_whole:
            return await self._receive()
        if self._deadline_s is None:
            self._deadline_s = asyncio.get_running_loop().time() + self._limits.body_s
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError as cause:
            raise ApiError(
                f"The body did not come within {self._limits.body_s:g} s: send it at once.",
                status=HTTPStatus.REQUEST_TIMEOUT,
                code="request_timeout",
                headers={"Connection": "close"},
            ) from cause
        count = len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._received + count > self._limits.body_bytes:
            raise too_large(self._limits.body_bytes)
        if not self._held.take(count):
            raise ApiError(
                "Too many large requests are being answered: ask again in some seconds.",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                kind="server_error",
                code="out_of_memory",
                headers={"Retry-After": str(_RETRY_S)},
            )
        self._received += count
        return message

    def close(self) -> None:
        """Give back the room that the body took."""
        self._held.give_back(self._received)
        self._received = 0


def too_large(limit: int) -> ApiError:
    """Return what a client is told whose body is larger than the limit."""
    return ApiError(
        f"The request is larger than {limit:,} bytes: send less.",
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        code="request_too_large",
        param="body",
    )

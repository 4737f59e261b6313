"""
Bodies: from bytes to what an endpoint takes, or to one sentence about what is wrong.

Everything that comes in passes here once: that it is JSON, how much and how deep it is, that its
numbers are numbers and its texts are whole characters. Nothing behind it needs to look again. What is
done for a body is bounded by `Limits`, and large ones are read on a thread.
"""

import asyncio
import math
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import from_json

from recollect.server.errors import ApiError
from recollect.server.fields import Body
from recollect.server.mistakes import Place, name_of, wrong_body
from recollect.server.settings import Limits

_SMALL_BYTES: Final = 64 * 2**10
_FEW_VALUES: Final = 1000
"""
A body of so many bytes and so few values is read on the event loop, in a millisecond or two; a switch of
threads and back takes a tenth of one, which each ordinary request would pay.
"""
_READERS: Final = 2
"""Threads that read bodies: one large body does not keep the others waiting."""
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{,]', re.DOTALL)
"""A string of JSON, or what a value or a member begins with or is parted from the next by."""
_TOKENS_A_VALUE: Final = 3
"""Most that one value brings: its comma or bracket, its name and its text."""


class Bodies:
    """Reads bodies. Safe from any thread; `close` it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="recollect-body")

    async def read(self, data: bytes, kind: type[Body]) -> Body:
        """
        Return a body as a model.

        Raises:
            ApiError: It is none; the message names the place.
        """
        if len(data) <= _SMALL_BYTES and _most_values(data) <= _FEW_VALUES:
            return read_body(data, kind, self._limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, read_body, data, kind, self._limits)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class BodyRoute(APIRoute):
    """A route whose body is read by the app's `Bodies`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer
        kind = self.body_field.field_info.annotation
        assert isinstance(kind, type), "a body is one model"
        assert issubclass(kind, Body), "a body is one model"

        async def handle(request: Request) -> Response:
            return await answer(_ReadRequest(request, kind))

        return handle


class _ReadRequest(Request):
    """A request whose JSON is a model already, which FastAPI then takes as it is."""

    def __init__(self, request: Request, kind: type[Body]) -> None:
        super().__init__(request.scope, request.receive)
        self._kind = kind

    async def json(self) -> Body:
        """Return the body as a model."""
        bodies = self.app.state.bodies
        assert isinstance(bodies, Bodies)
        return await bodies.read(await self.body(), self._kind)


def read_body(data: bytes, kind: type[Body], limits: Limits) -> Body:
    """
    Return a body as a model.

    Raises:
        ApiError: It is none; the message names the place.
    """
    value = read_json(data, limits)
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise wrong_body(found, value) from None  # the cause holds the whole body
    body.prepare()
    return body


def read_json(data: bytes, limits: Limits) -> Any:
    """
    Return a JSON value that can be written again: whole characters, finite numbers.

    Raises:
        ApiError: It is no JSON, or larger or deeper than `limits` allow.
    """
    if _has_more_values(data, limits.values):
        raise _refused(
            f"The body has more than {limits.values:,} values: send less in one request."
        )
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as cause:
        why = str(cause)
        if "hex escape" in why:
            why += r"; half a character, such as \ud800 without its other half, is none"
        raise _refused(f"The body is not JSON: {why}.") from None
    _check(value, limits.depth)
    return value


def _most_values(data: bytes) -> int:
    """Return how many values there are at most: what is in texts is counted too."""
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _has_more_values(data: bytes, most: int) -> bool:
    """Return whether there are more values than this; reads no farther than that shows."""
    if _most_values(data) < most:
        return False  # nearly always: only long texts have so many commas
    values = 0
    for seen, token in enumerate(_TOKEN.finditer(data)):
        values += data[token.start()] != ord('"')
        if values >= most or seen > _TOKENS_A_VALUE * most:
            return True
    return False


def _check(value: Any, most_deep: int) -> None:
    """Check each number, and how deep lists and objects are."""
    pending: list[tuple[Any, Place]] = [(value, ())]
    while pending:
        item, place = pending.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise _refused("The number is larger than JSON's readers can hold.", place)
        if not isinstance(item, dict | list):
            continue
        if len(place) >= most_deep:
            raise _refused(
                f"Lists and objects are more than {most_deep} deep in each other: make it flatter.",
                place[:3],
            )
        inside = item.items() if isinstance(item, dict) else enumerate(item)
        pending += [
            (part, (*place, name)) for name, part in inside if isinstance(part, dict | list | float)
        ]


def _refused(why: str, place: Place = ()) -> ApiError:
    param = name_of(place)
    where = "" if param is None else f"{param}: "
    return ApiError(f"{where}{why}", code="invalid_json", param=param or "body")

"""
What every request passes before an endpoint sees it, from the socket on.

In this order: the connection is bounded in bytes and time, since uvicorn's protocol bounds neither
for what it has not understood yet; the request is counted and logged, without its body or key; a web
page of another origin, or under another host name, is refused; the API key tells who the client is;
and the body is bounded, alone and together with all that are held.

A key is a namespace of its own: what is said, kept and computed under one is neither visible to nor
reused by another. The key itself is never written down; the file holds hashes of keys that we drew
at random, so that a fast hash is enough.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from pathlib import Path
from time import monotonic, perf_counter
from typing import ClassVar, Final, Literal, Self

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from recollect import files
from recollect.errors import ConfigError, StoreCorruptError, StoreError
from recollect.server.page import PREFIX
from recollect.server.refusals import ApiError, error_response, openai_body
from recollect.server.settings import LOOPBACK_NAMES, Limits, Settings
from recollect.server.usage import Metrics

_log = logging.getLogger(__name__)

KEYS_NAME: Final = "api-keys.json"
_MOST_BYTES: Final = 16 * files.MIB
"""Of the file: a hundred thousand keys."""
_PREFIX: Final = "rk-"


@dataclass(frozen=True, slots=True)
class Client:
    """Who a request is from."""

    name: str
    """For logs."""
    namespace: str
    """Under which everything of the client's is kept; empty on a server without keys."""
    is_operator: bool = False
    """Whether the client may read the metrics, which count what all do, and make prefixes public."""
    agent: str = ""
    """The program that it is, as the first word of its User-Agent says."""
    since_s: float = 0.0
    """When its request came, as `time.perf_counter` has it."""


ANYBODY: Final = Client("local", "", is_operator=True)
"""The client of a server without keys: whoever can reach this machine's own interface."""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """What is kept of a key."""

    name: str
    hash: str
    is_operator: bool = False


def hash_key(key: str) -> str:
    """Return what may be kept of a key."""
    return _digest(key, b"recollect key")


def namespace_of(key: str) -> str:
    """Return the namespace of a key; says nothing about the key, and nothing about its hash."""
    return _digest(key, b"recollect space")


def _digest(key: str, purpose: bytes) -> str:
    data = key.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=32, person=purpose).hexdigest()


class Keyring:
    """The keys that a server takes. Immutable, so any thread may ask."""

    def __init__(self, keys: Iterable[StoredKey] = ()) -> None:
        self._keys: Final = tuple(keys)

    def __len__(self) -> int:
        """Return how many there are; 0: everybody is let in."""
        return len(self._keys)

    def client(self, key: str | None) -> Client | None:
        """Return who has a key; None where nobody has. Takes as long whether and whoever has."""
        if not self._keys:
            return ANYBODY
        presented = hash_key(key or "")
        found = None
        for stored in self._keys:
            if hmac.compare_digest(presented, stored.hash):
                found = stored
        if found is None or not key:
            return None
        return Client(found.name, namespace_of(key), found.is_operator)


class KeyFile:
    """
    The keys in a file, which its owner alone can read.

    A key is in the file as its hash; `add` returns the key itself, once.
    """

    def __init__(self, path: Path) -> None:
        self.path: Final = path

    @classmethod
    def in_home(cls, home: Path) -> Self:
        """Return the file of a home folder."""
        return cls(home / KEYS_NAME)

    def read(self) -> list[StoredKey]:
        """
        Return the keys; none where there is no file.

        Raises:
            StoreCorruptError: It holds something else.
        """
        try:
            text = files.read_text(self.path, most_bytes=_MOST_BYTES)
        except FileNotFoundError:
            return []
        except OSError as cause:
            raise StoreError(
                f"{self.path} cannot be read ({cause.strerror or cause}): allow it."
            ) from cause
        try:
            return [StoredKey(**entry) for entry in json.loads(text)["keys"]]
        except (ValueError, TypeError, KeyError, RecursionError) as cause:
            raise StoreCorruptError(
                f"{self.path} does not hold keys: repair it, or remove it and add keys anew."
            ) from cause

    def add(self, name: str, *, is_operator: bool = False) -> str:
        """
        Draw a key, keep its hash, and return it: it cannot be shown again.

        Raises:
            ConfigError: There is a key of that name, or that is no name.
            StoreError: The file cannot be written; it is as it was.
        """
        keys = self.read()
        if not name.isprintable() or not name.strip():
            raise ConfigError(f"{name!r} cannot be the name of a key: take printable characters.")
        if any(stored.name == name for stored in keys):
            raise ConfigError(f"There is a key {name!r} already: remove it, or take another name.")
        key = _PREFIX + secrets.token_urlsafe(32)
        self._write([*keys, StoredKey(name, hash_key(key), is_operator)])
        return key

    def remove(self, name: str) -> None:
        """
        Let a key be refused from the next start on; what was kept under it stays.

        Raises:
            ConfigError: There is none of that name.
            StoreError: The file cannot be written; it is as it was.
        """
        keys = self.read()
        left = [stored for stored in keys if stored.name != name]
        if len(left) == len(keys):
            raise ConfigError(f"There is no key {name!r}: `recollect keys list` shows them.")
        self._write(left)

    def _write(self, keys: Iterable[StoredKey]) -> None:
        text = json.dumps({"keys": [asdict(stored) for stored in keys]}, indent=1)
        temporary = self.path.with_suffix(f".{secrets.token_hex(8)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            temporary.replace(self.path)
        except OSError as cause:
            raise StoreError(
                f"{self.path} cannot be written ({cause.strerror or cause}): see that this is allowed, "
                "and that the disk has room."
            ) from cause
        finally:
            with suppress(OSError):
                temporary.unlink()


def keyring(file: KeyFile, given: Iterable[str]) -> Keyring:
    """
    Return the keys in a file and those given by hand, which are an operator's.

    Raises:
        ConfigError: No request can carry one of those given by hand.
        StoreError: The file cannot be read.
    """
    by_hand = [
        StoredKey(f"key {n}", hash_key(_require_key(key)), True) for n, key in enumerate(given, 1)
    ]
    return Keyring([*file.read(), *by_hand])


def _require_key(key: str) -> str:
    """
    Return a key that a header can carry; the error does not quote it.

    Raises:
        ConfigError: It is empty or blank, has blanks around it, which headers lose, or characters
            that not every client sends the same.
    """
    if not key.strip():
        raise ConfigError(
            "The API key in --api-key or RECOLLECT_API_KEY is empty: give a key, or leave both out."
        )
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError(
            "No request can carry the API key in --api-key or RECOLLECT_API_KEY: take printable "
            "ASCII characters, with no blank before or after them."
        )
    return key


_RETRY_S: Final = 5
"""When a client may try again whose body found no room: replies take seconds."""


class HeldBytes:
    """Counts the bytes of all bodies that are being received or answered, up to a limit."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    def take(self, count: int) -> bool:
        """Reserve bytes; return whether they fit."""
        if self._taken + count > self._most:
            return False
        self._taken += count
        return True

    def give_back(self, count: int) -> None:
        """Free bytes that were reserved."""
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


_AGENT_CHARACTERS: Final = 40
CLIENT: Final = "recollect.client"
"""The key in an ASGI scope under which the client of a request is found."""
_OPEN_PATHS: Final = frozenset({"/", "/health"})
"""What answers without a key: it says nothing that a port scan does not. So do the files of the page."""
_JSON: Final = "application/json"


class Security:
    """
    An ASGI middleware that lets a request through with its client noted, or refuses it.

    Belongs to the event loop; any number of requests pass at once.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, keyring: Keyring) -> None:
        self._app = app
        self._settings = settings
        self._keyring = keyring
        self._held = HeldBytes(settings.limits.bodies_bytes)
        self._names = frozenset({*LOOPBACK_NAMES, *settings.allowed_hosts})
        self._checks_host = settings.is_local
        """A server that all machines can reach has names that we do not know; there, keys decide."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the server's own start and end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_origin(headers)
            scope.setdefault("state", {})[CLIENT] = self._client(scope["path"], headers)
            _check_content(scope["method"], headers, self._settings.limits.body_bytes)
        except ApiError as refused:
            await error_response(scope["path"], refused)(scope, receive, send)
            return
        body = LimitedBody(receive, self._settings.limits, self._held)
        try:
            await self._app(scope, body, send)
        finally:
            body.close()

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._checks_host and name.lower() not in self._names:
            raise ApiError(
                f"This server does not go by the name {name!r}: use 127.0.0.1, or let it have that "
                "name by --allow-host.",
                status=403,
                code="host_not_allowed",
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        own = {f"{scheme}://{headers.get('host')}" for scheme in ("http", "https")}
        known = own | {*self._settings.cors_origins}
        is_foreign = origin is not None and origin not in known
        # A page can load an image or a script without naming its origin.
        is_embedded = origin is None and headers.get("sec-fetch-site") in {
            "cross-site",
            "same-site",
        }
        if is_foreign or is_embedded:
            raise ApiError(
                f"Web pages of {origin or 'other sites'} may not call this server: --cors lets "
                "them.",
                status=403,
                code="origin_not_allowed",
            )

    def _client(self, path: str, headers: Headers) -> Client | None:
        client = self._keyring.client(_presented_key(headers))
        if client is None and path not in _OPEN_PATHS and not path.startswith(PREFIX):
            raise ApiError(
                "The API key is missing or wrong: send `Authorization: Bearer KEY`.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if client is None:
            return None
        agent = (
            headers.get("user-agent", "").split("/")[0].split(" (")[0].strip()[:_AGENT_CHARACTERS]
        )
        return replace(client, agent=agent, since_s=perf_counter())


def _presented_key(headers: Mapping[str, str]) -> str | None:
    """Return the key that a request carries, as OpenAI's or as Anthropic's clients send it."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")


def _check_content(method: str, headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_large(limit)
    has_body = length != "0" or "transfer-encoding" in headers
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    # Forms and plain text are what a page can send without asking; JSON is not.
    if method in {"POST", "PUT", "PATCH"} and has_body and media != _JSON:
        raise ApiError(
            f"The body has to be JSON: send `Content-Type: {_JSON}`.",
            status=415,
            code="unsupported_media_type",
        )


_WATCHED: Final = frozenset({"/health", "/metrics"})
"""Endpoints that monitoring asks every few seconds: not worth a line of the log each."""


class Counted:
    """An ASGI middleware around everything else: counts each request and logs it."""

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
    grace_s: ClassVar[float] = 5.0
    """How much later than the app's own deadline for a body the connection is closed: the app's answer
    says more."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin to wait for a first request."""
        self._awaited: Literal["header", "body"] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.pending_bytes = 0
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
            piece = data[start : start + most - self.pending_bytes]
            start += len(piece)
            self.pending_bytes += len(piece)
            super().data_received(piece)
            if self.pending_bytes >= most:
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
        self.pending_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Note that a piece of a body was understood."""
        self.pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that a request is whole."""
        self._await(None)
        self.pending_bytes = 0
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
        return self.limits.header_s if part == "header" else self.limits.body_s + self.grace_s

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

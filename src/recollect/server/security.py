"""
What every request passes before anything looks at it: who it is from, and how large it is.

A web page that a user visits can make the browser send requests to this machine. Such a request
names another origin, or another host where the page's own name was pointed here; both are refused.
"""

from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from recollect.server.errors import ApiError, error_response
from recollect.server.keys import Client, Keyring
from recollect.server.receiving import HeldBytes, LimitedBody, too_large
from recollect.server.settings import LOOPBACK_NAMES, Settings

CLIENT: Final = "recollect.client"
"""The key in an ASGI scope under which the client of a request is found."""
_OPEN_PATHS: Final = frozenset({"/health"})
"""What answers without a key: it says nothing that a port scan does not."""
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
        """A server that all machines can reach has names that we do not know; there, keys decide."""
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        known = LOOPBACK_NAMES | {*self._settings.allowed_hosts}
        if self._settings.is_local and name.lower() not in known:
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
        if client is None and path not in _OPEN_PATHS:
            raise ApiError(
                "The API key is missing or wrong: send `Authorization: Bearer KEY`.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return client


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

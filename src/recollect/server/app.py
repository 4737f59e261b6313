"""
Puts a server together: endpoints, what they share, and what every request passes first.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.exceptions import HTTPException as AnyHttpException

from recollect._version import __version__
from recollect.errors import RecollectError
from recollect.server import (
    chat,
    checkpoints,
    completions,
    conversations,
    messages,
    prewarm,
    responses,
    status,
)
from recollect.server.admission import Admission
from recollect.server.bodies import Bodies
from recollect.server.errors import ApiError, ClientGone, api_error, error_response
from recollect.server.hub import ModelHub
from recollect.server.kept import KeptConversations
from recollect.server.keys import Keyring
from recollect.server.metrics import Metrics
from recollect.server.mistakes import quoted, wrong_request
from recollect.server.requests import Counted
from recollect.server.security import Security
from recollect.server.services import Services
from recollect.server.settings import Settings

_CLIENT_GONE: Final = 499
"""What proxies note of a request whose client went away; nobody reads it."""

_SILENT: Final[Any] = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""
FastAPI, from 0.165 at the latest, can report requests and what they failed with to OpenTelemetry, and to
another machine where variables that are meant for other programs say so. Earlier ones ignore this.
"""

_log = logging.getLogger(__name__)

_ROUTERS: Final = (
    chat.router,
    completions.router,
    responses.router,
    conversations.router,
    checkpoints.router,
    messages.router,
    prewarm.router,
    status.router,
)


def create_app(
    settings: Settings,
    hub: ModelHub,
    keyring: Keyring,
    *,
    on_failure: Callable[[Exception], None] = lambda _: None,
) -> FastAPI:
    """
    Return a server as an ASGI app; it loads the default model when it starts.

    Args:
        settings: See there.
        hub: Its models; closed when the app shuts down.
        keyring: Whom to let in.
        on_failure: Called on the event loop where the default model cannot be loaded.
    """
    limits = settings.limits
    admission = Admission(concurrent=limits.concurrent, queue=limits.queue)
    metrics = Metrics(
        loaded=hub.loaded, running=lambda: admission.running, waiting=lambda: admission.waiting
    )
    bodies = Bodies(limits)
    services = Services(settings, hub, admission, metrics, KeptConversations())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load_default(hub, on_failure))
        try:
            yield
        finally:
            loading.cancel()
            await hub.close()
            services.close()
            bodies.close()

    app = FastAPI(
        title="recollect",
        version=__version__,
        telemetry=_SILENT,
        docs_url=None,  # these pages run scripts of another server's, in this one's name
        redoc_url=None,
        description=(
            "Conversations with local language models that never read a token twice. "
            "The APIs of OpenAI and Anthropic, and rewind, fork, checkpoint and prewarm beside them."
        ),
        lifespan=lifespan,
    )
    app.state.services, app.state.bodies = services, bodies
    for router in _ROUTERS:
        app.include_router(router)
    _answer_errors(app)
    # The last that is added is the first that a request passes. A browser asks whether a page may
    # call without the key that the call itself will have, so that is answered before keys are asked for.
    app.add_middleware(Security, settings=settings, keyring=keyring)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
            # The operator named the page, so it may also be one of another network's.
            allow_private_network=True,
        )
    app.add_middleware(Counted, metrics=metrics)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Let every error be answered in the shape of the API that the request was made to."""

    async def refuse(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, api_error(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(request.url.path, wrong_request(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, AnyHttpException)
        return error_response(request.url.path, _routed_nowhere(request, error))

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    app.add_exception_handler(Exception, refuse)  # a bug: its traceback goes to the log
    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(RecollectError, refuse)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(AnyHttpException, http)
    app.add_exception_handler(ClientGone, gone)


def _routed_nowhere(request: Request, error: AnyHttpException) -> ApiError:
    """Return what a client is told that has called what there is not."""
    where, code = quoted(request.url.path), None
    message = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        code = "not_found"
        message = (
            f"There is nothing at {where}: the calls are under /v1, such as "
            "/v1/chat/completions, and /openapi.json describes them all."
        )
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        code = "method_not_allowed"
        message = f"{where} does not take {request.method}: /openapi.json describes what it takes."
    headers = dict(error.headers or {})
    return ApiError(message, status=error.status_code, code=code, headers=headers)


async def _load_default(hub: ModelHub, on_failure: Callable[[Exception], None]) -> None:
    """Load the default model while the first requests are taken already."""
    try:
        (await hub.acquire(None)).release()
    except ApiError:
        pass  # it is given up, because the server stops
    except RecollectError as error:
        hub.failure = error
        on_failure(error)

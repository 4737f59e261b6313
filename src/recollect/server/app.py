"""
Put a server together, and run it until it is told to stop.

Here are the endpoints that say how a server is (`/v1/models`, `/health`, `/metrics`, and
for Ollama's clients `/api/tags` and others), how every error becomes a response, and how the process
ends: after the first signal no request is taken, and replies may go on for a while. After it, or after
a second signal, they end: what was said is in the journal, each client is told in a last event, and the
models are closed.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from time import monotonic
from typing import Any, Final

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as AnyHttpException

from recollect import __version__
from recollect.conversation.feed import Feed
from recollect.errors import EngineUnavailableError, RecollectError
from recollect.journal.requests import RequestLog
from recollect.server import (
    anthropic,
    browsing,
    chat_completions,
    completions,
    conversation_routes,
    explore_routes,
    ollama,
    page,
    responses,
    watching,
)
from recollect.server.access import Counted, Keyring, Security, bounded_protocol
from recollect.server.fields import Bodies, Body, BodyRoute, Ignored
from recollect.server.hub import Admission, ModelHub
from recollect.server.refusals import (
    ApiError,
    ClientGone,
    api_error,
    error_response,
    not_found,
    nothing_at,
    quoted,
    wrong_request,
)
from recollect.server.services import Services, client_of, services_of
from recollect.server.settings import Limits, Settings, bind
from recollect.server.streaming import Watchers
from recollect.server.usage import CONTENT_TYPE, Metrics

router = APIRouter(tags=["Server"])
_log: Final = logging.getLogger(__name__)


@router.get("/v1/models")
def list_models(request: Request) -> dict[str, Any]:
    """Return the models that a request may name."""
    services = services_of(request)
    names = (*services.hub.names, *services.hub.aliases)
    return {"object": "list", "data": [_model(services, name) for name in names]}


@router.get("/v1/models/{model_id:path}")
def get_model(model_id: str, request: Request) -> dict[str, Any]:
    """Return one of them."""
    services = services_of(request)
    services.hub.resolve(model_id)
    return _model(services, model_id)


@router.get("/health")
def health(request: Request) -> JSONResponse:
    """
    Return 200 where requests are answered, and 503 while the model is loading or cannot be loaded, or no
    engine elsewhere answers that models have.
    """
    hub = services_of(request).hub
    state = "ok" if hub.is_ready else "loading" if hub.failure is None else "failed"
    replicas = [one for model in hub.loaded().values() for one in model.replicas()]
    up = sum(one.is_up for one in replicas)
    waits = not hub.is_ready and isinstance(hub.failure, EngineUnavailableError)
    if waits or (replicas and not up):
        state = "no engine"
    engines = {"engines": {"up": up, "all": len(replicas)}} if replicas else {}
    told = {"status": state, "version": __version__, **engines}
    return JSONResponse(told, 200 if state == "ok" else 503)


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Return what was counted, for Prometheus; a server with keys shows it to operators alone."""
    if not client_of(request).is_operator:
        raise not_found("such page for this key")
    return Response(services_of(request).metrics.text(), media_type=CONTENT_TYPE)


def _model(services: Services, name: str) -> dict[str, Any]:
    hub = services.hub
    resolved = hub.resolve(name)
    model = hub.loaded().get(resolved)
    length = hub.context_length(resolved) if model is None else model.context_length
    return {
        "id": name,
        "object": "model",
        "created": services.started_at,
        "owned_by": "recollect",
        "context_length": length,
        **({} if name == resolved else {"alias_of": resolved}),
        "recollect": {
            "loaded": model is not None,
            "context_length": length,
            "profile": None if model is None or model.elsewhere else model.profile,
        },
    }


ollama_router = APIRouter(tags=["Ollama"], route_class=BodyRoute)

_OLLAMA_VERSION: Final = "0.13.0"
"""Of Ollama, whose API this is as far as it goes: clients ask for one that has what they use. Source:
Copilot wants 0.6.4 at least."""
_FAMILY: Final = "recollect"
_FOREVER: Final = "2318-01-01T00:00:00Z"
"""When a model is unloaded that stays loaded; Ollama, too, tells a time so far away."""


class OllamaShow(Body):
    """The body of `POST /api/show`."""

    model: str = ""
    name: str = ""
    verbose: Ignored = None


@ollama_router.get("/api/version")
def ollama_version() -> dict[str, str]:
    """Return which version of Ollama this answers like."""
    return {"version": _OLLAMA_VERSION}


@ollama_router.get("/api/tags")
def ollama_tags(request: Request) -> dict[str, Any]:
    """Return the models that a request may name."""
    services = services_of(request)
    names = (*services.hub.names, *services.hub.aliases)
    return {"models": [_ollama_model(services, name) for name in names]}


@ollama_router.get("/api/ps")
def ollama_ps(request: Request) -> dict[str, Any]:
    """Return the models that are loaded."""
    services = services_of(request)
    return {
        "models": [
            {
                **_ollama_model(services, name),
                "expires_at": _FOREVER,
                "size_vram": 0,
                "context_length": model.context_length,
            }
            for name, model in services.hub.loaded().items()
        ]
    }


@ollama_router.post("/api/show")
def ollama_show(body: OllamaShow, request: Request) -> dict[str, Any]:
    """Return what is known of a model."""
    services = services_of(request)
    name = ollama.named(services, body.model or body.name)
    resolved = services.hub.resolve(name)
    model = services.hub.loaded().get(resolved)
    length = services.hub.context_length(resolved) if model is None else model.context_length
    thinks = model is not None and model.template.reasoning is not None
    recommended = {} if model is None else model.local.sampling
    return {
        "modelfile": f"FROM {resolved}",
        "parameters": "\n".join(f"{name} {value:g}" for name, value in recommended.items()),
        "template": "" if model is None else model.template.source,
        "details": _ollama_details(),
        "model_info": {
            "general.architecture": _FAMILY,
            "general.basename": name,
            **({} if length is None else {f"{_FAMILY}.context_length": length}),
        },
        "capabilities": ["completion", "tools", *(["thinking"] if thinks else [])],
        "modified_at": ollama.moment(services.started_at),
    }


def _ollama_model(services: Services, name: str) -> dict[str, Any]:
    hub = services.hub
    resolved = hub.resolve(name)
    model = hub.loaded().get(resolved)
    return {
        "name": name,
        "model": name,
        "modified_at": ollama.moment(services.started_at),
        "size": hub.weight_bytes(resolved),
        "digest": "" if model is None else model.weights_fingerprint,
        "details": _ollama_details(),
    }


def _ollama_details() -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": _FAMILY,
        "family": _FAMILY,
        "families": [_FAMILY],
        "parameter_size": "",
        "quantization_level": "",
    }


_CLIENT_GONE: Final = 499
"""Status of a request whose client went away, as nginx logs it; nobody receives it."""

_SILENT: Final[Any] = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""
FastAPI, from 0.165 at the latest, can report requests and what they failed with to OpenTelemetry, and to
another machine where variables that are meant for other programs say so. Earlier ones ignore this.
"""


_ROUTERS: Final = (
    chat_completions.router,
    completions.router,
    responses.router,
    browsing.router,  # before the next: an import is no conversation's id
    conversation_routes.router,
    watching.router,
    explore_routes.router,
    anthropic.router,
    ollama.router,
    ollama_router,
    chat_completions.prewarm_router,
    page.router,
    router,
)


_CALLS: Final = tuple(
    route.path
    for router in _ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute) and "{" not in route.path
)
"""Paths of the calls, without those that have an id in them."""


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
    log = RequestLog(settings.home, settings.cipher, keeps_words=settings.keeps_words)
    metrics = Metrics(
        loaded=hub.loaded,
        running=lambda: admission.running,
        waiting=lambda: admission.waiting,
        log=log,
    )
    bodies = Bodies(limits, is_strict=settings.is_strict)
    feed, watchers = Feed(settings.home, settings.cipher), Watchers()
    hub.feed = feed
    services = Services(settings, hub, admission, metrics, feed, watchers)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        watchers.begin(asyncio.get_running_loop())
        loading = asyncio.create_task(_load_default(hub, on_failure))
        try:
            yield
        finally:
            loading.cancel()
            watchers.end()
            await hub.close()
            services.close()
            log.close()
            bodies.close()

    app = FastAPI(
        title="recollect",
        version=__version__,
        telemetry=_SILENT,
        docs_url=None,  # these pages run scripts of another server's, in this one's name
        redoc_url=None,
        description=(
            "Conversations with local language models that never read a token twice. "
            "The APIs of OpenAI, Anthropic and Ollama, and rewind, fork, checkpoint and prewarm beside them."
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
    """Answer every error in the shape of the API that the request was made to."""

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
    """Return the error for a path or a method that does not exist."""
    where, code = quoted(request.url.path), None
    message = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        code, message = "not_found", nothing_at(request.url.path, _CALLS)
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        code = "method_not_allowed"
        message = f"{where} does not take {request.method}: /openapi.json describes what it takes."
    headers = dict(error.headers or {})
    return ApiError(message, status=error.status_code, code=code, headers=headers)


async def _load_default(hub: ModelHub, on_failure: Callable[[Exception], None]) -> None:
    """
    Load the default model while the first requests are taken already.

    An engine elsewhere that does not answer is asked again: it may begin later than the server, which answers
    with 503 until then.
    """
    while True:
        try:
            (await hub.acquire(None)).release()
            hub.failure = None
        except ApiError:
            pass  # it is given up, because the server stops
        except EngineUnavailableError as error:
            if hub.failure is None:
                _log.warning("%s Until then requests are answered with 503.", error)
            hub.failure = error
            await asyncio.sleep(_ASK_AGAIN_S)
            continue
        except RecollectError as error:
            hub.failure = error
            on_failure(error)
        return


_ASK_AGAIN_S: Final = 5.0
"""Until an engine elsewhere that was not there is asked again."""

_KEEP_ALIVE_S: Final = 75
"""Longer than the usual pool of a client keeps a connection, so that the client closes it first."""

_LAST_WORDS_S: Final = 2.0
"""How long a reply that is ended may take: the forward pass under way, and the last event."""
_LOOK_EVERY_S: Final = 0.05
"""How often the server looks whether all have ended: half as long as uvicorn, nobody notices either."""


class _Server(uvicorn.Server):
    """uvicorn's server, which also says when it listens and what it waits for before it ends."""

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
        self._services.watchers.end()
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

"""
Puts a server together: endpoints, what they share, and what every request passes first.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from recollect._version import __version__
from recollect.errors import RecollectError
from recollect.server import (
    chat,
    checkpoints,
    completions,
    conversations,
    errors,
    messages,
    prewarm,
    responses,
    status,
)
from recollect.server.admission import Admission
from recollect.server.hub import ModelHub
from recollect.server.kept import KeptConversations
from recollect.server.keys import Keyring
from recollect.server.metrics import Metrics
from recollect.server.requests import Counted
from recollect.server.security import Security
from recollect.server.services import Services
from recollect.server.settings import Settings

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

    app = FastAPI(
        title="recollect",
        version=__version__,
        description=(
            "Conversations with local language models that never read a token twice. "
            "The APIs of OpenAI and Anthropic, and rewind, fork, checkpoint and prewarm beside them."
        ),
        lifespan=lifespan,
    )
    app.state.services = services
    for router in _ROUTERS:
        app.include_router(router)
    errors.install(app)
    # The last that is added is the first that a request passes.
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(Security, settings=settings, keyring=keyring)
    app.add_middleware(Counted, metrics=metrics)
    return app


async def _load_default(hub: ModelHub, on_failure: Callable[[Exception], None]) -> None:
    """Load the default model while the first requests are taken already."""
    try:
        (await hub.acquire(None)).release()
    except RecollectError as error:
        hub.failure = error
        on_failure(error)

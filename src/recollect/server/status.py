"""
`/v1/models`, `/health` and `/metrics`: what a server is, and how it is.
"""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from recollect._version import __version__
from recollect.server.errors import not_found
from recollect.server.metrics import CONTENT_TYPE
from recollect.server.services import Services, client_of, services_of

router = APIRouter(tags=["Server"])


@router.get("/v1/models")
def list_models(request: Request) -> dict[str, Any]:
    """Return the models that a request may name."""
    services = services_of(request)
    return {"object": "list", "data": [_model(services, name) for name in services.hub.names]}


@router.get("/v1/models/{model_id:path}")
def get_model(model_id: str, request: Request) -> dict[str, Any]:
    """Return one of them."""
    services = services_of(request)
    return _model(services, services.hub.resolve(model_id))


@router.get("/health")
def health(request: Request) -> JSONResponse:
    """Say whether requests are answered: 200 where they are, 503 while the model is loaded."""
    hub = services_of(request).hub
    state = "ok" if hub.is_ready else "loading" if hub.failure is None else "failed"
    return JSONResponse({"status": state, "version": __version__}, 200 if state == "ok" else 503)


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Return what was counted, for Prometheus; on a server with keys, an operator's are asked for."""
    if not client_of(request).is_operator:
        raise not_found("such page for this key")
    return Response(services_of(request).metrics.text(), media_type=CONTENT_TYPE)


def _model(services: Services, name: str) -> dict[str, Any]:
    model = services.hub.loaded().get(name)
    return {
        "id": name,
        "object": "model",
        "created": services.started_at,
        "owned_by": "recollect",
        "recollect": {
            "loaded": model is not None,
            "context_length": None if model is None else model.context_length,
            "profile": None if model is None else model.profile,
        },
    }

"""
`/v1/events` and `/v1/kv`: what happens in a client's conversations, as it happens; where their KV is.

Nothing is computed for it, and the engine's thread does not know of it: see `conversation/feed`.
"""

import asyncio
import heapq
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from recollect.conversation.costs import GoingOn
from recollect.conversation.model import Model
from recollect.errors import UnknownConversationError
from recollect.kv.blocks import CachedBlock
from recollect.server.conversation_routes import StandingPlace
from recollect.server.conversation_view import (
    ConversationView,
    branches,
    checkpoints,
    conversations_after,
    head_of,
    split_branch,
)
from recollect.server.refusals import ApiError
from recollect.server.response_object import PAGE, PageLimit
from recollect.server.services import client_of, services_of
from recollect.server.streaming import WatchStream, of_conversation

router = APIRouter(tags=["Conversations"])

_LAST: Final = "last-event-id"
_MOST_DIGITS: Final = 18
"""Of an id: any that a server gives has 16."""
_Id = Annotated[str, Query(pattern=r"^\d{1,18}$")]


@router.get("/v1/events", response_class=Response)
def watch_events(
    request: Request, conversation: str | None = None, after: _Id | None = None
) -> Response:
    """
    Return events as they happen, as server-sent events, until the client goes away.

    With the id of an event, in the header Last-Event-ID or in `after`, it goes on behind that one;
    where what came then is forgotten, the first event is `events.lost`, and the client reads anew.
    """
    services, namespace = services_of(request), client_of(request).namespace
    label = None if conversation is None else split_branch(conversation)[0]
    if conversation is not None:
        head_of(request, conversation)
    watch = services.feed.watch(
        namespace, after=_after(request, after), wake=services.watchers.wake
    )
    return WatchStream(services.watchers, watch, of_conversation(label))


def _after(request: Request, given: str | None) -> int | None:
    last = request.headers.get(_LAST, given)
    if not last:
        return None
    if not last.isascii() or not last.isdigit() or len(last) > _MOST_DIGITS:
        raise ApiError(
            "Last-Event-ID is not the id of an event: send the last that came, or leave it out.",
            param="Last-Event-ID",
        )
    return int(last)


_NEXT: Final = 10
"""How many of the blocks that would be evicted next are told."""


@router.get("/v1/kv")
async def get_kv(
    request: Request, limit: PageLimit = PAGE, after: str | None = None
) -> dict[str, Any]:
    """
    Return where the KV of the client's conversations is, branch by branch, and what it has saved.

    Conversations come in pages, the one used last first. Branches share the tokens that they begin with.
    """
    services = services_of(request)
    names = list(services.hub.loaded())
    leases = [lease for name in names if (lease := services.hub.lease(name)) is not None]
    try:
        models = {lease.name: lease.model for lease in leases}
        return await asyncio.to_thread(_kv, request, models, limit, after)
    finally:
        for lease in leases:
            lease.release()


def _kv(
    request: Request, models: Mapping[str, Model], limit: int, after: str | None
) -> dict[str, Any]:
    services, namespace = services_of(request), client_of(request).namespace
    page = conversations_after(request, after, limit + 1)
    holders: dict[CachedBlock, dict[str, str]] = {}
    data = []
    for info in page[:limit]:
        try:
            place = StandingPlace.of(
                request, ConversationView.load(services, info.label, namespace)
            )
        except (ApiError, UnknownConversationError):  # deleted since
            continue
        name = place.model_name()
        data.append(
            {
                "id": info.label,
                "name": info.name,
                "model": name if name in models else None,
                "branches": _held(place, models[name], holders) if name in models else {},
                "checkpoints": list(checkpoints(place.view.stored.tips)),
            }
        )
    saved = services.metrics.saved(namespace)
    return {
        "object": "kv",
        "models": [_model_kv(name, model, namespace) for name, model in models.items()],
        "data": data,
        "has_more": len(page) > limit,
        "last_id": page[:limit][-1].label if page else None,
        "evicted_next": [
            {"model": name, "tokens": len(block.token_ids), **_holder(block, holders)}
            for name, model in models.items()
            for block in _next_evicted(model, namespace)
        ],
        "saved": {
            "tokens": saved.tokens,
            "restored_tokens": saved.restored_tokens,
            "seconds": round(saved.seconds, 3),
        },
    }


def _held(
    place: StandingPlace, model: Model, holders: dict[CachedBlock, dict[str, str]]
) -> dict[str, dict[str, Any]]:
    """Return what each branch has, and note whose the blocks are."""
    view = place.view
    tips = {name: view.read.tree[at] for name, at in branches(view.stored.tips).items()}
    costs = place.costs(model)
    found = costs.of(list(tips.values()))
    for name, tip in tips.items():
        for block in costs.blocks(tip):
            holders.setdefault(block, {"conversation": view.label.name, "branch": name})
    return {name: _branch(found[tip], costs.blocks(tip), model) for name, tip in tips.items()}


def _branch(cost: GoingOn, blocks: Sequence[CachedBlock], model: Model) -> dict[str, Any]:
    size = model.engine.block_size
    return {
        "tokens": cost.tokens,
        "in_memory": cost.in_memory,
        "on_disk": cost.on_disk,
        "blocks_in_memory": -(-cost.in_memory // size),
        "blocks_on_disk": -(-cost.on_disk // size),
        "pinned": sum(len(block.token_ids) for block in blocks if block.pins),
    }


def _model_kv(name: str, model: Model, namespace: str) -> dict[str, Any]:
    """Return what a model holds of a namespace, and how much there is room for."""
    engine = model.engine
    rates, traffic = engine.speed.rates, engine.cache.accounts.traffic(namespace)
    return {
        "model": name,
        "block_tokens": engine.block_size,
        "block_bytes": engine.info.bytes_per_block,
        "blocks": engine.pool.num_blocks,
        "tokens_in_memory": traffic.tokens,
        "evicted_tokens": traffic.evicted_tokens,
        "compute_s_per_token": rates.compute_s_per_token,
        "restore_s_per_block": rates.restore_s_per_block,
    }


def _next_evicted(model: Model, namespace: str) -> list[CachedBlock]:
    """Return the blocks that are evicted next, as far as nothing else of the namespace is used."""
    cache = model.engine.cache
    with model.engine.lock:
        cache.settle()
        leaves = [one for one in cache.blocks(cache.root(namespace)) if one.can_go]
    return heapq.nsmallest(_NEXT, leaves, key=lambda cached: cached.last_used)


def _holder(block: CachedBlock, holders: Mapping[CachedBlock, dict[str, str]]) -> dict[str, Any]:
    """Return which conversation a block is of; a part of a block is of that of the block before."""
    found = holders.get(block) or (holders.get(block.parent) if block.parent else None)
    return dict(found) if found else {"conversation": None, "branch": None}

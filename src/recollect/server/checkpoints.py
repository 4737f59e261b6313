"""
`/v1/conversations/{id}/checkpoint`: places that have a name, and their KV on disk.

A place is a tip of the conversation that nothing moves. Its KV is a pin of the store, in the client's
namespace and under a name that begins with the conversation's own, which nobody can guess.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from fastapi import APIRouter, Request

from recollect import errors
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.tools import Tools
from recollect.engine.engine import Engine
from recollect.engine.pinning import pin_on_disk
from recollect.journal.checkpoints import drop_of_conversation, server_facts
from recollect.kv import pins
from recollect.kv.disk import DiskStore
from recollect.server.bodies import BodyRoute
from recollect.server.conversation_view import ConversationView, view_of
from recollect.server.errors import ApiError
from recollect.server.fields import Body, PlaceName
from recollect.server.places import checkpoint_tip, checkpoints
from recollect.server.response_object import ResponseHead
from recollect.server.response_schema import FlatTool
from recollect.server.services import Services, client_of, services_of, with_model
from recollect.types import SamplingParams

router = APIRouter(tags=["Conversations"], route_class=BodyRoute)

_log = logging.getLogger(__name__)

_REASONS: Final[tuple[tuple[type[errors.RecollectError], str], ...]] = (
    (errors.StoreFullError, "there is no room for it on disk: delete another checkpoint"),
    (errors.ContextFullError, "the conversation does not fit the model's context"),
    (errors.OutOfBlocksError, "the conversation does not fit the KV memory now: ask again later"),
    (errors.TemplateError, "the model's template refuses the conversation as it stands"),
    (errors.NameTakenError, "another request is keeping it: ask again"),
    (errors.ModelError, "the conversation's model cannot be loaded"),
    (errors.StoreError, "it cannot be written to the disk"),
)
"""Why KV is not kept, in words that say nothing of this machine. The first that fits counts."""


class Checkpoint(Body):
    """What to call this place."""

    name: PlaceName


@router.post("/v1/conversations/{conversation_id}/checkpoint")
async def checkpoint(conversation_id: str, body: Checkpoint, request: Request) -> dict[str, Any]:
    """
    Give the place where a conversation stands a name, to come back to, and keep its KV on disk.

    The place has the name in any case; `kv` says whether its KV is kept, and why not. The same name
    at the same place again tries again.
    """
    view = await asyncio.to_thread(_name_place, request, conversation_id, body.name)
    kept = await _keep_kv(request, view, body.name)
    return {**view.standing(), "checkpoint": body.name, "kv": kept}


@router.delete("/v1/conversations/{conversation_id}/checkpoints/{name}")
def delete_checkpoint(conversation_id: str, name: PlaceName, request: Request) -> dict[str, Any]:
    """Forget a checkpoint and let its KV go when room is needed; what was said there stays."""
    view, services = view_of(request, conversation_id), services_of(request)
    view.checkpoint(name)
    services.journal.drop_tip(view.stored.id, checkpoint_tip(name))
    _let_go(services, lambda store: pins.drop(store, _pin_name(view, name)))
    return {
        "id": view.id,
        "object": "conversation.checkpoint.deleted",
        "checkpoint": name,
        "deleted": True,
    }


def drop_all_kv(services: Services, conversation_id: int, begun: datetime) -> None:
    """Let the KV of all checkpoints of a conversation go that has been deleted."""
    _let_go(services, lambda store: drop_of_conversation(store, conversation_id, begun))


def _let_go(services: Services, drop: Callable[[DiskStore], object]) -> None:
    try:
        with services.store() as store:
            if store is not None:
                drop(store)
    except errors.StoreError as error:
        # The names are gone from the journal, so the rest takes room and means nothing to anybody.
        _log.warning("what was kept of a deleted checkpoint still takes room on disk: %s", error)


def _pin_name(view: ConversationView, name: str) -> str:
    return f"{view.label.name}.{name}"


def _name_place(request: Request, conversation_id: str, name: str) -> ConversationView:
    """
    Have a tip stand where the conversation does.

    Raises:
        ApiError: There is no such conversation, or it has that name for another place.
    """
    view, journal = view_of(request, conversation_id), services_of(request).journal
    known = checkpoints(view.stored.tips)
    if name in known and known[name] != view.tip:
        raise ApiError(
            f"There is a checkpoint {name!r} elsewhere in this conversation: take another name, or "
            "delete that one.",
            status=409,
            code="name_taken",
            param="name",
        )
    if name not in known:
        journal.set_tip(view.stored.id, checkpoint_tip(name), view.tip)
    return view


async def _keep_kv(request: Request, view: ConversationView, name: str) -> dict[str, Any]:
    """Keep the KV up to where a conversation stands, and return what came of it."""
    if view.tip is None:
        return _not_kept("nothing has been said yet")
    services, namespace = services_of(request), client_of(request).namespace
    head = await asyncio.to_thread(_last_head, services, view)
    place = _KeptPlace(services, view, namespace, name, head)
    try:
        kept = await with_model(request, place.model_name(), place.keep)
    except ApiError as refused:  # too many wait, or the models in use leave no memory
        return _not_kept(refused.message)
    except tuple(kind for kind, _ in _REASONS) as error:
        _log.warning("the KV of a checkpoint is not kept: %s", error)
        return _not_kept(next(why for kind, why in _REASONS if isinstance(error, kind)))
    assert isinstance(kept, dict)
    return kept


@dataclass(frozen=True, slots=True)
class _KeptPlace:
    """Where a conversation stands, as what the model last read there goes on from it."""

    services: Services
    view: ConversationView
    namespace: str
    name: str
    head: ResponseHead | None
    """Of the last response on the way there."""

    def model_name(self) -> str:
        """Return which model goes on there: the last one, or the default where that is not served."""
        hub = self.services.hub
        last = None if self.head is None else self.head.model
        return next(
            (name for name in (last, self.view.stored.model) if name in hub.names), hub.default
        )

    def keep(self, model: Model) -> dict[str, Any]:
        """Pin its KV, computing what is not there; called on a thread."""
        engine, tip = model.engine, self.view.tip
        if not engine.info.has_block_bytes:
            return _not_kept("the model's runtime keeps its KV to itself")
        if engine.tier is None:
            return _not_kept("this server keeps no KV on disk")
        conversation = self.services.kept.conversation(
            model, self.view.stored.id, namespace=self.namespace, node_id=tip
        )
        node = None if tip is None else conversation.kept_node(tip)
        assert node is not None, "it was opened for this node"
        session = Session(
            model,
            conversation,
            node,
            SamplingParams(),
            namespace=self.namespace,
            tools=self._tools(),
        )
        ids = session.typed_ids()
        if len(ids) < engine.keep_multiple_of:
            return _not_kept("the conversation is shorter than a block of KV")
        about = server_facts(conversation.spot(node), self.view.stored.created_at)
        tokens = self._still_kept(engine, about)
        computed = 0
        if tokens is None:
            name = _pin_name(self.view, self.name)
            made = pin_on_disk(engine, ids, self.namespace, name=name, about=about)
            tokens, computed = made.pin.tokens, made.computed_tokens
            if checkpoint_tip(self.name) not in self.services.journal.tips(self.view.stored.id):
                pins.drop(engine.tier.store, name)
                return _not_kept("it was deleted meanwhile")
        return {"kept": True, "tokens": tokens, "computed_tokens": computed}

    def _still_kept(self, engine: Engine, about: dict[str, Any]) -> int | None:
        """Return the tokens of what was pinned here before; what is not whole, or elsewhere, is let go."""
        tier = engine.tier
        assert tier is not None, "whoever keeps something has a tier"
        name = _pin_name(self.view, self.name)
        former = pins.find(tier.store, name)
        if former is None:
            return None
        is_same = (former.identity, former.about) == (tier.identity.digest().hex(), about)
        if is_same and pins.stored(tier.store, former).tokens >= former.tokens:
            return former.tokens
        pins.drop(tier.store, name)
        return None

    def _tools(self) -> Tools:
        """Return the tools of the last response: they are a part of the prompt, and so of its KV."""
        tools = [] if self.head is None else self.head.tools
        return Tools.of([FlatTool.model_validate(tool).schema_of() for tool in tools])


def _last_head(services: Services, view: ConversationView) -> ResponseHead | None:
    """Return what is known of the last response on the way to where a conversation stands."""
    notes = {label.node_id: label for label in services.journal.labels(view.stored.id)}
    for node in reversed(view.path()):
        label = notes.get(view.first(node.id))
        if label is not None and "head" in label.note:
            return ResponseHead.from_kept(label.name, label.note["head"])
    return None


def _not_kept(reason: str) -> dict[str, Any]:
    return {"kept": False, "reason": reason}

"""
`/v1/conversations`: kept conversations, and what other APIs do not have: rewind, fork, tree, checkpoints.

None of them but a checkpoint computes anything: they move names in the journal, and what these move
to is warm while its KV is there. A checkpoint is a branch that nothing moves. Its KV is pinned on disk,
in the client's namespace and under a name that begins with the conversation's own, which nobody can
guess.
"""

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Annotated, Any, Final, Self

from fastapi import APIRouter, Query, Request
from pydantic import Field, model_validator

from recollect import errors
from recollect.conversation.costs import Costs
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.tools import Tools
from recollect.conversation.tree import to_node
from recollect.engine.engine import Engine
from recollect.engine.pinning import pin_on_disk
from recollect.errors import RewindError
from recollect.journal.home import drop_of_conversation, server_facts
from recollect.journal.records import DEFAULT_TIP, Entry, NewNode, NodeRecord
from recollect.server.conversation_view import (
    COPIES,
    ConversationView,
    checkpoint_tip,
    checkpoints,
    conversation_body,
    conversations_after,
    head_of,
    let_go,
    split_branch,
    view_of,
)
from recollect.server.fields import Body, BodyRoute, Ignored, Items, PlaceName, check_count
from recollect.server.parts import InputItem, Metadata, kept_schemas, merged
from recollect.server.refusals import ApiError, name_taken, naming, not_found
from recollect.server.response_object import PAGE, PageLimit, ResponseHead, item_list
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
    place = await asyncio.to_thread(_name_place, request, conversation_id, body.name)
    kept = await _keep_kv(request, place, body.name)
    return {**place.view.standing(), "checkpoint": body.name, "kv": kept}


@router.delete("/v1/conversations/{conversation_id}/checkpoints/{name}")
def delete_checkpoint(conversation_id: str, name: PlaceName, request: Request) -> dict[str, Any]:
    """Forget a checkpoint and let its KV go when room is needed; what was said there stays."""
    view, services = view_of(request, conversation_id), services_of(request)
    view.checkpoint(name)
    services.journal.drop_tip(view.stored.id, checkpoint_tip(name))
    let_go(services.settings, lambda store: store.drop_pin(_pin_name(view, name)))
    return {
        "id": view.id,
        "object": "conversation.checkpoint.deleted",
        "checkpoint": name,
        "deleted": True,
    }


def drop_all_kv(services: Services, conversation_id: int, begun: datetime) -> None:
    """Let the KV of all checkpoints of a conversation go that has been deleted."""
    let_go(services.settings, lambda store: drop_of_conversation(store, conversation_id, begun))


def _pin_name(view: ConversationView, name: str) -> str:
    return f"{view.label.name}.{name}"


def _name_place(request: Request, conversation_id: str, name: str) -> "StandingPlace":
    """
    Have a tip stand where the conversation does, and return that place.

    Raises:
        ApiError: There is no such conversation, or it has that name for another place.
    """
    view, journal = view_of(request, conversation_id), services_of(request).journal
    known = checkpoints(view.stored.tips)
    if name in known and known[name] != view.tip:
        raise name_taken(
            f"There is a checkpoint {name!r} elsewhere in this conversation: take another name, or "
            "delete that one."
        )
    if name not in known:
        journal.set_tip(view.stored.id, checkpoint_tip(name), view.tip)
    return StandingPlace.of(request, view)


async def _keep_kv(request: Request, place: "StandingPlace", name: str) -> dict[str, Any]:
    """Keep the KV up to where a conversation stands, and return what came of it."""
    if place.view.tip is None:
        return _not_kept("nothing has been said yet")
    try:
        kept = await with_model(request, place.model_name(), partial(place.keep, name))
    except ApiError as refused:  # too many wait, or the models in use leave no memory
        return _not_kept(refused.message)
    except tuple(kind for kind, _ in _REASONS) as error:
        _log.warning("the KV of a checkpoint is not kept: %s", error)
        return _not_kept(next(why for kind, why in _REASONS if isinstance(error, kind)))
    assert isinstance(kept, dict)
    return kept


@dataclass(frozen=True, slots=True)
class StandingPlace:
    """Where a conversation stands, with the model and the tools of the last response there."""

    services: Services
    view: ConversationView
    namespace: str
    head: ResponseHead | None
    """Of the last response on the way there."""

    @classmethod
    def of(cls, request: Request, view: ConversationView) -> Self:
        """Return where a conversation of the client stands that a request is from."""
        services = services_of(request)
        head = view.last_head(services.journal)
        return cls(services, view, client_of(request).namespace, head)

    def model_name(self) -> str:
        """Return which model goes on there: the last one, or the default where that is not served."""
        hub = self.services.hub
        last = None if self.head is None else self.head.model
        return next(
            (name for name in (last, self.view.stored.model) if name in hub.names), hub.default
        )

    def tools(self) -> Tools:
        """Return the tools of the last response: they are a part of the prompt, and so of its KV."""
        return Tools.of(kept_schemas([] if self.head is None else self.head.tools))

    def costs(self, model: Model) -> Costs:
        """Return what finds the costs of going on in the tree with a model, as it is here."""
        tools = self.tools().schemas
        known = self.view.read.encodings(model, tools)
        return Costs(model, namespace=self.namespace, tools=tools, known=known)

    def keep(self, checkpoint: str, model: Model) -> dict[str, Any]:
        """Pin the KV of a checkpoint here, computing what is not there; called on a thread."""
        engine, tip = model.engine, self.view.tip
        if not engine.info.reuse.as_bytes:
            return _not_kept("the model's runtime keeps its KV to itself")
        if engine.tier is None:
            return _not_kept("this server keeps no KV on disk")
        conversation = self.services.conversations.conversation(
            model, self.view.stored.id, namespace=self.namespace, node_id=tip
        )
        node = None if tip is None else conversation.saved_node(tip)
        assert node is not None, "it was opened for this node"
        session = Session(
            model,
            conversation,
            node,
            SamplingParams(),
            namespace=self.namespace,
            tools=self.tools(),
        )
        ids = session.typed_ids()
        if len(ids) < engine.info.reuse.unit:
            return _not_kept("the conversation is shorter than a block of KV")
        about = server_facts(conversation.spot(node), self.view.stored.created_at)
        name = _pin_name(self.view, checkpoint)
        tokens = _still_kept(engine, name, about)
        computed = 0
        if tokens is None:
            made = pin_on_disk(engine, ids, self.namespace, name=name, about=about)
            tokens, computed = made.pin.tokens, made.computed_tokens
            if checkpoint_tip(checkpoint) not in self.services.journal.tips(self.view.stored.id):
                engine.tier.store.drop_pin(name)
                return _not_kept("it was deleted meanwhile")
        return {"kept": True, "tokens": tokens, "computed_tokens": computed}


def _still_kept(engine: Engine, name: str, about: dict[str, Any]) -> int | None:
    """Return the tokens of what was pinned by a name; what is not whole, or elsewhere, is let go."""
    tier = engine.tier
    assert tier is not None, "whoever keeps something has a tier"
    former = tier.store.find_pin(name)
    if former is None:
        return None
    is_same = (former.identity, former.about) == (tier.identity.digest().hex(), about)
    if is_same and tier.store.size_of(former).tokens >= former.tokens:
        return former.tokens
    tier.store.drop_pin(name)
    return None


def _not_kept(reason: str) -> dict[str, Any]:
    return {"kept": False, "reason": reason}


_TREE_PAGE: int = 1000
_TreeLimit = Annotated[int, Query(ge=1, le=2000)]
_Order = Annotated[str, Query(pattern="^(asc|desc)$")]


class NewConversation(Body):
    """The body of `POST /v1/conversations`."""

    items: Items[InputItem] | None = None
    metadata: Metadata | None = None


class ConversationChange(Body):
    """The body of `POST /v1/conversations/{id}`."""

    metadata: Metadata


class NewItems(Body):
    """The body of `POST /v1/conversations/{id}/items`."""

    items: Annotated[Items[InputItem], Field(min_length=1)]


class Rewind(Body):
    """Where to go: to an item or a response, back by turns, or to a checkpoint."""

    to: str | None = None
    turns: Annotated[int, Field(ge=1)] | None = None
    checkpoint: PlaceName | None = None

    @model_validator(mode="after")
    def _check(self) -> "Rewind":
        if sum(value is not None for value in (self.to, self.turns, self.checkpoint)) != 1:
            raise ValueError("Give exactly one of to, turns and checkpoint")
        return self


class Fork(Body):
    """Where to fork, at the tip unless said otherwise, and what to call the branch."""

    at: str | None = None
    before: str | None = None
    """An item or a response: the branch begins where it was said, to say something else there."""
    name: PlaceName | None = None
    metadata: Ignored = None

    @model_validator(mode="after")
    def _check(self) -> "Fork":
        if self.at is not None and self.before is not None:
            raise ValueError("Give at most one of at and before")
        return self


@router.post("/v1/conversations")
def create_conversation(body: NewConversation, request: Request) -> dict[str, Any]:
    """Begin a conversation, which may have something in it."""
    services, namespace = services_of(request), client_of(request).namespace
    _check_items(request, body.items or [])
    note = {"metadata": body.metadata or {}}
    entry = Entry(nodes=_nodes(body.items or []), tip=DEFAULT_TIP, note=lambda _: note)
    written = services.journal.begin(
        None, entry, model=services.hub.default, fingerprint="", namespace=namespace
    )
    info = services.journal.info(written.conversation_id)
    return conversation_body(info.label, info.created_at, note)


@router.get("/v1/conversations")
def list_conversations(
    request: Request,
    limit: PageLimit = PAGE,
    order: _Order = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """Return a page of the client's conversations, the one used last first."""
    found = conversations_after(request, after, limit + 1, newest_first=order == "desc")
    shown = found[:limit]
    notes = services_of(request).journal.notes([info.id for info in shown])
    data = [
        {
            **conversation_body(info.label, info.created_at, notes.get(info.id, {})),
            "name": info.name,
            "turns": info.turns,
        }
        for info in shown
    ]
    return item_list(data, has_more=len(found) > limit)


@router.get("/v1/conversations/{conversation_id}")
def get_conversation(conversation_id: str, request: Request) -> dict[str, Any]:
    """Return a conversation, without its items."""
    return head_of(request, conversation_id).body()


@router.post("/v1/conversations/{conversation_id}")
def update_conversation(
    conversation_id: str, body: ConversationChange, request: Request
) -> dict[str, Any]:
    """Replace a conversation's metadata."""
    services = services_of(request)
    with services.items_lock:
        head = head_of(request, conversation_id)
        label = replace(head.label, note={**head.label.note, "metadata": body.metadata})
        services.journal.set_label(label)
    return replace(head, label=label).body()


@router.delete("/v1/conversations/{conversation_id}")
def delete_conversation(conversation_id: str, request: Request) -> dict[str, Any]:
    """Delete a conversation with all its branches and responses."""
    head, services = head_of(request, conversation_id), services_of(request)
    if split_branch(conversation_id)[0] != conversation_id:
        raise ApiError("A branch goes with its conversation: delete that, or leave it.")
    journal_id = head.label.conversation_id
    services.journal.delete(journal_id, namespace=client_of(request).namespace)
    services.conversations.forget(journal_id)
    services.known.forget(journal_id)
    drop_all_kv(services, journal_id, head.created_at)
    return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}


@router.get("/v1/conversations/{conversation_id}/items")
def list_items(
    conversation_id: str,
    request: Request,
    limit: PageLimit = PAGE,
    order: _Order = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """Return the messages of a conversation up to its tip."""
    view = view_of(request, conversation_id)
    with naming("after"):
        items = view.items_after(after, newest_first=order == "desc")
    page = list(islice(items, limit + 1))
    return item_list(page[:limit], has_more=len(page) > limit)


@router.post("/v1/conversations/{conversation_id}/items")
def add_items(conversation_id: str, body: NewItems, request: Request) -> dict[str, Any]:
    """Add messages after the tip, which moves there."""
    services = services_of(request)
    _check_items(request, body.items)
    with services.items_lock:
        head = head_of(request, conversation_id)
        journal_id, branch = head.label.conversation_id, head.branch
        at = head.tips.get(branch)
        if branch not in head.tips:  # an import without a main tip
            at = view_of(request, conversation_id).tip
        ids = services.journal.append(journal_id, at, _nodes(body.items), tip=branch)
    view = view_of(request, conversation_id)
    return item_list(view.items([view.read.node(one) for one in ids]))


@router.get("/v1/conversations/{conversation_id}/items/{item_id}")
def get_item(conversation_id: str, item_id: str, request: Request) -> dict[str, Any]:
    """Return a message of a conversation, in whatever branch."""
    view = view_of(request, conversation_id)
    items = view.items([_node(view, view.node_id(item_id))])
    return next((item for item in items if item["id"] == item_id), items[0])


@router.delete("/v1/conversations/{conversation_id}/items/{item_id}")
def delete_item(conversation_id: str, item_id: str, request: Request) -> dict[str, Any]:
    """
    Take a message out of a conversation, or out of a branch, and return the conversation.

    The branch goes on along another path, without it: what other branches and responses have stays
    as it was. Messages after it keep their ids, and replies the tokens that they were generated as.
    """
    services = services_of(request)
    with services.items_lock:
        view = view_of(request, conversation_id)
        node, path = _node(view, view.node_id(item_id)), view.path()
        if node not in path:
            raise not_found(f"item {item_id!r} on this branch")
        _require_whole(view, node, item_id)
        rest = path[path.index(node) + 1 :]

        def note(ids: Sequence[int]) -> Mapping[str, Any]:
            again = {copy: view.first(one.id) for copy, one in zip(ids, rest, strict=True)}
            return {**view.label.note, COPIES: view.copies | again}

        entry = Entry(
            nodes=rest, parent_id=node.parent_id, tip=view.branch, note=note if rest else None
        )
        services.journal.write(view.stored.id, entry)
    return view.body()


@router.post("/v1/conversations/{conversation_id}/rewind")
def rewind(conversation_id: str, body: Rewind, request: Request) -> dict[str, Any]:
    """Go back; what was said after that place stays in the tree."""
    view = view_of(request, conversation_id)
    node_id = _target(view, body)
    services_of(request).journal.set_tip(view.stored.id, view.branch, node_id)
    return view.at(conversation_id, view.branch, node_id).standing()


@router.post("/v1/conversations/{conversation_id}/fork")
def fork(conversation_id: str, body: Fork, request: Request) -> dict[str, Any]:
    """Begin a branch, which has an id of its own and shares everything up to its beginning."""
    view = view_of(request, conversation_id)
    name = body.name or f"fork-{secrets.token_hex(4)}"
    if name in view.stored.tips:
        raise name_taken(f"There is {name!r} in this conversation already: take another name.")
    at = view.tip
    if body.at is not None:
        with naming("at"):
            at = view.node_id(body.at)
    if body.before is not None:
        with naming("before"):
            at = _node(view, view.node_id(body.before)).parent_id
    services_of(request).journal.set_tip(view.stored.id, name, at)
    return view.at(f"{split_branch(conversation_id)[0]}.{name}", name, at).standing()


@router.get("/v1/conversations/{conversation_id}/tree")
async def get_tree(
    conversation_id: str,
    request: Request,
    limit: _TreeLimit = _TREE_PAGE,
    after: str | None = None,
) -> dict[str, Any]:
    """
    Return what was said in a conversation, in all branches, and what going on from each place would cost.

    That is by the measurements of the model that spoke last. Where it is not loaded, or an engine
    elsewhere has its KV, nobody here knows, and it is null.
    """
    services = services_of(request)
    place = await asyncio.to_thread(_place_of, request, conversation_id)
    lease = services.hub.lease(place.model_name())
    try:
        model = None if lease is None else lease.model
        return await asyncio.to_thread(_tree, place, after, limit, model)
    finally:
        if lease is not None:
            lease.release()


def _place_of(request: Request, conversation_id: str) -> StandingPlace:
    return StandingPlace.of(request, view_of(request, conversation_id))


def _tree(
    place: StandingPlace, after: str | None, limit: int, model: Model | None
) -> dict[str, Any]:
    view = place.view
    with naming("after"):
        shown = view.nodes_after(after, limit)
    if model is None or model.replicas():
        return view.tree(shown, {}, None)
    nodes, costs = view.read.tree, place.costs(model)
    tips = [nodes[tip] for tip in (view.tip, *view.stored.tips.values())]
    found = costs.of([nodes[one.id] for one in shown], first=tips)
    by_id = {one.id: found[nodes[one.id]] for one in shown}
    return view.tree(shown, by_id, place.model_name())


def _check_items(request: Request, items: list[InputItem]) -> None:
    check_count("items", len(items), services_of(request).settings.limits.messages)


def _nodes(items: list[InputItem]) -> list[NewNode]:
    return [to_node(message) for message in merged(items)]


def _node(view: ConversationView, node_id: int) -> NodeRecord:
    return view.read.node(node_id)


def _require_whole(view: ConversationView, node: NodeRecord, item_id: str) -> None:
    """
    Check that a message is shown as one item.

    Raises:
        ApiError: It is a reply that says something and calls, or calls several times: as generated,
            it is one text.
    """
    items = view.items([node])
    if len(items) > 1:
        raise ApiError(
            f"{item_id!r} is one of {len(items)} items of one reply, which cannot be without it: "
            "rewind to before the reply, or fork there.",
            code="item_not_separable",
            param="item_id",
        )


def _target(view: ConversationView, where: Rewind) -> int | None:
    """Return the node to go to; None is the root."""
    if where.to is not None:
        with naming("to"):
            return view.node_id(where.to)
    if where.checkpoint is not None:
        with naming("checkpoint"):
            return view.checkpoint(where.checkpoint)
    asked = [node for node in view.path() if node.role == "user"]
    assert where.turns is not None, "one of the three is given"
    if where.turns > len(asked):
        raise RewindError(f"Cannot go back {where.turns} turns: the conversation has {len(asked)}.")
    return asked[-where.turns].parent_id

"""
`/v1/conversations`: kept conversations, and what others do not have: rewind, fork, tree.

None of these computes anything: they move names in the journal. What they move to is warm while its
KV is there.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field, model_validator

from recollect.conversation.journal import Journal
from recollect.conversation.labels import Label
from recollect.conversation.messages import to_node
from recollect.conversation.records import NewNode, NodeRecord
from recollect.errors import RewindError
from recollect.server.bodies import BodyRoute
from recollect.server.chat_schema import check_limits
from recollect.server.checkpoints import drop_all_kv
from recollect.server.conversation_view import ConversationView, view_of
from recollect.server.errors import ApiError, not_found
from recollect.server.fields import Body, Ignored, Items, Metadata, PlaceName
from recollect.server.places import COPIES, split_branch
from recollect.server.response_schema import InputItem, merged
from recollect.server.services import client_of, services_of

router = APIRouter(tags=["Conversations"], route_class=BodyRoute)

_PAGE: int = 20


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
            raise ValueError("give exactly one of to, turns and checkpoint")
        return self


class Fork(Body):
    """Where to fork, at the tip unless said otherwise, and what to call the branch."""

    at: str | None = None
    name: PlaceName | None = None
    metadata: Ignored = None


@router.post("/v1/conversations")
def create_conversation(body: NewConversation, request: Request) -> dict[str, Any]:
    """Begin a conversation, which may have something in it."""
    services, namespace = services_of(request), client_of(request).namespace
    _check_items(request, body.items or [])
    info = services.journal.create(model=services.hub.default, fingerprint="", namespace=namespace)
    label = Label(
        name=f"conv_{secrets.token_hex(16)}",
        conversation_id=info.id,
        note={"metadata": body.metadata or {}},
    )
    services.journal.set_label(label)
    services.journal.append(info.id, None, _nodes(body.items or []), tip="main")
    return ConversationView.load(services.journal, label.name, namespace).body()


@router.get("/v1/conversations")
def list_conversations(request: Request) -> dict[str, Any]:
    """Return the client's conversations, the one used last first."""
    journal, namespace = services_of(request).journal, client_of(request).namespace
    data = []
    for info in journal.conversations(namespace):
        labels = [one for one in journal.labels(info.id) if one.node_id is None]
        if not labels:  # begun by a response, or in a terminal
            labels = [Label(name=f"conv_{secrets.token_hex(16)}", conversation_id=info.id)]
            journal.set_label(labels[0])
        data.append(
            {
                "id": labels[0].name,
                "object": "conversation",
                "created_at": int(info.created_at.timestamp()),
                "metadata": labels[0].note.get("metadata", {}),
                "name": info.name,
                "turns": info.turns,
            }
        )
    return {"object": "list", "data": data, "has_more": False}


@router.get("/v1/conversations/{conversation_id}")
def get_conversation(conversation_id: str, request: Request) -> dict[str, Any]:
    """Return a conversation, without its items."""
    return view_of(request, conversation_id).body()


@router.post("/v1/conversations/{conversation_id}")
def update_conversation(
    conversation_id: str, body: ConversationChange, request: Request
) -> dict[str, Any]:
    """Replace a conversation's metadata."""
    services = services_of(request)
    with services.items_lock:
        view = view_of(request, conversation_id)
        _set_note(services.journal, view, {"metadata": body.metadata})
    return view_of(request, conversation_id).body()


@router.delete("/v1/conversations/{conversation_id}")
def delete_conversation(conversation_id: str, request: Request) -> dict[str, Any]:
    """Delete a conversation with all its branches and responses."""
    view, services = view_of(request, conversation_id), services_of(request)
    if split_branch(conversation_id)[0] != conversation_id:
        raise ApiError("A branch goes with its conversation: delete that, or leave it.")
    services.journal.delete(view.stored.id, namespace=client_of(request).namespace)
    services.kept.forget(view.stored.id)
    drop_all_kv(services, view.stored)
    return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}


@router.get("/v1/conversations/{conversation_id}/items")
def list_items(
    conversation_id: str,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = _PAGE,
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """Return the messages of a conversation up to its tip."""
    view = view_of(request, conversation_id)
    items = view.items(view.path())
    items = items[::-1] if order == "desc" else items
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise not_found(f"item {after!r} in this conversation")
        items = items[ids.index(after) + 1 :]
    return {**_list(items[:limit]), "has_more": len(items) > limit}


@router.post("/v1/conversations/{conversation_id}/items")
def add_items(conversation_id: str, body: NewItems, request: Request) -> dict[str, Any]:
    """Add messages after the tip, which moves there."""
    view, journal = view_of(request, conversation_id), services_of(request).journal
    _check_items(request, body.items)
    ids = journal.append(view.stored.id, view.tip, _nodes(body.items), tip=view.branch)
    view = view_of(request, conversation_id)
    return _list(view.items([node for node in view.stored.nodes if node.id in set(ids)]))


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
        ids = services.journal.append(view.stored.id, node.parent_id, rest, tip=view.branch)
        again = {copy: view.first(one.id) for copy, one in zip(ids, rest, strict=True)}
        if again:
            _set_note(services.journal, view, {COPIES: view.copies | again})
    return view_of(request, conversation_id).body()


@router.post("/v1/conversations/{conversation_id}/rewind")
def rewind(conversation_id: str, body: Rewind, request: Request) -> dict[str, Any]:
    """Go back; what was said after that place stays in the tree."""
    view = view_of(request, conversation_id)
    node_id = _target(view, body)
    services_of(request).journal.set_tip(view.stored.id, view.branch, node_id)
    return view_of(request, conversation_id).standing()


@router.post("/v1/conversations/{conversation_id}/fork")
def fork(conversation_id: str, body: Fork, request: Request) -> dict[str, Any]:
    """Begin a branch, which has an id of its own and shares everything up to its beginning."""
    view = view_of(request, conversation_id)
    name = body.name or f"fork-{secrets.token_hex(4)}"
    if name in view.stored.tips:
        raise ApiError(
            f"There is {name!r} in this conversation already: take another name.",
            status=409,
            code="name_taken",
            param="name",
        )
    at = view.tip if body.at is None else view.node_id(body.at)
    services_of(request).journal.set_tip(view.stored.id, name, at)
    return view_of(request, f"{split_branch(conversation_id)[0]}.{name}").standing()


@router.get("/v1/conversations/{conversation_id}/tree")
def get_tree(conversation_id: str, request: Request) -> dict[str, Any]:
    """Return everything that was said in a conversation, in all branches."""
    return view_of(request, conversation_id).tree()


def _check_items(request: Request, items: list[InputItem]) -> None:
    most = services_of(request).settings.limits.messages
    check_limits(items, 1, most_messages=most, most_choices=1, what="items")


def _nodes(items: list[InputItem]) -> list[NewNode]:
    return [to_node(message) for message in merged(items)]


def _node(view: ConversationView, node_id: int) -> NodeRecord:
    return next(node for node in view.stored.nodes if node.id == node_id)


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


def _set_note(journal: Journal, view: ConversationView, change: Mapping[str, Any]) -> None:
    """Change what is noted of a conversation."""
    note, kept_as = {**view.label.note, **change}, view.label.conversation_id
    journal.set_label(Label(name=view.label.name, conversation_id=kept_as, note=note))


def _target(view: ConversationView, where: Rewind) -> int | None:
    """Return the node to go to; None is the root."""
    if where.to is not None:
        return view.node_id(where.to)
    if where.checkpoint is not None:
        return view.checkpoint(where.checkpoint)
    asked = [node for node in view.path() if node.role == "user"]
    assert where.turns is not None, "one of the three is given"
    if where.turns > len(asked):
        raise RewindError(f"Cannot go back {where.turns} turns: the conversation has {len(asked)}.")
    return asked[-where.turns].parent_id


def _list(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": False,
    }

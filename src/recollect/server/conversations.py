"""
`/v1/conversations`: kept conversations, and what others do not have: rewind, fork, tree.

None of these computes anything: they move names in the journal. What they move to is warm while its
KV is there.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field, model_validator

from recollect.conversation.tree import to_node
from recollect.errors import RewindError
from recollect.journal.records import DEFAULT_TIP, Entry, NewNode, NodeRecord, Page
from recollect.server.bodies import BodyRoute
from recollect.server.chat_schema import check_limits
from recollect.server.checkpoints import drop_all_kv
from recollect.server.conversation_view import (
    ConversationView,
    conversation_body,
    head_of,
    view_of,
)
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
    limit: Annotated[int, Query(ge=1, le=100)] = _PAGE,
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """Return a page of the client's conversations, the one used last first."""
    journal, namespace = services_of(request).journal, client_of(request).namespace
    last = None if after is None else head_of(request, after).label.conversation_id
    page = Page(limit=limit + 1, after=last, newest_first=order == "desc")
    found = journal.conversations(namespace, page=page)
    shown = found[:limit]
    notes = journal.notes([info.id for info in shown])
    data = [
        {
            **conversation_body(info.label, info.created_at, notes.get(info.id, {})),
            "name": info.name,
            "turns": info.turns,
        }
        for info in shown
    ]
    return {**_list(data), "has_more": len(found) > limit}


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
    kept_as = head.label.conversation_id
    services.journal.delete(kept_as, namespace=client_of(request).namespace)
    services.kept.forget(kept_as)
    drop_all_kv(services, kept_as, head.created_at)
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
    services = services_of(request)
    _check_items(request, body.items)
    with services.items_lock:
        head = head_of(request, conversation_id)
        kept_as, branch = head.label.conversation_id, head.branch
        at = head.tips.get(branch)
        if branch not in head.tips:  # an import without a main tip
            at = view_of(request, conversation_id).tip
        ids = set(services.journal.append(kept_as, at, _nodes(body.items), tip=branch))
    view = view_of(request, conversation_id)
    return _list(view.items([node for node in view.stored.nodes if node.id in ids]))


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
        raise ApiError(
            f"There is {name!r} in this conversation already: take another name.",
            status=409,
            code="name_taken",
            param="name",
        )
    at = view.tip if body.at is None else view.node_id(body.at)
    services_of(request).journal.set_tip(view.stored.id, name, at)
    return view.at(f"{split_branch(conversation_id)[0]}.{name}", name, at).standing()


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

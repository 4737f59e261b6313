"""
Saved conversations as they are in the journal: searched, as files, and what their branches are called.

`/v1/search`, lists of branches and checkpoints, and files as `recollect conversations export` writes them.
Reads and writes the journal alone: no model needs to be loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from recollect.journal.conversation_files import from_json, to_json
from recollect.journal.records import DEFAULT_TIP, Hit
from recollect.journal.search import MOST_CHARACTERS
from recollect.server.conversation_view import (
    ConversationView,
    branches,
    checkpoints,
    conversation_body,
    is_checkpoint,
    split_branch,
    view_of,
)
from recollect.server.fields import Body, BodyRoute, PlaceName
from recollect.server.known_conversations import own_name
from recollect.server.refusals import ApiError, name_taken, naming, not_found
from recollect.server.response_object import PAGE, PageLimit, item_list
from recollect.server.services import client_of, services_of

router = APIRouter(tags=["Conversations"], route_class=BodyRoute)

_DIGITS: Final = 19
"""Of a number that SQLite can hold, which has 19 at most."""


@router.get("/v1/conversations/{conversation_id}/branches")
def list_branches(
    conversation_id: str, request: Request, limit: PageLimit = PAGE, after: str | None = None
) -> dict[str, Any]:
    """Return the branches of a conversation, by name, and the items at which they stand."""
    view = view_of(request, conversation_id)
    return _places("branch", view, branches(view.stored.tips), limit, after)


@router.get("/v1/conversations/{conversation_id}/checkpoints")
def list_checkpoints(
    conversation_id: str, request: Request, limit: PageLimit = PAGE, after: str | None = None
) -> dict[str, Any]:
    """Return the checkpoints of a conversation, by name, and the items at which they are."""
    view = view_of(request, conversation_id)
    return _places("checkpoint", view, checkpoints(view.stored.tips), limit, after)


def _places(
    kind: str,
    view: ConversationView,
    places: Mapping[str, int | None],
    limit: int,
    after: str | None,
) -> dict[str, Any]:
    names = sorted(name for name in places if after is None or name > after)
    named = view.named({name: places[name] for name in names[:limit]})
    data = [
        {"id": name, "object": f"conversation.{kind}", kind: name, "item": item}
        for name, item in named.items()
    ]
    return item_list(data, has_more=len(names) > limit)


@router.get("/v1/search")
def search(
    request: Request,
    query: Annotated[str, Query(min_length=1, max_length=MOST_CHARACTERS)],
    limit: PageLimit = PAGE,
    after: str | None = None,
) -> dict[str, Any]:
    """
    Return the client's messages that have all words of a query, in all conversations, the newest first.

    A phrase is put in double quotation marks. `after` is the id of the last hit of the page before.
    """
    journal, namespace = services_of(request).journal, client_of(request).namespace
    with naming("after"):
        last = None if after is None else _node_of_item(request, after)
    hits = journal.search(query, namespace=namespace, limit=limit + 1, after=last)
    data = [_hit_body(hit) for hit in hits[:limit]]
    return item_list(data, has_more=len(hits) > limit)


def _hit_body(hit: Hit) -> dict[str, Any]:
    item = own_name(hit.label, hit.number, hit.node_label)
    is_branch = hit.branch is not None and not is_checkpoint(hit.branch)
    return {
        "id": item,
        "object": "search.hit",
        "conversation": hit.label,
        "branch": hit.branch if is_branch else None,
        "item": item,
        "role": hit.role,
        "snippet": hit.snippet,
        "created_at": int(hit.created_at.timestamp()),
    }


def _node_of_item(request: Request, item: str) -> int:
    """
    Return the node that a hit's id names.

    Raises:
        ApiError: There is none of that id, for this client.
    """
    journal, namespace = services_of(request).journal, client_of(request).namespace
    name, _, number = item.partition("_")[2].partition("_")
    label = journal.find_label(f"conv_{name}" if number else f"resp_{name}", namespace=namespace)
    found = None if label is None else label.node_id
    if label is not None and number.isascii() and number.isdigit() and len(number) < _DIGITS:
        found = journal.numbered_node(label.conversation_id, int(number))
    if found is None:
        raise not_found(f"item {item!r}")
    return found


class ConversationFile(Body):
    """A conversation as `GET /v1/conversations/{id}/export` returns it."""

    file: dict[str, Any]


class BranchName(Body):
    """What a branch is called from now on."""

    name: PlaceName


@router.get("/v1/conversations/{conversation_id}/export")
def export_conversation(conversation_id: str, request: Request) -> Response:
    """Return a conversation with all its branches as a file, which can be imported elsewhere."""
    view = view_of(request, conversation_id)
    return Response(to_json(view.stored), media_type="application/json")


@router.post("/v1/conversations/import")
def import_conversation(body: ConversationFile, request: Request) -> dict[str, Any]:
    """Keep a conversation out of a file, under a free name; replies are as they were generated."""
    journal, namespace = services_of(request).journal, client_of(request).namespace
    given = replace(from_json(json.dumps(body.file)), namespace=namespace)
    info = journal.add(given, find_free=True)
    return {**conversation_body(info.label, info.created_at, {}), "name": info.name}


@router.post("/v1/conversations/{conversation_id}/branches/{branch}")
def rename_branch(
    conversation_id: str, branch: PlaceName, body: BranchName, request: Request
) -> dict[str, Any]:
    """Give a branch another name, which its id has from now on."""
    view = _branch(request, conversation_id, branch)
    journal, tips = services_of(request).journal, view.stored.tips
    if body.name in {DEFAULT_TIP, *tips}:
        raise name_taken(f"There is {body.name!r} in this conversation already: take another name.")
    journal.set_tip(view.stored.id, body.name, tips[branch])
    journal.drop_tip(view.stored.id, branch)
    label, _ = split_branch(conversation_id)
    return view.at(f"{label}.{body.name}", body.name, tips[branch]).standing()


@router.delete("/v1/conversations/{conversation_id}/branches/{branch}")
def delete_branch(conversation_id: str, branch: PlaceName, request: Request) -> dict[str, Any]:
    """Forget the name of a branch; what was said in it stays in the tree."""
    view = _branch(request, conversation_id, branch)
    services_of(request).journal.drop_tip(view.stored.id, branch)
    return {
        "id": conversation_id,
        "object": "conversation.branch.deleted",
        "branch": branch,
        "deleted": True,
    }


def _branch(request: Request, conversation_id: str, name: str) -> ConversationView:
    """
    Return a conversation that has a branch of a name.

    Raises:
        ApiError: It has none, or it is the main one, by which the conversation itself goes.
    """
    view = view_of(request, split_branch(conversation_id)[0])
    if name == DEFAULT_TIP:
        raise ApiError(f"{name!r} is the conversation itself: only other branches have names.")
    if name not in branches(view.stored.tips):
        raise not_found(f"branch {name!r} in this conversation")
    return view

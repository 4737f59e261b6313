"""
`/v1/search`, and lists of the branches and checkpoints of a conversation.

Reads the journal alone: no model needs to be loaded.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request

from recollect.journal.records import Hit
from recollect.journal.search import MOST_CHARACTERS
from recollect.server.conversation_view import (
    ConversationView,
    branches,
    checkpoints,
    is_checkpoint,
    view_of,
)
from recollect.server.fields import BodyRoute
from recollect.server.known_conversations import own_name
from recollect.server.refusals import naming, not_found
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

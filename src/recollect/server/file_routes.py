"""
Conversations as files over HTTP, and what their branches are called.

On its own because nothing here is said or computed: a file is what `recollect conversations export`
writes, and names of branches are moved or forgotten in the journal.
"""

import json
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from recollect.journal.conversation_files import from_json, to_json
from recollect.journal.records import DEFAULT_TIP
from recollect.server.conversation_view import (
    ConversationView,
    branches,
    conversation_body,
    split_branch,
    view_of,
)
from recollect.server.fields import Body, BodyRoute, PlaceName
from recollect.server.refusals import ApiError, name_taken, not_found
from recollect.server.services import client_of, services_of

router = APIRouter(tags=["Conversations"], route_class=BodyRoute)


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

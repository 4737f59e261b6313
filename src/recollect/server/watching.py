"""
`/v1/events`: what happens in a client's conversations, as it happens, in whatever program.

On its own because it is one API, as the others are.
Nothing is computed for it, and the engine's thread does not know of it: see `conversation/feed`.
"""

from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from recollect.server.conversation_view import head_of, split_branch
from recollect.server.refusals import ApiError
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
    if not services.watchers.has_room(namespace):
        raise ApiError(
            "Too many watch already: close another stream of /v1/events.",
            status=429,
            kind="requests",
            code="too_many_watchers",
            headers={"Retry-After": "5"},
        )
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

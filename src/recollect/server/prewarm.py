"""
`POST /v1/prewarm`: compute a conversation's KV before anybody asks anything.

For a client that knows what will be asked soon: a system prompt, a document, a message being typed.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from recollect.conversation.model import Model
from recollect.kv.names import PUBLIC
from recollect.server.bodies import BodyRoute
from recollect.server.chat_schema import ChatMessage, check_limits
from recollect.server.errors import operators_only
from recollect.server.fields import Body, Items
from recollect.server.services import client_of, services_of, with_model

router = APIRouter(tags=["Conversations"], route_class=BodyRoute)


class PrewarmRequest(Body):
    """The body of `POST /v1/prewarm`: a last message of the user counts as not yet finished."""

    model: str | None = None
    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    public: bool = False
    """Whether every key may reuse it, while the model stays loaded; an operator's to say."""


@router.post("/v1/prewarm")
async def prewarm(body: PrewarmRequest, request: Request) -> dict[str, Any]:
    """Compute what of a conversation is not computed yet."""
    most = services_of(request).settings.limits.messages
    check_limits(body.messages, 1, most_messages=most, most_choices=1)
    client = client_of(request)
    if body.public and not client.is_operator:
        raise operators_only("public")
    namespace = PUBLIC if body.public else client.namespace
    messages = [one.message() for one in body.messages]
    typed = (messages.pop()["content"] or "") if messages[-1]["role"] == "user" else ""

    def compute(model: Model) -> dict[str, Any]:
        session = (
            model.session_from(messages, namespace=namespace)
            if messages
            else model.session(namespace=namespace)
        )
        with session:
            ids = model.prompts.encode_typed(session.path(), typed).token_ids
            computed = (
                model.public.publish(ids).computed_tokens if body.public else session.prewarm(typed)
            )
        return {
            "object": "prewarm",
            "public": body.public,
            "prompt_tokens": len(ids),
            "computed_tokens": computed,
            "reused_tokens": len(ids) - computed,
        }

    result = await with_model(request, body.model, compute)
    assert isinstance(result, dict)
    return result

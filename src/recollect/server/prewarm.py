"""
`POST /v1/prewarm`: compute a conversation's KV before anybody asks anything.

For a client that knows what will be asked soon: a system prompt, a document, a message being typed.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from recollect.conversation.model import Model
from recollect.server.chat_schema import ChatMessage, check_limits
from recollect.server.fields import Body
from recollect.server.services import client_of, services_of, with_model

router = APIRouter(tags=["Conversations"])


class PrewarmRequest(Body):
    """The body of `POST /v1/prewarm`: a last message of the user counts as not yet finished."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]


@router.post("/v1/prewarm")
async def prewarm(body: PrewarmRequest, request: Request) -> dict[str, Any]:
    """Compute what of a conversation is not computed yet."""
    most = services_of(request).settings.limits.messages
    check_limits(body.messages, 1, most_messages=most, most_choices=1)
    namespace = client_of(request).namespace
    messages = [one.message() for one in body.messages]
    typed = (messages.pop()["content"] or "") if messages[-1]["role"] == "user" else ""

    def compute(model: Model) -> dict[str, Any]:
        session = (
            model.session_from(messages, namespace=namespace)
            if messages
            else model.session(namespace=namespace)
        )
        with session:
            computed = session.prewarm(typed)
        prompt = len(model.prompts.encode_typed(session.path(), typed).token_ids)
        return {
            "object": "prewarm",
            "prompt_tokens": prompt,
            "computed_tokens": computed,
            "reused_tokens": prompt - computed,
        }

    result = await with_model(request, body.model, compute)
    assert isinstance(result, dict)
    return result

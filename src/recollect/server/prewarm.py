"""
`POST /v1/prewarm`: compute a conversation's KV before anybody asks anything.

For a client that knows what will be asked soon: a system prompt, a document, a message being typed.
"""

import threading
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from recollect.conversation.model import Model
from recollect.engine.engine import Engine
from recollect.engine.pinning import compute_watched
from recollect.errors import ContextFullError
from recollect.kv.blocks import PUBLIC
from recollect.server.bodies import BodyRoute
from recollect.server.chat_schema import ChatMessage, check_limits
from recollect.server.errors import ClientGone, operators_only
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

    reading = _Reading()

    def compute(model: Model) -> dict[str, Any]:
        session = (
            model.session_from(messages, namespace=namespace)
            if messages
            else model.session(namespace=namespace)
        )
        with session:
            ids = model.prompts.encode_typed(session.path(), typed).token_ids
        if body.public:
            computed = model.public.publish(ids, progress=reading.told).computed_tokens
        else:
            computed = reading.compute(model.engine, ids, namespace)
        return {
            "object": "prewarm",
            "public": body.public,
            "prompt_tokens": len(ids),
            "computed_tokens": computed,
            "reused_tokens": len(ids) - computed,
        }

    return await with_model(request, body.model, compute, on_gone=reading.give_up)


class _Reading:
    """A prompt being read for a client, until that goes away; what was read by then stays warm."""

    def __init__(self) -> None:
        self._is_gone = threading.Event()

    def give_up(self) -> None:
        """End it at the next pass; from any thread."""
        self._is_gone.set()

    def told(self, _what: str, _done: int, _total: int | None) -> None:
        """
        Hear how far it is.

        Raises:
            ClientGone: Nobody waits for it any more.
        """
        if self._is_gone.is_set():
            raise ClientGone

    def compute(self, engine: Engine, token_ids: list[int], namespace: str) -> int:
        """
        Compute what of a prompt is not there; return how many tokens that took.

        Raises:
            ContextFullError: It leaves no place for a reply.
            ClientGone: Nobody waits for it any more.
        """
        if len(token_ids) >= engine.info.context_length:
            raise ContextFullError(needed=len(token_ids) + 1, limit=engine.info.context_length)
        sequence = engine.new_sequence(namespace)
        try:
            sequence.append(token_ids)
            if not sequence.is_warm():
                compute_watched(engine, sequence, progress=self.told)
            return sequence.fed_tokens
        finally:
            sequence.release()

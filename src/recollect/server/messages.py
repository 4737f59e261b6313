"""
`POST /v1/messages`: the same for clients of Anthropic's API.

There, input tokens are those that were computed; what was not is `cache_read_input_tokens`.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from recollect.conversation.model import Model
from recollect.conversation.reply import Reply
from recollect.server.chat_schema import check_limits
from recollect.server.errors import anthropic_body, api_error
from recollect.server.message_schema import CountRequest, MessagesRequest
from recollect.server.services import Job, begin, client_of, services_of, with_model
from recollect.server.streaming import (
    Ended,
    Event,
    Piece,
    Readable,
    progress_comment,
    require_reply,
    sse,
)
from recollect.types import FinishReason

router = APIRouter(tags=["Anthropic"])

_STOP_REASONS: Final[dict[FinishReason, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "cancelled": "end_turn",
}


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    settings, namespace = services_of(request).settings, client_of(request).namespace
    check_limits(body.messages, 1, most_messages=settings.limits.messages, most_choices=1)
    params = body.sampling(temperature=settings.temperature)

    def prepare(model: Model) -> Sequence[Readable]:
        session = model.session_from(body.conversation(), namespace=namespace)
        return [session.stream(None, params=params)]

    job = await begin(request, body.model, prepare)
    message = _Message(job)
    if body.stream:
        return await job.stream(request, message.events)
    replies = await job.replies(request)
    return JSONResponse(message.whole(replies[0]), headers=job.cost(replies).headers())


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> dict[str, Any]:
    """Return how many tokens a conversation is; nothing is computed."""
    namespace = client_of(request).namespace

    def count(model: Model) -> int:
        session = model.session_from(body.conversation(), namespace=namespace)
        return len(model.prompts.encode(session.path()).token_ids)

    return {"input_tokens": await with_model(request, body.model, count)}


class _Message:
    """The reply to one request, in Anthropic's words."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._id = f"msg_{secrets.token_hex(12)}"

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the reply at once."""
        return {
            **self._head(),
            "content": [{"type": "text", "text": reply.text}],
            "stop_reason": _STOP_REASONS[reply.finish_reason],
            "usage": self._job.cost([reply]).messages(),
        }

    async def events(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Yield the reply as it comes."""
        # What was reused is known only when the prompt is read; the last event has the numbers.
        unknown = {
            "input_tokens": 0,
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 0,
            "output_tokens": 0,
        }
        yield _event("message_start", message={**self._head(), "usage": unknown})
        empty = {"type": "text", "text": ""}
        yield _event("content_block_start", index=0, content_block=empty)
        async for event in events:
            match event:
                case Piece():
                    delta = {"type": "text_delta", "text": event.text}
                    yield _event("content_block_delta", index=0, delta=delta)
                case Ended():
                    try:
                        reply = require_reply(event)
                    except Exception as error:  # noqa: BLE001 - told to the client, and in the log
                        yield sse(anthropic_body(api_error(error)), "error")
                        return
                    yield self._end(reply)
                case _:
                    yield progress_comment(event)

    def _end(self, reply: Reply) -> str:
        stop = {"stop_reason": _STOP_REASONS[reply.finish_reason], "stop_sequence": None}
        usage = self._job.cost([reply]).messages()
        return (
            _event("content_block_stop", index=0)
            + _event("message_delta", delta=stop, usage=usage)
            + _event("message_stop")
        )

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._job.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }


def _event(kind: str, **fields: Any) -> str:
    return sse({"type": kind, **fields}, kind)

"""
`POST /v1/chat/completions`: the whole conversation comes as text each time, and is found again.

What of it was generated here is taken over as the token ids that it was, so nothing is read twice.
"""

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from time import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from recollect.conversation.model import Model
from recollect.conversation.turn import Reply
from recollect.server.bodies import BodyRoute
from recollect.server.chat_schema import ChatRequest, check_limits
from recollect.server.errors import api_error, openai_body
from recollect.server.services import Job, begin, client_of, services_of
from recollect.server.streaming import (
    Call,
    CallEvent,
    Ended,
    Event,
    Piece,
    Progress,
    Readable,
    progress_comment,
    require_reply,
    sse,
)
from recollect.server.tool_schema import logprob_entry
from recollect.text.tool_calls import ArgumentsDelta, CallStarted
from recollect.types import TokenLogprob

router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    settings, namespace = services_of(request).settings, client_of(request).namespace
    limits = settings.limits
    check_limits(
        body.messages,
        body.choices,
        most_messages=limits.messages,
        most_choices=limits.choices,
    )
    params = [
        body.sampling(choice, temperature=settings.temperature) for choice in range(body.choices)
    ]

    offered = body.offered

    def prepare(model: Model) -> Iterator[Readable]:
        session = model.session_from(
            body.conversation(),
            namespace=namespace,
            tools=offered.tools,
            tool_choice=offered.choice,
            parallel_tool_calls=offered.parallel,
        )
        sessions = [session, *(session.fork() for _ in params[1:])]
        for one, how in zip(sessions, params, strict=True):
            yield one.stream(None, params=how)

    job = await begin(request, body.model, prepare, choices=body.choices)
    completion = Completion(job, body)
    if body.stream:
        return await job.stream(request, completion.events)
    replies = await job.replies(request)
    cost = job.cost(replies)
    return JSONResponse(completion.whole(replies), headers=cost.headers())


class Completion:
    """The replies to one request, in OpenAI's words."""

    def __init__(self, job: Job, body: ChatRequest) -> None:
        self._job = job
        self._body = body
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time())

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Return the replies at once."""
        choices = [
            {
                "index": index,
                "message": _message(reply),
                "finish_reason": _finish_reason(reply),
                "logprobs": _logprobs(reply.logprobs),
            }
            for index, reply in enumerate(replies)
        ]
        usage = self._job.cost(replies).chat()
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    async def events(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Yield the replies as they come."""
        begun: set[int] = set()
        replies: list[Reply] = []
        async for event in events:
            if not isinstance(event, Progress) and event.choice not in begun:
                begun.add(event.choice)
                yield self._chunk(event.choice, {"role": "assistant", "content": ""})
            match event:
                case Piece():
                    likely = _logprobs(event.logprobs or None)
                    yield self._chunk(event.choice, {"content": event.text}, logprobs=likely)
                case Call():
                    if delta := _call_delta(event.event):
                        yield self._chunk(event.choice, {"tool_calls": [delta]})
                case Ended():
                    try:
                        reply = require_reply(event)
                    except Exception as error:  # noqa: BLE001 - told to the client, and in the log
                        yield sse(openai_body(api_error(error)))
                        return
                    replies.append(reply)
                    own = self._job.cost([reply]).own()
                    yield self._chunk(event.choice, {}, _finish_reason(reply), recollect=own)
                case Progress():
                    yield progress_comment(event)
        if self._body.include_usage:
            usage = self._job.cost(replies).chat()
            yield sse({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        yield sse("[DONE]")

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        *,
        logprobs: dict[str, Any] | None = None,
        **more: Any,
    ) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._body.include_usage else {}
        return sse({**self._head("chat.completion.chunk"), "choices": [choice], **usage, **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._job.model_name,
            "system_fingerprint": f"recollect-{self._job.model.fingerprint[:12]}",
        }


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.tool_calls:
        message["content"] = reply.content or None
        message["tool_calls"] = [call.to_dict() for call in reply.tool_calls]
    return message


def _finish_reason(reply: Reply) -> str:
    if reply.tool_calls and reply.finish_reason == "stop":
        return "tool_calls"
    return reply.finish_reason


def _logprobs(tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {"content": [logprob_entry(token) for token in tokens], "refusal": None}


def _call_delta(event: CallEvent) -> dict[str, Any] | None:
    """Return more of a call; None where nothing is told of its end."""
    match event:
        case CallStarted():
            function = {"name": event.name, "arguments": ""}
            return {"index": event.index, "id": event.id, "type": "function", "function": function}
        case ArgumentsDelta():
            return {"index": event.index, "function": {"arguments": event.text}}
        case _:
            return None

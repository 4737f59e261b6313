"""
A response as the events that OpenAI's clients expect while it is generated.

Knows the order of the events, not how the reply comes about.
"""

import itertools
from collections.abc import AsyncIterator, Mapping
from typing import Any

from recollect.conversation.reply import Reply
from recollect.server.errors import api_error
from recollect.server.response_object import (
    ResponseHead,
    output_message,
    output_text,
    response_object,
)
from recollect.server.services import Job
from recollect.server.streaming import Ended, Event, Piece, progress_comment, require_reply, sse


class ResponseEvents:
    """The events of one response, numbered."""

    def __init__(self, job: Job, head: ResponseHead, instructions: str | None = None) -> None:
        self._job = job
        self._head = head
        self._instructions = instructions
        self._numbers = itertools.count()

    async def events(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Yield the response as it comes."""
        beginning = response_object(self._head, None, None, None, self._instructions)
        yield self._event("response.created", response=beginning)
        yield self._event("response.in_progress", response=beginning)
        has_begun = False
        async for event in events:
            if isinstance(event, Piece | Ended) and not has_begun:
                has_begun = True
                yield self._begin_message()
            match event:
                case Piece():
                    yield self._event(
                        "response.output_text.delta", **self._part, delta=event.text, logprobs=[]
                    )
                case Ended():
                    try:
                        reply = require_reply(event)
                    except Exception as error:  # noqa: BLE001 - told to the client, and in the log
                        yield self._failed(error)
                        return
                    yield self._end(reply)
                case _:
                    yield progress_comment(event)

    @property
    def _part(self) -> Mapping[str, Any]:
        """Return where text belongs: there is one message, and one part in it."""
        return {"item_id": self._head.message_id, "output_index": 0, "content_index": 0}

    def _begin_message(self) -> str:
        item = {**output_message(self._head.message_id, "", "in_progress"), "content": []}
        return self._event("response.output_item.added", output_index=0, item=item) + self._event(
            "response.content_part.added", **self._part, part=output_text("")
        )

    def _end(self, reply: Reply) -> str:
        usage = self._job.cost([reply]).responses()
        response = response_object(
            self._head, reply.text, reply.finish_reason, usage, self._instructions
        )
        last = "completed" if reply.finish_reason == "stop" else "incomplete"
        return (
            self._event("response.output_text.done", **self._part, text=reply.text, logprobs=[])
            + self._event("response.content_part.done", **self._part, part=output_text(reply.text))
            + self._event("response.output_item.done", output_index=0, item=response["output"][0])
            + self._event(f"response.{last}", response=response)
        )

    def _failed(self, error: Exception) -> str:
        refused = api_error(error)
        response = {
            **response_object(self._head, None, None, None, self._instructions),
            "status": "failed",
            "error": {"code": refused.code or "server_error", "message": refused.message},
        }
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> str:
        return sse({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)

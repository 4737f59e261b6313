"""
A response as the events that OpenAI's clients expect while it is generated.

Knows the order of the events, not how the reply comes about.
"""

import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

from recollect.conversation.turn import Reply
from recollect.server.errors import api_error
from recollect.server.response_object import (
    ResponseHead,
    Said,
    function_call,
    output_message,
    output_text,
    response_object,
)
from recollect.server.services import Job
from recollect.server.streaming import (
    Call,
    CallEvent,
    Ended,
    Event,
    Piece,
    Progress,
    progress_comment,
    require_reply,
    sse,
)
from recollect.server.tool_schema import logprob_entry
from recollect.text.tool_calls import ArgumentsDelta, CallStarted


class ResponseEvents:
    """
    The events of one response, numbered.

    Its output is a list of items; each has a place from its first event on: the message where
    something is said, and each call.
    """

    def __init__(self, job: Job, head: ResponseHead, instructions: str | None = None) -> None:
        self._job = job
        self._head = head
        self._instructions = instructions
        self._numbers = itertools.count()
        self._places: dict[str, int] = {}  # item id to its place in the output

    async def events(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Yield the response as it comes."""
        beginning = response_object(self._head, None, None, self._instructions)
        yield self._event("response.created", response=beginning)
        yield self._event("response.in_progress", response=beginning)
        async for event in events:
            match event:
                case Piece():
                    for told in self._text(event):
                        yield told
                case Call():
                    for told in self._call(event.event):
                        yield told
                case Ended():
                    try:
                        reply = require_reply(event)
                    except Exception as error:  # noqa: BLE001 - told to the client, and in the log
                        yield self._failed(error)
                        return
                    for told in self._end(reply):
                        yield told
                case Progress():
                    yield progress_comment(event)

    def _text(self, piece: Piece) -> Iterator[str]:
        yield from self._begin_message()
        likely = [logprob_entry(token) for token in piece.logprobs]
        yield self._part("output_text.delta", delta=piece.text, logprobs=likely)

    def _begin_message(self) -> Iterator[str]:
        item_id = self._head.message_id
        if item_id not in self._places:
            yield self._begin_item(output_message(item_id, [], "in_progress"))
            yield self._part("content_part.added", part=output_text(""))

    def _call(self, event: CallEvent) -> Iterator[str]:
        if isinstance(event, CallStarted):
            function = {"name": event.name, "arguments": ""}
            call: Any = {"id": event.id, "type": "function", "function": function}
            yield self._begin_item(
                function_call(self._head.message_id, event.index, call, "in_progress")
            )
        elif isinstance(event, ArgumentsDelta):
            yield self._of_call(event.index, "delta", delta=event.text)

    def _end(self, reply: Reply) -> Iterator[str]:
        usage = self._job.cost([reply]).responses()
        response = response_object(self._head, Said.of(reply), usage, self._instructions)
        for item in response["output"]:
            if item["type"] == "message":
                yield from self._begin_message()
                (part,) = item["content"]
                yield self._part("output_text.done", text=part["text"], logprobs=part["logprobs"])
                yield self._part("content_part.done", part=part)
            else:
                done = {"arguments": item["arguments"], "name": item["name"]}
                number = int(item["id"].rpartition("_")[2])
                yield self._of_call(number, "done", **done)
            place = self._places[item["id"]]
            yield self._event("response.output_item.done", output_index=place, item=item)
        last = "completed" if reply.finish_reason == "stop" else "incomplete"
        yield self._event(f"response.{last}", response=response)

    def _begin_item(self, item: dict[str, Any]) -> str:
        place = self._places.setdefault(item["id"], len(self._places))
        return self._event("response.output_item.added", output_index=place, item=item)

    def _part(self, kind: str, **fields: Any) -> str:
        """Return an event of the message, whose text is its only part."""
        item_id = self._head.message_id
        where = {"item_id": item_id, "output_index": self._places[item_id], "content_index": 0}
        return self._event(f"response.{kind}", **where, **fields)

    def _of_call(self, number: int, kind: str, **fields: Any) -> str:
        item_id = f"fc_{self._head.message_id.removeprefix('msg_')}_{number}"
        where = {"item_id": item_id, "output_index": self._places[item_id]}
        return self._event(f"response.function_call_arguments.{kind}", **where, **fields)

    def _failed(self, error: Exception) -> str:
        refused = api_error(error)
        response = {
            **response_object(self._head, None, None, self._instructions),
            "status": "failed",
            "error": {"code": refused.code or "server_error", "message": refused.message},
        }
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> str:
        return sse({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)

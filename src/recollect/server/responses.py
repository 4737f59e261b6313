"""
`/v1/responses`: a response is a node of a kept conversation's tree, named by its id.

So `previous_response_id` may name any earlier response, as often as one likes: each is a fork, warm
while its KV is there, and right after a restart too.

A response as the events that OpenAI's clients expect while it is generated.

Knows the order of the events, not how the reply comes about.
"""

import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from time import time
from types import TracebackType
from typing import Any, Self

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Overflow
from recollect.conversation.turn import Reply, ReplyStream
from recollect.journal.records import Label, NodeRecord
from recollect.server.chat_completions import check_limits
from recollect.server.conversation_routes import drop_all_kv
from recollect.server.conversation_view import (
    HAS_INSTRUCTIONS,
    Place,
    Places,
    grow,
    with_instructions,
)
from recollect.server.fields import BodyRoute, logprob_entry
from recollect.server.refusals import api_error, not_found
from recollect.server.response_object import (
    ResponseHead,
    ResponseRequest,
    Said,
    function_call,
    items_of,
    output_message,
    output_text,
    response_object,
)
from recollect.server.services import Job, Services, begin, client_of, services_of
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
from recollect.server.usage import cost, recorded
from recollect.text.tool_calls import ArgumentsDelta, CallStarted
from recollect.text.tool_calls import Event as ReplyEvent
from recollect.types import Message, TokenLogprob, Usage


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


router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)


@router.post("/v1/responses")
async def create_response(body: ResponseRequest, request: Request) -> Response:
    """Answer the input, after an earlier response or in a conversation where one is named."""
    services, namespace = services_of(request), client_of(request).namespace
    limits = services.settings.limits
    items = [] if isinstance(body.input, str) else body.input
    check_limits(items, 1, most_messages=limits.messages, most_choices=1, what="input")
    params = body.sampling(temperature=services.settings.temperature)
    turn = _Turn(services, namespace, body, f"resp_{secrets.token_hex(16)}", int(time()))

    def prepare(model: Model) -> Sequence[Readable]:
        session, place = turn.session(model)
        stream = session.stream(None, params=params)
        return [_Kept(stream, lambda reply: turn.keep(model, place, reply))]

    job = await begin(request, body.model, prepare, keeps=body.keeps)
    head = turn.head(job.model_name)
    if body.stream:
        return await job.stream(request, ResponseEvents(job, head, body.instructions).events)
    (reply,) = await job.replies(request)
    spent = job.cost([reply])
    response = response_object(head, Said.of(reply), spent.responses(), body.instructions)
    return JSONResponse(response, headers=spent.headers())


@dataclass(frozen=True, slots=True)
class _Turn:
    """One request: where it goes on, and what is kept of it."""

    services: Services
    namespace: str
    body: ResponseRequest
    id: str
    created_at: int

    def head(self, model_name: str) -> ResponseHead:
        """Return what is known of the response before it is there."""
        return ResponseHead.of(self.body, self.id, self.created_at, model_name)

    def session(self, model: Model) -> tuple[Session, Place]:
        """
        Return a session at the last message of the input, and its place; called on a thread.

        Raises:
            ApiError: What the request goes on from is not there.
        """
        body = self.body
        places = Places(self.services.journal, self.services.kept, model, self.namespace)
        if body.previous_response_id is not None:
            place = places.after_response(body.previous_response_id)
        elif body.conversation_id is not None:
            place = places.at_tip(body.conversation_id)
        else:
            place = places.new()
        overflow: Overflow = "drop_oldest" if body.truncation == "auto" else "error"
        offered = body.offer()
        tools = Tools.of(offered.tools, offered.choice, parallel=offered.parallel)
        if not body.keeps:
            before = [node.message() for node in place.node.path()][place.has_instructions :]
            messages = [*_instructions(body), *before, *body.messages()]
            session = model.session_from(messages, namespace=self.namespace, overflow=overflow)
            session.tools = tools
            return session, place
        node = grow(
            place.conversation,
            with_instructions(place, body.instructions),
            places.known(body.messages()),
        )
        session = Session(
            model,
            place.conversation,
            node,
            body.sampling(temperature=0.0),
            namespace=self.namespace,
            name=place.tip,
            overflow=overflow,
            change=place.change,
            tools=tools,
        )
        return session, place

    def keep(self, model: Model, place: Place, reply: Reply) -> None:
        """Give a reply its id; called on the thread that has read it, before anybody is told."""
        kept_as = place.conversation.kept_as
        if not self.body.keeps or kept_as is None:
            return
        services = self.services
        services.kept.add(model, place.conversation)
        note = {
            HAS_INSTRUCTIONS: self.body.instructions is not None,
            "head": self.head(services.hub.resolve(self.body.model)).kept(),
        }
        label = Label(
            name=self.id,
            conversation_id=kept_as,
            node_id=place.conversation.kept_id(reply.node),
            note=note,
        )
        services.journal.set_label(label)


class _Kept:
    """A reply that gets its id before anybody is told that it has ended."""

    def __init__(self, stream: ReplyStream, keep: Callable[[Reply], None]) -> None:
        self._stream = stream
        self._keep = keep
        self.reply: Reply | None = None

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Return how many tokens of the prompt have KV, and how many there are."""
        return self._stream.prefill_progress

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Return how likely the tokens so far were; None where nobody asked."""
        return self._stream.logprobs

    def usage_so_far(self) -> Usage | None:
        """Return what the reply has cost by now; None before its first token."""
        return self._stream.usage_so_far()

    def events(self) -> Iterator[ReplyEvent]:
        """Read the reply as text and calls of tools."""
        return self._stream.events()

    def when_generated(self, call: Callable[[], object]) -> None:
        """Have something called once the reply is generated, before it is kept."""
        self._stream.when_generated(call)

    def stop(self) -> None:
        """End the reply after the forward pass under way."""
        self._stream.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        if self._stream.reply is not None:
            self._keep(self._stream.reply)
        self.reply = self._stream.reply


@router.get("/v1/responses/{response_id}")
def get_response(response_id: str, request: Request) -> JSONResponse:
    """Return a response that was kept."""
    label, path = _kept_response(request, response_id)
    instructions = path[0].content if label.note.get(HAS_INSTRUCTIONS) else None
    reply = path[-1]
    head = ResponseHead.from_kept(label.name, label.note["head"])
    usage = None if reply.usage is None else recorded(reply.usage)
    speed = services_of(request).speed(head.model, client_of(request).namespace)
    spent = None if usage is None else cost([usage], speed)
    return JSONResponse(
        response_object(
            head, Said.kept(reply), None if spent is None else spent.responses(), instructions
        )
    )


@router.get("/v1/responses/{response_id}/input_items")
def get_input_items(response_id: str, request: Request) -> dict[str, Any]:
    """Return the messages that a response answered, the last first."""
    label, path = _kept_response(request, response_id)
    asked = path[bool(label.note.get(HAS_INSTRUCTIONS)) : -1]
    name = label.name.removeprefix("resp_")
    items = [
        item for number, node in enumerate(asked) for item in items_of(f"msg_{name}_{number}", node)
    ][::-1]
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": False,
    }


@router.delete("/v1/responses/{response_id}")
def delete_response(response_id: str, request: Request) -> dict[str, Any]:
    """
    Forget a response; with the last one of a conversation, everything that was said in it.

    What other responses go on from stays in their conversation, without this name.
    """
    label, _ = _kept_response(request, response_id)
    services, namespace = services_of(request), client_of(request).namespace
    services.journal.delete_label(label.name)
    if not services.journal.labels(label.conversation_id):
        info = services.journal.info(label.conversation_id)
        services.journal.delete(info.id, namespace=namespace)
        services.kept.forget(info.id)
        drop_all_kv(services, info.id, info.created_at)
    return {"id": response_id, "object": "response", "deleted": True}


def _kept_response(request: Request, response_id: str) -> tuple[Label, list[NodeRecord]]:
    """
    Return the label of a response and the messages up to it.

    Raises:
        ApiError: There is none, for this client.
    """
    journal, namespace = services_of(request).journal, client_of(request).namespace
    label = journal.find_label(response_id, namespace=namespace)
    if label is None or label.node_id is None:
        raise not_found(f"response {response_id!r}")
    stored = journal.load(label.conversation_id, namespace=namespace)
    return label, stored.path(label.node_id)


def _instructions(body: ResponseRequest) -> list[Message]:
    return [] if body.instructions is None else [{"role": "system", "content": body.instructions}]

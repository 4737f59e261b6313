"""
`/v1/responses`: a response is a node of a kept conversation's tree, named by its id.

So `previous_response_id` may name any earlier response, as often as one likes: each is a fork, warm
while its KV is there, and right after a restart too. First the response as the numbered events that
OpenAI's clients expect while it is generated, then the calls.
"""

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import time
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from recollect import types
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Overflow
from recollect.conversation.turn import Reply
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.journal.records import Label, NodeRecord
from recollect.server.conversation_routes import drop_all_kv
from recollect.server.conversation_view import (
    HAS_INSTRUCTIONS,
    KnownItems,
    Place,
    Places,
)
from recollect.server.events import Call, CallEvent, Ended, EventWriter, Piece, Thought, Told, sse
from recollect.server.fields import BodyRoute, check_count, check_last, named_sampling
from recollect.server.parts import logprob_entry
from recollect.server.refusals import ApiError, not_found
from recollect.server.response_object import (
    ResponseHead,
    ResponseRequest,
    Said,
    function_call,
    item_list,
    items_of,
    output_message,
    output_text,
    reasoning_item,
    reasoning_text,
    response_object,
)
from recollect.server.services import Job, Services, begin, client_of, services_of
from recollect.server.usage import cost, recorded
from recollect.text.tool_calls import ArgumentsDelta, CallStarted
from recollect.types import Message, ToolCall

_ENDED: Final = "ended"
"""Key in the note of a response: see `GeneratedReply.ended`."""
_RAN_AWAY: Final = "ran_away"
"""Key that earlier versions have there: whether it was ended because it repeated itself."""


class _Response(EventWriter):
    """
    One response and its numbered events; a `Writer`.

    Its output is a list of items; each has a place from its first event on: the message where
    something is said, and each call.
    """

    def __init__(self, job: Job, head: ResponseHead, instructions: str | None = None) -> None:
        self._job = job
        self._head = head
        self._instructions = instructions
        self._numbers = itertools.count()
        self._places: dict[str, int] = {}  # item id to its place in the output

    def whole(self, replies: Sequence[GeneratedReply]) -> dict[str, Any]:
        """Return the response at once."""
        (reply,) = replies
        usage = self._job.cost(replies).responses()
        return response_object(self._head, Said.of(reply), usage, self._instructions)

    def begin(self) -> str:
        """Return what is known of the response before it is there."""
        beginning = response_object(self._head, None, None, self._instructions)
        return self._event("response.created", response=beginning) + self._event(
            "response.in_progress", response=beginning
        )

    def write(self, event: Told) -> str:
        """Return what is sent of an event."""
        match event:
            case Piece():
                return "".join(self._text(event))
            case Thought():
                return "".join(self._thought(event))
            case Call():
                return "".join(self._call(event.event))
            case Ended():
                return "".join(self._end(event.reply))

    def fail(self, error: ApiError) -> str:
        """Return the response as failed."""
        response = {
            **response_object(self._head, None, None, self._instructions),
            "status": "failed",
            "error": {"code": error.code or "server_error", "message": error.message},
        }
        return self._event("response.failed", response=response)

    def end(self) -> str:
        """Return nothing: the response has said that it is over."""
        return ""

    def _text(self, piece: Piece) -> Iterator[str]:
        yield from self._begin_message()
        likely = [logprob_entry(token) for token in piece.logprobs]
        yield self._part("output_text.delta", delta=piece.text, logprobs=likely)

    def _thought(self, thought: Thought) -> Iterator[str]:
        item = reasoning_item(self._head.message_id, [], "in_progress")
        if item["id"] not in self._places:
            yield self._begin_item(item)
            yield self._part("content_part.added", item["id"], part=reasoning_text(""))
        yield self._part("reasoning_text.delta", item["id"], delta=thought.text)

    def _begin_message(self) -> Iterator[str]:
        item_id = self._head.message_id
        if item_id not in self._places:
            yield self._begin_item(output_message(item_id, [], "in_progress"))
            yield self._part("content_part.added", part=output_text(""))

    def _call(self, event: CallEvent) -> Iterator[str]:
        if isinstance(event, CallStarted):
            call = ToolCall(event.id, event.name, "").to_dict()
            item = function_call(
                self._head.message_id,
                event.index,
                call,
                "in_progress",
                namespaces=self._head.namespaces,
            )
            yield self._begin_item(item)
        elif isinstance(event, ArgumentsDelta):
            yield self._of_call(event.index, "delta", delta=event.text)

    def _end(self, reply: GeneratedReply) -> Iterator[str]:
        response = self.whole([reply])
        for item in response["output"]:
            if item["type"] == "reasoning":
                (part,) = item["content"]
                yield self._part("reasoning_text.done", item["id"], text=part["text"])
                yield self._part("content_part.done", item["id"], part=part)
            elif item["type"] == "message":
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

    def _part(self, kind: str, item_id: str | None = None, **fields: Any) -> str:
        """Return an event of an item, or of the message, whose text is its only part."""
        item_id = item_id or self._head.message_id
        where = {"item_id": item_id, "output_index": self._places[item_id], "content_index": 0}
        return self._event(f"response.{kind}", **where, **fields)

    def _of_call(self, number: int, kind: str, **fields: Any) -> str:
        item_id = f"fc_{self._head.message_id.removeprefix('msg_')}_{number}"
        where = {"item_id": item_id, "output_index": self._places[item_id]}
        return self._event(f"response.function_call_arguments.{kind}", **where, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        return sse({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)


router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)


@router.post("/v1/responses")
async def create_response(body: ResponseRequest, request: Request) -> Response:
    """Answer the input, after an earlier response or in a conversation where one is named."""
    services, namespace = services_of(request), client_of(request).namespace
    limits = services.settings.limits
    items = [] if isinstance(body.input, str) else body.input
    check_count("input", len(items), limits.messages)
    params = body.sampling(services.settings)
    named = named_sampling(body, services.settings)
    asked = _Asked(services, namespace, body, f"resp_{secrets.token_hex(16)}", int(time()))

    def prepare(model: Model) -> Sequence[ReplyGeneration]:
        return [
            asked.session(model).stream(
                None, params=params.with_recommended(model.local.sampling, named)
            )
        ]

    job = await begin(request, body.model, prepare, keeps=body.keeps, keep=asked.keep)
    writer = _Response(job, asked.head(job.model_name), body.instructions)
    return await job.answer(request, writer, stream=bool(body.stream))


@dataclass(slots=True)
class _Asked:
    """One request: where it goes on, and what is kept of it. Used by one thread at a time."""

    services: Services
    namespace: str
    body: ResponseRequest
    id: str
    created_at: int
    at: tuple[Model, Place] | None = None
    """Where it goes on, once that is found."""

    def head(self, model_name: str) -> ResponseHead:
        """Return what is known of the response before it is there."""
        return ResponseHead.of(self.body, self.id, self.created_at, model_name)

    def session(self, model: Model) -> Session:
        """
        Return a session at the last message of the input.

        Raises:
            ApiError: What the request goes on from is not there.
        """
        body = self.body
        places = Places(self.services.journal, self.services.conversations, model, self.namespace)
        if body.previous_response_id is not None:
            place = places.after_response(body.previous_response_id)
        elif body.conversation_id is not None:
            place = places.at_tip(body.conversation_id)
        else:
            place = places.new()
        self.at = model, place
        overflow: Overflow = "drop_oldest" if body.truncation == "auto" else "error"
        offered = body.offer()
        items = KnownItems(self.services, self.namespace)
        said = model.template.with_thoughts(body.messages(items.find))
        if said:
            check_last(said, "input")
        if not body.keeps:
            before = [node.message() for node in place.node.path()][place.has_instructions :]
            messages = [*_instructions(body), *before, *said]
            return model.session_from(
                messages, namespace=self.namespace, overflow=overflow, **offered
            )
        tools = Tools.of(
            offered["tools"], offered["tool_choice"], parallel=offered["parallel_tool_calls"]
        )
        place = places.grow(place, body.instructions, said)
        return Session(
            model,
            place.conversation,
            place.node,
            body.sampling(self.services.settings),
            namespace=self.namespace,
            name=place.tip,
            overflow=overflow,
            change=place.change,
            tools=tools,
            template_options=offered["template_options"],
        )

    def keep(self, reply: GeneratedReply) -> None:
        """Give a reply its id, before anybody is told of it."""
        assert self.at is not None, "it was begun somewhere"
        assert isinstance(reply, Reply), "it was said in a session"
        model, place = self.at
        journal_id = place.conversation.journal_id
        if not self.body.keeps or journal_id is None:
            return
        services = self.services
        services.conversations.add(model, place.conversation)
        note = {
            HAS_INSTRUCTIONS: self.body.instructions is not None,
            "head": self.head(services.hub.resolve(self.body.model)).kept(),
            _ENDED: reply.ended,
        }
        label = Label(
            name=self.id,
            conversation_id=journal_id,
            node_id=place.conversation.saved_id(reply.node),
            note=note,
        )
        services.journal.set_label(label)


def _ended(note: Mapping[str, Any]) -> types.Ended | None:
    noted = note.get(_ENDED)
    if noted == "repetition" or note.get(_RAN_AWAY) is True:
        return "repetition"
    return "call" if noted == "call" else None


@router.get("/v1/responses/{response_id}")
def get_response(response_id: str, request: Request) -> JSONResponse:
    """Return a response that was kept."""
    label, path = _kept_response(request, response_id)
    instructions = path[0].content if label.note.get(HAS_INSTRUCTIONS) else None
    reply = path[-1]
    head = ResponseHead.from_kept(label.name, label.note["head"])
    usage = None if reply.usage is None else recorded(reply.usage)
    speed = services_of(request).metrics.speed(head.model, client_of(request).namespace)
    ended = _ended(label.note)
    spent = None if usage is None else cost([usage], speed, ended=ended)
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
    return item_list(items)


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
        services.conversations.forget(info.id)
        services.known.forget(info.id)
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

"""
`/v1/responses`: a response is a node of a kept conversation's tree, named by its id.

So `previous_response_id` may name any earlier response, as often as one likes: each is a fork, warm
while its KV is there, and right after a restart too.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
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
from recollect.journal.entries import Label
from recollect.journal.records import NodeRecord
from recollect.server.bodies import BodyRoute
from recollect.server.chat_schema import check_limits
from recollect.server.checkpoints import drop_all_kv
from recollect.server.errors import not_found
from recollect.server.places import HAS_INSTRUCTIONS, Place, Places, grow, with_instructions
from recollect.server.response_events import ResponseEvents
from recollect.server.response_object import ResponseHead, Said, items_of, response_object
from recollect.server.response_schema import ResponseRequest
from recollect.server.services import Services, begin, client_of, services_of
from recollect.server.streaming import Readable
from recollect.server.usage import cost, recorded
from recollect.text.tool_calls import Event
from recollect.types import Message, TokenLogprob, Usage

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

    def events(self) -> Iterator[Event]:
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

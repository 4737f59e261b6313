"""
`POST /v1/conversations/{id}/explore`: several replies from one place, generated in one batch.

The events say which branch each piece is of. A branch that fails is told, and the others go on; a client
that goes away ends them all, and then only those that had come to their end are kept.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from recollect.conversation.branches import Plan
from recollect.conversation.explore import Exploration
from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.server.conversation_routes import StandingPlace
from recollect.server.conversation_view import (
    ConversationView,
    split_branch,
    view_of,
)
from recollect.server.events import Call, Ended, EventWriter, Failed, Piece, Progress, Told, sse
from recollect.server.fields import (
    BodyRoute,
    Items,
    PlaceName,
    SamplingFields,
    check_count,
    named_sampling,
)
from recollect.server.parts import Thinking
from recollect.server.refusals import ApiError, api_error, name_taken, naming
from recollect.server.services import (
    Job,
    begin,
    services_of,
    unless_disconnected,
)
from recollect.server.settings import Settings
from recollect.text.tool_calls import ArgumentsDelta, CallStarted
from recollect.types import SamplingParams

router = APIRouter(tags=["Conversations"], route_class=BodyRoute)


class TriedBranch(SamplingFields):
    """One branch: what is said, how its reply is sampled, and what it is to be called."""

    prompt: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    name: PlaceName | None = None


class Explore(SamplingFields):
    """What to try; what a branch does not say of itself is as the body says it."""

    model: str | None = None
    item: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    prompts: Annotated[Items[str], Field(min_length=1)] | None = None
    branches: Annotated[Items[TriedBranch], Field(min_length=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning: Thinking | None = None
    keep: bool = True
    stream: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Explore":
        if sum(value is not None for value in (self.n, self.prompts, self.branches)) != 1:
            raise ValueError("Give exactly one of n, prompts and branches")
        return self

    def counted(self) -> tuple[str, int]:
        """Return which field says how many branches there are to be, and how many; none is made for it."""
        if self.branches is not None:
            return "branches", len(self.branches)
        return ("n", self.n or 1) if self.prompts is None else ("prompts", len(self.prompts))

    def tried(self) -> list[TriedBranch]:
        """Return the branches, also where the body only counts them or says what is said."""
        if self.branches is not None:
            return self.branches
        prompts: Sequence[str | None] = self.prompts or [None] * (self.n or 1)
        return [TriedBranch(prompt=prompt) for prompt in prompts]

    def sampling(
        self, number: int, own: TriedBranch, model: Model, settings: Settings
    ) -> SamplingParams:
        """Return how the reply of one of the branches is sampled; each has a seed of its own."""
        said = {name: getattr(own, name) for name in own.model_fields_set - {"prompt", "name"}}
        both = self.model_copy(update=said)
        params = both.params(
            settings,
            max_tokens=both.max_output_tokens or settings.max_tokens,
            choice=0 if "seed" in said else number,
            reasoning_budget=None if self.reasoning is None else self.reasoning.budget,
        )
        return params.with_recommended(model.local.sampling, named_sampling(both, settings))


@router.post("/v1/conversations/{conversation_id}/explore")
async def explore(conversation_id: str, body: Explore, request: Request) -> Response:
    """Try several replies from where a conversation stands, or from one of its items."""
    check_count(*body.counted(), services_of(request).settings.limits.choices)
    tried = body.tried()
    place = await asyncio.to_thread(_place_of, request, conversation_id, body)
    trial = _Trial(place, body, _names(place.view, tried))
    job = await begin(
        request,
        body.model or place.model_name(),
        trial.prepare,
        choices=len(tried),
        keeps=body.keep,
        keep=trial.note_item,
        per_prompt=1,
    )
    writer = _Told(job, trial)
    if body.stream:
        return await job.answer(request, writer, stream=True, failed=writer.failed)
    try:
        ended = await unless_disconnected(request, _ended(job))
    except BaseException:
        job.stop()
        raise
    return JSONResponse(writer.all(ended))


async def _ended(job: Job) -> list[Ended | Failed]:
    """
    Return how all replies have ended, in their order.

    Raises:
        RecollectError: All have failed; this is what the first failed with.
    """
    told = [event async for event in job.told() if isinstance(event, Ended | Failed)]
    told.sort(key=lambda event: event.choice)
    if isinstance(first := told[0], Failed) and all(isinstance(one, Failed) for one in told):
        raise first.error
    return told


def _place_of(request: Request, conversation_id: str, body: Explore) -> StandingPlace:
    """
    Return where the conversation stands, or the item to begin from.

    Raises:
        ApiError: There is no such conversation or item, for this client.
    """
    view = view_of(request, conversation_id)
    if body.item is not None:
        with naming("item"):
            view = view.at(view.id, view.branch, view.node_id(body.item))
    return StandingPlace.of(request, view)


def _names(view: ConversationView, tried: Sequence[TriedBranch]) -> list[str]:
    """
    Return what the branches are called.

    Raises:
        ApiError: Two have one name, or there is one of that name.
    """
    prefix = f"explore-{secrets.token_hex(3)}"
    names = [one.name or f"{prefix}-{number}" for number, one in enumerate(tried, 1)]
    counted = Counter(names)
    for number, name in enumerate(names):
        if name in view.stored.tips or counted[name] > 1:
            raise name_taken(
                f"There is {name!r} in this conversation already, or twice in the request: take another "
                "name.",
                param=f"branches.{number}.name",
            )
    return names


@dataclass(slots=True)
class _Trial:
    """One request: where its branches begin, and what they are called. Used by one thread at a time."""

    place: StandingPlace
    body: Explore
    names: list[str]
    exploration: Exploration | None = None
    items: dict[int, str] = field(default_factory=dict)
    """By the index of a branch that is kept: the id of its reply."""

    def prepare(self, model: Model) -> Sequence[ReplyGeneration]:
        """Have the engine begin all branches."""
        place, body = self.place, self.body
        services, view, namespace = place.services, place.view, place.namespace
        conversation = services.conversations.conversation(
            model, view.stored.id, namespace=namespace, node_id=view.tip
        )
        node = None if view.tip is None else conversation.saved_node(view.tip)
        tried = body.tried()
        session = Session(
            model,
            conversation,
            node or conversation.tree.root,
            SamplingParams(),
            namespace=namespace,
            tools=place.tools(),
            template_options=None if body.reasoning is None else body.reasoning.options(),
        )
        plan = Plan(
            prompts=[one.prompt for one in tried],
            params=[
                body.sampling(number, one, model, services.settings)
                for number, one in enumerate(tried)
            ],
            keep=None if body.keep else 0,
            name=self.names,
        )
        self.exploration = Exploration(session.origin(), [model], plan)
        try:
            return self.exploration.begin()
        except BaseException:
            self.exploration.close()
            raise

    def note_item(self, reply: GeneratedReply) -> None:
        """Find the id of a reply that was kept; called on a thread."""
        assert self.exploration is not None, "it was begun"
        for branch in self.exploration.branches:
            if branch.reply is reply and branch.node is not None:
                saved = self.exploration.conversation.saved_id(branch.node)
                if saved is None:
                    continue
                place = self.place
                _, names = place.services.journal.names(place.view.stored.id, [saved])
                if saved in names:  # else the conversation was deleted meanwhile
                    self.items[branch.index] = names[saved]


class _Told(EventWriter):
    """The branches of one exploration and their events; a `Writer`."""

    def __init__(self, job: Job, trial: _Trial) -> None:
        assert trial.exploration is not None, "it was begun"
        self._job = job
        self._trial = trial
        self._tried: Final = trial.exploration.branches
        self._replies: dict[int, GeneratedReply] = {}
        self._is_over: set[int] = set()

    def whole(self, replies: Sequence[GeneratedReply]) -> dict[str, Any]:
        """Return the exploration at once, where no branch has failed."""
        return self.all([Ended(number, reply) for number, reply in enumerate(replies)])

    def all(self, outcomes: Sequence[Ended | Failed]) -> dict[str, Any]:
        """Return the exploration at once."""
        branches = [
            self._ended(one) if isinstance(one, Ended) else self._failure(one) for one in outcomes
        ]
        return {
            "object": "conversation.exploration",
            **self._head(),
            "branches": branches,
            "usage": self._usage(),
        }

    def begin(self) -> str:
        """Return which branches there are."""
        names = self._trial.names if self._trial.body.keep else [None] * len(self._tried)
        branches = [
            {"index": one.index, "branch": name, "prompt": one.prompt, "seed": one.params.seed}
            for one, name in zip(self._tried, names, strict=True)
        ]
        return self._event("started", **self._head(), branches=branches)

    def waiting(self, progress: Progress) -> str:
        """Return how much of each prompt is read, where nothing else is new."""
        return "".join(
            self._event("progress", index=number, computed=done, tokens=total)
            for number, (done, total) in enumerate(progress.each)
            if number not in self._is_over
        )

    def write(self, event: Told) -> str:
        """Return what is sent of an event."""
        if isinstance(event, Ended):
            return self._event("branch_completed", **self._ended(event))
        if isinstance(event, Call):
            return self._call(event)
        kind = "text" if isinstance(event, Piece) else "reasoning"
        return self._event("delta", index=event.choice, **{kind: event.text}) if event.text else ""

    def failed(self, event: Failed) -> str:
        """Return that one branch has failed; the others go on."""
        return self._event("failed", **self._failure(event))

    def fail(self, error: ApiError) -> str:
        """Return that the exploration has failed."""
        return self._event("failed", index=None, error=_told(error))

    def end(self) -> str:
        """Return what all branches have cost together."""
        return self._event("completed", **self._head(), usage=self._usage())

    def _head(self) -> dict[str, Any]:
        view = self._trial.place.view
        at = None if view.tip is None else view.item_id(view.tip)
        return {"conversation": view.id, "model": self._job.model_name, "item": at}

    def _call(self, event: Call) -> str:
        more = event.event
        if isinstance(more, CallStarted):
            call = {"index": more.index, "id": more.id, "name": more.name}
        elif isinstance(more, ArgumentsDelta):
            call = {"index": more.index, "arguments": more.text}
        else:
            return ""
        return self._event("delta", index=event.choice, call=call)

    def _ended(self, event: Ended) -> dict[str, Any]:
        reply, branch = event.reply, self._tried[event.choice]
        self._replies[event.choice] = reply
        self._is_over.add(event.choice)
        base = split_branch(self._trial.place.view.id)[0]
        return {
            "index": event.choice,
            "branch": branch.name,
            "conversation": None if branch.name is None else f"{base}.{branch.name}",
            "item": self._trial.items.get(event.choice),
            "text": reply.content,
            "reasoning": reply.reasoning or None,
            "tool_calls": [call.to_dict() for call in reply.tool_calls],
            "finish_reason": reply.finish_reason,
            "usage": self._job.cost([reply]).responses(),
        }

    def _failure(self, event: Failed) -> dict[str, Any]:
        self._is_over.add(event.choice)
        return {"index": event.choice, "error": _told(api_error(event.error))}

    def _usage(self) -> dict[str, Any] | None:
        replies = [self._replies[number] for number in sorted(self._replies)]
        return self._job.cost(replies).responses() if replies else None

    def _event(self, kind: str, **fields: Any) -> str:
        name = f"explore.{kind}"
        return sse({"type": name, **fields}, name)


def _told(error: ApiError) -> dict[str, Any]:
    return {"code": error.code or "server_error", "message": error.message}

"""
`POST /v1/completions`: text goes on, without a template and without a conversation.

Every prompt is a sequence of its own; what any of them has in common with an earlier one is reused.
"""

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from time import time
from types import TracebackType
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from recollect.conversation.model import Model
from recollect.conversation.tree import Node
from recollect.conversation.turn import Reply
from recollect.engine.reply import ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.errors import ContextFullError, InvalidParameterError
from recollect.server.chat_completions import StreamOptions, check_limits
from recollect.server.fields import BodyRoute, Ignored, Items, SamplingFields
from recollect.server.refusals import api_error, openai_body
from recollect.server.services import Job, begin, client_of, services_of
from recollect.server.streaming import (
    Ended,
    Event,
    Piece,
    Progress,
    Readable,
    progress_comment,
    require_reply,
    sse,
)
from recollect.text.tool_calls import Event as ReplyEvent
from recollect.text.tool_calls import TextDelta
from recollect.types import SamplingParams, TokenLogprob, Usage

router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)

_Item = TypeVar("_Item")
TokenId = Annotated[int, Field(ge=0)]
Prompts = Annotated[Items[_Item], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    model: str | None = None
    prompt: str | Prompts[str] | Prompts[TokenId] | Prompts[Items[TokenId]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    n: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    best_of: Literal[1] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: Literal[""] | None = None
    user: Ignored = None

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, as text or as token ids."""
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [self.prompt]  # type: ignore[list-item] # a list that begins with a number is one of numbers
            case prompts:
                return list(prompts)  # type: ignore[arg-type] # as above, of texts or of lists


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Go on with a text."""
    settings, namespace = services_of(request).settings, client_of(request).namespace
    prompts = body.prompts()
    number = body.n or 1
    check_limits(
        prompts,
        number * len(prompts),
        most_messages=settings.limits.choices,
        most_choices=settings.limits.choices,
        what="prompt",
    )
    params = [
        body.params(
            max_tokens=body.max_tokens,
            temperature=settings.temperature,
            choice=choice,
            logprobs=body.logprobs,
        )
        for choice in range(number)
    ]

    def prepare(model: Model) -> Iterator[Readable]:
        streams = [
            TextStream(model, prompt, how, namespace=namespace, echo=bool(body.echo))
            for prompt in prompts
            for how in params
        ]  # all of them, so that nothing is begun where one prompt cannot be
        for stream in streams:
            stream.start()
            yield stream

    job = await begin(request, body.model, prepare, choices=number * len(prompts))
    completion = TextCompletion(job, body)
    if body.stream:
        return await job.stream(request, completion.events, per_prompt=number)
    replies = await job.replies(request)
    cost = job.cost(replies, per_prompt=number)
    return JSONResponse(completion.whole(replies), headers=cost.headers())


class TextStream:
    """What follows a prompt, as it is generated; nothing is kept but its KV."""

    def __init__(
        self,
        model: Model,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        namespace: str,
        echo: bool,
    ) -> None:
        """
        Have it ready to begin.

        Raises:
            InvalidParameterError: The prompt is empty.
            ContextFullError: It leaves no place for a reply.
            TokenIdError: An id is outside the vocabulary.
        """
        ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise InvalidParameterError("The prompt is empty: give at least one token.")
        if len(ids) >= model.context_length:
            raise ContextFullError(needed=len(ids) + 1, limit=model.context_length)
        sequence = model.engine.new_sequence(namespace)
        sequence.append(ids)
        generator = Generator(model.engine, params, sequence=sequence, grammars=model.grammars)
        self._generation = ReplyGeneration(model.engine, generator, model.tokenizer)
        self._echo = model.tokenizer.decode(ids) if echo else ""
        self.reply: Reply | None = None

    def start(self) -> None:
        """Have the engine begin."""
        self._generation.start()

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Return how many tokens of the prompt have KV, and how many there are."""
        return self._generation.prefilled_tokens, self._generation.prompt_tokens

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Return how likely the tokens so far were; None where nobody asked."""
        return self._generation.logprobs

    def usage_so_far(self) -> Usage | None:
        """Return what it has cost by now; None before its first token."""
        return self._generation.usage() if self._generation.has_begun else None

    def events(self) -> Iterator[ReplyEvent]:
        """Read what comes, which is text."""
        if self._echo:
            yield TextDelta(self._echo)
        yield from map(TextDelta, self._generation)

    def stop(self) -> None:
        """End it after the forward pass under way."""
        self._generation.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._generation.finish()
        self._generation.release()
        reason = self._generation.finish_reason
        assert reason is not None, "it has ended"
        text = self._echo + self._generation.text
        nowhere = Node(id=0, parent=None, role=None, content="")
        usage, logprobs = self._generation.usage(), self._generation.logprobs
        self.reply = Reply(text, reason, usage, nowhere, content=text, logprobs=logprobs)


class TextCompletion:
    """What follows the prompts of one request, in OpenAI's words."""

    def __init__(self, job: Job, body: CompletionRequest) -> None:
        self._job = job
        self._per_prompt = body.n or 1
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time()),
            "model": job.model_name,
        }

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Return everything at once."""
        choices = [
            _choice(index, reply.text, reply.finish_reason, reply.logprobs)
            for index, reply in enumerate(replies)
        ]
        return {**self._head, "choices": choices, "usage": self._usage(replies)}

    async def events(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Yield texts as they come."""
        replies: dict[int, Reply] = {}
        async for event in events:
            match event:
                case Piece():
                    piece = _choice(event.choice, event.text, None, event.logprobs or None)
                    yield sse({**self._head, "choices": [piece]})
                case Ended():
                    try:
                        reply = require_reply(event)
                    except Exception as error:  # noqa: BLE001 - told to the client, and in the log
                        yield sse(openai_body(api_error(error)))
                        return
                    replies[event.choice] = reply
                    last = _choice(event.choice, "", reply.finish_reason)
                    yield sse({**self._head, "choices": [last]})
                case Progress():
                    yield progress_comment(event)
        if self._include_usage:
            usage = self._usage([replies[choice] for choice in sorted(replies)])
            yield sse({**self._head, "choices": [], "usage": usage})
        yield sse("[DONE]")

    def _usage(self, replies: Sequence[Reply]) -> dict[str, Any]:
        return self._job.cost(replies, per_prompt=self._per_prompt).chat()


def _choice(
    index: int,
    text: str,
    finish_reason: str | None,
    logprobs: Sequence[TokenLogprob] | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": None if logprobs is None else _logprobs(logprobs),
        "finish_reason": finish_reason,
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return how likely tokens were, in the older form that completions have."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{other.text: other.logprob for other in token.top} for token in tokens],
        "text_offset": None,
    }

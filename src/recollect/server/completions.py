"""
`POST /v1/completions`: text goes on, without a template and without a conversation.

Every prompt is a sequence of its own; what any of them has in common with an earlier one is reused.
"""

import secrets
from collections.abc import Iterator, Sequence
from time import time
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from recollect.conversation.model import Model
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.errors import ContextFullError, InvalidParameterError
from recollect.server.chat_completions import StreamOptions
from recollect.server.fields import (
    NOT_SUPPORTED,
    BodyRoute,
    Ignored,
    Items,
    SamplingFields,
    check_count,
)
from recollect.server.refusals import ApiError, openai_body
from recollect.server.services import (
    Call,
    Ended,
    Job,
    Piece,
    Told,
    begin,
    client_of,
    services_of,
    sse,
)
from recollect.types import SamplingParams, TokenLogprob

router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)

_Item = TypeVar("_Item")
TokenId = Annotated[int, Field(ge=0)]
Prompts = Annotated[Items[_Item], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    refused: ClassVar = NOT_SUPPORTED

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
    most = settings.limits.choices
    check_count("prompt", len(prompts), most)
    check_count("n", number * len(prompts), most)
    params = [
        body.params(
            settings,
            max_tokens=body.max_tokens,
            choice=choice,
            logprobs=body.logprobs,
        )
        for choice in range(number)
    ]

    echoes: list[str] = []

    def prepare(model: Model) -> Iterator[ReplyGeneration]:
        ids = [_token_ids(model, prompt) for prompt in prompts]
        if body.echo:
            echoes.extend(model.tokenizer.decode(one) for one in ids for _ in params)
        # All of them, so that nothing is begun where one prompt cannot be.
        streams = [_reply_to(model, one, how, namespace) for one in ids for how in params]
        for stream in streams:
            stream.start()
            yield stream

    job = await begin(
        request, body.model, prepare, choices=number * len(prompts), per_prompt=number
    )
    return await job.answer(request, _Completion(job, body, echoes), stream=bool(body.stream))


def _token_ids(model: Model, prompt: str | list[int]) -> list[int]:
    """
    Return a prompt as token ids.

    Raises:
        InvalidParameterError: The prompt is empty.
        ContextFullError: It leaves no place for a reply.
    """
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise InvalidParameterError("The prompt is empty: give at least one token.")
    if len(ids) >= model.context_length:
        raise ContextFullError(needed=len(ids) + 1, limit=model.context_length)
    return ids


def _reply_to(
    model: Model, prompt: list[int], params: SamplingParams, namespace: str
) -> ReplyGeneration:
    """
    Return what follows a prompt, ready to begin; nothing is kept of it but its KV.

    Raises:
        TokenIdError: An id is outside the vocabulary.
    """
    sequence = model.engine.new_sequence(namespace)
    sequence.append(prompt)
    generator = Generator(model.engine, params, sequence=sequence, grammars=model.grammars)
    return ReplyGeneration(model.engine, generator, model.tokenizer)


class _Completion:
    """What follows the prompts of one request, in OpenAI's words; a `Writer`."""

    def __init__(self, job: Job, body: CompletionRequest, echoes: Sequence[str]) -> None:
        self._job = job
        self._echoes = echoes
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time()),
            "model": job.model_name,
        }
        self._replies: dict[int, GeneratedReply] = {}

    def whole(self, replies: Sequence[GeneratedReply]) -> dict[str, Any]:
        """Return everything at once."""
        echoes = self._echoes or [""] * len(replies)
        choices = [
            _choice(index, echo + reply.text, reply.finish_reason, reply.logprobs)
            for index, (echo, reply) in enumerate(zip(echoes, replies, strict=True))
        ]
        return {**self._head, "choices": choices, "usage": self._job.cost(replies).chat()}

    def begin(self) -> str:
        """Return the prompts, where they are to be echoed."""
        return "".join(map(self._piece, range(len(self._echoes)), self._echoes))

    def write(self, event: Told) -> str:
        """Return the chunk of an event."""
        match event:
            case Piece():
                return self._piece(event.choice, event.text, logprobs=event.logprobs or None)
            case Ended():
                self._replies[event.choice] = event.reply
                return self._piece(event.choice, "", event.reply.finish_reason)
            case Call():
                return ""  # without tools there are none

    def fail(self, error: ApiError) -> str:
        """Return an error as OpenAI's clients expect it."""
        return sse(openai_body(error))

    def end(self) -> str:
        """Return the usage, where it is asked for, and the mark of the end."""
        usage = ""
        if self._include_usage:
            replies = [self._replies[choice] for choice in sorted(self._replies)]
            usage = sse({**self._head, "choices": [], "usage": self._job.cost(replies).chat()})
        return usage + sse("[DONE]")

    def _piece(
        self,
        index: int,
        text: str,
        finish_reason: str | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> str:
        return sse({**self._head, "choices": [_choice(index, text, finish_reason, logprobs)]})


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

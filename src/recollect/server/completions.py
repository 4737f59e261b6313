"""
`POST /v1/completions`: text goes on, without a template and without a conversation.

Every prompt is a sequence of its own; what any of them has in common with an earlier one is reused.
Where the prompt is given back with its log probabilities, each of its tokens takes a pass of its own.
"""

import math
import secrets
import threading
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter, time
from typing import Annotated, Any, ClassVar, Final, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from recollect.conversation.model import Model
from recollect.engine.reply import GeneratedReply, ReadAhead, ReplyGeneration
from recollect.engine.sampling import Generator, score_tokens
from recollect.engine.sequence import FeedPlan
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import ContextFullError, InvalidParameterError
from recollect.server.chat_completions import StreamOptions
from recollect.server.events import Call, Ended, EventWriter, Piece, Thought, Told, sse
from recollect.server.fields import (
    NOT_SUPPORTED,
    BodyRoute,
    Ignored,
    Items,
    SamplingFields,
    check_count,
    named_sampling,
)
from recollect.server.refusals import ApiError, ClientGone, openai_body
from recollect.server.services import begin, client_of, services_of, with_model
from recollect.server.usage import Cost, cost_of
from recollect.types import SamplingParams, TokenLogprob, Usage

router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)

_Item = TypeVar("_Item")
TokenId = Annotated[int, Field(ge=0)]
Prompts = Annotated[Items[_Item], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    refused: ClassVar = {
        "suffix": "text cannot be filled in before another here: leave it out.",
        **NOT_SUPPORTED,
    }

    model: str | None = None
    prompt: str | Prompts[str] | Prompts[TokenId] | Prompts[Items[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    n: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
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


_PATH: Final = "/v1/completions"


@router.post(_PATH)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Go on with a text."""
    services, namespace = services_of(request), client_of(request).namespace
    settings = services.settings
    prompts = body.prompts()
    number = body.n or 1
    most = settings.limits.choices
    check_count("prompt", len(prompts), most)
    check_count("n", number * len(prompts), most)
    gone = threading.Event()
    given = _Given(body, namespace, gone)

    if body.max_tokens == 0:

        def read(model: Model) -> list[GeneratedReply]:
            replies = [given.read(model, prompt) for prompt in prompts]
            return [reply for reply in replies for _ in range(number)]

        name = services.hub.resolve(body.model)
        replies = await with_model(request, body.model, read, on_gone=gone.set)
        speed = services.metrics.speed(name, namespace)

        def spent(replies: Sequence[GeneratedReply]) -> Cost:
            return cost_of(replies, speed, per_prompt=number)

        writer = _Completion(name, spent, body, given.echoes)
        if not body.stream:
            return JSONResponse(writer.whole(replies))
        ends = [writer.write(Ended(choice, reply)) for choice, reply in enumerate(replies)]
        return Response(
            "".join([writer.begin(), *ends, writer.end()]), media_type="text/event-stream"
        )

    params = [
        body.params(
            settings,
            max_tokens=body.max_tokens,
            choice=choice,
            logprobs=body.logprobs,
        )
        for choice in range(number)
    ]

    named = named_sampling(body, settings)

    def prepare(model: Model) -> Iterator[ReplyGeneration]:
        ids = [_token_ids(model, prompt) for prompt in prompts]
        ahead = [given.echo(model, *one) for one in zip(prompts, ids, strict=True)]
        # All of them, so that nothing is begun where one prompt cannot be.
        streams = [
            _reply_to(
                model, one, how.with_recommended(model.local.sampling, named), namespace, read
            )
            for one, read in zip(ids, ahead, strict=True)
            for how in params
        ]
        for stream in streams:
            stream.start()
            yield stream

    job = await begin(
        request,
        body.model,
        prepare,
        choices=number * len(prompts),
        per_prompt=number,
        on_gone=gone.set,
    )
    writer = _Completion(job.model_name, job.cost, body, given.echoes)
    return await job.answer(request, writer, stream=bool(body.stream))


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt as it is given back."""

    text: str
    tokens: tuple[TokenLogprob, ...] | None
    """How likely they were, the first as NaN; None where nobody asked."""


class _Given:
    """The prompts of one request, where they are given back. Used by one thread."""

    def __init__(self, body: CompletionRequest, namespace: str, gone: threading.Event) -> None:
        self._body = body
        self._namespace = namespace
        self._gone = gone
        self.echoes: list[_Echo] = []
        """One for each choice; none where they are not asked for."""

    def echo(self, model: Model, prompt: str | list[int], token_ids: list[int]) -> list[ReadAhead]:
        """
        Note a prompt that is to be given back, and return what was computed of it for that.

        Raises:
            ClientGone: Nobody waits for it any more.
        """
        if not self._body.echo:
            return []
        ahead, tokens = [], None
        if self._body.logprobs is not None:
            sequence = model.engine.new_sequence(self._namespace)
            try:
                tokens = self._scored(model, sequence, token_ids)
            finally:
                sequence.release()
            ahead = [ReadAhead(sequence, [FeedPlan(0, len(token_ids) - 1)])]
        text = prompt
        if not isinstance(text, str):
            text = model.tokenizer.decode(token_ids, skip_special_tokens=False)
        echo = _Echo(text, tokens)
        self.echoes += [echo] * (self._body.n or 1)
        return ahead

    def read(self, model: Model, prompt: str | list[int]) -> GeneratedReply:
        """
        Compute a prompt, and return a reply that says nothing.

        Raises:
            ClientGone: Nobody waits for it any more.
        """
        began = perf_counter()
        ids = _token_ids(model, prompt)
        ahead = self.echo(model, prompt, ids)
        sequence = model.engine.new_sequence(self._namespace)
        try:
            sequence.append(ids)
            model.engine.compute([sequence])
            fed = sequence.fed_tokens
        finally:
            sequence.release()
        computed = max(fed, len(ids) if ahead else 0)
        usage = Usage(
            prompt_tokens=len(ids),
            reused_tokens=len(ids) - computed,
            computed_tokens=computed,
            generated_tokens=0,
            ttft_s=perf_counter() - began,
            prefill_tps=None,
            decode_tps=None,
        )
        logprobs = None if self._body.logprobs is None else ()
        return GeneratedReply(text="", finish_reason="length", usage=usage, logprobs=logprobs)

    def _scored(
        self, model: Model, sequence: TokenSequence, token_ids: list[int]
    ) -> tuple[TokenLogprob, ...]:
        vocabulary = model.tokenizer.vocabulary.token_bytes

        def goes_on() -> None:
            if self._gone.is_set():
                raise ClientGone

        def told(token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
            known = vocabulary[token] if token < len(vocabulary) else b""
            return TokenLogprob(token, known, logprob, top)

        likely = score_tokens(
            model.engine, sequence, token_ids, self._body.logprobs or 0, goes_on=goes_on
        )
        return (
            told(token_ids[0], math.nan),
            *(
                told(one.token_id, one.logprob, tuple(told(*other) for other in one.top))
                for one in likely
            ),
        )


def _token_ids(model: Model, prompt: str | list[int]) -> list[int]:
    """
    Return a prompt as token ids.

    Raises:
        InvalidParameterError: The prompt is empty.
        ContextFullError: It leaves no place for a reply.
    """
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise InvalidParameterError(
            "The prompt is empty: give at least one token.", param="messages"
        )
    if len(ids) >= model.context_length:
        raise ContextFullError(needed=len(ids) + 1, limit=model.context_length)
    return ids


def _reply_to(
    model: Model,
    prompt: list[int],
    params: SamplingParams,
    namespace: str,
    ahead: Sequence[ReadAhead],
) -> ReplyGeneration:
    """
    Return what follows a prompt, ready to begin; nothing is kept of it but its KV.

    Raises:
        TokenIdError: An id is outside the vocabulary.
    """
    sequence = model.engine.new_sequence(namespace)
    sequence.append(prompt)
    generator = Generator(model.engine, params, sequence=sequence, grammars=model.grammars)
    return ReplyGeneration(model.engine, generator, model.tokenizer, ahead=ahead)


class _Completion(EventWriter):
    """What follows the prompts of one request, in OpenAI's words; a `Writer`."""

    def __init__(
        self,
        model_name: str,
        spent: Callable[[Sequence[GeneratedReply]], Cost],
        body: CompletionRequest,
        echoes: Sequence[_Echo],
    ) -> None:
        self._spent = spent
        self._echoes = echoes
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time()),
            "model": model_name,
        }
        self._replies: dict[int, GeneratedReply] = {}
        self._offsets: dict[int, _Offsets] = {}

    def whole(self, replies: Sequence[GeneratedReply]) -> dict[str, Any]:
        """Return everything at once."""
        choices = []
        for index, reply in enumerate(replies):
            echo = self._echoes[index] if self._echoes else _Echo("", ())
            tokens = reply.logprobs
            if tokens is not None:
                tokens = (*(echo.tokens or ()), *tokens)
            choices.append(self._choice(index, echo.text + reply.text, reply.finish_reason, tokens))
        return {**self._head, "choices": choices, "usage": self._spent(replies).chat()}

    def begin(self) -> str:
        """Return the prompts, where they are to be echoed."""
        return "".join(
            self._piece(index, echo.text, logprobs=echo.tokens)
            for index, echo in enumerate(self._echoes)
        )

    def write(self, event: Told) -> str:
        """Return the chunk of an event."""
        match event:
            case Piece() | Thought():  # without a template there are no thoughts
                return self._piece(event.choice, event.text, logprobs=event.logprobs or None)
            case Ended():
                self._replies[event.choice] = event.reply
                return self._piece(event.choice, "", event.reply.finish_reason)
            case Call():
                return ""  # without tools there are none

    def fail(self, error: ApiError) -> str:
        """Return an error as OpenAI's clients expect it."""
        return sse(openai_body(error, _PATH))

    def end(self) -> str:
        """Return the usage, where it is asked for, and the mark of the end."""
        usage = ""
        if self._include_usage:
            replies = [self._replies[choice] for choice in sorted(self._replies)]
            usage = sse({**self._head, "choices": [], "usage": self._spent(replies).chat()})
        return usage + sse("[DONE]")

    def _piece(
        self,
        index: int,
        text: str,
        finish_reason: str | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> str:
        return sse({**self._head, "choices": [self._choice(index, text, finish_reason, logprobs)]})

    def _choice(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        logprobs: Sequence[TokenLogprob] | None = None,
    ) -> dict[str, Any]:
        offsets = self._offsets.setdefault(index, _Offsets())
        return {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else _logprobs(logprobs, offsets),
            "finish_reason": finish_reason,
        }


class _Offsets:
    """Where each token begins in a text, in characters; a part of one counts with its end."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next(self, token: TokenLogprob) -> int:
        """Return where a token begins that comes after the one before."""
        begin = self._characters
        self._characters += len(self._decoder.decode(token.token_bytes))
        return begin


def _logprobs(tokens: Sequence[TokenLogprob], offsets: _Offsets) -> dict[str, Any]:
    """Return how likely tokens were, in the older form that completions have."""
    first_of_all = [math.isnan(token.logprob) for token in tokens]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [
            None if unknown else token.logprob
            for token, unknown in zip(tokens, first_of_all, strict=True)
        ],
        "top_logprobs": [
            None if unknown else {other.text: other.logprob for other in token.top}
            for token, unknown in zip(tokens, first_of_all, strict=True)
        ],
        "text_offset": [offsets.next(token) for token in tokens],
    }

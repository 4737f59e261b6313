"""
`POST /v1/chat/completions`: the whole conversation comes as text each time, and is found again.

What of it was generated here is taken over as the token ids that it was, so nothing is computed
twice. First the body and what it means to the engine, then the call and how its replies are written.
`POST /v1/prewarm` takes the same messages and computes their KV before anybody asks anything: for a
client that knows what will be asked soon, such as a system prompt or a message being typed.
"""

import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from time import time
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from recollect import types
from recollect.conversation.model import Model
from recollect.engine.engine import Engine
from recollect.engine.pinning import compute_watched
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.errors import ContextFullError
from recollect.kv.blocks import PUBLIC
from recollect.server.events import (
    Call,
    CallEvent,
    Ended,
    EventWriter,
    Piece,
    Thought,
    Told,
    calls_tools,
    sse,
)
from recollect.server.fields import (
    MOST_CALLS,
    MOST_TOOLS,
    NOT_SUPPORTED,
    Body,
    BodyRoute,
    Echoed,
    Ignored,
    Instructing,
    Items,
    LogprobCount,
    SamplingFields,
    Text,
    check_count,
    named_sampling,
    unsupported,
)
from recollect.server.parts import (
    AllowedTools,
    ChatChoice,
    ChatFormat,
    ChatTool,
    FunctionTool,
    NamedTool,
    Offer,
    Thinking,
    grammar_of,
    logprob_entry,
    others_among,
    split_thoughts,
)
from recollect.server.refusals import ApiError, ClientGone, openai_body, operators_only
from recollect.server.services import Job, begin, client_of, services_of, with_model
from recollect.server.settings import Settings
from recollect.text.tool_calls import ArgumentsDelta, CallStarted
from recollect.types import Grammar, Message, MessageToolCall, Role, SamplingParams, TokenLogprob


class CalledFunction(Body):
    """A function, and what it is called with as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call of a tool in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Echoed = None

    def call(self) -> MessageToolCall:
        """Return it as the engine has it."""
        return types.ToolCall(self.id, self.function.name, self.function.arguments).to_dict()


class ChatMessage(Instructing):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    tool_calls: Annotated[Items[ToolCall], Field(max_length=MOST_CALLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    name: Echoed = None
    refusal: Echoed = None
    audio: Echoed = None
    annotations: Echoed = None
    reasoning_details: Echoed = None
    thinking_blocks: Echoed = None
    provider_specific_fields: Echoed = None

    @model_validator(mode="before")
    @classmethod
    def _split(cls, fields: Any) -> Any:
        """Tell apart what an assistant said and what it thought."""
        if not isinstance(fields, dict) or fields.get("role") != "assistant":
            return fields
        content = fields.get("content")
        if not isinstance(content, list):
            return fields
        content, thoughts = split_thoughts(content)
        return {**fields, "content": content, "reasoning": thoughts} if thoughts else fields

    def message(self) -> Message:
        """Return it as the engine has it; instructions of a developer are those of the system."""
        role: Role = "system" if self.role == "developer" else self.role
        message: Message = {"role": role, "content": self.content}
        if role == "assistant" and self.tool_calls:
            message["tool_calls"] = [call.call() for call in self.tool_calls]
        if role == "assistant" and (thoughts := self.reasoning_content or self.reasoning):
            message["reasoning_content"] = thoughts
        if role == "tool" and self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class StreamOptions(Body):
    """What a stream tells besides text."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class ChatRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    refused: ClassVar = {
        "functions": "is not supported: describe functions in tools.",
        "function_call": "is not supported: choose a function by tool_choice.",
        "web_search_options": "this server cannot search; leave it out.",
        "audio": "these models do not speak; leave it out.",
        **NOT_SUPPORTED,
    }

    model: str | None = None
    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    response_format: ChatFormat | None = None
    tools: Annotated[Items[ChatTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ChatChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    thinking: Thinking | None = None
    reasoning: Thinking | None = None
    logprobs: bool | None = False
    top_logprobs: LogprobCount | None = None

    modalities: Items[Literal["text"]] | None = None

    metadata: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None
    verbosity: Ignored = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise unsupported("stream_options", "only where stream is true.")
        if self.top_logprobs is not None and not self.logprobs:
            raise unsupported("top_logprobs", "only where logprobs is true.")
        return self

    @property
    def choices(self) -> int:
        """Return how many replies are asked for."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def conversation(self) -> list[Message]:
        """Return the messages as the engine has them."""
        return [message.message() for message in self.messages if not message.is_left_out]

    @cached_property
    def offered(self) -> Offer:
        """Return what the reply may call."""
        choice = self.tool_choice
        return Offer(
            tools=[tool.schema_of() for tool in self.tools or () if isinstance(tool, FunctionTool)],
            tool_choice=choice.chosen()
            if isinstance(choice, NamedTool | AllowedTools)
            else choice or "auto",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            template_options=self.template_options(),
        )

    def template_options(self) -> dict[str, Any]:
        """Return what the template is told besides the conversation."""
        found: dict[str, Any] = {}
        effort, is_on = self.reasoning_effort, self.enable_thinking
        plain = None
        if effort is not None or is_on is not None:
            plain = Thinking(enabled=is_on, effort=effort)
        for told in (plain, self.thinking, self.reasoning):
            found |= {} if told is None else told.options()
        return found | (self.chat_template_kwargs or {})

    @property
    def reasoning_budget(self) -> int | None:
        """Return how many tokens of reasoning are asked for at most."""
        told = (self.thinking, self.reasoning)
        budgets = [self.thinking_budget, *(one.budget for one in told if one is not None)]
        return min((one for one in budgets if one is not None), default=None)

    def left_out(self) -> Iterable[str]:
        """Return the tools that are no functions."""
        return others_among(self.tools) if self.tools else ()

    @cached_property
    def grammar(self) -> Grammar | None:
        """Return what the reply must look like; None: anything goes."""
        return None if self.response_format is None else grammar_of(self.response_format)

    def prepare(self) -> None:
        """Work out `offered` and `grammar`."""
        _ = self.offered, self.grammar

    def sampling(self, choice: int, settings: Settings) -> SamplingParams:
        """Return how a reply is sampled; see `SamplingFields.params`."""
        return self.params(
            settings,
            max_tokens=self.max_completion_tokens or self.max_tokens or settings.max_tokens,
            choice=choice,
            grammar=self.grammar,
            reasoning_budget=self.reasoning_budget,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


router = APIRouter(tags=["OpenAI"], route_class=BodyRoute)


_PATH: Final = "/v1/chat/completions"


@router.post(_PATH)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    settings, namespace = services_of(request).settings, client_of(request).namespace
    check_count("messages", len(body.messages), settings.limits.messages)
    check_count("n", body.choices, settings.limits.choices)
    params = [body.sampling(choice, settings) for choice in range(body.choices)]

    def prepare(model: Model) -> Iterator[ReplyGeneration]:
        session = model.session_from(body.conversation(), namespace=namespace, **body.offered)
        sessions = [session, *(session.fork() for _ in params[1:])]
        named = named_sampling(body, settings)
        for one, how in zip(sessions, params, strict=True):
            yield one.stream(None, params=how.with_recommended(model.local.sampling, named))

    job = await begin(request, body.model, prepare, choices=body.choices)
    return await job.answer(request, _Completion(job, body), stream=bool(body.stream))


class _Completion(EventWriter):
    """The replies to one request, in OpenAI's words; a `Writer`."""

    def __init__(self, job: Job, body: ChatRequest) -> None:
        self._job = job
        self._include_usage = body.include_usage
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time())
        self._begun: set[int] = set()
        self._replies: list[GeneratedReply] = []

    def whole(self, replies: Sequence[GeneratedReply]) -> dict[str, Any]:
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

    def begin(self) -> str:
        """Return nothing: each choice begins by itself."""
        return ""

    def write(self, event: Told) -> str:
        """Return the chunks of an event."""
        role = ""
        if event.choice not in self._begun:
            self._begun.add(event.choice)
            role = self._chunk(event.choice, {"role": "assistant", "content": ""})
        match event:
            case Piece():
                likely = _logprobs(event.logprobs or None)
                return role + self._chunk(event.choice, {"content": event.text}, logprobs=likely)
            case Thought():
                likely = _logprobs(event.logprobs or None)
                thought = {"reasoning_content": event.text}
                return role + self._chunk(event.choice, thought, logprobs=likely)
            case Call():
                delta = _call_delta(event.event)
                return role + (self._chunk(event.choice, {"tool_calls": [delta]}) if delta else "")
            case Ended():
                self._replies.append(event.reply)
                own = self._job.cost([event.reply]).own()
                reason = _finish_reason(event.reply)
                return role + self._chunk(event.choice, {}, reason, recollect=own)

    def fail(self, error: ApiError) -> str:
        """Return an error as OpenAI's clients expect it."""
        return sse(openai_body(error, _PATH))

    def end(self) -> str:
        """Return the usage, where it is asked for, and the mark of the end."""
        usage = ""
        if self._include_usage:
            spent = self._job.cost(self._replies).chat()
            usage = sse({**self._head("chat.completion.chunk"), "choices": [], "usage": spent})
        return usage + sse("[DONE]")

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
        usage = {"usage": None} if self._include_usage else {}
        return sse({**self._head("chat.completion.chunk"), "choices": [choice], **usage, **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._job.model_name,
            "system_fingerprint": f"recollect-{self._job.model.fingerprint[:12]}",
        }


def _message(reply: GeneratedReply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["content"] = reply.content or None
        message["tool_calls"] = [call.to_dict() for call in reply.tool_calls]
    return message


def _finish_reason(reply: GeneratedReply) -> str:
    if calls_tools(reply):
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


prewarm_router = APIRouter(tags=["Conversations"], route_class=BodyRoute)


class PrewarmRequest(Body):
    """The body of `POST /v1/prewarm`: a last message of the user counts as not yet finished."""

    model: str | None = None
    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    public: bool = False
    """Whether every key may reuse it, while the model stays loaded; an operator's to say."""


@prewarm_router.post("/v1/prewarm")
async def prewarm(body: PrewarmRequest, request: Request) -> dict[str, Any]:
    """Compute what of a conversation is not computed yet."""
    check_count("messages", len(body.messages), services_of(request).settings.limits.messages)
    client = client_of(request)
    if body.public and not client.is_operator:
        raise operators_only("public")
    namespace = PUBLIC if body.public else client.namespace
    lasting = [one for one in body.messages if not one.is_left_out] or body.messages
    messages = [one.message() for one in lasting]
    typed = (messages.pop()["content"] or "") if messages[-1]["role"] == "user" else ""

    reading = _Reading()

    def compute(model: Model) -> dict[str, Any]:
        session = (
            model.session_from(messages, namespace=namespace)
            if messages
            else model.session(namespace=namespace)
        )
        with session:
            ids = model.prompts.encode_typed(session.path(), typed).token_ids
        if body.public:
            computed = model.public.publish(ids, progress=reading.told).computed_tokens
        else:
            computed = reading.compute(model.engine, ids, namespace)
        return {
            "object": "prewarm",
            "public": body.public,
            "prompt_tokens": len(ids),
            "computed_tokens": computed,
            "reused_tokens": len(ids) - computed,
        }

    return await with_model(request, body.model, compute, on_gone=reading.give_up)


class _Reading:
    """A prompt being read for a client, until that goes away; what was read by then stays warm."""

    def __init__(self) -> None:
        self._is_gone = threading.Event()

    def give_up(self) -> None:
        """End it at the next pass; from any thread."""
        self._is_gone.set()

    def told(self, _what: str, _done: int, _total: int | None) -> None:
        """
        Hear how far it is.

        Raises:
            ClientGone: Nobody waits for it any more.
        """
        if self._is_gone.is_set():
            raise ClientGone

    def compute(self, engine: Engine, token_ids: list[int], namespace: str) -> int:
        """
        Compute what of a prompt is not there; return how many tokens that took.

        Raises:
            ContextFullError: It leaves no place for a reply.
            ClientGone: Nobody waits for it any more.
        """
        if len(token_ids) >= engine.info.context_length:
            raise ContextFullError(needed=len(token_ids) + 1, limit=engine.info.context_length)
        sequence = engine.new_sequence(namespace)
        try:
            sequence.append(token_ids)
            if not sequence.is_warm():
                compute_watched(engine, sequence, progress=self.told)
            return sequence.fed_tokens
        finally:
            sequence.release()

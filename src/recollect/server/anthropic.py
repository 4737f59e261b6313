"""
`POST /v1/messages` and `count_tokens`: conversations for clients of Anthropic's API.

First the body and what it means to the engine, then the calls and how the reply is written. In this
API input tokens are those that were computed; reused ones are `cache_read_input_tokens`.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Discriminator, Field, Tag

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.engine.reply import GeneratedReply, ReplyGeneration
from recollect.server.events import (
    Call,
    CallEvent,
    Ended,
    EventWriter,
    Piece,
    Thought,
    Told,
    call_input,
    calls_tools,
    sse,
)
from recollect.server.fields import (
    MOST_TOOLS,
    NOT_SUPPORTED,
    Body,
    BodyRoute,
    Echoed,
    Ignored,
    Instructing,
    Items,
    Text,
    check_count,
    lasting,
    named_sampling,
    sampled,
    volatile_in,
)
from recollect.server.parts import (
    AnyMessagesTool,
    MessagesChoice,
    MessagesTool,
    Offer,
    Thinking,
    kind_among,
    offer,
    others_among,
)
from recollect.server.refusals import ApiError, anthropic_body, quoted
from recollect.server.services import Job, begin, client_of, services_of, with_model
from recollect.server.settings import Settings
from recollect.text.tool_calls import ArgumentsDelta, CallStarted
from recollect.types import (
    FinishReason,
    Grammar,
    Message,
    MessageToolCall,
    SamplingParams,
    ToolCall,
)


class TextBlock(Body):
    """A text."""

    type: Literal["text"]
    text: str
    cache_control: Ignored = None
    citations: Echoed = None


class ToolUseBlock(Body):
    """A call of a tool, as an earlier reply had it."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Ignored = None
    caller: Echoed = None


class ToolResultBlock(Body):
    """What a tool gave back."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Text = ""
    is_error: Ignored = None
    cache_control: Ignored = None


class ThinkingBlock(Body):
    """What an assistant thought before it answered."""

    type: Literal["thinking"]
    thinking: str
    signature: Echoed = None
    cache_control: Ignored = None


class RedactedBlock(Body):
    """The same, encrypted: only its own server can read it."""

    type: Literal["redacted_thinking"]
    data: Echoed = None


def _refuse_block(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, Mapping) else None
    raise ValueError(f"content of type {quoted(kind)} cannot be read by these models, only text")


_BLOCKS: Final = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedBlock, Tag("redacted_thinking")]
    | Annotated[Annotated[Any, BeforeValidator(_refuse_block)], Tag("other")],
    Discriminator(kind_among(*_BLOCKS)),
]


class InputMessage(Instructing):
    """A message: a text, or blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | Items[Block]

    def messages(self) -> list[Message]:
        """Return it as the engine has it: what tools gave back comes first, each by itself."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results: list[Message] = [
            {"role": "tool", "content": block.content, "tool_call_id": block.tool_use_id}
            for block in self.content
            if isinstance(block, ToolResultBlock)
        ]
        text = "".join(block.text for block in self.content if isinstance(block, TextBlock))
        calls = [_call(block) for block in self.content if isinstance(block, ToolUseBlock)]
        thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
        if results and not text and not calls:
            return results
        said: Message = {"role": self.role, "content": text}
        if calls:
            said = {"role": self.role, "content": text or None, "tool_calls": calls}
        if thoughts:
            said["reasoning_content"] = "\n\n".join(text.strip() for text in thoughts)
        return [*results, said]


def _call(block: ToolUseBlock) -> MessageToolCall:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return ToolCall(block.id, block.name, arguments).to_dict()


class JsonOutput(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """What a reply is like."""

    format: JsonOutput | None = None
    effort: str | None = None


class CountRequest(Body):
    """The body of `POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[Items[InputMessage], Field(min_length=1)]
    system: str | Items[TextBlock] | None = None
    tools: Annotated[Items[AnyMessagesTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: MessagesChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutput | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_control: Ignored = None

    @cached_property
    def conversation(self) -> list[Message]:
        """Return the messages as the engine has them, the instructions first."""
        first: list[Message] = []
        told = "".join(lasting(self._instructions()))
        if told:
            first = [{"role": "system", "content": told}]
        said = (one for one in self.messages if not one.is_left_out)
        return first + [message for one in said for message in one.messages()]

    def prepare(self) -> None:
        """Work out `conversation` and `grammar`."""
        _ = self.conversation, self.grammar

    def offer(self) -> Offer:
        """Return what the reply may call."""
        choice = self.tool_choice or MessagesChoice(type="auto")
        options: dict[str, Any] = {}
        if self.output_config is not None:
            options |= Thinking(effort=self.output_config.effort).options()
        if self.thinking is not None:
            options |= self.thinking.options()
        return offer(
            [tool.schema_of() for tool in self.tools or () if isinstance(tool, MessagesTool)],
            choice.chosen(),
            not choice.disable_parallel_tool_use,
            options | (self.chat_template_kwargs or {}),
        )

    @cached_property
    def grammar(self) -> Grammar | None:
        """Return what the reply must look like; None: anything goes."""
        wanted = self.output_format
        if self.output_config is not None:
            wanted = self.output_config.format or wanted
        return None if wanted is None else Grammar.json_schema(wanted.schema_)

    def left_out(self) -> Iterable[str]:
        """Return the tools that are no functions, and whether instructions had a volatile block."""
        return [*volatile_in("system", self._instructions()), *others_among(self.tools)]

    def _instructions(self) -> str | list[str]:
        if self.system is None or isinstance(self.system, str):
            return self.system or ""
        return [block.text for block in self.system]


class MessagesRequest(CountRequest):
    """The body of `POST /v1/messages`."""

    refused: ClassVar = {
        "mcp_servers": "this server calls no others: leave it out.",
        "container": "this server runs no code: leave it out.",
        **NOT_SUPPORTED,
    }

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Items[str] | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Not one of Anthropic's: what `usage` tells of a reply gives it again."""
    metadata: Ignored = None
    service_tier: Ignored = None
    context_management: Ignored = None
    inference_geo: Ignored = None

    def sampling(self, settings: Settings) -> SamplingParams:
        """Return how the reply is sampled."""
        return sampled(
            settings,
            temperature=self.temperature,
            seed=self.seed,
            stop=self.stop_sequences,
            top_k=self.top_k,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            reasoning_budget=None if self.thinking is None else self.thinking.budget,
            grammar=self.grammar,
        )


router = APIRouter(tags=["Anthropic"], route_class=BodyRoute)

_STOP_REASONS: Final[dict[FinishReason, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "cancelled": "end_turn",
}
_NOTHING_SPENT: Final = {
    "input_tokens": 0,
    "cache_read_input_tokens": 0,
    "cache_creation_input_tokens": 0,
    "output_tokens": 0,
}
"""Of a reply that failed, or was stopped, before its first token."""


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    settings, namespace = services_of(request).settings, client_of(request).namespace
    _check_messages(body, request)
    params, named = body.sampling(settings), named_sampling(body, settings)

    def prepare(model: Model) -> Sequence[ReplyGeneration]:
        how = params.with_recommended(model.local.sampling, named)
        return [_session(model, body, namespace).stream(None, params=how)]

    job = await begin(request, body.model, prepare)
    return await job.answer(request, _Message(job), stream=bool(body.stream))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> dict[str, Any]:
    """Return how many tokens a conversation is; nothing is computed."""
    _check_messages(body, request)
    namespace = client_of(request).namespace

    def count(model: Model) -> int:
        return _session(model, body, namespace).prompt_tokens()

    return {"input_tokens": await with_model(request, body.model, count)}


def _check_messages(body: CountRequest, request: Request) -> None:
    """
    Check how many messages there are; each block of what a tool gave back is one.

    Raises:
        ApiError: There are more than one may send.
    """
    most = services_of(request).settings.limits.messages
    check_count("messages", len(body.conversation), most)


def _session(model: Model, body: CountRequest, namespace: str) -> Session:
    return model.session_from(body.conversation, namespace=namespace, **body.offer())


class _Message(EventWriter):
    """The reply to one request, in Anthropic's words: a list of blocks. A `Writer`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._id = f"msg_{secrets.token_hex(12)}"
        # Clients send it back, and look for one to be there; what is thought is known by its text.
        self._signature = secrets.token_urlsafe(24)
        self._block = -1  # the last that was begun
        self._open: Literal["text", "call", "thought"] | None = None
        self._has_begun = False

    def whole(self, replies: Sequence[GeneratedReply]) -> dict[str, Any]:
        """Return the reply at once."""
        (reply,) = replies
        content: list[dict[str, Any]] = []
        if reply.reasoning:
            content.append(_thinking(reply.reasoning, self._signature))
        if reply.content or not reply.tool_calls:
            content.append({"type": "text", "text": reply.content})
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": call_input(call)}
            for call in reply.tool_calls
        ]
        return {
            **self._head(),
            "content": content,
            "stop_reason": _stop_reason(reply),
            "stop_sequence": reply.stop_string,
            "usage": self._job.cost([reply]).messages(),
        }

    def begin(self) -> str:
        """Return nothing: what was reused, which comes first, is known when the prompt is read."""
        return ""

    def write(self, event: Told) -> str:
        """Return what is sent of an event."""
        match event:
            case Piece():
                return self._start() + self._text(event.text)
            case Thought():
                return self._start() + self._thought(event.text)
            case Call():
                return self._start() + self._call(event.event)
            case Ended():
                return self._start() + self._end(event.reply)

    def fail(self, error: ApiError) -> str:
        """Return an error as Anthropic's clients expect it."""
        return self._start() + sse(anthropic_body(error), "error")

    def end(self) -> str:
        """Return nothing: the reply has said that it is over."""
        return ""

    def _start(self) -> str:
        if self._has_begun:
            return ""
        self._has_begun = True
        spent = self._job.cost_so_far()
        usage = _NOTHING_SPENT if spent is None else spent.messages()
        return _event("message_start", message={**self._head(), "usage": usage})

    def _text(self, text: str) -> str:
        begun = "" if self._open == "text" else self._begin("text", {"type": "text", "text": ""})
        return begun + self._delta({"type": "text_delta", "text": text})

    def _thought(self, text: str) -> str:
        begun = ""
        if self._open != "thought":  # what sets it apart from thoughts before it is the block
            begun, text = self._begin("thought", _thinking("", "")), text.lstrip()
        return begun + self._delta({"type": "thinking_delta", "thinking": text})

    def _call(self, event: CallEvent) -> str:
        match event:
            case CallStarted():
                block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                return self._begin("call", block)
            case ArgumentsDelta():
                return self._delta({"type": "input_json_delta", "partial_json": event.text})
            case _:
                return self._close()

    def _begin(self, kind: Literal["text", "call", "thought"], block: dict[str, Any]) -> str:
        closed = self._close()
        self._block, self._open = self._block + 1, kind
        return closed + _event("content_block_start", index=self._block, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> str:
        return _event("content_block_delta", index=self._block, delta=delta)

    def _close(self) -> str:
        was, self._open = self._open, None
        signed = ""
        if was == "thought":
            signed = self._delta({"type": "signature_delta", "signature": self._signature})
        return signed + (_event("content_block_stop", index=self._block) if was else "")

    def _end(self, reply: GeneratedReply) -> str:
        nothing = self._text("") if self._block < 0 else ""
        stop = {"stop_reason": _stop_reason(reply), "stop_sequence": reply.stop_string}
        usage = self._job.cost([reply]).messages()
        return (
            nothing
            + self._close()
            + _event("message_delta", delta=stop, usage=usage)
            + _event("message_stop")
        )

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._job.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }


def _thinking(text: str, signature: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": signature}


def _stop_reason(reply: GeneratedReply) -> str:
    if calls_tools(reply):
        return "tool_use"
    if reply.stop_string is not None:
        return "stop_sequence"
    return _STOP_REASONS[reply.finish_reason]


def _event(kind: str, **fields: Any) -> str:
    return sse({"type": kind, **fields}, kind)

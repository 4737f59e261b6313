"""
The body of a chat completion, as OpenAI's clients send it, and what it means to the engine.

Pure: parses and translates; generates nothing.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from recollect.server.errors import ApiError
from recollect.server.fields import (
    MOST_CALLS,
    MOST_TOOLS,
    Body,
    Ignored,
    Items,
    SamplingFields,
    Text,
    unsupported,
)
from recollect.server.tool_schema import (
    ChatFormat,
    FunctionTool,
    LogprobCount,
    Offer,
    ToolChoice,
    grammar_of,
    offer,
)
from recollect.types import Grammar, Message, MessageToolCall, Role, SamplingParams


class CalledFunction(Body):
    """A function, and what it is called with as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call of a tool in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None

    def call(self) -> MessageToolCall:
        """Return it as the engine has it."""
        name, arguments = self.function.name, self.function.arguments
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


class ChatMessage(Body):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    tool_calls: Annotated[Items[ToolCall], Field(max_length=MOST_CALLS)] | None = None
    tool_call_id: str | None = None
    name: Ignored = None
    refusal: Ignored = None
    audio: Ignored = None
    annotations: Ignored = None

    def message(self) -> Message:
        """Return it as the engine has it; instructions of a developer are those of the system."""
        role: Role = "system" if self.role == "developer" else self.role
        message: Message = {"role": role, "content": self.content}
        if role == "assistant" and self.tool_calls:
            message["tool_calls"] = [call.call() for call in self.tool_calls]
        if role == "tool" and self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class StreamOptions(Body):
    """What a stream tells besides text."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class ChatRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    model: str | None = None
    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    response_format: ChatFormat | None = None
    tools: Annotated[Items[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = False
    top_logprobs: LogprobCount | None = None

    modalities: Items[Literal["text"]] | None = None

    metadata: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning_effort: Ignored = None
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
        return [message.message() for message in self.messages]

    @cached_property
    def offered(self) -> Offer:
        """Return what the reply may call."""
        return offer(self.tools, self.tool_choice, self.parallel_tool_calls)

    @cached_property
    def grammar(self) -> Grammar | None:
        """Return what the reply must look like; None: anything goes."""
        return grammar_of(self.response_format)

    def prepare(self) -> None:
        """Work out `offered` and `grammar`."""
        _ = self.offered, self.grammar

    def sampling(self, choice: int, *, temperature: float) -> SamplingParams:
        """Return how a reply is sampled; see `SamplingFields.params`."""
        limit = self.max_completion_tokens or self.max_tokens
        return self.params(
            max_tokens=limit,
            temperature=temperature,
            choice=choice,
            grammar=self.grammar,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def check_limits(
    messages: Sequence[Any],
    choices: int,
    *,
    most_messages: int,
    most_choices: int,
    what: str = "messages",
) -> None:
    """
    Check that a request asks for no more than one may.

    Args:
        what: The field that the messages are in.

    Raises:
        ApiError: It does.
    """
    for name, count, most in ((what, len(messages), most_messages), ("n", choices, most_choices)):
        if count > most:
            raise ApiError(
                f"{name}: {count:,} are too many; this server takes {most:,}.",
                code="invalid_value",
                param=name,
            )

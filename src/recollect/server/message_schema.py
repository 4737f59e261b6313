"""
The body of a message request, as Anthropic's clients send it, and what it means to the engine.

Pure: parses and translates; generates nothing.
"""

import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from recollect.server.fields import MOST_TOOLS, Body, Ignored, Items, Text
from recollect.server.tool_schema import Offer
from recollect.types import Message, MessageToolCall, SamplingParams


class TextBlock(Body):
    """A text."""

    type: Literal["text"]
    text: str
    cache_control: Ignored = None
    citations: Ignored = None


class ToolUseBlock(Body):
    """A call of a tool, as an earlier reply had it."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Ignored = None
    caller: Ignored = None


class ToolResultBlock(Body):
    """What a tool gave back."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Text = ""
    is_error: Ignored = None
    cache_control: Ignored = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class InputMessage(Body):
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
        if calls:
            said: Message = {"role": self.role, "content": text or None, "tool_calls": calls}
            return [*results, said]
        if results and not text:
            return results
        return [*results, {"role": self.role, "content": text}]


def _call(block: ToolUseBlock) -> MessageToolCall:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {
        "id": block.id,
        "type": "function",
        "function": {"name": block.name, "arguments": arguments},
    }


class Tool(Body):
    """A tool, described as Anthropic's clients do."""

    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    cache_control: Ignored = None
    strict: Ignored = None
    eager_input_streaming: Ignored = None

    def schema_of(self) -> dict[str, Any]:
        """Return it as the engine has it."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class ToolChoice(Body):
    """Whether a tool has to be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """Whether the model thinks aloud; these do not."""

    type: Literal["disabled"]


class CountRequest(Body):
    """The body of `POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[Items[InputMessage], Field(min_length=1)]
    system: Text | None = None
    tools: Annotated[Items[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: Ignored = None

    @cached_property
    def conversation(self) -> list[Message]:
        """Return the messages as the engine has them, the instructions first."""
        first: list[Message] = []
        if self.system:
            first = [{"role": "system", "content": self.system}]
        return first + [message for one in self.messages for message in one.messages()]

    def prepare(self) -> None:
        """Work out `conversation`."""
        _ = self.conversation

    def offer(self) -> Offer:
        """Return what the reply may call."""
        choice = self.tool_choice or ToolChoice(type="auto")
        names = {"any": "required", "tool": choice.name or ""}
        return Offer(
            [tool.schema_of() for tool in self.tools or ()],
            names.get(choice.type, choice.type),
            not choice.disable_parallel_tool_use,
        )


class MessagesRequest(CountRequest):
    """The body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Items[str] | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    metadata: Ignored = None
    service_tier: Ignored = None
    context_management: Ignored = None
    output_config: Ignored = None
    inference_geo: Ignored = None

    def sampling(self, *, temperature: float) -> SamplingParams:
        """Return how the reply is sampled; *temperature* where the request names none."""
        given: dict[str, Any] = {"top_k": self.top_k, "top_p": self.top_p}
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            stop=tuple(text for text in self.stop_sequences or () if text),
            **{name: value for name, value in given.items() if value is not None},
        )

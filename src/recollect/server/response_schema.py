"""
The body of a response request, as OpenAI's clients send it, and what it means to the engine.

Pure: parses and translates; generates nothing.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from recollect.server.fields import (
    MOST_TOOLS,
    Body,
    Ignored,
    Items,
    Metadata,
    OnlyOff,
    SamplingFields,
    Text,
    unsupported,
)
from recollect.server.tool_schema import LogprobCount, Offer, ResponseFormat, grammar_of
from recollect.types import Grammar, Message, MessageToolCall, Role, SamplingParams

_LOGPROBS: Final = "message.output_text.logprobs"
"""What a client includes to be told how likely tokens were."""


class InputMessage(Body):
    """A message of the input, or of a conversation's items."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None

    def message(self) -> Message:
        """Return it as the engine has it."""
        role: Role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class FunctionCallItem(Body):
    """A call of a tool, as an earlier response had it."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: Ignored = None
    status: Ignored = None
    namespace: Ignored = None

    def call(self) -> MessageToolCall:
        """Return it as the engine has it."""
        return {
            "id": self.call_id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class FunctionOutputItem(Body):
    """What a tool gave back."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text
    id: Ignored = None
    status: Ignored = None

    def message(self) -> Message:
        """Return it as the engine has it."""
        return {"role": "tool", "content": self.output, "tool_call_id": self.call_id}


def _kind_of(item: Any) -> Any:
    """Return which kind of item something claims to be; a message need not say so."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(_kind_of),
]


def merged(items: Sequence[InputItem]) -> list[Message]:
    """Return items as messages: what an assistant says and then calls is one message."""
    messages: list[Message] = []
    calls: list[MessageToolCall] = []  # of the last message
    for item in items:
        if not isinstance(item, FunctionCallItem):
            messages.append(item.message())
            calls = []
            continue
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        if not calls:
            messages[-1]["tool_calls"] = calls
        calls.append(item.call())
    return messages


class FlatTool(Body):
    """A tool, described as the Responses API does."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored = None

    def schema_of(self) -> dict[str, Any]:
        """Return it as the engine has it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        given = {name: value for name, value in function.items() if value is not None}
        return {"type": "function", "function": given}


class FlatChoice(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    name: str


class TextOptions(Body):
    """What the text of a reply is like."""

    format: ResponseFormat | None = None
    verbosity: Ignored = None


class ConversationId(Body):
    """Names a conversation."""

    id: str


class ResponseStreamOptions(Body):
    """What a stream tells besides text."""

    include_obfuscation: Ignored = None


class ResponseRequest(SamplingFields):
    """The body of `POST /v1/responses`."""

    model: str | None = None
    input: str | Annotated[Items[InputItem], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    store: bool | None = True
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: Metadata | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    text: TextOptions | None = None
    tools: Annotated[Items[FlatTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: LogprobCount | None = None
    include: Items[str] | None = None

    background: OnlyOff = None

    max_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    user: Ignored = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseRequest":
        if self.previous_response_id is not None and self.conversation is not None:
            raise unsupported("previous_response_id", "not together with conversation.")
        return self

    @property
    def conversation_id(self) -> str | None:
        """Return the conversation that the reply is added to."""
        named = self.conversation
        return named.id if isinstance(named, ConversationId) else named

    @property
    def keeps(self) -> bool:
        """Return whether the response can be asked for, and gone on from, later."""
        return self.store is not False

    def messages(self) -> list[Message]:
        """Return the input as the engine has it, without the instructions."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return merged(self.input)

    def offer(self) -> Offer:
        """Return what the reply may call."""
        choice = self.tool_choice
        return Offer(
            [tool.schema_of() for tool in self.tools or ()],
            (choice.name if isinstance(choice, FlatChoice) else choice) or "auto",
            self.parallel_tool_calls is not False,
        )

    @cached_property
    def grammar(self) -> Grammar | None:
        """Return what the reply must look like; None: anything goes."""
        return None if self.text is None else grammar_of(self.text.format)

    def prepare(self) -> None:
        """Work out `grammar`."""
        _ = self.grammar

    def sampling(self, *, temperature: float) -> SamplingParams:
        """Return how the reply is sampled; see `SamplingFields.params`."""
        wants_logprobs = self.top_logprobs or _LOGPROBS in (self.include or ())
        return self.params(
            max_tokens=self.max_output_tokens,
            temperature=temperature,
            grammar=self.grammar,
            logprobs=(self.top_logprobs or 0) if wants_logprobs else None,
        )

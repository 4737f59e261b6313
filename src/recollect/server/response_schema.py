"""
The body of a response request, as OpenAI's clients send it, and what it means to the engine.

Pure: parses and translates; generates nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from recollect.server.fields import Body, Ignored, OnlyOff, SamplingFields, Text, unsupported
from recollect.types import Message, Role, SamplingParams


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


class PlainFormat(Body):
    """Text as it comes."""

    type: Literal["text"] = "text"


class TextOptions(Body):
    """What the text of a reply is like."""

    format: PlainFormat | None = None
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
    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationId | None = None
    store: bool | None = True
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    text: TextOptions | None = None

    background: OnlyOff = None

    include: Ignored = None
    max_tool_calls: Ignored = None
    parallel_tool_calls: Ignored = None
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
        return [item.message() for item in self.input]

    def sampling(self, *, temperature: float) -> SamplingParams:
        """Return how the reply is sampled; see `SamplingFields.params`."""
        return self.params(max_tokens=self.max_output_tokens, temperature=temperature)

"""
The body of a message request, as Anthropic's clients send it, and what it means to the engine.

Pure: parses and translates; generates nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from recollect.server.fields import Body, Ignored, Text
from recollect.types import Message, SamplingParams


class InputMessage(Body):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: Text


class Thinking(Body):
    """Whether the model thinks aloud; these do not."""

    type: Literal["disabled"]


class CountRequest(Body):
    """The body of `POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: Text | None = None
    thinking: Thinking | None = None
    cache_control: Ignored = None

    def conversation(self) -> list[Message]:
        """Return the messages as the engine has them, the instructions first."""
        first: list[Message] = []
        if self.system:
            first = [{"role": "system", "content": self.system}]
        return first + [{"role": one.role, "content": one.content} for one in self.messages]


class MessagesRequest(CountRequest):
    """The body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
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

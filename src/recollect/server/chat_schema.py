"""
The body of a chat completion, as OpenAI's clients send it, and what it means to the engine.

Pure: parses and translates; generates nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from recollect.server.errors import ApiError
from recollect.server.fields import Body, Ignored, SamplingFields, Text, unsupported
from recollect.types import Message, Role, SamplingParams


class ChatMessage(Body):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | None = None
    name: Ignored = None
    refusal: Ignored = None
    audio: Ignored = None
    annotations: Ignored = None

    def message(self) -> Message:
        """Return it as the engine has it; instructions of a developer are those of the system."""
        role: Role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content or ""}


class StreamOptions(Body):
    """What a stream tells besides text."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class ChatRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    modalities: list[Literal["text"]] | None = None

    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
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

    def sampling(self, choice: int, *, temperature: float) -> SamplingParams:
        """Return how a reply is sampled; see `SamplingFields.params`."""
        limit = self.max_completion_tokens or self.max_tokens
        return self.params(max_tokens=limit, temperature=temperature, choice=choice)


def check_limits(
    messages: list[Any], choices: int, *, most_messages: int, most_choices: int
) -> None:
    """
    Check that a request asks for no more than one may.

    Raises:
        ApiError: It does.
    """
    for what, count, most in (
        ("messages", len(messages), most_messages),
        ("n", choices, most_choices),
    ):
        if count > most:
            raise ApiError(
                f"{what}: {count:,} are too many; this server takes {most:,}.",
                code="invalid_value",
                param=what,
            )

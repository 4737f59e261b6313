"""
What is told of replies while they are generated, and what puts it into the words of an API.

Values and a contract: generates nothing, and sends nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic_core import from_json

from recollect.engine.reply import GeneratedReply
from recollect.server.refusals import ApiError
from recollect.text.tool_calls import ArgumentsDelta, CallEnded, CallStarted, is_whole
from recollect.types import TokenLogprob, ToolCall

CallEvent = CallStarted | ArgumentsDelta | CallEnded


def calls_tools(reply: GeneratedReply) -> bool:
    """Return whether a reply ended with a call that is whole: by a stop string it may end inside one."""
    calls = reply.tool_calls
    return bool(calls) and reply.finish_reason == "stop" and is_whole(calls[-1].arguments)


@dataclass(frozen=True, slots=True)
class Piece:
    """More text of a reply."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens whose text is out now, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what a model thinks before it answers; fields as in `Piece`."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """More of a call of a tool."""

    choice: int
    event: CallEvent


@dataclass(frozen=True, slots=True)
class Ended:
    """A reply is whole, and kept where it is to be."""

    choice: int
    reply: GeneratedReply


@dataclass(frozen=True, slots=True)
class Failed:
    """A reply ended without being whole: it is not told, whatever was kept of it."""

    choice: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Progress:
    """Nothing new; this much of the prompts is read."""

    each: tuple[tuple[int, int], ...]
    """Of each reply's prompt, how many tokens have KV, and how many there are."""

    @property
    def done(self) -> int:
        """Return how many tokens of all prompts have KV."""
        return sum(done for done, _ in self.each)

    @property
    def total(self) -> int:
        """Return how many tokens all prompts have."""
        return sum(total for _, total in self.each)


Told = Piece | Thought | Call | Ended
"""What every API has words for."""
Event = Told | Failed | Progress


class Writer(Protocol):
    """Puts the replies to one request into the words of an API. A text may be empty."""

    @property
    def media_type(self) -> str:
        """Return what a stream is."""

    def whole(self, replies: Sequence[GeneratedReply]) -> dict[str, Any]:
        """Return them all at once."""

    def begin(self) -> str:
        """Return what a stream begins with."""

    def waiting(self, progress: Progress) -> str:
        """Return what is sent where nothing is new."""

    def write(self, event: Told) -> str:
        """Return what is sent of an event."""

    def fail(self, error: ApiError) -> str:
        """Return what is sent last where a reply has failed."""

    def end(self) -> str:
        """Return what is sent last, after all replies."""


def sse(data: Mapping[str, Any] | str, event: str | None = None) -> str:
    """Return a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {text}\n\n"


class EventWriter:
    """A writer's part of server-sent events."""

    media_type: ClassVar = "text/event-stream"

    def waiting(self, progress: Progress) -> str:
        """Return a comment, which clients skip: it tells a proxy, and whoever looks, that work goes on."""
        return f": prefill {progress.done}/{progress.total}\n\n"


def call_input(call: ToolCall) -> Any:
    """Return the arguments of a call as a value; where the reply was cut, those that there are."""
    try:
        return from_json(call.arguments, allow_partial=True)  # as clients read a stream's pieces
    except ValueError:
        return {}  # a bare model's: what cannot be read cannot be passed on as an object

"""
A reply: while it is generated, and when it is there.

Knows how a reply ends, not how one begins: that is the session's.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from recollect.conversation.tree import Node
from recollect.engine.reply import ReplyGeneration
from recollect.errors import ConversationError
from recollect.text.tool_calls import Event, TextDelta, ToolCallParser
from recollect.types import FinishReason, TokenLogprob, ToolCall, Usage


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to one message."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    node: Node
    dropped_turns: int = 0
    """Oldest turns that were left out because the context was full."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """How likely each token was; None where `SamplingParams.logprobs` is."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What the model calls, where the session offers tools: those of the calls that are whole."""
    content: str = ""
    """What is said beside the calls; `text` has all that the model wrote."""
    stop_string: str | None = None
    """The stop string that has ended it; None where none has."""

    def __str__(self) -> str:
        return self.text


class ReplyStream:
    """
    A reply as it is generated: iterate over it for pieces of text.

    Leaving the loop early, `stop`, and the end of a `with` block all end the reply and keep what
    was said as a turn. A reply that had not begun leaves the conversation as it was.
    """

    def __init__(
        self,
        generation: ReplyGeneration,
        *,
        keep: Callable[[], Reply | None],
        measure: Callable[[], Usage],
        free_session: Callable[[], None],
        parser: ToolCallParser | None = None,
    ) -> None:
        self._generation = generation
        self._parser = parser
        self._keep = keep
        self._measure = measure
        self._closed = False
        self._told: list[Callable[[], object]] = []
        # Also where the stream is forgotten without ever having been read.
        self._free_session = weakref.finalize(self, _give_up, generation, free_session)
        self.reply: Reply | None = None
        """The whole reply, once it has ended; None before, and where nothing was said."""

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Return how many tokens of the prompt have KV, and how many there are."""
        return self._generation.prefilled_tokens, self._generation.prompt_tokens

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """
        Return how likely the tokens of the pieces so far were; None where nobody asked.

        It only grows: what is new after a piece belongs to that piece and those before it. A token
        comes once all of its text has, the last ones when the reply has ended.
        """
        return self._generation.logprobs

    def usage_so_far(self) -> Usage | None:
        """
        Return what the reply has cost by now; None before its first token.

        From then on the numbers of the prompt stay as they are.
        """
        return self._measure() if self._generation.has_begun else None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._generation
        finally:
            self.close()

    def events(self) -> Iterator[Event]:
        """
        Read the reply as text and calls of tools, both as they are generated.

        The ids of the calls are those in the reply. Without tools there is text alone.
        """
        if self._parser is None:
            yield from map(TextDelta, self)
            return
        for piece in self:
            yield from self._parser.push(piece)
        yield from self._parser.finish()

    def read(self) -> Reply:
        """
        Read to the end and return the whole reply.

        Raises:
            ConversationError: It was stopped before anything was said.
        """
        with self:
            for _ in self:
                pass
        if self.reply is None:
            raise ConversationError("The reply was stopped before it began: ask again.")
        return self.reply

    def when_generated(self, call: Callable[[], object]) -> None:
        """
        Have something called once the reply is generated, before it is kept, which may take long.

        On the thread that reads the reply. A reply that is over already is told of at once.
        """
        if self._closed:
            call()
        else:
            self._told.append(call)

    def stop(self) -> None:
        """End the reply after the forward pass under way; from any thread or signal handler."""
        self._generation.stop()

    def close(self) -> None:
        """
        End the reply here and keep what was said. Calling it again does nothing.

        Raises:
            StoreError: The journal cannot keep it. The conversation is as it was.
        """
        if self._closed:
            return
        self._closed = True
        try:
            try:
                self._generation.finish()
            finally:
                for call in self._told:
                    call()
            self.reply = self._keep()
        finally:
            self._free_session()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _give_up(generation: ReplyGeneration, free_session: Callable[[], None]) -> None:
    generation.stop()
    free_session()

"""
One turn, from its question to what is kept of it.

Knows a reply being generated; not where in a tree the next one goes.

A reply: while it is generated, and when it is there.

Knows how a reply ends, not how one begins: that is the session's.

Say why less was reused than there might have been.

Pure: a decision over what is known of a turn.

Work that is done for a session while nobody waits for it.

Knows no conversation: it is given sequences to compute.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Self

from recollect.conversation.matching import Change
from recollect.conversation.prompt import Prompt
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Node
from recollect.engine.engine import Engine
from recollect.engine.reply import ReadAhead, ReplyGeneration
from recollect.engine.scheduler import Task
from recollect.engine.sequence import Sequence
from recollect.errors import ConversationError, MisuseError, RuntimeFailure
from recollect.journal.records import NewNode
from recollect.text.tool_calls import (
    Event,
    ParsedReply,
    TextDelta,
    ToolCallParser,
    new_call_prefix,
    parse_reply,
)
from recollect.types import FinishReason, Reason, TokenLogprob, ToolCall, ToolLinks, Usage


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


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a turn was expected to reuse, before it ran."""

    prompt: Prompt
    block_size: int
    """Reuse may end this many tokens early where KV is kept in whole blocks, else 1."""
    change: Change | None = None
    """Where the messages leave an earlier conversation."""
    tools_change: str | None = None
    """How the tools differ from those of an earlier reply, in words."""


def explained(usage: Usage, expected: Expectation) -> Usage:
    """Return the usage with its reason, and what differed in words."""
    reason, difference = _reason(usage, expected)
    return replace(usage, reason=reason, difference=difference)


def _reason(usage: Usage, expected: Expectation) -> tuple[Reason, str | None]:
    prompt, change = expected.prompt, expected.change
    if prompt.rewritten_reply is not None:
        return (
            "template_rewrote",
            f"The template shows reply {prompt.rewritten_reply + 1} otherwise.",
        )
    if prompt.reencoded_replies:
        count = prompt.reencoded_replies
        replies = "1 reply was" if count == 1 else f"{count} replies were"
        return "other_model", f"{replies} not generated by this model."
    # The last token of a reply has no KV yet when it ends, and is not missing.
    warm = (prompt.generated_length - 1) // expected.block_size * expected.block_size
    there = usage.reused_tokens + usage.read_ahead_tokens
    is_all_there = bool(prompt.generated_length) and there >= warm
    if expected.tools_change is not None and not is_all_there:
        return "tools_changed", expected.tools_change
    if change is not None:
        reason: Reason = "system_changed" if change.role == "system" else "message_changed"
        return reason, f"Message {change.message + 1}: {change.was!r} became {change.is_now!r}."
    if there < warm:
        missing = warm - there
        return "evicted", f"{missing} tokens had been computed, and are no longer in memory."
    return "new", None


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said where, what could be called, and the reply that it gets."""

    at: Node
    """What the turn follows."""
    said: str | None
    """None: `at` is answered."""
    generation: ReplyGeneration
    expected: Expectation
    tools: Tools
    dropped_turns: int
    bare_names: tuple[str, ...] = ()
    """Tools that may be called without marks."""
    call_prefix: str = field(default_factory=new_call_prefix)
    """What the ids of the reply's calls begin with."""

    @property
    def finish_reason(self) -> FinishReason:
        """Return why the reply ended, which it has."""
        reason = self.generation.finish_reason
        assert reason is not None, "it has ended"
        return reason

    def usage(self) -> Usage:
        """Return what the reply has cost, and why not less."""
        return explained(self.generation.usage(), self.expected)

    def parsed(self) -> ParsedReply:
        """Return the reply, calls beside the text."""
        if not self.tools.schemas:
            return ParsedReply(self.generation.text, ())
        return parse_reply(self.generation.text, self.call_prefix, self.bare_names)

    def new_parser(self) -> ToolCallParser | None:
        """Return what finds the same calls while they are written; None where there are no tools."""
        return ToolCallParser(self.call_prefix, self.bare_names) if self.tools.schemas else None

    def messages(self, usage: Usage, fingerprint: str) -> list[NewNode]:
        """Return what is kept of it: what was said, and the reply as the model wrote it."""
        asked = [] if self.said is None else [NewNode(role="user", content=self.said)]
        calls = self.parsed().calls
        reply = NewNode(
            role="assistant",
            content=self.generation.text,
            token_ids=self.generation.token_ids,
            fingerprint=fingerprint,
            finish_reason=self.finish_reason,
            usage=usage.to_dict(),
            links=ToolLinks(call_ids=tuple(call.id for call in calls)) if calls else None,
        )
        return [*asked, reply]

    def reply(self, usage: Usage, node: Node) -> Reply:
        """Return the reply, which has become a node."""
        parsed = self.parsed()
        return Reply(
            self.generation.text,
            self.finish_reason,
            usage,
            node,
            self.dropped_turns,
            self.generation.logprobs,
            parsed.calls,
            parsed.content,
            self.generation.stop_string,
        )


_MOST_REMEMBERED: Final = 32
"""
Drafts of one message whose cost is known apart. Each holds its token ids, 8 bytes a token; whoever
pauses more often finds what the first drafts had computed among the reused.
"""


class IdleWork:
    """
    A sequence that the engine computes when it has nothing else to do; at most one.

    Remembers what was computed since the last turn, so that the next can tell it from what it reuses.
    Safe from several threads where only one of them starts work.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._task: Task | None = None
        self._ahead: deque[ReadAhead] = deque(maxlen=_MOST_REMEMBERED)

    @property
    def ahead(self) -> tuple[ReadAhead, ...]:
        """Return what was computed ahead since the last turn."""
        return tuple(self._ahead)

    def note(self, ahead: ReadAhead) -> None:
        """Remember something else that was computed ahead."""
        self._ahead.append(ahead)

    def forget(self) -> None:
        """Let what was computed so far be of a turn that is over."""
        self._ahead.clear()

    def start(self, sequence: Sequence) -> None:
        """
        Have a sequence computed instead of the one before, and return at once.

        The sequence is released when that is done, or given up; what was computed stays findable.
        """
        if self._task is not None:
            self._task.cancel()  # not waited for: a forward pass may be under way
            self._task = None
        if sequence.is_warm():
            sequence.release()
            return
        task = Task(sequence, lambda: False, idle=True, spare=True, on_end=sequence.release)
        try:
            self._engine.submit(task)
        except (MisuseError, RuntimeFailure):
            sequence.release()  # the engine is gone: whoever asks it for something is told
        else:
            self._task = task
            self.note(ReadAhead(sequence, task.fed, task))

    def stop(self) -> None:
        """Give it up, and wait for the end of a forward pass that is under way."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            task.join()

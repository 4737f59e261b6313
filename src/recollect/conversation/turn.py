"""
One turn of a session: its prompt, its reply, and the reason why tokens were computed again.

`Prompting` makes the prompts of one session, and remembers which turns a full context has left out. The
rest are values: the session carries a turn out, and owns all other state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

from recollect.conversation.matching import Change
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Node
from recollect.engine.reply import GeneratedReply
from recollect.journal.records import NewNode
from recollect.types import Reason, ToolLinks, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(GeneratedReply):
    """A whole reply, and its node in the conversation's tree."""

    node: Node
    """The reply's node in the tree."""
    change: Change | None = None
    """Where the messages leave an earlier conversation; None: they do not, or nobody knows."""
    dropped_turns: int = 0
    """Number of the oldest turns that the prompt leaves out, because the context is full."""

    @classmethod
    def of(
        cls, generated: GeneratedReply, node: Node, dropped_turns: int, change: Change | None = None
    ) -> Self:
        """Return a generated reply with the node that it has become."""
        values = {one.name: getattr(generated, one.name) for one in fields(GeneratedReply)}
        return cls(**values, node=node, dropped_turns=dropped_turns, change=change)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A reply, or what leads to it, that is shown otherwise than when it was generated."""

    reply: int
    """Which, counted from 0."""
    start: int
    """Of the prompt's ids, the first that was another then."""
    end: int
    """Where in the prompt the reply ends."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as token ids."""

    token_ids: list[int]
    rewritten: tuple[Rewritten, ...] = ()
    """The replies of this model that are shown otherwise; there the ids are those of the template's text."""
    reencoded_replies: int = 0
    """Replies that another model wrote: their text is encoded, since its ids mean nothing here."""
    reencoded_length: int = 0
    """Leading ids up to the end of the last of these."""
    generated_length: int = 0
    """Leading ids up to the end of the last reply of this model. All but the last of them were read
    before, unless something is shown otherwise."""

    @property
    def rewritten_reply(self) -> int | None:
        """Return the first reply, counted from 0, that is shown otherwise; None where none is."""
        return self.rewritten[0].reply if self.rewritten else None


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is known before a turn runs about the KV that it should reuse."""

    prompt: Prompt
    block_size: int
    """Tokens in the smallest unit that the runtime can reuse: a block, or 1."""
    change: Change | None = None
    """The first message that differs from an earlier conversation; None: none does."""
    tools_change: str | None = None
    """How the tools differ from those of an earlier reply, in words; None: they do not."""


def explained(usage: Usage, expected: Expectation) -> Usage:
    """Return the usage with the reason for computed tokens, and with the difference in words."""
    reason, difference = _reason(usage, expected)
    return replace(usage, reason=reason, difference=difference)


def _reason(usage: Usage, expected: Expectation) -> tuple[Reason, str | None]:
    """Say what happened where reuse ended; a reason is given only for tokens that were lost there."""
    prompt, change = expected.prompt, expected.change

    def warm(length: int) -> int:
        # The last token that was generated has no KV yet when a reply ends, and is not missing.
        return max(0, length - 1) // expected.block_size * expected.block_size

    later = [shown.start for shown in prompt.rewritten if shown.start > usage.reused_tokens]
    known = warm(min([prompt.generated_length, *later]))
    there = usage.reused_tokens + usage.read_ahead_tokens
    rewritten = next(
        (
            shown.reply
            for shown in prompt.rewritten
            if warm(shown.start) <= usage.reused_tokens < shown.end
        ),
        None,
    )
    is_all_there = bool(prompt.generated_length) and there >= known and rewritten is None
    if expected.tools_change is not None and not is_all_there:
        return "tools_changed", expected.tools_change
    if rewritten is not None:
        return "template_rewrote", f"The template shows reply {rewritten + 1} otherwise."
    if usage.reused_tokens < prompt.reencoded_length and (
        prompt.generated_length < prompt.reencoded_length  # no reply since then has read them
    ):
        count = prompt.reencoded_replies
        replies = "1 reply was" if count == 1 else f"{count} replies were"
        return "other_model", f"{replies} not generated by this model."
    if change is not None and change.again:
        reason: Reason = "system_changed" if change.role == "system" else "message_changed"
        return reason, str(change)
    if there < known:
        missing = known - there
        return "evicted", f"{missing} tokens had been computed, and are no longer in memory."
    return "new", None


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and the node that it follows, what its reply may call, and what it should reuse."""

    at: Node
    """The node that the turn follows."""
    said: str | None
    """The user's message; None: the reply answers `at`."""
    before: Node
    """The session's tip before the turn, which is the tip again if there is no reply."""
    tools: Tools
    dropped_turns: int
    expected: Expectation
    begun: Node | None = None
    """The reply that goes on, in whose place the longer one comes; None: a new one begins."""
    begun_ids: Sequence[int] = ()
    """What it was read as."""

    def messages(
        self, reply: GeneratedReply, token_ids: Sequence[int], fingerprint: str
    ) -> list[NewNode]:
        """Return what is saved of the turn: its message, and the reply as the model wrote it."""
        asked = [] if self.said is None else [NewNode(role="user", content=self.said)]
        calls = tuple(call.id for call in reply.tool_calls)
        said = NewNode(
            role="assistant",
            content=reply.text if self.begun is None else self.begun.content + reply.text,
            token_ids=[*self.begun_ids, *token_ids],
            fingerprint=fingerprint,
            finish_reason=reply.finish_reason,
            usage=reply.usage.to_dict(),
            links=ToolLinks(call_ids=calls) if calls else None,
        )
        return [*asked, said]

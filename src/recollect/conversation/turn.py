"""
One turn, from its question to what is kept of it.

Knows a reply being generated; not where in a tree the next one goes.
"""

from dataclasses import dataclass, field

from recollect.conversation.reason import Expectation, explained
from recollect.conversation.reply import Reply
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Node
from recollect.engine.reply import ReplyGeneration
from recollect.journal.records import NewNode
from recollect.text.tool_calls import ParsedReply, ToolCallParser, new_call_prefix, parse_reply
from recollect.types import FinishReason, ToolLinks, Usage


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

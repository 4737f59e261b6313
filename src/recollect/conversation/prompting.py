"""
The prompts of one session: which messages they are made of, and the sequences that begin with them.

Holds no place in the tree and no KV; what was left out of a full context once is remembered.
"""

from collections.abc import Sequence

from recollect.conversation.prompt import Prompt, PromptEncoder
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Node
from recollect.conversation.window import Overflow, Window, turn_starts
from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.errors import ContextFullError


class Prompting:
    """Prompts in one namespace. Owned by a session."""

    def __init__(self, engine: Engine, encoder: PromptEncoder, namespace: str) -> None:
        self._engine = engine
        self._encoder = encoder
        self._namespace = namespace
        self._window = Window()

    def asking(
        self, at: Node, said: str | None, tools: Tools, overflow: Overflow
    ) -> tuple[Prompt, int]:
        """
        Return the prompt for a reply, and how many turns were left out of it.

        Args:
            at: The messages up to here, all or those that still fit.
            said: A user's message after those.
            tools: What the reply may call.
            overflow: What happens when not all fit.
        """

        def encode(messages: Sequence[Node]) -> Prompt:
            return self._encoder.encode(messages, said, tools.schemas)

        def measure(messages: Sequence[Node]) -> int:
            return len(encode(messages).token_ids)

        path = at.path()
        shown = self._window.fitting(path, self._engine.info.context_length, measure, overflow)
        return encode(shown), len(turn_starts(path)) - len(turn_starts(shown))

    def typing(self, at: Node, text: str, tools: Tools) -> list[int]:
        """Return the ids of what is shown up to a node, and of a message that is being typed."""
        shown = self._window.shown(at.path())
        return self._encoder.encode_typed(shown, text, tools.schemas).token_ids

    def sequence(self, token_ids: list[int]) -> TokenSequence:
        """
        Return a sequence with this history.

        Raises:
            ContextFullError: It leaves no place for a reply.
        """
        limit = self._engine.info.context_length
        needed = len(token_ids) + 1
        if needed > limit:
            raise ContextFullError(needed=needed, limit=limit)
        sequence = self._engine.new_sequence(self._namespace)
        sequence.append(token_ids)
        return sequence

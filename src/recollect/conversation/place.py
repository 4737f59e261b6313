"""
Where somebody stands in a conversation's tree, and how one moves there.

Knows nodes and named tips; no tokens, no KV, no replies.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from recollect.conversation.conversation import Conversation
from recollect.conversation.matching import Change
from recollect.conversation.tree import Node, Tree
from recollect.errors import ConversationError, RewindError, SessionBusyError
from recollect.types import Message

ANSWERED: Final = ("user", "tool")
"""Roles whose messages a reply can follow."""


class Place:
    """
    A node of a conversation's tree that one goes on from.

    Safe from several threads in that whatever moves it, or goes on from it, is refused while
    something else does.

    Invariant: the tip is a node of the tree.
    """

    def __init__(
        self,
        conversation: Conversation,
        tip: Node,
        *,
        name: str | None = None,
        change: Change | None = None,
    ) -> None:
        self.conversation = conversation
        self._name = name
        self._tip = tip
        self._change = change
        self._busy = threading.Lock()

    @property
    def name(self) -> str | None:
        """Return the conversation's named tip that moves with this place; None: none does."""
        return None if self._name is None else self.conversation.tip_name(self._name)

    @property
    def tip(self) -> Node:
        """Return the node at which one stands."""
        return self._tip

    @property
    def tree(self) -> Tree:
        """Return all messages in all branches."""
        return self.conversation.tree

    def path(self) -> list[Node]:
        """Return the messages up to the tip."""
        return self._tip.path()

    def transcript(self) -> list[Message]:
        """Return the messages up to the tip as plain values, calls of tools beside the text."""
        return [node.message() for node in self.path()]

    def last_user(self) -> Node:
        """
        Return the message that the tip answers, a user's or a tool's, or the tip if it is one.

        Raises:
            ConversationError: Nobody has said anything yet.
        """
        for node in reversed(self.path()):
            if node.role in ANSWERED:
                return node
        raise ConversationError("Nothing has been said yet: say something first.")

    def rewind(self, node: Node) -> None:
        """
        Go to a node of the tree, in any branch; costs no forward pass.

        Raises:
            UnknownNodeError: It is not a node of this conversation. Nothing was changed.
            StoreError: The journal cannot keep it. Nothing was changed.
        """
        self.tree.require(node)
        with self._exclusively():
            if self.name is not None:
                self.conversation.set_tip(self.name, node)
            self._tip = node
            self._change = None

    def undo(self, turns: int = 1) -> Node:
        """
        Go back by that many turns and return the new tip; they stay in the tree.

        Raises:
            RewindError: There are not as many. Nothing was changed.
        """
        asked = [node for node in self.path() if node.role == "user"]
        if not 1 <= turns <= len(asked):
            raise RewindError(
                f"Cannot undo {turns} turns: the conversation has {len(asked)}; "
                "give a number between 1 and that."
            )
        parent = asked[-turns].parent
        assert parent is not None, "a user's message has a parent"
        self.rewind(parent)
        return parent

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._busy.release()

    def _begin(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise SessionBusyError(
                "A reply is being generated in this session: read it to its end or stop it first."
            )

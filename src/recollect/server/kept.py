"""
Conversations of the journal that a server has open.

A conversation is loaded once and shared by the requests that go on with it. Safe from any thread.
"""

import threading
from collections import OrderedDict
from typing import Final
from weakref import WeakKeyDictionary

from recollect.conversation.conversation import Conversation
from recollect.conversation.model import Model

_MOST_OPEN: Final = 256
"""Conversations of one model that stay open; an open one is its texts and token ids in memory."""


class KeptConversations:
    """Conversations by model and id; those used longest ago are closed first."""

    def __init__(self) -> None:
        self._open: WeakKeyDictionary[Model, OrderedDict[int, Conversation]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def conversation(
        self, model: Model, kept_as: int, *, namespace: str, node_id: int | None = None
    ) -> Conversation:
        """
        Return a conversation of the journal, open on a model.

        Args:
            model: Goes on with it.
            kept_as: Its id in the journal.
            namespace: Whose it is.
            node_id: In the journal, of a node that it must have; another process may have added it.

        Raises:
            UnknownConversationError: There is none in that namespace.
        """
        while True:
            with self._lock:
                conversations = self._open.setdefault(model, OrderedDict())
                known = conversations.get(kept_as)
                if known is not None and _has(known, node_id):
                    self._remember(conversations, kept_as, known)
                    return known
            # Not under the lock: the journal may be held by others, and those who ask for what is
            # open need not wait for it.
            loaded = model.conversation(kept_as, namespace=namespace)
            loaded.shares_tips = True
            with self._lock:
                conversations = self._open.setdefault(model, OrderedDict())
                if conversations.get(kept_as) is known:  # else another request was faster
                    self._remember(conversations, kept_as, loaded)
                    return loaded

    def add(self, model: Model, conversation: Conversation) -> None:
        """Take over a new conversation, which is in the journal by now."""
        assert conversation.kept_as is not None, "it is kept"
        conversation.shares_tips = True
        with self._lock:
            conversations = self._open.setdefault(model, OrderedDict())
            self._remember(conversations, conversation.kept_as, conversation)

    def forget(self, kept_as: int) -> None:
        """Close a conversation that was deleted."""
        with self._lock:
            for conversations in self._open.values():
                conversations.pop(kept_as, None)

    def _remember(
        self, conversations: OrderedDict[int, Conversation], kept_as: int, known: Conversation
    ) -> None:
        conversations[kept_as] = known
        conversations.move_to_end(kept_as)
        while len(conversations) > _MOST_OPEN:
            conversations.popitem(last=False)


def _has(conversation: Conversation, node_id: int | None) -> bool:
    return node_id is None or conversation.kept_node(node_id) is not None

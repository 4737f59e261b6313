"""
Conversations as they were read from the journal, kept while nobody changes them.

A client reads a large conversation page by page. Without this, the journal's rows would be read and
checked anew for each page, and each message encoded anew to say what going on from it would cost.
Knows no request and no client: whoever reads has looked up whose the conversation is.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from sys import getsizeof
from typing import Final

from recollect.conversation.costs import Encodings
from recollect.conversation.model import Model
from recollect.conversation.prompt import ToolSchemas
from recollect.conversation.tree import Node, grown
from recollect.journal.changes import Snapshot, item_name, response_item
from recollect.journal.journal import Journal
from recollect.journal.records import NodeRecord, StoredConversation
from recollect.server.response_object import items_of

MOST_BYTES: Final = 64 << 20
"""Of what is kept: several conversations of ten thousand short messages."""
_NODE_BYTES: Final = 2_600
"""Of a message without its text: its record, its node in the tree, its names."""
_TOKEN_BYTES: Final = 40
"""Of a token id: in the record, and as part of what the message is encoded as."""


def own_name(conversation: str, number: int, response: str | None) -> str:
    """
    Return the id of a message's node.

    Args:
        conversation: The label of its conversation.
        number: Which message of the conversation it is, in the order of writing; the first is 1.
        response: The id of the response that it is; None: it is none.
    """
    return item_name(conversation, number) if response is None else response_item(response)


class ReadConversation:
    """A conversation as it was read, and how its messages are found. Shared by threads, never changed."""

    def __init__(self, label: str, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        """A later one has the same conversation and responses."""
        self.stored: Final[StoredConversation] = snapshot.conversation
        self.responses: Final[Mapping[int, str]] = snapshot.responses
        self.numbers: Final = {node.id: number for number, node in enumerate(self.stored.nodes)}
        """Where each message is in the order of writing, from 0."""
        self.names: Final = {
            node.id: own_name(label, number, self.responses.get(node.id))
            for number, node in enumerate(self.stored.nodes, 1)
        }
        """The id that each message has for itself, whatever it is a copy of."""
        self.size_bytes: Final = sum(map(_size_of, self.stored.nodes))
        """About what it takes in memory, with all that is found out of it later."""
        self._encodings: Encodings | None = None

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Return the messages by their own ids, those of their items, and the labels of responses."""
        found = {label: node_id for node_id, label in self.responses.items()}
        for node in self.stored.nodes:
            name = self.names[node.id]
            found |= {item["id"]: node.id for item in items_of(name, node)}
            found[name] = node.id
        return found

    @cached_property
    def tree(self) -> dict[int | None, Node]:
        """Return the nodes of its tree by their ids in the journal; the root is under None."""
        return grown(self.stored.nodes)[1]

    def node(self, node_id: int) -> NodeRecord:
        """Return a message by its id in the journal."""
        return self.stored.nodes[self.numbers[node_id]]

    def path(self, node_id: int | None) -> list[NodeRecord]:
        """Return the messages from the first one to that of an id in the journal; None: of the root."""
        path = []
        while node_id is not None:
            path.append(self.node(node_id))
            node_id = path[-1].parent_id
        return path[::-1]

    def encodings(self, model: Model, tools: ToolSchemas) -> Encodings:
        """Return what is known of its encoding for a model and some tools; that for others is forgotten."""
        known = self._encodings
        if known is None or not known.fits(model, tools):
            known = self._encodings = Encodings(model, tools)
        return known


class KnownConversations:
    """
    Conversations of one journal as they were read last; those read longest ago are forgotten first.

    Safe from any thread.

    Invariant: they take at most the bytes that were allowed, as far as `ReadConversation` counts.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._known: OrderedDict[int, ReadConversation] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, journal: Journal, conversation_id: int, label: str, namespace: str
    ) -> ReadConversation:
        """
        Return a conversation as it is now, read only if it has changed.

        Args:
            journal: Always the same one.
            conversation_id: Its id there.
            label: By which clients know it.
            namespace: Whose it is.

        Raises:
            UnknownConversationError, StoreError: As `Journal.load`.
        """
        with self._lock:
            known = self._known.get(conversation_id)
        before = None if known is None else known.snapshot
        # Not under the lock: to read one takes as long as it is large.
        snapshot = journal.snapshot(conversation_id, namespace=namespace, known=before)
        if known is None or snapshot.conversation is not known.stored:
            known = ReadConversation(label, snapshot)
        known.snapshot = snapshot
        with self._lock:
            self._forget(conversation_id)
            self._known[conversation_id] = known
            self._bytes += known.size_bytes
            while self._bytes > self._most_bytes:
                self._forget(next(iter(self._known)))
        return known

    def forget(self, conversation_id: int) -> None:
        """Forget a conversation that was deleted."""
        with self._lock:
            self._forget(conversation_id)

    def _forget(self, conversation_id: int) -> None:
        known = self._known.pop(conversation_id, None)
        if known is not None:
            self._bytes -= known.size_bytes


def _size_of(node: NodeRecord) -> int:
    tokens = len(node.content) // 2 if node.token_ids is None else len(node.token_ids)
    about = 0 if node.usage is None else 64 * len(node.usage) + getsizeof(node.usage)
    if node.links is not None:
        about += 2 * len(repr(node.links))
    return _NODE_BYTES + 2 * getsizeof(node.content) + _TOKEN_BYTES * tokens + about

"""
Find the nodes that messages sent as text came from.

A client that sends the whole conversation each time gets its replies back as the token ids that
were generated. Pure bookkeeping over trees: no runtime, no encoding.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from recollect.conversation.messages import to_node
from recollect.conversation.records import NewNode
from recollect.conversation.tree import ROOT_KEY, Node, message_key
from recollect.types import Message, common_prefix_length

if TYPE_CHECKING:  # a conversation tells the index of its nodes, so the import would be a circle
    from recollect.conversation.conversation import Conversation

_MOST_MESSAGES: Final = 20_000
"""Messages of a namespace that can be found, about 5 kB of memory each; the ones found or added
longest ago are forgotten first, and their replies are still known on disk. Source: benchmarks/soak.py."""

_SHOWN_CHARACTERS: Final = 60


@dataclass(frozen=True, slots=True)
class Found:
    """The longest beginning of a list of messages that is known."""

    conversation: "Conversation"
    node: Node
    messages: int
    """How many of the messages lead to `node`."""


@dataclass(frozen=True, slots=True)
class Change:
    """Where messages leave the conversation that they come closest to."""

    message: int
    """Which message, counted from 0."""
    role: str
    was: str
    """The known text from the first difference on, shortened."""
    is_now: str
    """The same of the new text."""


class MessageIndex:
    """
    Which node stands for which messages, in one namespace.

    Owned by a model; safe from any thread.

    Invariants:
        1. A key leads to a node that has it, and the node is of the conversation beside it.
        2. At most `_MOST_MESSAGES` keys.
    """

    def __init__(self) -> None:
        self._nodes: OrderedDict[bytes, tuple[Conversation, Node]] = OrderedDict()
        self._after_system: OrderedDict[str, Node] = OrderedDict()  # first question to instructions
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many messages can be found."""
        return len(self._nodes)

    def add(self, conversation: "Conversation", node: Node) -> None:
        """
        Let a node be found.

        Of several with the same messages, the last that was generated is found: its KV is the warmest.
        """
        with self._lock:
            known = self._nodes.get(node.key)
            if known is None or known[1].token_ids is None or node.token_ids is not None:
                self._nodes[node.key] = (conversation, node)
            self._nodes.move_to_end(node.key)
            if node.parent is not None and node.parent.role == "system":
                self._after_system[node.content] = node.parent
            for index in (self._nodes, self._after_system):
                while len(index) > _MOST_MESSAGES:
                    index.popitem(last=False)

    def find(self, messages: Sequence[Message]) -> Found | None:
        """Return the longest known beginning of *messages*; None where not even the first is known."""
        found = None
        key = ROOT_KEY
        with self._lock:
            for count, message in enumerate(map(to_node, messages), 1):
                key = message_key(key, message.role, message.content, message.links)
                if key not in self._nodes:
                    break
                self._nodes.move_to_end(key)
                conversation, node = self._nodes[key]
                found = Found(conversation, node, count)
        return found

    def change(self, messages: Sequence[Message], found: Found | None) -> Change | None:
        """
        Return where *messages* leave what is known; None where they go on from its end.

        Args:
            messages: From the first on.
            found: What `find` said of them.
        """
        if found is None:
            return self._changed_instructions(messages)
        if found.messages == len(messages):
            return None
        message = to_node(messages[found.messages])
        siblings = [node for node in found.node.children if node.role == message.role]
        if not siblings:
            return None
        # An edit rarely changes the start, so the likeliest origin begins like the message.
        origin = max(siblings, key=lambda node: common_prefix_length(node.content, message.content))
        return described(found.messages, origin, message)

    def _changed_instructions(self, messages: Sequence[Message]) -> Change | None:
        """Return how the system message differs from that of a conversation with the same first question."""
        if len(messages) < 2 or messages[0]["role"] != "system":
            return None
        known = self._after_system.get(to_node(messages[1]).content)
        return None if known is None else described(0, known, to_node(messages[0]))

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        assert len(self._nodes) <= _MOST_MESSAGES, "too many messages"
        for key, (conversation, node) in self._nodes.items():
            assert node.key == key, "a node is found under another key"
            conversation.tree.require(node)


def described(index: int, known: Node, message: NewNode) -> Change:
    """Return what differs between a known message and the one in its place."""
    start = common_prefix_length(known.content, message.content)
    return Change(
        message=index,
        role=message.role,
        was=known.content[start : start + _SHOWN_CHARACTERS],
        is_now=message.content[start : start + _SHOWN_CHARACTERS],
    )

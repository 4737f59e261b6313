"""
A conversation as a tree of messages: nothing is ever changed or deleted, only added.

Pure bookkeeping: no runtime, no text encoding.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from recollect.conversation.messages import as_written, canonical, to_message
from recollect.errors import UnknownNodeError
from recollect.journal.records import NewNode, NodeRecord
from recollect.types import FinishReason, Message, Role, ToolLinks

ROOT_KEY: Final = b""


def message_key(parent: bytes, role: Role, content: str, links: ToolLinks | None = None) -> bytes:
    """Return the name of a message in its place: a hash of what came before and what it says."""
    text = canonical(role, content, links)
    head = f"{role}:{len(text)}:".encode()
    return hashlib.blake2b(
        parent + head + text.encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()


@dataclass(eq=False, slots=True, frozen=True)
class Node:
    """
    A message in its place.

    The root has no message: its role is None. Two nodes are equal only where they are the same.
    """

    id: int
    parent: "Node | None"
    role: Role | None
    content: str
    key: bytes = ROOT_KEY
    """The same for the same text after the same messages, in whatever tree."""
    token_ids: tuple[int, ...] | None = None
    """What the model generated; None for what it did not write."""
    fingerprint: str | None = None
    """The model that generated the tokens."""
    finish_reason: FinishReason | None = None
    usage: Mapping[str, Any] | None = None
    """As `Usage.to_dict` gives it."""
    links: ToolLinks | None = None
    """How the message hangs together with calls of tools; None where it does not."""
    children: list["Node"] = field(default_factory=list)

    def path(self) -> list["Node"]:
        """Return the nodes from the first message to this one, without the root."""
        path, node = [], self
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    @property
    def turns(self) -> int:
        """Return how many replies the path to this node has."""
        return sum(node.role == "assistant" for node in self.path())

    def message(self) -> Message:
        """Return the message as clients send it, with calls of tools beside the text."""
        assert self.role is not None, "the root is no message"
        return to_message(self.role, self.content, self.links)

    def written_message(self) -> Message:
        """Return the message as templates get it, with calls of tools as the model wrote them."""
        assert self.role is not None, "the root is no message"
        return as_written(self.role, self.content, self.links)

    def to_new(self) -> NewNode:
        """Return the message as it is to be kept, or added, somewhere else too."""
        assert self.role is not None, "the root is no message"
        return NewNode(
            role=self.role,
            content=self.content,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            usage=self.usage,
            fingerprint=self.fingerprint,
            links=self.links,
        )

    def __repr__(self) -> str:
        return f"Node({self.id}, {self.role}, {self.content[:30]!r})"


def grown(records: Iterable[NodeRecord]) -> "tuple[Tree, dict[int | None, Node]]":
    """
    Return the tree of kept messages, parents first, and its nodes by their ids in the journal.

    The root is under None. The tree numbers messages from 1 in the order in which they were kept, which
    is also how they are numbered for people; see `numbering`.
    """
    tree = Tree()
    nodes: dict[int | None, Node] = {None: tree.root}
    for record in records:
        nodes[record.id] = tree.add(
            nodes[record.parent_id],
            record.role,
            record.content,
            token_ids=record.token_ids,
            fingerprint=record.fingerprint,
            finish_reason=record.finish_reason,
            usage=record.usage,
            links=record.links,
        )
    return tree, nodes


class Tree:
    """
    All messages of a conversation, in all its branches.

    Invariants:
        1. Every node but the root is among the children of its parent, once.
        2. Ids are unique and grow from parent to child.
        3. Only replies have token ids, and those name the model that generated them.
        4. A key is that of the parent, the role, the text and, of what a tool gave back, its call.
    """

    def __init__(self) -> None:
        self.root = Node(id=0, parent=None, role=None, content="")
        self._nodes = {0: self.root}
        self._ids = itertools.count(1)  # atomic: forks in several threads may add at once

    def __len__(self) -> int:
        """Return the number of messages."""
        return len(self._nodes) - 1

    def nodes(self) -> Iterator[Node]:
        """Iterate over all messages, parents first."""
        return (node for node in list(self._nodes.values()) if node.parent is not None)

    def node(self, node_id: int) -> Node:
        """
        Return the node with that id.

        Raises:
            UnknownNodeError: There is none.
        """
        try:
            return self._nodes[node_id]
        except KeyError:
            raise UnknownNodeError(
                f"This conversation has no node {node_id}: see its tree for those that it has."
            ) from None

    def require(self, node: Node) -> None:
        """
        Check that the node is of this tree.

        Raises:
            UnknownNodeError: It is of another conversation.
        """
        if self._nodes.get(node.id) is not node:
            raise UnknownNodeError(f"{node!r} is not a node of this conversation.")

    def add(
        self,
        parent: Node,
        role: Role,
        content: str,
        *,
        token_ids: tuple[int, ...] | None = None,
        fingerprint: str | None = None,
        finish_reason: FinishReason | None = None,
        usage: Mapping[str, Any] | None = None,
        links: ToolLinks | None = None,
        key: bytes | None = None,
    ) -> Node:
        """
        Add a message after *parent* and return its node.

        Args:
            key: As `message_key` gives it; None: it is not known yet.
            parent, role, content, token_ids, fingerprint, finish_reason, usage, links: As in `Node`.
        """
        self.require(parent)
        node = Node(
            id=next(self._ids),
            parent=parent,
            role=role,
            content=content,
            key=message_key(parent.key, role, content, links) if key is None else key,
            token_ids=token_ids,
            fingerprint=fingerprint,
            finish_reason=finish_reason,
            usage=usage,
            links=links,
        )
        self._nodes[node.id] = node
        parent.children.append(node)
        return node

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        reached, pending = {self.root.id}, [self.root]
        while pending:
            node = pending.pop()
            for child in node.children:
                assert child.parent is node, f"{child!r} hangs under a node that is not its parent"
                assert child.id not in reached, f"{child!r} is reached twice"
                assert child.id > node.id, f"{child!r} is older than its parent"
                assert child.token_ids is None or child.role == "assistant", f"{child!r} has tokens"
                assert (child.token_ids is None) == (child.fingerprint is None), (
                    f"{child!r} by whom"
                )
                assert child.role is not None, f"{child!r} is a second root"
                key = message_key(node.key, child.role, child.content, child.links)
                assert child.key == key, f"{child!r} has the key of another"
                reached.add(child.id)
                pending.append(child)
        assert reached == set(self._nodes), "a node cannot be reached from the root"

"""
A kept conversation as a client sees it: its items, branches and ids.

Reads the journal alone, so that no model needs to be loaded. Ids of items say where in their
conversation they are and nothing of any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self

from fastapi import Request

from recollect.journal.entries import Label
from recollect.journal.journal import Journal
from recollect.journal.records import DEFAULT_TIP, NodeRecord, StoredConversation
from recollect.server.errors import not_found
from recollect.server.places import branches, checkpoints, copies_of, split_branch
from recollect.server.response_object import items_of
from recollect.server.services import client_of, services_of


@dataclass(frozen=True, slots=True)
class ConversationHead:
    """A conversation at one of its branches, without its messages: what can be told without reading them."""

    id: str
    """As the client said it: with the branch where it is not the main one."""
    branch: str
    label: Label
    created_at: datetime
    tips: Mapping[str, int | None]

    @classmethod
    def load(cls, journal: Journal, conversation_id: str, namespace: str) -> Self:
        """
        Return a conversation of a client.

        Raises:
            ApiError: There is none of that id, for this client.
        """
        name, branch = split_branch(conversation_id)
        label = journal.find_label(name, namespace=namespace)
        if label is None or label.node_id is not None:
            raise not_found(f"conversation {conversation_id!r}")
        tips = journal.tips(label.conversation_id)
        if branch not in {DEFAULT_TIP, *branches(tips)}:
            raise not_found(f"conversation {conversation_id!r}")
        created_at = journal.info(label.conversation_id).created_at
        return cls(conversation_id, branch, label, created_at, tips)

    def body(self) -> dict[str, Any]:
        """Return the conversation as OpenAI's clients read it."""
        return conversation_body(self.id, self.created_at, self.label.note)


@dataclass(frozen=True, slots=True)
class ConversationView:
    """A conversation at one of its branches, with the names that its nodes go by."""

    id: str
    """As the client said it: with the branch where it is not the main one."""
    stored: StoredConversation
    branch: str
    label: Label
    responses: dict[int, str]
    """Response ids, by node."""
    names: dict[int, str]
    """Of all nodes, each its own."""
    copies: dict[int, int]
    """Nodes that are the same message as others, which were there before an item was deleted."""

    @classmethod
    def load(cls, journal: Journal, conversation_id: str, namespace: str) -> Self:
        """
        Return a conversation of a client.

        Raises:
            ApiError: There is none of that id, for this client.
        """
        head = ConversationHead.load(journal, conversation_id, namespace)
        label = head.label
        stored = journal.load(label.conversation_id, namespace=namespace)
        responses = {
            one.node_id: one.name
            for one in journal.labels(label.conversation_id)
            if one.node_id is not None
        }
        prefix = f"msg_{label.name.removeprefix('conv_')}"
        names = {node.id: f"{prefix}_{number}" for number, node in enumerate(stored.nodes, 1)}
        names |= {node: f"msg_{one.removeprefix('resp_')}" for node, one in responses.items()}
        copies = copies_of(label)
        return cls(conversation_id, stored, head.branch, label, responses, names, copies)

    @property
    def tip(self) -> int | None:
        """Return the node at which the branch stands; None is the root."""
        if self.branch in self.stored.tips:
            return self.stored.tips[self.branch]
        return self.stored.default_tip()

    def body(self) -> dict[str, Any]:
        """Return the conversation as OpenAI's clients read it."""
        return conversation_body(self.id, self.stored.created_at, self.label.note)

    def at(self, conversation_id: str, branch: str, tip: int | None) -> Self:
        """Return the conversation at a branch whose tip has been moved, as it is known."""
        stored = replace(self.stored, tips={**self.stored.tips, branch: tip})
        return replace(self, id=conversation_id, branch=branch, stored=stored)

    def standing(self) -> dict[str, Any]:
        """Return the conversation, and where it stands."""
        return {
            **self.body(),
            "branch": self.branch,
            "tip": None if self.tip is None else self.item_id(self.tip),
            "turns": sum(node.role == "assistant" for node in self.path()),
        }

    def path(self) -> list[NodeRecord]:
        """Return the messages up to the tip."""
        return self.stored.path(self.tip)

    def first(self, node_id: int) -> int:
        """Return the node where a message was said first; most are themselves."""
        return self.copies.get(node_id, node_id)

    def item_id(self, node_id: int) -> str:
        """Return the id of an item: a message keeps its own on whatever path it is."""
        return self.names[self.first(node_id)]

    def node_id(self, name: str) -> int:
        """
        Return the node that an item's or a response's id names, on this branch where it is there.

        Raises:
            ApiError: It is not of this conversation.
        """
        by_name = {response: node for node, response in self.responses.items()}
        for node in self.stored.nodes:
            own = self.names[node.id]
            by_name |= {item["id"]: node.id for item in items_of(own, node)} | {own: node.id}
        for node in self.path():
            by_name |= {item["id"]: node.id for item in self.items([node])}
            by_name[self.item_id(node.id)] = node.id
        if name not in by_name:
            raise not_found(f"item {name!r} in this conversation")
        return by_name[name]

    def checkpoint(self, name: str) -> int | None:
        """
        Return the node at which a checkpoint is; None is the root.

        Raises:
            ApiError: There is none of that name.
        """
        known = checkpoints(self.stored.tips)
        if name not in known:
            raise not_found(f"checkpoint {name!r} in this conversation")
        return known[name]

    def items(self, nodes: Sequence[NodeRecord]) -> list[dict[str, Any]]:
        """Return messages as items."""
        return [item for node in nodes for item in items_of(self.item_id(node.id), node)]

    def tree(self) -> dict[str, Any]:
        """Return all messages in all branches, parents first, and where branches and checkpoints are."""
        nodes = [
            {
                "id": self.names[node.id],
                "role": node.role,
                "items": self.items([node]),
                "parent_id": None if node.parent_id is None else self.names[node.parent_id],
                "response_id": self.responses.get(node.id),
                "created_at": int(node.created_at.timestamp()),
            }
            for node in self.stored.nodes
        ]
        return {
            "object": "conversation.tree",
            "id": self.id,
            "nodes": nodes,
            "tips": self._named(branches(self.stored.tips)),
            "checkpoints": self._named(checkpoints(self.stored.tips)),
        }

    def _named(self, places: Mapping[str, int | None]) -> dict[str, str | None]:
        return {
            name: None if node_id is None else self.names[node_id]
            for name, node_id in places.items()
        }


def conversation_body(
    conversation_id: str, created_at: datetime, note: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a conversation as OpenAI's clients read it."""
    return {
        "id": conversation_id,
        "object": "conversation",
        "created_at": int(created_at.timestamp()),
        "metadata": note.get("metadata", {}),
    }


def head_of(request: Request, conversation_id: str) -> ConversationHead:
    """
    Return a conversation of the client that a request is from, without its messages.

    Raises:
        ApiError: There is none of that id, for this client.
    """
    journal = services_of(request).journal
    return ConversationHead.load(journal, conversation_id, client_of(request).namespace)


def view_of(request: Request, conversation_id: str) -> ConversationView:
    """
    Return a conversation of the client that a request is from.

    Raises:
        ApiError: There is none of that id, for this client.
    """
    journal = services_of(request).journal
    return ConversationView.load(journal, conversation_id, client_of(request).namespace)

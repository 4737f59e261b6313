"""
Kept conversations by the ids that clients have, and where in their trees a response goes on.

A `ConversationView` is what a client sees: items, branches, checkpoints. It is read from the journal
alone, so that no model needs to be loaded, and ids of items say where in their conversation they are
and nothing of any other. A `Place` is the node that a response follows: an earlier response is a
node, so going on from any of them is a fork, whose shared part is found by its token ids.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self

from fastapi import Request

from recollect.conversation.conversation import Conversation
from recollect.conversation.costs import GoingOn
from recollect.conversation.feed import CHECKPOINT
from recollect.conversation.matching import Change, described
from recollect.conversation.model import Model
from recollect.conversation.tree import ROOT_KEY, Node, message_key, to_message
from recollect.conversation.turn import ANSWERED
from recollect.encryption import KV_PURPOSE
from recollect.errors import StoreError
from recollect.journal.journal import Journal
from recollect.journal.records import (
    DEFAULT_TIP,
    ConversationInfo,
    Label,
    NewNode,
    NodeRecord,
    Page,
    StoredConversation,
)
from recollect.kv.disk import STORE_FOLDER, DiskStore, is_there, open_existing
from recollect.server.hub import OpenConversations
from recollect.server.known_conversations import ReadConversation
from recollect.server.refusals import ApiError, naming, not_found, quoted
from recollect.server.response_object import ResponseHead, items_of
from recollect.server.services import Services, client_of, services_of
from recollect.server.settings import Settings
from recollect.server.usage import recorded
from recollect.types import Message

_log = logging.getLogger(__name__)

HAS_INSTRUCTIONS = "has_instructions"
"""In the note of a response: whether its first message is the instructions of the request, which
the next one does not inherit."""
COPIES = "copies"
"""In the note of a conversation: which messages are the same as others, said again on another path
after an item was deleted. Ids in the journal, as texts, and of the message that was said first."""


@dataclass(frozen=True, slots=True)
class Place:
    """A node of a conversation, and which of the conversation's tips moves on from it."""

    conversation: Conversation
    node: Node
    has_instructions: bool = False
    tip: str | None = None
    """None: none moves."""
    change: Change | None = None
    """Where the path leaves the one that was read before, since an item was deleted."""


def split_branch(conversation_id: str) -> tuple[str, str]:
    """Return the label of a conversation, and the name of its branch that an id stands for."""
    label, _, branch = conversation_id.partition(".")
    return label, branch or DEFAULT_TIP


def branches(tips: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return those of a conversation's tips that move with what is said."""
    return {name: at for name, at in tips.items() if not is_checkpoint(name)}


def checkpoints(tips: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return where a conversation's checkpoints are, by the names that clients gave them."""
    return {name.removeprefix(CHECKPOINT): at for name, at in tips.items() if is_checkpoint(name)}


def copies_of(label: Label) -> dict[int, int]:
    """Return which messages of a conversation are the same as others, by their ids in the journal."""
    return {int(copy): first for copy, first in label.note.get(COPIES, {}).items()}


def checkpoint_tip(name: str) -> str:
    """Return the name of the tip that a checkpoint is."""
    return CHECKPOINT + name


def is_checkpoint(tip: str) -> bool:
    """Return whether a tip is a checkpoint and no branch: a branch's name has no colon in it."""
    return tip.startswith(CHECKPOINT)


class Places:
    """Finds places for one client and one model. Used on one thread."""

    def __init__(
        self, journal: Journal, kept: OpenConversations, model: Model, namespace: str
    ) -> None:
        self._journal = journal
        self._kept = kept
        self._model = model
        self._namespace = namespace

    def after_response(self, response_id: str) -> Place:
        """
        Return the place after an earlier response.

        Raises:
            ApiError: There is no such response, for this client.
        """
        label = self._journal.find_label(response_id, namespace=self._namespace)
        if label is None or label.node_id is None:
            raise ApiError(
                f"Previous response with id {response_id!r} not found.",
                status=404,
                code="previous_response_not_found",
                param="previous_response_id",
            )
        conversation = self._open(label.conversation_id, label.node_id)
        node = conversation.saved_node(label.node_id)
        assert node is not None, "it was opened for this node"
        # The main tip goes along with a conversation that goes straight on, and not with a fork.
        goes_on = self._journal.tips(label.conversation_id).get(DEFAULT_TIP) == label.node_id
        has_instructions = bool(label.note.get(HAS_INSTRUCTIONS))
        return Place(conversation, node, has_instructions, DEFAULT_TIP if goes_on else None)

    def at_tip(self, conversation_id: str) -> Place:
        """
        Return the place where a conversation, or a branch of it, stands.

        Raises:
            ApiError: There is none, for this client.
        """
        name, branch = split_branch(conversation_id)
        label = self._journal.find_label(name, namespace=self._namespace)
        tips = {} if label is None else branches(self._journal.tips(label.conversation_id))
        if label is None or label.node_id is not None or branch not in {DEFAULT_TIP, *tips}:
            raise not_found(f"conversation {conversation_id!r}")
        node_id = tips.get(branch)
        conversation = self._open(label.conversation_id, node_id)
        node = None if node_id is None else conversation.saved_node(node_id)
        if node is None:
            return Place(conversation, conversation.tree.root, tip=branch)
        has_instructions = self._has_instructions(label, conversation, node)
        change = _change(copies_of(label), conversation, node)
        return Place(conversation, node, has_instructions, branch, change)

    def new(self) -> Place:
        """Return the beginning of a conversation, which is kept from its first reply on."""
        session = self._model.session(namespace=self._namespace, keep=True)
        session.conversation.shares_tips = True
        return Place(session.conversation, session.tip, tip=DEFAULT_TIP)

    def grow(self, place: Place, instructions: str | None, messages: Sequence[Message]) -> Place:
        """
        Return the place after messages that were sent as text, under instructions.

        Those that were generated here, after the same messages, have the token ids that they had then.

        Raises:
            StoreError: The journal cannot keep them.
        """
        first: list[Message] = []
        if instructions is not None:
            first.append({"role": "system", "content": instructions})
        path = place.node.path()[place.has_instructions :]
        before = [*first, *(node.message() for node in path)]
        session = self._model.session_from([*before, *messages], namespace=self._namespace)
        new = [node.to_new() for node in session.path()[len(before) :]]
        node = grow(place.conversation, with_instructions(place, instructions), new)
        place.conversation.take_tools(node, session.conversation, session.tip)
        return replace(place, node=node, change=place.change or session.change)

    def _has_instructions(self, label: Label, conversation: Conversation, node: Node) -> bool:
        """Return whether the path to a node begins with the instructions of the response there."""
        copies = copies_of(label)

        def first(one: Node | None) -> int | None:
            saved_id = None if one is None else conversation.saved_id(one)
            return None if saved_id is None else copies.get(saved_id, saved_id)

        said = first(node)
        notes = {one.node_id: one.note for one in self._journal.labels(label.conversation_id)}
        response = None if said is None else conversation.saved_node(said)
        if response is None or not notes.get(said, {}).get(HAS_INSTRUCTIONS):
            return False
        # They are an item like others, which may have been deleted.
        return first(node.path()[0]) == first(response.path()[0])

    def _open(self, journal_id: int, node_id: int | None) -> Conversation:
        return self._kept.conversation(
            self._model, journal_id, namespace=self._namespace, node_id=node_id
        )


def _change(copies: Mapping[int, int], conversation: Conversation, node: Node) -> Change | None:
    """Return where the path to a node leaves that on which its last reply was generated."""
    reply = next((one for one in reversed(node.path()) if one.role == "assistant"), None)
    saved_id = None if reply is None else conversation.saved_id(reply)
    first = None if saved_id is None else copies.get(saved_id)
    before = None if first is None else conversation.saved_node(first)
    if reply is None or before is None or _was_read(copies, conversation, reply):
        return None
    for number, (was, is_now) in enumerate(zip(before.path(), reply.path(), strict=False)):
        if (was.role, was.content) != (is_now.role, is_now.content):
            return described(number, was, [one.to_new() for one in reply.path()[number:]])
    return None


def _was_read(copies: Mapping[int, int], conversation: Conversation, copy: Node) -> bool:
    """Return whether a reply was generated after the copy of one, and so with that before it."""
    pending = list(copy.children)
    while pending:
        node = pending.pop()
        saved_id = conversation.saved_id(node)
        if node.token_ids is not None and saved_id not in copies:
            return True
        pending += node.children
    return False


def with_instructions(place: Place, instructions: str | None) -> Node:
    """
    Return the place's node, or the same messages after other instructions.

    Raises:
        StoreError: The journal cannot keep them.
    """
    path = place.node.path()
    before = path[0].content if place.has_instructions else None
    if before == instructions:
        return place.node
    rest = [node.to_new() for node in (path[1:] if place.has_instructions else path)]
    first = [] if instructions is None else [NewNode(role="system", content=instructions)]
    return grow(place.conversation, place.conversation.tree.root, [*first, *rest])


def grow(conversation: Conversation, at: Node, messages: Sequence[NewNode]) -> Node:
    """
    Return the node after messages, which are added where they are not there.

    What the path ends with, and nobody has answered, is not said again.
    Replies are kept at once, since their token ids are; what follows them when something is said.

    Raises:
        StoreError: The journal cannot keep them.
    """
    left = list(messages)[_repeated(at, messages) :]
    while left and (known := _child(at, left[0])) is not None:
        at = known
        left.pop(0)
    replies = [number for number, new in enumerate(left, 1) if new.token_ids is not None]
    generated = replies[-1] if replies else 0
    if generated:
        at = conversation.add(at, left[:generated], tip=None)
    for new in left[generated:]:
        at = conversation.add_unsaved(at, to_message(new.role, new.content, new.links))
    return at


def _repeated(at: Node, messages: Sequence[NewNode]) -> int:
    """
    Return how many of the messages are what a path ends with, unanswered.

    A client that asks again, because the server ended during the reply, does not say it twice.
    """
    if at.role not in ANSWERED or at.children:
        return 0
    path = at.path()
    for count in range(min(len(path), len(messages)), 0, -1):
        key = ROOT_KEY if count == len(path) else path[-count - 1].key
        for message in messages[:count]:
            key = message_key(key, message.role, message.content, message.links)
        if key == at.key and not any(node.role == "assistant" for node in path[-count:]):
            return count
    return 0


def _child(node: Node, message: NewNode) -> Node | None:
    ids = None if message.token_ids is None else tuple(message.token_ids)
    key = message_key(node.key, message.role, message.content, message.links)
    for child in node.children:
        if child.key == key and child.token_ids == ids:
            return child
    return None


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
    read: ReadConversation
    """As the journal has it; its tips may have been moved since."""
    stored: StoredConversation
    """The same, with its tips as they are now."""
    branch: str
    label: Label
    copies: dict[int, int]
    """Nodes that are the same message as others, which were there before an item was deleted."""

    @classmethod
    def load(cls, services: Services, conversation_id: str, namespace: str) -> Self:
        """
        Return a conversation of a client.

        Raises:
            ApiError: There is none of that id, for this client.
        """
        head = ConversationHead.load(services.journal, conversation_id, namespace)
        label = head.label
        read = services.known.read(services.journal, label.conversation_id, label.name, namespace)
        return cls(conversation_id, read, read.stored, head.branch, label, copies_of(label))

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
        return self.read.path(self.tip)

    def last_head(self, journal: Journal) -> ResponseHead | None:
        """Return what is known of the last response on the way to where the conversation stands."""
        for node in reversed(self.path()):
            name = self.read.responses.get(self.first(node.id))
            label = name and journal.find_label(name, namespace=self.stored.namespace)
            if label and "head" in label.note:
                return ResponseHead.from_kept(label.name, label.note["head"])
        return None

    def first(self, node_id: int) -> int:
        """Return the node where a message was said first; most are themselves."""
        return self.copies.get(node_id, node_id)

    def item_id(self, node_id: int) -> str:
        """Return the id of an item: a message keeps its own on whatever path it is."""
        return self.read.names[self.first(node_id)]

    def node_id(self, name: str) -> int:
        """
        Return the node that an item's or a response's id names, on this branch where it is there.

        Raises:
            ApiError: It is not of this conversation.
        """
        for node in reversed(self.path() if self.copies else []):
            if node.id in self.copies:
                items = (item["id"] for item in self.items([node]))
                if name == self.item_id(node.id) or name in items:
                    return node.id
        if name not in self.read.by_name:
            raise not_found(f"item {name!r} in this conversation")
        return self.read.by_name[name]

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

    def items_after(
        self, name: str | None, *, newest_first: bool = False
    ) -> Iterator[dict[str, Any]]:
        """
        Return the items of the messages up to the tip, each made when it is asked for.

        Args:
            name: The id of the item that they come after; None: all.
            newest_first: Whether to begin at the tip.

        Raises:
            ApiError: No message up to the tip has an item of that id.
        """
        step = -1 if newest_first else 1
        path = self.path()[::step]
        if name is not None:
            last = self.read.node(self.node_id(name))
            path = path[path.index(last) :] if last in path else []
        items = (item for node in path for item in self.items([node])[::step])
        if name is not None and all(item["id"] != name for item in items):
            raise not_found(f"item {name!r} in this conversation")
        return items

    def nodes_after(self, name: str | None, limit: int) -> Sequence[NodeRecord]:
        """
        Return a page of all messages, parents first.

        Args:
            name: The id of the last node of the page before; None: this is the first page.
            limit: Most messages to return.

        Raises:
            ApiError: There is no such node.
        """
        start = 0
        if name is not None:
            # By its own name: on this branch, the message may have a copy much further down.
            last = self.read.by_name.get(name)
            start = 1 + self.read.numbers[self.node_id(name) if last is None else last]
        return self.stored.nodes[start : start + limit]

    def tree(
        self, shown: Sequence[NodeRecord], costs: Mapping[int, GoingOn], model: str | None
    ) -> dict[str, Any]:
        """
        Return messages in all branches, parents first, and which branches and checkpoints stand at them.

        Args:
            shown: A page of them; the first one also has what stands at the root.
            costs: What going on from them would cost, by their ids in the journal.
            model: With which model; None: it is not loaded, so nobody knows.
        """
        is_first = not shown or shown[0] is self.stored.nodes[0]
        here = {node.id for node in shown} | ({None} if is_first else set())
        tips = {name: at for name, at in self.stored.tips.items() if at in here}
        nodes = [
            {
                "id": self.read.names[node.id],
                "role": node.role,
                "items": self.items([node]),
                "parent_id": None if node.parent_id is None else self.read.names[node.parent_id],
                "response_id": self.read.responses.get(node.id),
                "created_at": int(node.created_at.timestamp()),
                "finish_reason": node.finish_reason,
                "usage": None if node.usage is None else recorded(node.usage).to_dict(),
                "warmth": costs[node.id].warmth if node.id in costs else None,
                "going_on": costs[node.id].to_dict() if node.id in costs else None,
            }
            for node in shown
        ]
        ends_at = shown[-1] if shown else None
        return {
            "object": "conversation.tree",
            "id": self.id,
            "model": model,
            "nodes": nodes,
            "has_more": ends_at is not None and ends_at is not self.stored.nodes[-1],
            "last_id": nodes[-1]["id"] if nodes else None,
            "tips": self.named(branches(tips)),
            "checkpoints": self.named(checkpoints(tips)),
        }

    def named(self, places: Mapping[str, int | None]) -> dict[str, str | None]:
        """Return at which nodes branches or checkpoints stand, by the nodes' ids; None is the root."""
        return {
            name: None if node_id is None else self.read.names[node_id]
            for name, node_id in places.items()
        }


class KnownItems:
    """The items of one client by the ids that it was given. Used by one request."""

    def __init__(self, services: Services, namespace: str) -> None:
        self._services = services
        self._namespace = namespace
        self._found: dict[str, dict[str, Any]] = {}

    def find(self, item_id: str) -> dict[str, Any]:
        """
        Return an item.

        Raises:
            ApiError: There is none of that id, for this client.
        """
        if item_id not in self._found:
            name = item_id.partition("_")[2].partition("_")[0]
            self._found |= self._of_response(name) or self._of_conversation(name)
        if item_id not in self._found:
            raise ApiError(
                f"Item with id {quoted(item_id)} not found: send the item itself, or keep responses "
                "(store).",
                status=404,
                code="item_not_found",
                param="input",
            )
        return self._found[item_id]

    def _of_response(self, name: str) -> dict[str, dict[str, Any]]:
        label = self._services.journal.find_label(f"resp_{name}", namespace=self._namespace)
        if label is None or label.node_id is None:
            return {}
        stored = self._services.journal.load(label.conversation_id, namespace=self._namespace)
        *before, reply = stored.path(label.node_id)
        asked = before[bool(label.note.get(HAS_INSTRUCTIONS)) :]
        items = items_of(f"msg_{name}", reply)
        for number, node in enumerate(asked):
            items += items_of(f"msg_{name}_{number}", node)
        return {item["id"]: item for item in items}

    def _of_conversation(self, name: str) -> dict[str, dict[str, Any]]:
        try:
            view = ConversationView.load(self._services, f"conv_{name}", self._namespace)
        except ApiError:
            return {}
        return {item["id"]: item for item in view.items(view.stored.nodes)}


def let_go(settings: Settings, drop: Callable[[DiskStore], object]) -> None:
    """
    Have KV on disk forgotten that nobody can name any more, whatever models are loaded.

    Args:
        settings: Say where it is.
        drop: Called with the store, where there is one.
    """
    folder, cipher = settings.home / STORE_FOLDER, settings.cipher
    if not is_there(folder):
        return
    sealer = None if cipher is None else cipher.for_purpose(KV_PURPOSE)
    try:
        with closing(open_existing(folder, sealer)) as store:
            drop(store)
    except StoreError as error:
        # The names are gone from the journal, so the rest takes room and means nothing to anybody.
        _log.warning("what was kept of a deleted checkpoint still takes room on disk: %s", error)


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


def conversations_after(
    request: Request, after: str | None, limit: int, *, newest_first: bool = True
) -> list[ConversationInfo]:
    """
    Return a page of the conversations of the client that a request is from.

    Args:
        request: Has its client.
        after: The id of the last conversation of the page before; None: this is the first page.
        limit: Most conversations to return.
        newest_first: Whether the one used last comes first.

    Raises:
        ApiError: There is none of that id, for this client.
    """
    with naming("after"):
        last = None if after is None else head_of(request, after).label.conversation_id
    page = Page(limit=limit, after=last, newest_first=newest_first)
    return services_of(request).journal.conversations(client_of(request).namespace, page=page)


def view_of(request: Request, conversation_id: str) -> ConversationView:
    """
    Return a conversation of the client that a request is from.

    Raises:
        ApiError: There is none of that id, for this client.
    """
    return ConversationView.load(
        services_of(request), conversation_id, client_of(request).namespace
    )

"""
Where in a kept conversation's tree a response goes on.

An earlier response is a node, so going on from any of them is a fork; what it shares with what was
said before is found by its token ids. Knows trees and the journal, and nothing of HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from recollect.conversation.conversation import Conversation, as_new
from recollect.conversation.matching import Change, described
from recollect.conversation.model import Model
from recollect.conversation.session import ANSWERED
from recollect.conversation.tree import ROOT_KEY, Node, message_key, to_message, to_node
from recollect.journal.entries import Label
from recollect.journal.journal import Journal
from recollect.journal.records import DEFAULT_TIP, NewNode
from recollect.server.errors import ApiError, not_found
from recollect.server.kept import KeptConversations
from recollect.types import Message

HAS_INSTRUCTIONS = "has_instructions"
"""In the note of a response: whether its first message is the instructions of the request, which
the next one does not inherit."""
COPIES = "copies"
"""In the note of a conversation: which messages are the same as others, said again on another path
after an item was deleted. Ids in the journal, as texts, and of the message that was said first."""
_CHECKPOINT: Final = "checkpoint:"
"""What the tips that checkpoints are begin with: no branch that a client names has a colon in it."""


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
    return {name: at for name, at in tips.items() if not name.startswith(_CHECKPOINT)}


def checkpoints(tips: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return where a conversation's checkpoints are, by the names that clients gave them."""
    return {
        name.removeprefix(_CHECKPOINT): at
        for name, at in tips.items()
        if name.startswith(_CHECKPOINT)
    }


def copies_of(label: Label) -> dict[int, int]:
    """Return which messages of a conversation are the same as others, by their ids in the journal."""
    return {int(copy): first for copy, first in label.note.get(COPIES, {}).items()}


def checkpoint_tip(name: str) -> str:
    """Return the name of the tip that a checkpoint is."""
    return _CHECKPOINT + name


class Places:
    """Finds places for one client and one model. Used on one thread."""

    def __init__(
        self, journal: Journal, kept: KeptConversations, model: Model, namespace: str
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
        node = conversation.kept_node(label.node_id)
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
        node = None if node_id is None else conversation.kept_node(node_id)
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

    def known(self, messages: Sequence[Message]) -> list[NewNode]:
        """Return messages sent as text, with the token ids of those that were generated here."""
        if not any(message["role"] == "assistant" for message in messages):
            return [to_node(message) for message in messages]
        session = self._model.session_from(messages, namespace=self._namespace)
        return [as_new(node) for node in session.path()]

    def _has_instructions(self, label: Label, conversation: Conversation, node: Node) -> bool:
        """Return whether the path to a node begins with the instructions of the response there."""
        copies = copies_of(label)

        def first(one: Node | None) -> int | None:
            kept_id = None if one is None else conversation.kept_id(one)
            return None if kept_id is None else copies.get(kept_id, kept_id)

        said = first(node)
        notes = {one.node_id: one.note for one in self._journal.labels(label.conversation_id)}
        response = None if said is None else conversation.kept_node(said)
        if response is None or not notes.get(said, {}).get(HAS_INSTRUCTIONS):
            return False
        # They are an item like others, which may have been deleted.
        return first(node.path()[0]) == first(response.path()[0])

    def _open(self, kept_as: int, node_id: int | None) -> Conversation:
        return self._kept.conversation(
            self._model, kept_as, namespace=self._namespace, node_id=node_id
        )


def _change(copies: Mapping[int, int], conversation: Conversation, node: Node) -> Change | None:
    """Return where the path to a node leaves that on which its last reply was generated."""
    reply = next((one for one in reversed(node.path()) if one.role == "assistant"), None)
    kept_id = None if reply is None else conversation.kept_id(reply)
    first = None if kept_id is None else copies.get(kept_id)
    before = None if first is None else conversation.kept_node(first)
    if reply is None or before is None or _was_read(copies, conversation, reply):
        return None
    for number, (was, is_now) in enumerate(zip(before.path(), reply.path(), strict=False)):
        if (was.role, was.content) != (is_now.role, is_now.content):
            return described(number, was, as_new(is_now))
    return None


def _was_read(copies: Mapping[int, int], conversation: Conversation, copy: Node) -> bool:
    """Return whether a reply was generated after the copy of one, and so with that before it."""
    pending = list(copy.children)
    while pending:
        node = pending.pop()
        kept_id = conversation.kept_id(node)
        if node.token_ids is not None and kept_id not in copies:
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
    rest = [as_new(node) for node in (path[1:] if place.has_instructions else path)]
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
        at = conversation.add_unkept(at, to_message(new.role, new.content, new.links))
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

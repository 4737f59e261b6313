"""
One conversation: its tree, where it is kept, and how its messages are found again.

What all sessions on it share. Knows no tokens' meaning and no KV.
"""

import itertools
import threading
from collections.abc import Sequence

from recollect.conversation.checkpoints import Spot
from recollect.conversation.journal import Journal
from recollect.conversation.matching import Found, MessageIndex
from recollect.conversation.messages import to_node
from recollect.conversation.records import DEFAULT_TIP, NewNode, StoredConversation, require_name
from recollect.conversation.remembered import RememberedReplies
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Node, Tree
from recollect.errors import ConversationError, NameTakenError
from recollect.types import Message


class Conversation:
    """
    A tree, and a record of it in the journal where the conversation has a name.

    Safe from any thread. What is said is in the journal before it is in the tree, so a turn that
    anybody can see is kept.

    Invariants:
        1. With a record, every reply in the tree, and all before it, have an id in the journal.
        2. Named tips are nodes of the tree.
    """

    def __init__(
        self,
        *,
        model: str,
        fingerprint: str,
        index: MessageIndex | None = None,
        remembered: RememberedReplies | None = None,
        namespace: str = "",
    ) -> None:
        self.tree = Tree()
        self.name: str | None = None
        """Under which it is kept; None: it goes when the program does."""
        self.other_model: str | None = None
        """With which model it was held before; None: with this one, or nobody has said anything."""
        self._model = model
        self._fingerprint = fingerprint
        self._index = index
        self._remembered = remembered
        self._namespace = namespace
        self._journal: Journal | None = None
        self._record: int | None = None
        self._record_ids: dict[int, int] = {}  # node id to id in the journal
        self._tips: dict[str, Node] = {DEFAULT_TIP: self.tree.root}
        self._tools: dict[int, Tools] = {}  # node id to what its reply could call
        self._answers: dict[
            int, tuple[Tools, ...]
        ] = {}  # node id to what others' replies to it could
        self._lock = threading.Lock()

    @property
    def tips(self) -> dict[str, Node]:
        """Return where each named session stands."""
        return dict(self._tips)

    @property
    def is_kept(self) -> bool:
        """Return whether what is said goes to a journal."""
        return self._journal is not None

    @property
    def kept_as(self) -> int | None:
        """Return its id in the journal; None until there is something to keep."""
        return self._record

    def kept_id(self, node: Node) -> int | None:
        """Return the id of a node in the journal; None for the root and for what is not kept yet."""
        return self._record_ids.get(node.id)

    def kept_node(self, kept_id: int) -> Node | None:
        """Return the node that has an id in the journal; None where it is not known here."""
        with self._lock:
            found = next((node for node, kept in self._record_ids.items() if kept == kept_id), None)
        return None if found is None else self.tree.node(found)

    def keep_in(self, journal: Journal, name: str | None) -> None:
        """
        Keep what is said from the first turn on; an empty conversation leaves nothing behind.

        Args:
            name: None: the journal finds one, when there is something to keep.

        Raises:
            NameTakenError: Another conversation has it.
        """
        if name is not None and name in {info.name for info in journal.conversations()}:
            raise NameTakenError(
                f"There is a conversation {name!r} already: take another name, or resume that one."
            )
        self._journal, self.name = journal, name

    def rename(self, name: str) -> None:
        """
        Keep it under another name; before the first turn, under that name from then on.

        Raises:
            ConversationError: It is not kept, or that cannot be a name.
            NameTakenError: Another conversation has it.
            StoreError: The journal cannot be written.
                In each case nothing was changed.
        """
        with self._lock:
            if self._journal is None:
                raise ConversationError("This conversation is not kept, so it has no name.")
            if self._record is None:
                self.keep_in(self._journal, require_name(name))
            else:
                self._journal.rename(self._record, name)
                self.name = name

    def load(self, journal: Journal, stored: StoredConversation) -> None:
        """Take over what the journal has; the conversation is empty before."""
        assert not len(self.tree), "a conversation is loaded once, and before anything is said"
        nodes: dict[int | None, Node] = {None: self.tree.root}
        for record in stored.nodes:
            nodes[record.id] = self.tree.add(
                nodes[record.parent_id],
                record.role,
                record.content,
                token_ids=record.token_ids,
                fingerprint=record.fingerprint,
                finish_reason=record.finish_reason,
                usage=record.usage,
                links=record.links,
            )
            self._record_ids[nodes[record.id].id] = record.id
        self._find_later([nodes[record.id] for record in stored.nodes])
        self._journal, self.name, self._record = journal, stored.name, stored.id
        self.other_model = None if stored.fingerprint == self._fingerprint else stored.model
        self._tips = {name: nodes[node_id] for name, node_id in stored.tips.items()}
        self._tips.setdefault(DEFAULT_TIP, nodes[stored.default_tip()])

    def add(self, parent: Node, messages: Sequence[NewNode], *, tip: str | None) -> Node:
        """
        Add messages, each after the one before, and return the last one's node.

        Args:
            parent: What the first follows.
            messages: In order; kept all or none.
            tip: The named tip that moves to the last one; None: none does.

        Raises:
            StoreError: The journal cannot keep them. Nothing was changed.
        """
        with self._lock:
            kept = self._keep(parent, messages, tip)
            node, grown = parent, []
            for message, record_id in zip(messages, kept, strict=True):
                node = self._grow(node, message, record_id)
                grown.append(node)
                if self._remembered is not None and not self.is_kept:
                    self._remembered.note(node)
            self._find_later(grown)
            if tip is not None:
                self._tips[tip] = node
            return node

    def add_unkept(self, parent: Node, *messages: Message) -> Node:
        """
        Add messages that are kept only when something is said after them; return the last one's node.

        A reply that was generated here at another time gets the token ids that it had, unless the
        conversation is kept, whose replies are in the journal.

        Raises:
            InvalidParameterError: One lacks something. Nothing was changed.
        """
        node, grown = parent, []
        new = [to_node(message) for message in messages]
        remembered = None if self.is_kept else self._remembered
        for one in new:
            message = one if remembered is None else remembered.recalled(node, one)
            with self._lock:
                node = self._grow(node, message, None)
            grown.append(node)
        self._find_later(grown)
        return node

    def take_over(self, found: Found) -> Node:
        """Begin with messages that are known, and return the last one's node."""
        assert not self.is_kept, "what comes as text is not kept"
        node = reply = self.tree.root
        with self._lock:
            for key, message in found.path:
                node = self._grow(node, message, None, key)
                reply = node if node.role == "assistant" else reply
            if found.tools is not None:
                self._tools[reply.id] = found.tools
            self._answers[node.id] = found.answers
        return node

    def note_tools(self, reply: Node, tools: Tools) -> None:
        """Remember with which tools a reply was generated."""
        self._tools[reply.id] = tools
        if self._index is not None:
            self._index.note_tools(reply, tools)

    def tools_change(self, node: Node, tools: Tools) -> str | None:
        """
        Return how tools differ from those that *node* was answered with before, in words.

        Where it was not, from those of the last reply before it; None where none differ.
        """
        answers = [self._tools[child.id] for child in node.children if child.id in self._tools]
        answers += self._answers.get(node.id, ())
        before = (self._tools[one.id] for one in reversed(node.path()) if one.id in self._tools)
        changes = [tools.difference(one) for one in answers or itertools.islice(before, 1)]
        return None if None in changes else next(iter(changes), None)

    def set_tip(self, name: str, node: Node) -> None:
        """
        Let a named tip stand at a node.

        Raises:
            StoreError: The journal cannot keep that. Nothing was changed.
        """
        with self._lock:
            if self._journal is not None and self._record is not None:
                self._journal.set_tip(self._record, name, self._record_ids.get(node.id))
            self._tips[name] = node

    def new_tip(self, name: str, node: Node) -> None:
        """
        Let a new named tip stand at a node.

        Raises:
            ConversationError: There is one of that name.
            StoreError: The journal cannot keep it.
        """
        if name in self._tips:
            raise ConversationError(f"There is a branch {name!r} already: take another name.")
        self.set_tip(name, node)

    def spot(self, node: Node) -> Spot:
        """
        Return where the journal has a node.

        Raises:
            ConversationError: It is not kept.
        """
        record_id = self._record_ids.get(node.id)
        if self._journal is None:
            raise ConversationError(
                "This conversation is not kept, so nobody could come back to it: begin one that has "
                "a name."
            )
        if self._record is None or record_id is None:
            raise ConversationError("Nothing has been said here yet: say something first.")
        return Spot(self._record, record_id, node.turns)

    def node_at(self, conversation_id: int, record_id: int) -> Node | None:
        """Return the node that the journal has there; None: it is of another conversation, or newer."""
        if conversation_id != self._record:
            return None
        found = (node for node, record in self._record_ids.items() if record == record_id)
        return next((self.tree.node(node) for node in found), None)

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        self.tree.check()
        if self._record is not None:
            replies = (node for node in self.tree.nodes() if node.token_ids is not None)
            unkept = {n.id for reply in replies for n in reply.path()} - set(self._record_ids)
            assert not unkept, f"nodes {unkept} are not kept"
        for node in self._tips.values():
            self.tree.require(node)

    def _keep(
        self, parent: Node, messages: Sequence[NewNode], tip: str | None
    ) -> Sequence[int | None]:
        """Write to the journal, with whatever of the tree is not there yet; return the messages' ids."""
        if self._journal is None:
            return [None] * len(messages)
        is_new = self._record is None
        if self._record is None:
            info = self._journal.create(
                self.name,
                model=self._model,
                fingerprint=self._fingerprint,
                namespace=self._namespace,
            )
            self.name, self._record = info.name, info.id
        elif self.other_model is not None:
            self._journal.set_model(self._record, model=self._model, fingerprint=self._fingerprint)
            self.other_model = None
        path = [self.tree.root, *parent.path()]
        unkept = [node for node in path[1:] if node.id not in self._record_ids]
        above = path[len(path) - len(unkept) - 1]
        nodes = [*(as_new(node) for node in unkept), *messages]
        ids = self._journal.append(self._record, self._record_ids.get(above.id), nodes, tip=tip)
        self._record_ids |= {node.id: record for node, record in zip(unkept, ids, strict=False)}
        if is_new:  # branches that were begun before anything was said
            for other, node in self._tips.items():
                if other != tip:
                    self._journal.set_tip(self._record, other, self._record_ids.get(node.id))
        return ids[len(unkept) :]

    def _grow(
        self, parent: Node, message: NewNode, record_id: int | None, key: bytes | None = None
    ) -> Node:
        node = self.tree.add(
            parent,
            message.role,
            message.content,
            token_ids=None if message.token_ids is None else tuple(message.token_ids),
            fingerprint=message.fingerprint,
            finish_reason=message.finish_reason,
            usage=message.usage,
            links=message.links,
            key=key,
        )
        if record_id is not None:
            self._record_ids[node.id] = record_id
        return node

    def _find_later(self, nodes: Sequence[Node]) -> None:
        if self._index is not None:
            self._index.add(nodes)


def as_new(node: Node) -> NewNode:
    """Return a message as it is to be kept, or added, somewhere else too."""
    return node.to_new()

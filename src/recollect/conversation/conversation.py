"""
One conversation: its tree, its branches, and its record in the journal.

All sessions in a conversation share this object. It knows neither KV nor what tokens mean.
People name messages by numbers, 1 for the first that was saved. The numbers follow the order of the
journal, so a running chat, a listing and another process number a message alike.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from recollect.conversation.matching import Found, MessageIndex, RememberedReplies
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Node, Tree, grown, numbered, to_node
from recollect.errors import (
    ConversationError,
    NameTakenError,
    StoreBusyError,
    StoreError,
    UnknownConversationError,
)
from recollect.journal.conversation_files import path_to_json
from recollect.journal.database import BUSY_TIMEOUT_S
from recollect.journal.home import Spot
from recollect.journal.journal import Journal
from recollect.journal.records import (
    DEFAULT_TIP,
    Entry,
    NewNode,
    StoredConversation,
    Written,
    require_name,
)
from recollect.types import Message


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A message that was saved and has no reply yet, so that it can be taken back."""

    ids: tuple[int, ...]
    """The journal's ids of everything that was written; a reply follows the last one."""
    path: tuple[Node, ...]
    """The nodes of the tree that were written with it, because they had not been saved before."""
    said_id: int | None
    """The journal's id of the message itself, which is not in the tree yet; None: it was in the tree."""
    tip: str | None
    """The branch whose tip moved to the message; None: none did."""
    back_to: int | None
    """The journal's id of that branch's tip before."""
    began: bool
    """Whether the journal's record of the conversation began with it."""


class Conversation:
    """
    A tree of messages with its branches and, if the conversation is saved, a record in the journal.

    Safe from any thread. A message is in the journal before it is in the tree, so every turn that a
    caller can see is saved.

    Invariants:
        1. With a record, every reply in the tree, and all messages before it, have an id in the journal.
        2. The tips of branches are nodes of the tree.
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
        """The name under which it is saved; None: it is not, or the journal will choose one."""
        self.other_model: str | None = None
        """The model that wrote the saved replies, if it is another one than this; else None."""
        self._model = model
        self._fingerprint = fingerprint
        self._index = index
        self._remembered = remembered
        self._namespace = namespace
        self._journal: Journal | None = None
        self._wanted: str | None = None  # the name asked for; None: the journal chooses one
        self._record: int | None = None
        self._record_ids: dict[int, int] = {}  # by node id: the id in the journal
        self._tips: dict[str, Node] = {DEFAULT_TIP: self.tree.root}
        self._tools: dict[int, Tools] = {}  # by reply: what it could call
        # By node: what the replies to the same message in other conversations could call.
        self._answers: dict[int, tuple[Tools, ...]] = {}
        self.shares_tips = False
        """Whether the last writer moves a branch's tip, as with clients of a server. If not, and another
        process has moved the tip, this conversation goes on in a new branch; see `tip_name`."""
        self._seen: dict[str, int | None] = {}
        """The journal's ids of the tips, by branch, when the journal was last read or written here."""
        self._continued_as: dict[str, str] = {}
        """By branch whose tip another process has moved: the branch in which this one goes on."""
        self._unanswered: list[Asked] = []
        self._given_up: deque[Asked] = deque()  # those of the unanswered that are to be taken back
        self._turn = threading.Lock()
        """Held while the journal is written, which can take long. `_lock` is held for moments only."""
        self._lock = threading.Lock()

    def path_json(self, tip: Node) -> str:
        """Return the messages up to a node as JSON, with token ids; see `Session.to_json`."""
        return path_to_json(
            [node.to_new() for node in tip.path()],
            name=self.name or "conversation",
            model=self._model,
            fingerprint=self._fingerprint,
        )

    @property
    def tips(self) -> dict[str, Node]:
        """Return the tip of each branch, by the branch's name."""
        return dict(self._tips)

    @property
    def is_saved(self) -> bool:
        """Return whether messages are written to the journal."""
        return self._journal is not None

    @property
    def journal_id(self) -> int | None:
        """Return the conversation's id in the journal; None until the first message is saved."""
        return self._record

    def saved_id(self, node: Node) -> int | None:
        """Return the id of a node in the journal; None for the root and for a node not saved yet."""
        return self._record_ids.get(node.id)

    def saved_node(self, saved_id: int) -> Node | None:
        """Return the node that has an id in the journal; None: this tree has no such node."""
        with self._lock:
            found = next((node for node, one in self._record_ids.items() if one == saved_id), None)
        return None if found is None else self.tree.node(found)

    def numbers(self) -> dict[int, int]:
        """
        Return the number by which people name each node, by the node's id; see `numbered`.

        Reads the journal, because other processes may have saved messages in this conversation. If it
        cannot be read, only the messages of this tree are counted.
        """
        there = list[int]()
        if self._journal is not None and self._record is not None:
            with suppress(StoreError):
                there = self._journal.node_ids(self._record)
        with self._lock:
            nodes, saved = [node.id for node in self.tree.nodes()], dict(self._record_ids)
        return numbered(nodes, saved, there)

    def current_name(self) -> str | None:
        """
        Return the name under which it is saved now; None if it is not saved, or was deleted.

        Raises:
            StoreError: The journal cannot be read.
        """
        if self._journal is None or self._record is None:
            return self.name
        try:
            self.name = self._journal.info(self._record).name
        except UnknownConversationError:
            self.name = None
        return self.name

    def tip_name(self, name: str) -> str:
        """
        Return the branch in which the sessions of the branch *name* go on.

        That is another one if another process has moved the tip of *name*.
        """
        return self._continued_as.get(name, name)

    def save_in(self, journal: Journal, name: str | None) -> None:
        """
        Save the conversation from its first turn on. Without a turn, nothing is written.

        Args:
            journal: Where it is saved.
            name: None: the journal chooses one with the first turn.

        Raises:
            NameTakenError: Another conversation has that name.
        """
        if name is not None and journal.find(name) is not None:
            raise NameTakenError(
                f"There is a conversation {name!r} already: take another name, or resume that one."
            )
        self._journal, self.name, self._wanted = journal, name, name

    def rename(self, name: str) -> None:
        """
        Give the conversation another name; before the first turn, the name that it will get.

        Raises:
            ConversationError: It is not saved, or the name cannot be one.
            NameTakenError: Another conversation has that name.
            StoreError: The journal cannot be written.
                In each case nothing was changed.
        """
        with self._writing():
            if self._journal is None:
                raise ConversationError(
                    "This conversation is not saved, so it cannot be named: begin one that is."
                )
            if self._record is None:
                self.save_in(self._journal, require_name(name))
            else:
                self._journal.rename(self._record, name)
                self.name = name

    def load(self, journal: Journal, stored: StoredConversation) -> None:
        """Fill this conversation, which is empty, with what the journal has of it."""
        assert not len(self.tree), "a conversation is loaded once, before its first message"
        self.tree, nodes = grown(stored.nodes)
        for record in stored.nodes:
            self._record_ids[nodes[record.id].id] = record.id
        self._find_later([nodes[record.id] for record in stored.nodes])
        self._journal, self.name, self._record = journal, stored.name, stored.id
        self._seen = dict(stored.tips)
        self.other_model = None if stored.fingerprint == self._fingerprint else stored.model
        self._tips = {name: nodes[node_id] for name, node_id in stored.tips.items()}
        self._tips.setdefault(DEFAULT_TIP, nodes[stored.default_tip()])

    def ask(self, at: Node, said: str | None, *, tip: str | None) -> Asked | None:
        """
        Save a user's message before it is answered, so that no crash loses it.

        Then the message is in the journal and not yet in the tree. `add` puts it into the tree
        together with its reply; `take_back` removes it from the journal if there is no reply.

        Args:
            at: The node that it follows.
            said: The message; None: *at* is the message.
            tip: The branch whose tip moves to it; None: none does.

        Returns:
            What `add` and `take_back` need; None if nothing had to be written.

        Raises:
            StoreError: The journal cannot be written. Nothing was changed.
        """
        if self._journal is None:
            return None
        with self._writing() as deadline:
            self._settle()
            messages = [] if said is None else [NewNode(role="user", content=said)]
            path = [node for node in at.path() if node.id not in self._record_ids]
            if not messages and not path:
                return None
            began = self._record is None
            written = self._write(self._entry(at, messages, tip), path, deadline)
            asked = Asked(
                ids=written.ids,
                path=tuple(path),
                said_id=None if said is None else written.ids[-1],
                tip=written.tip,
                back_to=written.tip_was,
                began=began,
            )
            self._unanswered.append(asked)
            return asked

    def take_back(self, asked: Asked | None) -> None:
        """
        Remove a message that gets no reply; the journal is then as it was before `ask`.

        If the journal cannot be written now, the next `ask` removes it.
        """
        if asked is None:
            return
        self._given_up.append(asked)
        with suppress(StoreError), self._writing():
            self._settle()

    def give_up(self, asked: Asked | None) -> None:
        """Have the next `ask` remove a message that gets no reply; does not wait for the journal."""
        if asked is not None:
            self._given_up.append(asked)

    def add(
        self,
        parent: Node,
        messages: Sequence[NewNode],
        *,
        tip: str | None,
        asked: Asked | None = None,
        begins: bool = False,
    ) -> Node:
        """
        Add messages, each after the one before, and return the last one's node.

        Args:
            parent: The node that the first one follows.
            messages: In order; all of them are saved, or none.
            tip: The branch whose tip moves to the last one; None: none does.
            asked: What `ask` has returned, if it saved the first of them.
            begins: Whether the branch is a new one; see `begin_branch`.

        Raises:
            StoreError: The journal cannot be written. Nothing was changed.
        """
        with self._writing() as deadline:
            if begins:
                taken = {*self._tips, *self._continued_as}
                names = itertools.chain([tip], (f"{tip}-{number}" for number in itertools.count(2)))
                tip = next(name for name in names if name not in taken)
            said_id = None if asked is None else asked.said_id
            kept: list[int | None] = [None] * len(messages)
            if self._journal is not None and (messages or self._record is not None):
                rest = messages if said_id is None else messages[1:]
                entry = self._entry(parent, rest, tip, said_id, moves=not messages)
                if begins:  # no branch stands at the node -1, so one of that name keeps its tip
                    entry = replace(entry, seen=-1, leaves_others=True)
                above = parent.path() if messages else []
                path = [node for node in above if node.id not in self._record_ids]
                ids = self._write(entry, path, deadline).ids[len(path) :]
                kept = [*ids] if said_id is None else [said_id, *ids]
            if asked is not None:
                self._unanswered.remove(asked)
            with self._lock:
                node, added = parent, []
                for message, record_id in zip(messages, kept, strict=True):
                    node = self._grow(node, message, record_id)
                    added.append(node)
                    if self._remembered is not None and (self.shares_tips or not self.is_saved):
                        self._remembered.note(node)
                self._find_later(added)
                if tip is not None:
                    self._tips[self.tip_name(tip)] = node
                return node

    def begin_branch(
        self, name: str, at: Node, messages: Sequence[NewNode] = ()
    ) -> tuple[str, Node]:
        """
        Begin a branch with messages after a node, and return the branch's name and its tip.

        Where there is a branch of that name, whoever began it and whenever, a number is added to the name.

        Raises:
            ConversationError: It cannot be the name of a branch.
            StoreError: The journal cannot be written.
                In each case nothing was changed.
        """
        node = self.add(at, messages, tip=name, begins=True)
        return next(one for one, tip in reversed(self.tips.items()) if tip is node), node

    def add_unsaved(self, parent: Node, *messages: Message) -> Node:
        """
        Add messages that the journal gets only together with the next turn; return the last one's node.

        If the conversation is not saved, a reply that this model generated earlier gets its token ids
        back (`RememberedReplies`); those of a saved conversation are in the journal.

        Raises:
            InvalidParameterError: A message lacks a part. Nothing was changed.
        """
        node, grown = parent, []
        new = [to_node(message) for message in messages]
        remembered = None if self.is_saved else self._remembered
        for one in new:
            message = one if remembered is None else remembered.recalled(node, one)
            with self._lock:
                node = self._grow(node, message, None)
            grown.append(node)
        self._find_later(grown)
        return node

    def take_over(self, found: Found) -> Node:
        """Begin with messages that the index has found, and return the last one's node."""
        assert not self.is_saved, "a client's messages are not saved"
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

    def take_tools(self, node: Node, other: "Conversation", same: Node) -> None:
        """Know of a node what another conversation knows of the tools that it was answered with."""
        if not self._answered_with(node):
            self._answers[node.id] = other._answered_with(same)

    def tools_change(self, node: Node, tools: Tools) -> str | None:
        """
        Return how tools differ from those that *node* was answered with before, in words.

        Where it was not, from those of the last reply before it; None where none differ.
        """
        answers = self._answered_with(node)
        if not answers or any(one.schemas == tools.schemas for one in answers):
            return None
        return tools.difference(answers[0])

    def _answered_with(self, node: Node) -> tuple[Tools, ...]:
        """Return the tools that a node was answered with; where it was not, the last reply before it."""
        answers = [self._tools[child.id] for child in node.children if child.id in self._tools]
        answers += self._answers.get(node.id, ())
        before = (self._tools[one.id] for one in reversed(node.path()) if one.id in self._tools)
        return tuple(answers or itertools.islice(before, 1))

    def set_tip(self, name: str, node: Node) -> None:
        """
        Move the tip of a branch to a node.

        Raises:
            StoreError: The journal cannot be written. Nothing was changed.
        """
        with self._writing() as deadline:
            if self._journal is not None and self._record is not None:
                self._write(self._entry(node, (), name, moves=True), (), deadline)
            self._tips[self.tip_name(name)] = node

    def new_tip(self, name: str, node: Node) -> None:
        """
        Begin a branch at a node.

        Raises:
            ConversationError: There is a branch of that name.
            StoreError: The journal cannot be written. Nothing was changed.
        """
        if name in self._tips:
            raise ConversationError(f"There is a branch {name!r} already: take another name.")
        self.set_tip(name, node)

    def spot(self, node: Node) -> Spot:
        """
        Return where the journal has a node, for a checkpoint.

        Raises:
            ConversationError: The conversation or the node is not saved.
        """
        record_id = self._record_ids.get(node.id)
        if self._journal is None:
            raise ConversationError(
                "This conversation is not saved, so it can have no checkpoint: begin one that has a "
                "name."
            )
        if self._record is None or record_id is None:
            raise ConversationError(
                "Nothing has been said here yet: say something first, then save a checkpoint."
            )
        return Spot(self._record, record_id, node.turns)

    def check(self) -> None:
        """
        Verify the invariants.

        Raises:
            AssertionError: One does not hold.
        """
        self.tree.check()
        if self._record is not None:
            replies = (node for node in self.tree.nodes() if node.token_ids is not None)
            unsaved = {n.id for reply in replies for n in reply.path()} - set(self._record_ids)
            assert not unsaved, f"nodes {unsaved} are not saved"
        for node in self._tips.values():
            self.tree.require(node)

    @contextmanager
    def _writing(self) -> Iterator[float]:
        """
        Hold the right to write this conversation to the journal.

        The tree can be read, and can grow, meanwhile.

        Yields:
            The time (`time.monotonic`) until which to wait for the journal itself.

        Raises:
            StoreBusyError: Another thread writes for longer than `BUSY_TIMEOUT_S`.
        """
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        if not self._turn.acquire(timeout=BUSY_TIMEOUT_S):
            raise StoreBusyError(
                "Another thread writes this conversation and waits for the journal's file: close the "
                "program that holds the file, or try again."
            )
        try:
            yield deadline
        finally:
            self._turn.release()

    def _entry(
        self,
        at: Node,
        messages: Sequence[NewNode],
        tip: str | None,
        said_id: int | None = None,
        *,
        moves: bool = False,
    ) -> Entry:
        """
        Return what is to be written: the unsaved nodes of the path to *at*, and new messages.

        Args:
            at: The node that the messages follow.
            messages: The new messages.
            tip: The branch whose tip moves to the last of them; None: none does.
            said_id: The journal's id of a message between *at* and the new ones; see `Asked`.
            moves: Whether only the tip moves, to *at*.
        """
        path = at.path()
        unsaved = [node for node in path if node.id not in self._record_ids]
        saved = [self._record_ids[node.id] for node in path[: len(path) - len(unsaved)]]
        above = said_id if said_id is not None else next(reversed(saved), None)
        tip = None if tip is None else self.tip_name(tip)
        # A new record gets all branches; some may have begun before the first turn.
        others = {} if self._record is not None else dict(self._tips)
        numbers = {node.id: number for number, node in enumerate(unsaved)}
        return Entry(
            nodes=() if moves else [*(node.to_new() for node in unsaved), *messages],
            parent_id=above,
            tip=tip,
            seen=None if tip is None else self._seen.get(tip),
            leaves_others=not self.shares_tips,
            tips={name: numbers.get(node.id) for name, node in others.items() if name != tip},
            model=None if self.other_model is None or moves else (self._model, self._fingerprint),
        )

    def _write(self, entry: Entry, unsaved: Sequence[Node], deadline: float) -> Written:
        """Write an entry, which begins with the nodes in *unsaved*, and note their ids in the journal."""
        assert self._journal is not None, "only a saved conversation is written"
        if self._record is None:
            written = self._journal.begin(
                self._wanted,
                entry,
                model=self._model,
                fingerprint=self._fingerprint,
                namespace=self._namespace,
                deadline=deadline,
            )
            self._seen = dict.fromkeys(entry.tips)
        else:
            written = self._journal.write(self._record, entry, deadline=deadline)
        self.name, self._record = written.name, written.conversation_id
        if entry.nodes:
            self.other_model = None
        with self._lock:
            for node, record_id in zip(unsaved, written.ids, strict=False):
                self._record_ids[node.id] = record_id
        if written.tip is not None:
            if entry.tip is not None and written.tip != entry.tip:
                self._leave(entry.tip, written.tip)
            self._seen[written.tip] = written.ids[-1] if written.ids else entry.parent_id
        return written

    def _leave(self, tip: str, own: str) -> None:
        """Go on in the branch *own*, because another process has moved the tip of *tip*."""
        names = [name for name, now in self._continued_as.items() if now == tip]
        self._continued_as |= dict.fromkeys([tip, *names], own)
        with self._lock:
            if tip in self._tips:
                self._tips[own] = self._tips.pop(tip)

    def _settle(self) -> None:
        """
        Remove the messages that got no reply from the journal.

        Raises:
            StoreError: The journal cannot be written.
        """
        while self._given_up:
            asked = self._given_up[0]
            if asked in self._unanswered:
                self._remove(asked)
                self._unanswered.remove(asked)
            self._given_up.popleft()

    def _remove(self, asked: Asked) -> None:
        assert self._journal is not None, "the message was saved"
        assert self._record is not None, "the message was saved"
        try:
            came_of_it = self._journal.take_back(
                self._record, asked.ids, tip=asked.tip, back_to=asked.back_to, began=asked.began
            )
        except UnknownConversationError:  # another process has deleted the conversation
            return
        if asked.tip is not None:
            self._seen[asked.tip] = asked.back_to
        if came_of_it == "stays":
            return
        with self._lock:
            for node in asked.path:
                self._record_ids.pop(node.id, None)
        if came_of_it == "conversation gone":
            self.name, self._record, self._seen = self._wanted, None, {}

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

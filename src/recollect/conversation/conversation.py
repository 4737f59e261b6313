"""
One conversation: its tree, its record in the journal, and how its messages are found again.

All sessions on a conversation share this object. It knows neither what tokens mean nor KV. People name
messages by numbers, 1 for the first that was kept; the numbers follow the journal's order, so that a
running chat, a list and another process all count alike.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from recollect.conversation.matching import Found, MessageIndex, RememberedReplies
from recollect.conversation.tools import Tools
from recollect.conversation.tree import Node, Tree, grown, to_node
from recollect.errors import (
    ConversationError,
    NameTakenError,
    StoreBusyError,
    StoreError,
    UnknownConversationError,
)
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


def numbered(
    node_ids: Iterable[int], kept: Mapping[int, int], journal_ids: Iterable[int]
) -> dict[int, int]:
    """
    Return the number of each node of a tree, by its id there.

    Args:
        node_ids: Of the tree, in its order.
        kept: The ids in the journal of those that are kept.
        journal_ids: All that the journal has of the conversation, in any order; others may have been
            kept since, and those of *kept* count in any case.
    """
    order = sorted({*journal_ids, *kept.values()})
    places = {journal_id: number for number, journal_id in enumerate(order, start=1)}
    numbers, last = dict[int, int](), len(order)
    for node_id in node_ids:
        if node_id in kept:
            numbers[node_id] = places[kept[node_id]]
        else:  # it will be kept after all that is
            last += 1
            numbers[node_id] = last
    return numbers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """What was kept of something that somebody said, and that has no reply yet."""

    ids: tuple[int, ...]
    """In the journal, of all that was written; the last is what a reply follows."""
    path: tuple[Node, ...]
    """The nodes of the tree among it."""
    said_id: int | None
    """Of the message that is not in the tree; None: there is none."""
    tip: str | None
    """Which moved there."""
    back_to: int | None
    """Where that tip stood before, by the journal's ids."""
    began: bool
    """Whether the conversation was begun with it."""


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
        self._wanted: str | None = None  # the name that it begins with; None: the journal finds one
        self._record: int | None = None
        self._record_ids: dict[int, int] = {}  # node id to id in the journal
        self._tips: dict[str, Node] = {DEFAULT_TIP: self.tree.root}
        self._tools: dict[int, Tools] = {}  # node id to what its reply could call
        self._answers: dict[
            int, tuple[Tools, ...]
        ] = {}  # node id to what others' replies to it could
        self.shares_tips = False
        """Whether whoever moves a named tip last owns it, as clients of a server do. Else who finds one
        moved by others goes on as a branch; see `tip_name`."""
        self._seen: dict[str, int | None] = {}
        """Where the tips stood in the journal when it was last read or written here, by its ids."""
        self._continued_as: dict[str, str] = {}
        """Tips that others have moved, and which of ours goes on instead."""
        self._unanswered: list[Asked] = []
        self._given_up: deque[Asked] = deque()  # of these, what is to be taken back
        self._turn = threading.Lock()
        """Held while the journal is written, which can take long; `_lock` never is."""
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

    def numbers(self) -> dict[int, int]:
        """
        Return the number by which people name each node, by its id in the tree; see `numbering`.

        Asks the journal, because other processes may have kept messages of this conversation; where
        it cannot be read the numbers are those of what is known here.
        """
        there = list[int]()
        if self._journal is not None and self._record is not None:
            with suppress(StoreError):
                there = self._journal.node_ids(self._record)
        with self._lock:
            nodes, kept = [node.id for node in self.tree.nodes()], dict(self._record_ids)
        return numbered(nodes, kept, there)

    def current_name(self) -> str | None:
        """
        Return under which name it is kept now; None where it is not, or was deleted.

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
        Return which named tip goes on from what was the tip *name*.

        Another one where somebody else has moved that: what was said here is a branch of its own then.
        """
        return self._continued_as.get(name, name)

    def keep_in(self, journal: Journal, name: str | None) -> None:
        """
        Keep what is said from the first turn on; an empty conversation leaves nothing behind.

        Args:
            name: None: the journal finds one, when there is something to keep.

        Raises:
            NameTakenError: Another conversation has it.
        """
        if name is not None and journal.find(name) is not None:
            raise NameTakenError(
                f"There is a conversation {name!r} already: take another name, or resume that one."
            )
        self._journal, self.name, self._wanted = journal, name, name

    def rename(self, name: str) -> None:
        """
        Keep it under another name; before the first turn, under that name from then on.

        Raises:
            ConversationError: It is not kept, or that cannot be a name.
            NameTakenError: Another conversation has it.
            StoreError: The journal cannot be written.
                In each case nothing was changed.
        """
        with self._writing():
            if self._journal is None:
                raise ConversationError(
                    "This conversation is not saved, so it cannot be named: begin one that is."
                )
            if self._record is None:
                self.keep_in(self._journal, require_name(name))
            else:
                self._journal.rename(self._record, name)
                self.name = name

    def load(self, journal: Journal, stored: StoredConversation) -> None:
        """Take over what the journal has; the conversation is empty before."""
        assert not len(self.tree), "a conversation is loaded once, and before anything is said"
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
        Keep what somebody says before it is answered, so that nothing that happens meanwhile loses it.

        It is in the journal then and not in the tree, which grows with the reply: `add`, or
        `take_back` where there is none.

        Args:
            at: What it follows.
            said: The message; None: the path to *at* ends with it.
            tip: The named tip that moves to it; None: none does.

        Returns:
            None where there was nothing to keep.

        Raises:
            StoreError: The journal cannot keep it. Nothing was changed.
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
        Let something go again that was asked and gets no reply; the journal is as it was before.

        Where it cannot be written now, that is done before the next thing is asked.
        """
        if asked is None:
            return
        self._given_up.append(asked)
        with suppress(StoreError), self._writing():
            self._settle()

    def give_up(self, asked: Asked | None) -> None:
        """Have something taken back before the next thing is asked; waits for nobody."""
        if asked is not None:
            self._given_up.append(asked)

    def add(
        self,
        parent: Node,
        messages: Sequence[NewNode],
        *,
        tip: str | None,
        asked: Asked | None = None,
    ) -> Node:
        """
        Add messages, each after the one before, and return the last one's node.

        Args:
            parent: What the first follows.
            messages: In order; kept all or none.
            tip: The named tip that moves to the last one; None: none does.
            asked: What `ask` has kept of them already.

        Raises:
            StoreError: The journal cannot keep them. Nothing was changed.
        """
        with self._writing() as deadline:
            said_id = None if asked is None else asked.said_id
            kept: list[int | None] = [None] * len(messages)
            if self._journal is not None:
                rest = messages if said_id is None else messages[1:]
                entry = self._entry(parent, rest, tip, said_id)
                path = [node for node in parent.path() if node.id not in self._record_ids]
                ids = self._write(entry, path, deadline).ids[len(path) :]
                kept = [*ids] if said_id is None else [said_id, *ids]
            if asked is not None:
                self._unanswered.remove(asked)
            with self._lock:
                node, added = parent, []
                for message, record_id in zip(messages, kept, strict=True):
                    node = self._grow(node, message, record_id)
                    added.append(node)
                    if self._remembered is not None and (self.shares_tips or not self.is_kept):
                        self._remembered.note(node)
                self._find_later(added)
                if tip is not None:
                    self._tips[self.tip_name(tip)] = node
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
        Let a named tip stand at a node.

        Raises:
            StoreError: The journal cannot keep that. Nothing was changed.
        """
        with self._writing() as deadline:
            if self._journal is not None and self._record is not None:
                self._write(self._entry(node, (), name, moves=True), (), deadline)
            self._tips[self.tip_name(name)] = node

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
            unkept = {n.id for reply in replies for n in reply.path()} - set(self._record_ids)
            assert not unkept, f"nodes {unkept} are not kept"
        for node in self._tips.values():
            self.tree.require(node)

    @contextmanager
    def _writing(self) -> Iterator[float]:
        """
        Write to the journal in turn with others; yields until when to wait for it, all in all.

        The tree can be read and grow meanwhile: whoever keeps nothing does not wait for a journal.

        Raises:
            StoreBusyError: Others write for too long.
        """
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        if not self._turn.acquire(timeout=BUSY_TIMEOUT_S):
            raise StoreBusyError(
                "This conversation is being written by others, who wait for its file: close the "
                "program that holds it, or try again."
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
        Return what is to be written, with whatever of the path to *at* is not there yet.

        Args:
            at: What the messages follow.
            messages: What is new.
            tip: The named tip that moves to the last of them.
            said_id: In the journal, of a message between *at* and them that is not in the tree.
            moves: Whether the tip alone moves, and nothing is written.
        """
        path = at.path()
        unkept = [node for node in path if node.id not in self._record_ids]
        kept = [self._record_ids[node.id] for node in path[: len(path) - len(unkept)]]
        above = said_id if said_id is not None else next(reversed(kept), None)
        tip = None if tip is None else self.tip_name(tip)
        # With a new conversation come the branches that were begun before anything was said in it.
        others = {} if self._record is not None else dict(self._tips)
        numbers = {node.id: number for number, node in enumerate(unkept)}
        return Entry(
            nodes=() if moves else [*(node.to_new() for node in unkept), *messages],
            parent_id=above,
            tip=tip,
            seen=None if tip is None else self._seen.get(tip),
            leaves_others=not self.shares_tips,
            tips={name: numbers.get(node.id) for name, node in others.items() if name != tip},
            model=None if self.other_model is None or moves else (self._model, self._fingerprint),
        )

    def _write(self, entry: Entry, unkept: Sequence[Node], deadline: float) -> Written:
        """Write an entry, whose first nodes are those of the tree in *unkept*, and note what came of it."""
        assert self._journal is not None, "whoever writes is kept"
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
            for node, record_id in zip(unkept, written.ids, strict=False):
                self._record_ids[node.id] = record_id
        if written.tip is not None:
            if entry.tip is not None and written.tip != entry.tip:
                self._leave(entry.tip, written.tip)
            self._seen[written.tip] = written.ids[-1] if written.ids else entry.parent_id
        return written

    def _leave(self, tip: str, own: str) -> None:
        """Go on as a branch: somebody else has moved the tip."""
        names = [name for name, now in self._continued_as.items() if now == tip]
        self._continued_as |= dict.fromkeys([tip, *names], own)
        with self._lock:
            if tip in self._tips:
                self._tips[own] = self._tips.pop(tip)

    def _settle(self) -> None:
        """
        Take back what was asked and given up.

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
        assert self._journal is not None, "it was kept"
        assert self._record is not None, "it was kept"
        try:
            came_of_it = self._journal.take_back(
                self._record, asked.ids, tip=asked.tip, back_to=asked.back_to, began=asked.began
            )
        except UnknownConversationError:  # deleted meanwhile
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

"""
Chats of clients that send all of it each time, kept in the journal (`serve --keep-chats`).

What a request says is found by the keys of its messages among what was kept before, and only what is new is
written: a chat that goes on is one conversation, and where a client edits, tries again or goes another way, a
branch of it. Two chats are one conversation as far as they begin with the same first question.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from recollect.conversation.model import Model
from recollect.conversation.tree import Node, grown
from recollect.conversation.turn import ANSWERED, Reply
from recollect.engine.reply import GeneratedReply
from recollect.errors import (
    RecollectError,
    StoreCorruptError,
    UnknownConversationError,
    UnknownNodeError,
)
from recollect.journal.journal import Journal
from recollect.journal.records import DEFAULT_TIP, Entry, Page

KEPT_CHAT: Final = "kept_chat"
"""In the note of a conversation: whether it is such a chat."""
MOST_MESSAGES: Final = 2**14
"""Messages of a key that are found again, those used last: 4 MB. A chat of which all are forgotten begins a
new conversation when it goes on."""
MOST_BRANCHES: Final = 256
"""Of one conversation: all are read for each turn. Where one more would be needed, a new conversation
begins."""
_READ_AGAIN: Final = 64
"""Conversations of a key, those used last: the chats among them are found again after a restart."""

_log = logging.getLogger(__name__)

_Place = tuple[int, int]
"""Ids in the journal: of a conversation, and of a message in it."""


class KeptChats:
    """
    Keeps the chats of all clients, and knows where in the journal their messages are.

    Safe from any thread; one reply is kept at a time.

    Invariant: at most `MOST_MESSAGES` messages of a namespace are known.
    """

    def __init__(self) -> None:
        """Begin with nothing known; what was kept before is read when a namespace first asks."""
        self._known: dict[str, OrderedDict[bytes, _Place]] = {}
        self._lock = threading.Lock()

    def keep(
        self,
        opened: Callable[[], Journal],
        model: Model,
        namespace: str,
        reply: GeneratedReply,
    ) -> None:
        """
        Keep a reply and what of its chat was not kept yet.

        A reply to a prompt as text, without messages, is not kept. Where that cannot be done, the
        log says so: the client has its reply all the same, and the next one brings what is missing.

        Args:
            opened: Returns the open journal.
            model: Has generated the reply.
            namespace: Of the client.
            reply: With its node, whose path is kept.
        """
        if not isinstance(reply, Reply):
            return
        try:
            journal = opened()
            with self._lock:
                known = self._known.get(namespace)
                if known is None:
                    known = self._known[namespace] = self._read(journal, namespace)
                self._write(journal, model, namespace, known, reply.node.path())
        except RecollectError as error:
            _log.warning("a chat is not kept: %s", error)

    def _write(
        self,
        journal: Journal,
        model: Model,
        namespace: str,
        known: OrderedDict[bytes, _Place],
        path: Sequence[Node],
    ) -> None:
        about = (model.name, model.weights_fingerprint)
        place, rest = self._found(known, path)
        if place is not None:
            try:
                if self._goes_on(journal, about, known, place, rest):
                    return
            except (UnknownConversationError, UnknownNodeError):  # all of it is said again
                for key in [key for key, (one, _) in known.items() if one == place[0]]:
                    del known[key]
        note: Mapping[str, object] = {"metadata": {}, KEPT_CHAT: True}
        entry = Entry(nodes=[node.to_new() for node in path], tip=DEFAULT_TIP, note=lambda _: note)
        model_name, fingerprint = about
        written = journal.begin(
            None, entry, model=model_name, fingerprint=fingerprint, namespace=namespace
        )
        self._learn(known, path, written.conversation_id, written.ids)

    def _goes_on(
        self,
        journal: Journal,
        about: tuple[str, str],
        known: OrderedDict[bytes, _Place],
        place: _Place,
        rest: Sequence[Node],
    ) -> bool:
        """
        Write what follows a place that is known; False: its conversation has too many branches for that.

        Raises:
            UnknownConversationError, UnknownNodeError: It was deleted meanwhile.
        """
        conversation_id, node_id = place
        journal.info(
            conversation_id
        )  # raises where it is not there, also if nothing is to be written
        if not rest:
            return True
        tips = journal.tips(conversation_id)
        # A checkpoint stays where it is; its name has a colon, which no branch of a client has.
        tip = next((tip for tip, at in tips.items() if at == node_id and ":" not in tip), None)
        if tip is None and len(tips) >= MOST_BRANCHES:
            return False
        entry = Entry(
            nodes=[node.to_new() for node in rest],
            parent_id=node_id,
            tip=tip or DEFAULT_TIP,
            seen=node_id,
            leaves_others=True,
            model=about,
        )
        written = journal.write(conversation_id, entry)
        self._learn(known, rest, conversation_id, written.ids)
        return True

    def _found(
        self, known: OrderedDict[bytes, _Place], path: Sequence[Node]
    ) -> tuple[_Place | None, Sequence[Node]]:
        """
        Return where the longest known part of a path ends, and the rest.

        Instructions alone make no chat: many begin with the same.
        """
        first = next((n for n, node in enumerate(path) if node.role in ANSWERED), 0)
        for number in range(len(path) - 1, first - 1, -1):
            place = known.get(path[number].key)
            if place is not None:
                known.move_to_end(path[number].key)
                return place, path[number + 1 :]
        return None, path

    def _learn(
        self,
        known: OrderedDict[bytes, _Place],
        nodes: Sequence[Node],
        conversation_id: int,
        ids: Sequence[int],
    ) -> None:
        for node, node_id in zip(nodes, ids, strict=True):
            known[node.key] = (conversation_id, node_id)
            known.move_to_end(node.key)
        while len(known) > MOST_MESSAGES:
            known.popitem(last=False)

    def _read(self, journal: Journal, namespace: str) -> OrderedDict[bytes, _Place]:
        """Return where the messages of the chats are that were used last, before a restart."""
        infos = journal.conversations(namespace, page=Page(limit=_READ_AGAIN))
        notes = journal.notes([info.id for info in infos])
        known: OrderedDict[bytes, _Place] = OrderedDict()
        for info in reversed(infos):
            if notes.get(info.id, {}).get(KEPT_CHAT):
                with suppress(StoreCorruptError, UnknownConversationError):
                    stored = journal.load(info.id, namespace=namespace)
                    _, nodes = grown(stored.nodes)
                    records = [record.id for record in stored.nodes]
                    self._learn(known, [nodes[one] for one in records], info.id, records)
        return known

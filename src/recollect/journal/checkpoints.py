"""
Places in conversations that are kept from eviction under a name, with their KV on disk.

A checkpoint is a pin of the KV store that knows a node of the journal, by number: no text is in it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from recollect.errors import UnknownCheckpointError, UnknownConversationError
from recollect.journal.journal import Journal
from recollect.journal.records import ConversationInfo
from recollect.kv.disk import DiskStore
from recollect.kv.record import Pin

_KIND: Final = {"kind": "checkpoint"}
_SERVER_KIND: Final = {"kind": "server checkpoint"}
"""Of a pin whose place a client of a server has named. The journal has that name, in the client's
namespace; names of other checkpoints are for all who use the home."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A place that one can come back to without reading anything again."""

    name: str
    conversation: str | None
    """What its conversation is called now; None: that was deleted."""
    conversation_id: int
    """In the journal."""
    node_id: int
    """In the journal."""
    turns: int
    """Replies up to it."""
    tokens: int
    stored_tokens: int
    """Whose KV is on disk: all, unless something there was damaged."""
    stored_bytes: int
    """That their blocks take, also those that others share."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Spot:
    """A node of a conversation that is kept, as the journal numbers it."""

    conversation_id: int
    node_id: int
    turns: int
    """Replies up to it."""


class Checkpoints:
    """
    All checkpoints of a home.

    Owns neither the store nor the journal. Any thread and any process may use them at once.
    """

    def __init__(self, store: DiskStore, journal: Journal) -> None:
        self._store = store
        self._journal = journal

    def all(self) -> list[Checkpoint]:
        """
        Return all, by name.

        Raises:
            StoreError: The store or the journal cannot be read.
        """
        known = {info.id: info for info in self._journal.conversations()}
        found = [pin for pin in self._store.pins() if is_checkpoint(pin)]
        return [self._of(pin, known.get(pin.about["conversation"])) for pin in found]

    def facts(self, spot: Spot) -> dict[str, Any]:
        """
        Return what a pin has to know to be a checkpoint there.

        Raises:
            UnknownConversationError: The conversation has been deleted meanwhile.
            StoreError: The journal cannot be read.
        """
        try:
            info = self._journal.info(spot.conversation_id)
        except UnknownConversationError:
            raise UnknownConversationError(
                "This conversation has been deleted: begin another one."
            ) from None
        return _KIND | _facts(spot, info.created_at)

    def find(self, name: str) -> Checkpoint:
        """
        Return the one of that name.

        Raises:
            UnknownCheckpointError: There is none, or its conversation was deleted.
            StoreError: As `all`.
        """
        for checkpoint in self.all():
            if checkpoint.name == name:
                if checkpoint.conversation is None:
                    raise UnknownCheckpointError(
                        f"The conversation of the checkpoint {name!r} was deleted: drop it "
                        f"(`recollect checkpoints drop`)."
                    )
                return checkpoint
        raise _unknown(name)

    def drop(self, name: str) -> None:
        """
        Let the KV of one be evicted again; its conversation stays as it is.

        Raises:
            UnknownCheckpointError: There is none of that name.
            StoreError: The store cannot be written.
        """
        pin = self._store.find_pin(name)
        if pin is None or not is_checkpoint(pin) or not self._store.drop_pin(name):
            raise _unknown(name)

    def of_servers(self) -> int:
        """
        Return how many checkpoints clients of a server have; `all` has none of them.

        Raises:
            StoreError: The store cannot be read.
        """
        return sum(_SERVER_KIND.items() <= pin.about.items() for pin in self._store.pins())

    def _of(self, pin: Pin, info: ConversationInfo | None) -> Checkpoint:
        """Return a pin as a checkpoint, with what the journal has under its number."""
        stored, about = self._store.size_of(pin), pin.about
        is_same = info is not None and info.created_at.isoformat() == about["begun"]
        return Checkpoint(
            name=pin.name,
            conversation=info.name if info is not None and is_same else None,
            conversation_id=about["conversation"],
            node_id=about["node"],
            turns=about["turns"],
            tokens=pin.tokens,
            stored_tokens=min(pin.tokens, stored.tokens),
            stored_bytes=stored.stored_bytes,
            created_at=datetime.fromtimestamp(pin.created, UTC),
        )


def server_facts(spot: Spot, begun: datetime) -> dict[str, Any]:
    """
    Return what a pin has to know to be a checkpoint of a client of a server.

    Args:
        spot: Where it is.
        begun: When the conversation was created, as the journal has it.
    """
    return _SERVER_KIND | _facts(spot, begun)


def drop_of_conversation(store: DiskStore, conversation_id: int, begun: datetime) -> list[str]:
    """
    Drop the checkpoints of a conversation that is deleted, of whatever kind; return their names.

    Args:
        store: Where they are.
        conversation_id: In the journal.
        begun: When the conversation was created, as the journal has it.

    Raises:
        StoreError: The store cannot be written.
    """
    facts = {"conversation": conversation_id, "begun": begun.isoformat()}
    return store.drop_pins(facts)


def _facts(spot: Spot, begun: datetime) -> dict[str, Any]:
    return {
        "conversation": spot.conversation_id,
        "begun": begun.isoformat(),  # another journal may have that number
        "node": spot.node_id,
        "turns": spot.turns,
    }


def is_checkpoint(pin: Pin) -> bool:
    """Return whether a pin is a checkpoint that has its name from the terminal or the library."""
    return _KIND.items() <= pin.about.items()


def _unknown(name: str) -> UnknownCheckpointError:
    return UnknownCheckpointError(
        f"There is no checkpoint {name!r}: `recollect checkpoints` lists them."
    )

"""
A data folder as a whole, which is the journal and the KV store together: its checkpoints, and encrypting it.

A checkpoint is a pin of the KV store that knows a node of the journal, by number: no text is in it, and its
KV is kept from eviction. `encrypt` makes a plain folder an encrypted one; it knows what in the folder holds
content, which models do not.
"""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from recollect import config, encryption
from recollect.encryption import KV_PURPOSE, Cipher
from recollect.errors import (
    StoreCorruptError,
    StoreError,
    UnknownCheckpointError,
    UnknownConversationError,
)
from recollect.journal.journal import JOURNAL_NAME, Journal, remove_history
from recollect.journal.records import ConversationInfo
from recollect.kv.blocks import disguised_key
from recollect.kv.disk import STORE_FOLDER, DiskStore, is_there, open_existing
from recollect.kv.environment import remove_damaged
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


def encrypt(
    home: Path | None = None,
    *,
    passphrase: str | None = None,
    keyring: bool = False,
    ask: encryption.Ask | None = None,
) -> Cipher:
    """
    Encrypt a data folder, once and for good, and return its cipher; one that is encrypted is unlocked.

    All conversations are converted. KV on disk and the history of what was typed are deleted; KV comes
    again. In a folder that is encrypted already, a history and damaged KV that were left there go too.
    Checkpoints stay as places, without KV. Other programs that use the folder have to be closed before.

    Args:
        home: None: `RECOLLECT_HOME` or the user's data folder.
        passphrase: None: `RECOLLECT_PASSPHRASE`. Whoever loses it loses what is in the folder.
        keyring: Whether the key is drawn at random and put into the keyring of this system instead.
        ask: Called for a passphrase where there is none.

    Raises:
        ConfigError: The passphrase is wrong or missing, there is no keyring, or a library is not
            installed; or the file that says which key it is has gone. Nothing was changed.
        StoreError: Something in the folder cannot be written. What was converted by then is
            encrypted, and calling this again goes on with the rest.
    """
    home = home or config.home()
    cipher = None
    if encryption.is_encrypted(home):
        cipher = encryption.unlock(home, passphrase=passphrase, ask=ask)
        if cipher is not None:
            _remove_plain_kv(home / STORE_FOLDER, cipher)  # which may put a damaged store aside
            _remove_leftovers(home)
    if cipher is None:
        _require_plain(home / JOURNAL_NAME)
        source: encryption.Source = "keyring" if keyring else "passphrase"
        cipher, key_file = encryption.new_key(source, passphrase=passphrase, ask=ask)
        kept = _checkpoints(home / STORE_FOLDER)
        _remove_plain(home)  # before the folder counts as encrypted: it may end here
        encryption.save(home, key_file)
        _remove_leftovers(home)  # a chat that is still open may have written one meanwhile
        _keep(kept, home / STORE_FOLDER, cipher)
    if (home / JOURNAL_NAME).exists():
        Journal.open(home / JOURNAL_NAME, cipher=cipher, convert=True).close()
    return cipher


def _require_plain(journal: Path) -> None:
    """
    Check that a journal is not encrypted with a key that the folder does not know any more.

    Raises:
        ConfigError: It is; with a new key nobody could ever read it again.
        StoreError: It cannot be read.
    """
    if journal.exists():
        Journal.open(journal).close()


def _checkpoints(folder: Path) -> list[Pin]:
    """Return the places that have a name in a store, and nowhere else."""
    if not is_there(folder):
        return []
    try:
        with closing(open_existing(folder, None)) as store:
            return [pin for pin in store.pins() if is_checkpoint(pin)]
    except StoreCorruptError:
        return []  # it could not have been used either


def _keep(found: list[Pin], folder: Path, cipher: Cipher) -> None:
    """Name places again, sealed; their KV is not there, and would have other names."""
    if not found:
        return
    sealer, least = cipher.for_purpose(KV_PURPOSE), config.LEAST_KV_DISK_BYTES
    with closing(DiskStore(folder, budget_bytes=least, sealer=sealer)) as store:
        for pin in found:  # under its former name, tokens could be tried
            tail = disguised_key(pin.tail, sealer.name_secret)
            store.add_pin(replace(pin, tail=tail))


def _remove_plain(home: Path) -> None:
    """Delete what holds content and is no loss."""
    _remove_leftovers(home)
    with _deleting():
        if (home / STORE_FOLDER).exists():
            shutil.rmtree(home / STORE_FOLDER)


def _remove_leftovers(home: Path) -> None:
    """Delete what no encrypted folder holds: a history, and stores that were put aside as damaged."""
    with _deleting():
        remove_history(home / config.HISTORY_NAME)
        remove_damaged(home / STORE_FOLDER)


def _remove_plain_kv(folder: Path, cipher: Cipher) -> None:
    """Delete a store in which a program without the key has kept blocks; its checkpoints stay as places."""
    if not is_there(folder):
        return
    try:
        with closing(open_existing(folder, cipher.for_purpose(KV_PURPOSE))) as store:
            with store.reading() as tables:
                heads = tables.heads().values()
            is_plain = any(not head.is_sealed for head in heads)
            kept = [pin for pin in store.pins() if is_checkpoint(pin)]
    except StoreCorruptError:  # what is in there cannot be told
        is_plain, kept = True, []
    if is_plain:
        with _deleting():
            shutil.rmtree(folder)
        _keep(kept, folder, cipher)


@contextmanager
def _deleting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{error.filename} cannot be deleted ({error.strerror}): delete it, since it shows what "
            "was said."
        ) from error

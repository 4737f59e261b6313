"""
The journal and the KV store of a data folder together: checkpoints, and encrypting the folder.

A checkpoint is a pin of the KV store, which holds the id of a node of the journal and no text. `encrypt`
makes a plain folder an encrypted one; it knows which files hold what was said or typed. Models hold none.
"""

import os
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
from recollect.journal.records import ConversationInfo, require_limit
from recollect.kv.disk import STORE_FOLDER, DiskStore, is_there, open_existing
from recollect.kv.environment import remove_damaged
from recollect.kv.record import Pin, disguised_key

_KIND: Final = {"kind": "checkpoint"}
_SERVER_KIND: Final = {"kind": "server checkpoint"}
"""
Marks the pin of a checkpoint that a server's client made.

The name that the client gave it is a label in the journal, in the client's namespace. The names of other
checkpoints are the pins' names, and all who use the data folder share them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A named place in a conversation whose KV is pinned on disk, so that going back computes nothing."""

    name: str
    conversation: str | None
    """The present name of its conversation; None: the conversation was deleted."""
    conversation_id: int
    """Id of the conversation in the journal."""
    node_id: int
    """Id in the journal of the node at which the checkpoint is."""
    turns: int
    """Number of replies up to there."""
    tokens: int
    """Length of the prompt up to there, in tokens."""
    stored_tokens: int
    """How many of these have their KV on disk: all, unless blocks were damaged."""
    stored_bytes: int
    """Bytes of their blocks on disk, including blocks that other prefixes share."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Spot:
    """A node of a saved conversation, by its ids in the journal."""

    conversation_id: int
    node_id: int
    turns: int
    """Number of replies up to the node."""


class Checkpoints:
    """
    All checkpoints of a data folder that were made at the terminal or by the library.

    Owns neither the store nor the journal. Threads and processes may use it at the same time.
    """

    def __init__(self, store: DiskStore, journal: Journal) -> None:
        self._store = store
        self._journal = journal

    def all(self, *, limit: int | None = None, after: str | None = None) -> list[Checkpoint]:
        """
        Return checkpoints, sorted by name.

        Args:
            limit: Most of them to return, at least 1; None: all.
            after: Only those whose names sort behind this one.

        Raises:
            InvalidParameterError: There is no such limit.
            StoreError: The store or the journal cannot be read.
        """
        most = None if limit is None else require_limit(limit)
        known = {info.id: info for info in self._journal.conversations()}
        found = [pin for pin in self._store.pins() if is_checkpoint(pin)]
        every = [self._of(pin, known.get(pin.about["conversation"])) for pin in found]
        return [one for one in every if after is None or one.name > after][:most]

    def facts(self, spot: Spot) -> dict[str, Any]:
        """
        Return the facts that make a pin a checkpoint at that node, for `Pin.about`.

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
        Return the checkpoint of that name.

        Raises:
            UnknownCheckpointError: There is none, or its conversation was deleted.
            StoreError: The store or the journal cannot be read.
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
        Delete a checkpoint, so that its KV may be evicted; its conversation stays as it is.

        Raises:
            UnknownCheckpointError: There is none of that name.
            StoreError: The store cannot be written.
        """
        pin = self._store.find_pin(name)
        if pin is None or not is_checkpoint(pin) or not self._store.drop_pin(name):
            raise _unknown(name)

    def of_servers(self) -> int:
        """
        Return the number of checkpoints that a server's clients made, which `all` leaves out.

        Raises:
            StoreError: The store cannot be read.
        """
        return sum(_SERVER_KIND.items() <= pin.about.items() for pin in self._store.pins())

    def _of(self, pin: Pin, info: ConversationInfo | None) -> Checkpoint:
        """Return the checkpoint of a pin; *info* is what the journal has under the conversation's id now."""
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
    Return the facts that make a pin a checkpoint of a server's client, for `Pin.about`.

    Args:
        spot: The node at which the checkpoint is.
        begun: When the conversation was created, as the journal has it.
    """
    return _SERVER_KIND | _facts(spot, begun)


def drop_of_conversation(store: DiskStore, conversation_id: int, begun: datetime) -> list[str]:
    """
    Delete all checkpoints of a conversation, also those of a server's clients; return their names.

    Args:
        store: The store that has the pins.
        conversation_id: Id of the conversation in the journal.
        begun: When the conversation was created, as the journal has it.

    Raises:
        StoreError: The store cannot be written.
    """
    facts = {"conversation": conversation_id, "begun": begun.isoformat()}
    return store.drop_pins(facts)


def _facts(spot: Spot, begun: datetime) -> dict[str, Any]:
    return {
        "conversation": spot.conversation_id,
        "begun": begun.isoformat(),  # tells the conversation from one with this id in another journal
        "node": spot.node_id,
        "turns": spot.turns,
    }


def is_checkpoint(pin: Pin) -> bool:
    """Return whether a pin is a checkpoint that was made at the terminal or by the library."""
    return _KIND.items() <= pin.about.items()


def _unknown(name: str) -> UnknownCheckpointError:
    return UnknownCheckpointError(
        f"There is no checkpoint {name!r}: `recollect checkpoints` lists them."
    )


def encrypt(
    home: str | os.PathLike[str] | None = None,
    *,
    passphrase: str | None = None,
    keyring: bool = False,
    ask: encryption.Ask | None = None,
) -> Cipher:
    """
    Encrypt a data folder, which cannot be undone, and return its cipher.

    All conversations are encrypted. KV on disk and the history of typed lines are deleted; checkpoints
    keep their places, and their KV is computed again when it is needed. A folder that is encrypted already
    is unlocked, and plain KV, a history or damaged stores that are left in it are deleted. Other programs
    that use the folder must be closed before.

    Args:
        home: The data folder; None: `RECOLLECT_HOME` or the platform's user data folder.
        passphrase: What the key is derived from; None: `RECOLLECT_PASSPHRASE`. Without it nobody can read
            the folder again.
        keyring: Whether the key is random and kept in the system's keyring instead.
        ask: Called for a passphrase if none is given.

    Raises:
        ConfigError: The passphrase is wrong or missing, there is no keyring, a library is not installed, or
            the journal is encrypted and the folder's key file is missing. Nothing was changed.
        StoreError: A file cannot be written. What was converted by then is encrypted; a second call goes
            on with the rest.
    """
    home = config.data_folder(home)
    cipher = None
    if encryption.is_encrypted(home):
        cipher = encryption.unlock(home, passphrase=passphrase, ask=ask)
        if cipher is not None:
            _remove_plain_kv(home / STORE_FOLDER, cipher)  # first: it may put a damaged store aside
            _remove_leftovers(home)
    if cipher is None:
        _require_plain(home / JOURNAL_NAME)
        source: encryption.Source = "keyring" if keyring else "passphrase"
        cipher, key_file = encryption.new_key(source, passphrase=passphrase, ask=ask)
        kept = _checkpoints(home / STORE_FOLDER)
        # Plain files go before the key file is written: a folder with that file counts as encrypted, and
        # this process may be killed in between.
        _remove_plain(home)
        encryption.save(home, key_file)
        _remove_leftovers(home)  # an open chat may have written to the history meanwhile
        _keep(kept, home / STORE_FOLDER, cipher)
    if (home / JOURNAL_NAME).exists():
        Journal.open(home / JOURNAL_NAME, cipher=cipher, convert=True).close()
    return cipher


def _require_plain(journal: Path) -> None:
    """
    Check that a journal is plain. If the key file of an encrypted one is missing, a new key must not be made.

    Raises:
        ConfigError: It is encrypted.
        StoreError: It cannot be read.
    """
    if journal.exists():
        Journal.open(journal).close()


def _checkpoints(folder: Path) -> list[Pin]:
    """Return the checkpoints of a plain store; none if there is no store, or a damaged one."""
    if not is_there(folder):
        return []
    try:
        with closing(open_existing(folder, None)) as store:
            return [pin for pin in store.pins() if is_checkpoint(pin)]
    except StoreCorruptError:
        return []  # damaged: a chat could not have used them either


def _keep(found: list[Pin], folder: Path, cipher: Cipher) -> None:
    """Write checkpoints into a new, encrypted store, without their KV."""
    if not found:
        return
    sealer, least = cipher.for_purpose(KV_PURPOSE), config.LEAST_KV_DISK_BYTES
    with closing(DiskStore(folder, budget_bytes=least, sealer=sealer)) as store:
        # A plain key is a hash of the tokens, by which guesses of them could be checked.
        for pin in found:
            tail = disguised_key(pin.tail, sealer.name_secret)
            store.add_pin(replace(pin, tail=tail))


def _remove_plain(home: Path) -> None:
    """Delete the files that hold content and can be made again: the history and the KV store."""
    _remove_leftovers(home)
    with _deleting():
        if (home / STORE_FOLDER).exists():
            shutil.rmtree(home / STORE_FOLDER)


def _remove_leftovers(home: Path) -> None:
    """Delete what an encrypted folder must not hold: a history, and damaged stores that were put aside."""
    with _deleting():
        for name in (config.HISTORY_NAME, config.REQUESTS_NAME):
            remove_history(home / name)
        remove_damaged(home / STORE_FOLDER)


def _remove_plain_kv(folder: Path, cipher: Cipher) -> None:
    """Delete a store that has plain blocks, from a program without the key, but keep its checkpoints."""
    if not is_there(folder):
        return
    try:
        with closing(open_existing(folder, cipher.for_purpose(KV_PURPOSE))) as store:
            with store.reading() as tables:
                heads = tables.heads().values()
            is_plain = any(not head.is_sealed for head in heads)
            kept = [pin for pin in store.pins() if is_checkpoint(pin)]
    except StoreCorruptError:  # it may hold plain blocks
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

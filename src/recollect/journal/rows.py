"""
Conversations and their nodes as rows of the journal's tables, and back.

Each node's row has a checksum over everything in it, as it lies there. Knows columns, not
transactions.

How values lie in the journal's tables: as they are, or sealed where they tell what was said.

Knows the cipher and the mark that an encrypted journal bears; nothing of what the values mean.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from recollect import encryption
from recollect.encryption import OVERHEAD_BYTES, Cipher
from recollect.errors import ConfigError, StoreCorruptError, StoreEncryptedError, StoreVersionError
from recollect.journal.database import corrupt_error
from recollect.journal.records import (
    ConversationInfo,
    NewNode,
    NodeRecord,
    StoredConversation,
    checksum,
    links_from_dict,
    links_to_dict,
    pack_token_ids,
    require_text,
    unpack_token_ids,
)
from recollect.journal.schema import NODE_FORMAT

Place = tuple[str | int | None, ...]
"""Table, column, and what of the row can be read. A value opens only where all of that is the same."""

_MARK: Final = b"recollect journal"


class Sealing:
    """
    What one journal seals with.

    Without a cipher all values stay as they are. With one, each is bound to its place: swapped with
    another, or its row changed, it does not open.
    """

    def __init__(self, path: Path, cipher: Cipher | None) -> None:
        self._path = path
        self._cipher = None if cipher is None else cipher.for_purpose("journal")
        self._mark: bytes | None = None  # as the journal bore it when it was opened

    @property
    def is_on(self) -> bool:
        """Return whether values are sealed."""
        return self._cipher is not None

    @property
    def overhead_bytes(self) -> int:
        """Return by how much a value is longer in the file."""
        return 0 if self._cipher is None else OVERHEAD_BYTES

    def seal(self, value: str | bytes, place: Place) -> str | bytes:
        """Return a text or bytes as they are kept."""
        if self._cipher is None:
            return value
        data = value.encode() if isinstance(value, str) else value
        return self._cipher.seal(data, context=_context(place))

    def read_text(self, kept: str | bytes, place: Place, what: str) -> str:
        """
        Return a text that was kept.

        Args:
            kept: As it is in the table.
            place: As when it was written.
            what: Whose text it is, for the error.

        Raises:
            StoreCorruptError: It is not what was written there.
        """
        if self._cipher is not None:
            return self.read_bytes(kept, place, what).decode()
        if isinstance(kept, str):
            return kept
        raise self.not_as_written(what)

    def read_bytes(self, kept: str | bytes, place: Place, what: str) -> bytes:
        """Return bytes that were kept; as `read_text` in all else."""
        if isinstance(kept, bytes):
            if self._cipher is None:
                return kept
            with suppress(StoreCorruptError):  # which names neither the file nor the place
                return self._cipher.open(kept, context=_context(place))
        raise self.not_as_written(what)

    def not_as_written(self, what: str) -> StoreCorruptError:
        """Return the error for something in the journal that is not what was written."""
        return corrupt_error(self._path, f"{what} is not as it was written")

    def mark(self, connection: sqlite3.Connection) -> None:
        """Have the journal say that it is encrypted, and by which key."""
        assert self._cipher is not None, "there is a key"
        self._mark = self._cipher.seal(_MARK, context=_MARK)
        connection.execute("INSERT INTO encryption (mark, is_clean) VALUES (?, 0)", (self._mark,))

    def read_mark(self, connection: sqlite3.Connection) -> bool:
        """
        Return whether the journal is encrypted, with this key.

        Raises:
            ConfigError: It is encrypted, and there is no key or another one, or the file is missing
                that says which.
        """
        self._mark = _mark(connection)
        if self._mark is None:
            return False
        if self._cipher is None:
            if not encryption.is_encrypted(self._path.parent):
                raise encryption.missing(self._path.parent)
            raise ConfigError(
                f"{self._path} is encrypted: give its key, by recollect.unlock() or "
                "RECOLLECT_PASSPHRASE."
            )
        try:
            self._cipher.open(self._mark, context=_MARK)
        except StoreCorruptError:
            raise ConfigError(
                f"{self._path} is encrypted with another key than the folder that it is in: put "
                "the folder's own encryption.json back, from a backup."
            ) from None
        return True

    def require_unchanged(self, connection: sqlite3.Connection) -> None:
        """
        Check that the journal is as encrypted as when it was opened.

        Raises:
            StoreEncryptedError: Somebody has encrypted it since; what would be written now could be read.
        """
        if _mark(connection) != self._mark:
            raise StoreEncryptedError(
                f"{self._path} has been encrypted by another program meanwhile: start again, with "
                "the key."
            )


def _mark(connection: sqlite3.Connection) -> bytes | None:
    row = connection.execute("SELECT mark FROM encryption").fetchone()
    return None if row is None else row[0]


def _context(place: Place) -> bytes:
    return json.dumps(place).encode()


Row = tuple[Any, ...]
"""The columns of one, in the order of a constant here."""

_HEAD: Final = "conversation_id, parent_id, role, finish_reason, created_at, fingerprint"
_HEAD_LENGTH: Final = len(_HEAD.split(", "))
_SEALED: Final = ("usage", "token_ids", "content", "links")
"""Columns that tell what was said; `links` is the last because rows of version 1 had none."""
_CHECKED: Final = f"{_HEAD}, {', '.join(_SEALED)}"
_INSERT: Final = (
    f"INSERT INTO nodes (id, {_CHECKED}, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
)
NODE_COLUMNS: Final = f"id, checksum, {_CHECKED}"
CONVERSATION_COLUMNS: Final = (
    "id, name, created_at, updated_at, model, fingerprint, format, namespace"
)
INFO_COLUMNS: Final = f"{CONVERSATION_COLUMNS}, label, turns, size_bytes"


def time_text(moment: datetime) -> str:
    """Return a moment in UTC as the tables hold it."""
    return moment.isoformat(timespec="microseconds")


def text_to_keep(name: str) -> str:
    """Return the name of a model, which can be a path of any bytes, as text that can be kept."""
    return name.encode(errors="replace").decode()


def next_id(connection: sqlite3.Connection, table: str) -> int:
    """
    Return the id of the next row of a table, which has never been given.

    Asked before the row is written, because what is sealed in it is bound to it. Nobody else can
    take it: this transaction writes.
    """
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    return 1 if row is None else int(row[0]) + 1


def insert_node(
    connection: sqlite3.Connection,
    sealing: Sealing,
    conversation_id: int,
    parent_id: int | None,
    node: NewNode | NodeRecord,
    created_at: datetime,
) -> int:
    """
    Write a node and return the id that it got.

    Raises:
        ConversationError: Its text cannot be kept.
    """
    require_text(node.content)
    usage = None if node.usage is None else json.dumps(dict(node.usage), allow_nan=False)
    token_ids = None if node.token_ids is None else pack_token_ids(node.token_ids)
    links = None if node.links is None else json.dumps(links_to_dict(node.links))
    moment, reason = time_text(created_at), node.finish_reason
    head = (conversation_id, parent_id, node.role, reason, moment, node.fingerprint)
    node_id = next_id(connection, "nodes")
    said = (usage, token_ids, node.content, links)
    values = (*head, *sealed_columns(sealing, (node_id, *head), said))
    connection.execute(_INSERT, (node_id, *values, _checksum(values)))
    return node_id


def sealed_columns(sealing: Sealing, place: Row, columns: Row) -> Row:
    """
    Return a node's usage, token ids, content and links as they are kept.

    Args:
        sealing: Of the journal.
        place: The node's id and the other columns, in the order of the table.
        columns: Those that tell what was said.
    """
    return tuple(
        None if value is None else sealing.seal(value, _place(column, place, columns))
        for column, value in zip(_SEALED, columns, strict=True)
    )


def _place(column: str, row: Row, columns: Row) -> Place:
    """Return what a value is bound to; also which of the others are there, so that none can be taken out."""
    there = "".join("0" if value is None else "1" for value in columns)
    return ("nodes", column, *row, there)


def seal_node(connection: sqlite3.Connection, sealing: Sealing, row: Row) -> None:
    """Seal a sound row of `NODE_COLUMNS` that is not."""
    node_id, _, *values = row
    head, plain = values[:_HEAD_LENGTH], values[_HEAD_LENGTH:]
    sealed = sealed_columns(sealing, (node_id, *head), tuple(plain))
    connection.execute(
        "UPDATE nodes SET usage = ?, token_ids = ?, content = ?, links = ?, checksum = ? "
        "WHERE id = ?",
        (*sealed, _checksum((*head, *sealed)), node_id),
    )


def read_nodes(
    connection: sqlite3.Connection, sealing: Sealing, conversation_id: int, path: Path
) -> Iterator[NodeRecord]:
    """
    Yield the nodes of a conversation, parents first.

    Raises:
        StoreCorruptError: What is there is not what was written.
    """
    rows = connection.execute(
        f"SELECT {NODE_COLUMNS} FROM nodes WHERE conversation_id = ? ORDER BY id",  # noqa: S608
        (conversation_id,),
    )
    seen: set[int | None] = {None}
    for row in rows:
        if not is_sound(row):
            raise corrupt_error(path, f"node {row[0]} is not as it was written")
        node = read_node(row, sealing)
        if node.parent_id not in seen:
            raise corrupt_error(path, f"node {node.parent_id} is missing")
        seen.add(node.id)
        yield node


def read_node_ids(connection: sqlite3.Connection, conversation_id: int) -> list[int]:
    """Return the ids of the nodes of a conversation, in the order in which they were kept."""
    rows = connection.execute(
        "SELECT id FROM nodes WHERE conversation_id = ? ORDER BY id", (conversation_id,)
    )
    return [node_id for (node_id,) in rows]


def is_sound(row: Row) -> bool:
    """Return whether a row of `NODE_COLUMNS` is what was written."""
    return bool(row[1] == _checksum(row[2:]))


def _checksum(values: Row) -> int:
    """Return the checksum of `_CHECKED`; without links that of version 1, which had no such column."""
    return checksum(*values) if values[-1] is not None else checksum(*values[:-1])


def read_node(row: Row, sealing: Sealing) -> NodeRecord:
    """
    Return the node in a sound row of `NODE_COLUMNS`.

    Raises:
        StoreCorruptError: It was sealed elsewhere, or with another key.
    """
    node_id, _, _, parent_id, role, finish, created_at, fingerprint, *sealed = row
    usage, token_ids, text, links = sealed
    rest, what = (node_id, *row[2 : 2 + _HEAD_LENGTH]), f"node {node_id}"

    def place(column: str) -> Place:
        return _place(column, rest, tuple(sealed))

    return NodeRecord(
        id=node_id,
        parent_id=parent_id,
        role=role,
        content=sealing.read_text(text, place("content"), what),
        token_ids=None
        if token_ids is None
        else unpack_token_ids(sealing.read_bytes(token_ids, place("token_ids"), what)),
        finish_reason=finish,
        usage=None if usage is None else json.loads(sealing.read_text(usage, place("usage"), what)),
        created_at=datetime.fromisoformat(created_at),
        fingerprint=fingerprint,
        links=None
        if links is None
        else links_from_dict(json.loads(sealing.read_text(links, place("links"), what))),
    )


def conversation_info(row: Row, *, tips: tuple[str, ...], path: Path) -> ConversationInfo:
    """
    Return what a list says of a row of `INFO_COLUMNS`.

    Raises:
        StoreCorruptError: It holds no times.
    """
    conversation_id, name, created_at, updated_at, model, fingerprint, _, _, *rest = row
    label, turns, size_bytes = rest
    if (type(label), type(turns), type(size_bytes)) != (str, int, int):
        raise corrupt_error(path, f"conversation {conversation_id} is not as it was written")
    return ConversationInfo(
        id=conversation_id,
        name=name,
        created_at=_moment(created_at, path),
        updated_at=_moment(updated_at, path),
        model=model,
        fingerprint=fingerprint,
        turns=turns,
        tips=tips,
        size_bytes=size_bytes,
        label=label,
    )


def stored_conversation(
    row: Row,
    nodes: tuple[NodeRecord, ...],
    tips: Mapping[str, int | None],
    path: Path,
) -> StoredConversation:
    """
    Return a conversation from its row of `CONVERSATION_COLUMNS` and what belongs to it.

    Raises:
        StoreVersionError: A newer version wrote its nodes.
        StoreCorruptError: It holds no times, or a tip stands at no node of it.
    """
    conversation_id, name, created_at, updated_at, model, fingerprint, node_format, namespace = row
    if node_format > NODE_FORMAT:
        raise StoreVersionError(
            f"A newer recollect wrote the conversation {name!r}: update recollect to read it."
        )
    ids = {None, *(node.id for node in nodes)}
    for tip, node_id in tips.items():
        if node_id not in ids:
            raise corrupt_error(path, f"the tip {tip!r} of {name!r} stands at no node of it")
    return StoredConversation(
        id=conversation_id,
        name=name,
        created_at=_moment(created_at, path),
        updated_at=_moment(updated_at, path),
        model=model,
        fingerprint=fingerprint,
        nodes=nodes,
        tips=dict(tips),
        namespace=namespace,
    )


def _moment(text: str, path: Path) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise corrupt_error(path, f"{text!r} is no time") from None

"""
Rows of the journal's tables as values, and values as rows: columns, checksums, seals.

A value that tells what was said is sealed where the journal is encrypted. Each node's row has a
checksum over all its columns as they are in the table. Knows no transactions and runs no statement
but those on the table `encryption`.
"""

import json
import sqlite3
from collections.abc import Mapping
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
    ConversationRecord,
    Label,
    NewNode,
    NodeRecord,
    StoredConversation,
    checksum,
    is_writable,
    links_from_dict,
    links_to_dict,
    mended,
    pack_token_ids,
    require_text,
    require_writable,
    unpack_token_ids,
)
from recollect.journal.schema import NODE_FORMAT

Row = tuple[Any, ...]
"""The columns of a row, in the order of one of the constants below."""

Cell = tuple[str | int | None, ...]
"""Table, column, and the unsealed columns of the row: a sealed value opens only with all of these."""

_HEAD: Final = "conversation_id, parent_id, role, finish_reason, created_at, fingerprint"
_HEAD_LENGTH: Final = len(_HEAD.split(", "))
_SEALED: Final = ("usage", "token_ids", "content", "links")
"""Columns that tell what was said; `links` is the last because rows of version 1 had none."""
_CHECKED: Final = f"{_HEAD}, {', '.join(_SEALED)}"
NODE_COLUMNS: Final = f"id, checksum, {_CHECKED}"
LABEL_COLUMNS: Final = "label, conversation_id, node_id, note"
CONVERSATION_COLUMNS: Final = (
    "id, name, created_at, updated_at, model, fingerprint, format, namespace"
)
INFO_COLUMNS: Final = f"{CONVERSATION_COLUMNS}, label, turns, size_bytes"

_MARK: Final = b"recollect journal"


class Sealing:
    """
    How one journal seals its values, and the mark by which it says so.

    Without a cipher values stay as they are. With one, each is bound to its cell: moved elsewhere, or
    with the rest of its row changed, it does not open.
    """

    def __init__(self, path: Path, cipher: Cipher | None) -> None:
        self._path = path
        self._cipher = None if cipher is None else cipher.for_purpose("journal")
        self._mark: bytes | None = None  # the journal's own, when it was opened

    @property
    def is_on(self) -> bool:
        """Return whether values are sealed."""
        return self._cipher is not None

    @property
    def overhead_bytes(self) -> int:
        """Return by how much a value is longer in the file."""
        return 0 if self._cipher is None else OVERHEAD_BYTES

    def seal(self, value: str | bytes, cell: Cell) -> str | bytes:
        """Return a text or bytes as they are written into the table."""
        if self._cipher is None:
            return value
        data = value.encode() if isinstance(value, str) else value
        return self._cipher.seal(data, context=_context(cell))

    def read_text(self, sealed: str | bytes, cell: Cell, what: str) -> str:
        """
        Return a text that was sealed.

        Args:
            sealed: The value in the table.
            cell: The cell that it was written into.
            what: Whose text it is, for the error.

        Raises:
            StoreCorruptError: It is not what was written into that cell.
        """
        if self._cipher is not None:
            return self.read_bytes(sealed, cell, what).decode()
        if isinstance(sealed, str):
            return sealed
        raise self.not_as_written(what)

    def read_bytes(self, sealed: str | bytes, cell: Cell, what: str) -> bytes:
        """Return bytes that were sealed; otherwise as `read_text`."""
        if isinstance(sealed, bytes):
            if self._cipher is None:
                return sealed
            with suppress(StoreCorruptError):  # its message names neither file nor cell
                return self._cipher.open(sealed, context=_context(cell))
        raise self.not_as_written(what)

    def corrupt(self, found: str) -> StoreCorruptError:
        """Return the error for a journal in which *found* is wrong."""
        return corrupt_error(self._path, found)

    def not_as_written(self, what: str) -> StoreCorruptError:
        """Return the error for something in the journal that is not what was written."""
        return self.corrupt(f"{what} is not as it was written")

    def mark(self, connection: sqlite3.Connection) -> None:
        """Mark the journal as encrypted with this key."""
        assert self._cipher is not None, "there is a key"
        self._mark = self._cipher.seal(_MARK, context=_MARK)
        connection.execute("INSERT INTO encryption (mark, is_clean) VALUES (?, 0)", (self._mark,))

    def read_mark(self, connection: sqlite3.Connection) -> bool:
        """
        Return whether the journal is encrypted, with this key.

        Raises:
            ConfigError: It is encrypted, and the key is missing, another one, or unknown because
                the folder's key file is missing.
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
        Check that nobody has encrypted the journal since it was opened.

        Raises:
            StoreEncryptedError: Somebody has; what would be written now could be read by others.
        """
        if _mark(connection) != self._mark:
            raise StoreEncryptedError(
                f"{self._path} has been encrypted by another program meanwhile: start again, with "
                "the key."
            )


def _mark(connection: sqlite3.Connection) -> bytes | None:
    row = connection.execute("SELECT mark FROM encryption").fetchone()
    return None if row is None else row[0]


def _context(cell: Cell) -> bytes:
    return json.dumps(cell).encode()


# Conversations


def name_cell(conversation_id: int) -> Cell:
    """Return the cell of a conversation's name."""
    return ("conversations", "name", conversation_id)


def model_cell(conversation_id: int, fingerprint: str) -> Cell:
    """Return the cell of the name of a conversation's model."""
    return ("conversations", "model", conversation_id, fingerprint)


def read_name(sealed: str | bytes, conversation_id: int, sealing: Sealing) -> str:
    """
    Return the name of a conversation.

    Raises:
        StoreCorruptError: It is not what was written.
    """
    what = f"conversation {conversation_id}"
    return sealing.read_text(sealed, name_cell(conversation_id), what)


def conversation_row(row_id: int, name: str, about: ConversationRecord, sealing: Sealing) -> Row:
    """Return the row of a new conversation, in `CONVERSATION_COLUMNS`."""
    return (
        row_id,
        sealing.seal(name, name_cell(row_id)),
        time_text(about.created_at),
        time_text(about.updated_at),
        sealing.seal(text_to_keep(about.model), model_cell(row_id, about.fingerprint)),
        about.fingerprint,
        NODE_FORMAT,
        about.namespace,
    )


def open_conversation(row: Row, sealing: Sealing) -> Row:
    """
    Return a row that begins with `CONVERSATION_COLUMNS`, its two names unsealed.

    Raises:
        StoreCorruptError: A name is not what was written.
    """
    conversation_id, name, created_at, updated_at, model, fingerprint, *rest = row
    name = read_name(name, conversation_id, sealing)
    what = f"conversation {conversation_id}"
    model = sealing.read_text(model, model_cell(conversation_id, fingerprint), what)
    return (conversation_id, name, created_at, updated_at, model, fingerprint, *rest)


def conversation_info(row: Row, tips: tuple[str, ...], sealing: Sealing) -> ConversationInfo:
    """
    Return the list entry in an unsealed row of `INFO_COLUMNS`.

    Raises:
        StoreCorruptError: A time, count or label is not what was written.
    """
    conversation_id, name, created_at, updated_at, model, fingerprint, _, _, *rest = row
    label, turns, size_bytes = rest
    if (type(label), type(turns), type(size_bytes)) != (str, int, int):
        raise sealing.not_as_written(f"conversation {conversation_id}")
    return ConversationInfo(
        id=conversation_id,
        name=name,
        created_at=_moment(created_at, sealing),
        updated_at=_moment(updated_at, sealing),
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
    sealing: Sealing,
) -> StoredConversation:
    """
    Return a conversation from its unsealed row of `CONVERSATION_COLUMNS`, its nodes and its branches.

    Raises:
        StoreVersionError: A newer version wrote its nodes.
        StoreCorruptError: A time is not what was written, or a branch stands at no node of it.
    """
    conversation_id, name, created_at, updated_at, model, fingerprint, node_format, namespace = row
    if node_format > NODE_FORMAT:
        raise StoreVersionError(
            f"A newer recollect wrote the conversation {name!r}: update recollect to read it."
        )
    ids = {None, *(node.id for node in nodes)}
    for tip, node_id in tips.items():
        if node_id not in ids:
            raise sealing.corrupt(f"the tip {tip!r} of {name!r} stands at no node of it")
    return StoredConversation(
        id=conversation_id,
        name=name,
        created_at=_moment(created_at, sealing),
        updated_at=_moment(updated_at, sealing),
        model=model,
        fingerprint=fingerprint,
        nodes=nodes,
        tips=dict(tips),
        namespace=namespace,
    )


def tip_cell(conversation_id: int, node_id: int | None) -> Cell:
    """Return the cell of a branch's name."""
    return ("tips", "name", conversation_id, node_id)


def read_tip(
    conversation_id: int, sealed: str | bytes, node_id: int | None, sealing: Sealing
) -> str:
    """
    Return the name of a branch.

    Raises:
        StoreCorruptError: It is not what was written.
    """
    what = f"a tip of conversation {conversation_id}"
    return sealing.read_text(sealed, tip_cell(conversation_id, node_id), what)


# Nodes


def node_row(
    node_id: int,
    conversation_id: int,
    parent_id: int | None,
    node: NewNode | NodeRecord,
    created_at: datetime,
    sealing: Sealing,
) -> Row:
    """
    Return the row of a new node, in `NODE_COLUMNS`.

    Raises:
        ConversationError: Its text cannot be written.
    """
    require_text(node.content)
    usage = None if node.usage is None else json.dumps(dict(node.usage), allow_nan=False)
    token_ids = None if node.token_ids is None else pack_token_ids(node.token_ids)
    links = None if node.links is None else json.dumps(links_to_dict(node.links))
    moment, reason = time_text(created_at), node.finish_reason
    head = (conversation_id, parent_id, node.role, reason, moment, node.fingerprint)
    return sealed_node_row((node_id, None, *head, usage, token_ids, node.content, links), sealing)


def sealed_node_row(row: Row, sealing: Sealing) -> Row:
    """Return a plain row of `NODE_COLUMNS` sealed, with its new checksum."""
    node_id, _, *columns = row
    head, plain = columns[:_HEAD_LENGTH], columns[_HEAD_LENGTH:]
    sealed = [
        None if value is None else sealing.seal(value, _node_cell(column, row))
        for column, value in zip(_SEALED, plain, strict=True)
    ]
    return (node_id, _checksum((*head, *sealed)), *head, *sealed)


def _node_cell(column: str, row: Row) -> Cell:
    """Return the cell of a column; it says which sealed columns are set, so that none can be removed."""
    node_id, _, *columns = row
    is_set = "".join("0" if value is None else "1" for value in columns[_HEAD_LENGTH:])
    return ("nodes", column, node_id, *columns[:_HEAD_LENGTH], is_set)


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
        StoreCorruptError: It was sealed for another cell, or with another key.
    """
    node_id, _, _, parent_id, role, finish, created_at, fingerprint, *sealed = row
    usage, token_ids, text, links = sealed
    what = f"node {node_id}"

    def read(column: str, value: str | bytes) -> str:
        return sealing.read_text(value, _node_cell(column, row), what)

    return NodeRecord(
        id=node_id,
        parent_id=parent_id,
        role=role,
        content=read("content", text),
        token_ids=None
        if token_ids is None
        else unpack_token_ids(sealing.read_bytes(token_ids, _node_cell("token_ids", row), what)),
        finish_reason=finish,
        usage=None if usage is None else json.loads(read("usage", usage)),
        created_at=datetime.fromisoformat(created_at),
        fingerprint=fingerprint,
        links=None if links is None else links_from_dict(json.loads(read("links", links))),
    )


# Labels


def label_row(label: Label, sealing: Sealing) -> Row:
    """
    Return the row of a label, in `LABEL_COLUMNS`.

    Raises:
        ConversationError: Its note is not JSON that can be written.
    """
    require_writable(label.note, "What is noted of a conversation")
    head = (label.name, label.conversation_id, label.node_id)
    text = json.dumps(dict(label.note), allow_nan=False)
    return (*head, sealing.seal(text, ("labels", "note", *head)))


def read_label(row: Row, sealing: Sealing) -> Label:
    """
    Return the label in a row of `LABEL_COLUMNS`, with as much of its note as can be written again.

    Earlier versions accepted any note, and one that nobody can show must not hide the others.

    Raises:
        StoreCorruptError: The note is not what was written.
    """
    *head, sealed = row
    name, conversation_id, node_id = head
    text = sealing.read_text(sealed, ("labels", "note", *head), f"the label {name}")
    try:
        note = json.loads(text)
    except RecursionError:
        note = {}
    except ValueError:
        note = None
    if not isinstance(note, dict):
        raise sealing.not_as_written(f"the label {name}")
    return Label(
        name=name,
        conversation_id=conversation_id,
        node_id=node_id,
        note=note if is_writable(note) else mended(note),
    )


def time_text(moment: datetime) -> str:
    """Return a moment in UTC as the tables hold it."""
    return moment.isoformat(timespec="microseconds")


def text_to_keep(name: str) -> str:
    """Return the name of a model, which can be a path of any bytes, as text that can be written."""
    return name.encode(errors="replace").decode()


def _moment(text: str, sealing: Sealing) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise sealing.corrupt(f"{text!r} is no time") from None

"""
Rows of the journal's tables as values, and values as rows: columns, checksums, seals.

In an encrypted journal, values that reveal what was said are encrypted ("sealed"). The row of each node has a
checksum over all its columns as they are in the table. Knows no transactions, and runs statements on the
table `encryption` only.
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
"""
Table, column, id, and the plain columns of the row.

A sealed value is authenticated together with its cell: it cannot be decrypted in another cell.
"""

_HEAD: Final = "conversation_id, parent_id, role, finish_reason, created_at, fingerprint"
_HEAD_LENGTH: Final = len(_HEAD.split(", "))
_SEALED: Final = ("usage", "token_ids", "content", "links")
"""Columns that reveal what was said. `links` is the last, because rows of version 1 did not have it."""
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
    Encrypts and decrypts the values of one journal, and knows the mark by which it tells its key.

    Without a cipher, values stay as they are. With one, each value is bound to its cell: after it was moved
    to another row, or another column of its row was changed, it cannot be decrypted.
    """

    def __init__(self, path: Path, cipher: Cipher | None) -> None:
        self._path = path
        self._cipher = None if cipher is None else cipher.for_purpose("journal")
        self._mark: bytes | None = None  # what the journal had when it was opened

    @property
    def is_on(self) -> bool:
        """Return whether values are sealed."""
        return self._cipher is not None

    @property
    def overhead_bytes(self) -> int:
        """Return how many bytes sealing adds to a value; 0 in a plain journal."""
        return 0 if self._cipher is None else OVERHEAD_BYTES

    def seal(self, value: str | bytes, cell: Cell) -> str | bytes:
        """Return a text or bytes as they are written into the table."""
        if self._cipher is None:
            return value
        data = value.encode() if isinstance(value, str) else value
        return self._cipher.seal(data, context=_context(cell))

    def read_text(self, sealed: str | bytes, cell: Cell, what: str) -> str:
        """
        Return a value of the table as text.

        Args:
            sealed: The value in the table.
            cell: The cell that it was written into.
            what: The thing that the text belongs to, for the error: "node 7".

        Raises:
            StoreCorruptError: The value is not what was written into that cell.
        """
        if self._cipher is not None:
            return self.read_bytes(sealed, cell, what).decode()
        if isinstance(sealed, str):
            return sealed
        raise self.not_as_written(what)

    def read_bytes(self, sealed: str | bytes, cell: Cell, what: str) -> bytes:
        """Return a value of the table as bytes; otherwise as `read_text`."""
        if isinstance(sealed, bytes):
            if self._cipher is None:
                return sealed
            with suppress(StoreCorruptError):  # its message names neither file nor cell
                return self._cipher.open(sealed, context=_context(cell))
        raise self.not_as_written(what)

    def corrupt(self, found: str) -> StoreCorruptError:
        """Return the error for a damaged journal; *found* says what is wrong, without a full stop."""
        return corrupt_error(self._path, found)

    def not_as_written(self, what: str) -> StoreCorruptError:
        """Return the error for *what* in the journal whose checksum or seal is wrong."""
        return self.corrupt(f"{what} is not as it was written")

    def mark(self, connection: sqlite3.Connection) -> None:
        """Write the mark by which `read_mark` tells that the journal is encrypted with this key."""
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
            StoreEncryptedError: Another program has; what this one writes would be plain text in it.
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
            raise sealing.corrupt(f"the branch {tip!r} of {name!r} stands at no node of it")
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
    what = f"a branch of conversation {conversation_id}"
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
        ConversationError: Its text holds a lone surrogate.
    """
    require_text(node.content)
    if node.links is not None and node.links.reasoning is not None:
        require_text(node.links.reasoning)
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
    """
    Return the cell of a column.

    It holds a digit for each sealed column, 0 for NULL: setting one to NULL breaks the seals of the others.
    """
    node_id, _, *columns = row
    is_set = "".join("0" if value is None else "1" for value in columns[_HEAD_LENGTH:])
    return ("nodes", column, node_id, *columns[:_HEAD_LENGTH], is_set)


def is_sound(row: Row) -> bool:
    """Return whether the checksum of a row of `NODE_COLUMNS` is right."""
    return bool(row[1] == _checksum(row[2:]))


def _checksum(values: Row) -> int:
    """Return the checksum of `_CHECKED`; if `links` is NULL, as in version 1, which had no such column."""
    return checksum(*values) if values[-1] is not None else checksum(*values[:-1])


def read_node(row: Row, sealing: Sealing) -> NodeRecord:
    """
    Return the node in a row of `NODE_COLUMNS` whose checksum is right.

    Raises:
        StoreCorruptError: A value was sealed for another cell, or with another key.
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


def read_content(row: Row, sealing: Sealing) -> str:
    """
    Return the text in a row of `NODE_COLUMNS`, whose checksum the caller looks at.

    Raises:
        StoreCorruptError: It was sealed for another cell, or with another key.
    """
    content = row[2 + _HEAD_LENGTH + _SEALED.index("content")]
    if not sealing.is_on and isinstance(content, str):
        return content  # a search reads many, and what follows is needed for sealed ones
    return sealing.read_text(content, _node_cell("content", row), f"node {row[0]}")


# Labels


def label_row(label: Label, sealing: Sealing) -> Row:
    """
    Return the row of a label, in `LABEL_COLUMNS`.

    Raises:
        ConversationError: Its note is not JSON that `require_writable` accepts.
    """
    require_writable(label.note, "What is noted of a conversation")
    head = (label.name, label.conversation_id, label.node_id)
    text = json.dumps(dict(label.note), allow_nan=False)
    return (*head, sealing.seal(text, ("labels", "note", *head)))


def read_label(row: Row, sealing: Sealing) -> Label:
    """
    Return the label in a row of `LABEL_COLUMNS`.

    Earlier versions accepted notes that cannot be written as JSON. Such a note is repaired, so that one note
    does not make a whole list unreadable.

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
    """Return a moment in UTC in ISO 8601 with microseconds, so that the texts sort as the moments."""
    return moment.isoformat(timespec="microseconds")


def text_to_keep(name: str) -> str:
    """Return the name of a model as valid Unicode; it can be a path, and a path can be any bytes."""
    return name.encode(errors="replace").decode()


def _moment(text: str, sealing: Sealing) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise sealing.corrupt(f"{text!r} is no time") from None

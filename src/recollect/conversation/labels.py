"""
Names that a server gives out for conversations and their nodes, and what it remembers of each.

Each function is part of somebody else's transaction. Knows no protocol: a note is any JSON object.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from recollect.conversation.records import is_whole, is_writable, mended, require_writable
from recollect.conversation.sealing import Place, Sealing
from recollect.conversation.statements import require_conversation, require_node

LABEL_COLUMNS: Final = "label, conversation_id, node_id, note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A name for a conversation or one of its nodes."""

    name: str
    """Unique in a journal, and nothing that can be guessed."""
    conversation_id: int
    node_id: int | None = None
    """None: the conversation itself."""
    note: Mapping[str, Any] = field(default_factory=dict)


def write_label(connection: sqlite3.Connection, sealing: Sealing, label: Label) -> None:
    """
    Keep a label.

    Raises:
        UnknownConversationError: It has been deleted.
        UnknownNodeError: The node is not in it.
        ConversationError: Its note could not be written out again.
    """
    require_conversation(connection, label.conversation_id)
    require_node(connection, label.conversation_id, label.node_id)
    connection.execute(
        "INSERT OR REPLACE INTO labels (label, conversation_id, node_id, note) VALUES (?, ?, ?, ?)",
        (label.name, label.conversation_id, label.node_id, _note(sealing, label)),
    )


def read_label(
    connection: sqlite3.Connection, sealing: Sealing, name: str, namespace: str
) -> Label | None:
    """
    Return a label of a conversation in a namespace; None where there is none.

    The one that a conversation has had from the first is there, with an empty note, also where
    nothing was ever noted.
    """
    if not is_whole(name):  # which SQLite could not even be asked for
        return None
    row = connection.execute(
        "SELECT l.label, l.conversation_id, l.node_id, l.note FROM labels l "
        "JOIN conversations c ON c.id = l.conversation_id WHERE l.label = ? AND c.namespace = ?",
        (name, namespace),
    ).fetchone()
    if row is not None:
        return open_label(sealing, row)
    row = connection.execute(
        "SELECT id FROM conversations WHERE label = ? AND namespace = ?", (name, namespace)
    ).fetchone()
    return None if row is None else Label(name=name, conversation_id=row[0])


def notes_of(
    connection: sqlite3.Connection, sealing: Sealing, conversation_ids: Sequence[int]
) -> dict[int, Mapping[str, Any]]:
    """Return what is noted of conversations themselves, of those of which something is."""
    rows = connection.execute(
        "SELECT l.label, l.conversation_id, l.node_id, l.note FROM conversations c "
        "JOIN labels l ON l.label = c.label WHERE c.id IN (SELECT value FROM json_each(?))",
        (json.dumps(list(conversation_ids)),),
    ).fetchall()
    return {label.conversation_id: label.note for label in (open_label(sealing, r) for r in rows)}


def labels_of(
    connection: sqlite3.Connection, sealing: Sealing, conversation_id: int
) -> list[Label]:
    """Return all labels of a conversation."""
    rows = connection.execute(
        f"SELECT {LABEL_COLUMNS} FROM labels WHERE conversation_id = ?",  # noqa: S608
        (conversation_id,),
    ).fetchall()
    return [open_label(sealing, row) for row in rows]


def seal_labels(connection: sqlite3.Connection, plain: Sealing, sealing: Sealing) -> None:
    """Seal the notes of all labels, which are not."""
    rows = connection.execute(f"SELECT {LABEL_COLUMNS} FROM labels").fetchall()  # noqa: S608
    for row in rows:
        label = open_label(plain, row)
        connection.execute(
            "UPDATE labels SET note = ? WHERE label = ?", (_note(sealing, label), label.name)
        )


def open_label(sealing: Sealing, row: tuple[Any, ...]) -> Label:
    """
    Return the label in a row of `LABEL_COLUMNS`.

    Raises:
        StoreCorruptError: Its note is not what was written.
    """
    name, conversation_id, node_id, kept = row
    note = sealing.read_text(kept, _place(name, conversation_id, node_id), f"the label {name}")
    return Label(
        name=name,
        conversation_id=conversation_id,
        node_id=node_id,
        note=_read_note(note, sealing, name),
    )


def _read_note(text: str, sealing: Sealing, name: str) -> Mapping[str, Any]:
    """
    Return a note that can be shown.

    Versions before this one kept whatever they were given. A list has to show the others all the
    same, so of such a note what can be shown is.
    """
    try:
        note = json.loads(text)
    except RecursionError:
        return {}
    except ValueError:
        note = None
    if not isinstance(note, dict):
        raise sealing.not_as_written(f"the label {name}")
    shown: dict[str, Any] = note if is_writable(note) else mended(note)
    return shown


def _note(sealing: Sealing, label: Label) -> str | bytes:
    """Return a label's note as it is kept."""
    require_writable(label.note, "What is noted of a conversation")
    text = json.dumps(dict(label.note), allow_nan=False)
    return sealing.seal(text, _place(label.name, label.conversation_id, label.node_id))


def _place(name: str, conversation_id: int, node_id: int | None) -> Place:
    return ("labels", "note", name, conversation_id, node_id)

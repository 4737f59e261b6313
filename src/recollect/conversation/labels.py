"""
Names that a server gives out for conversations and their nodes, and what it remembers of each.

Each function is part of somebody else's transaction. Knows no protocol: a note is any JSON object.
"""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from recollect.conversation.statements import require_node, touch


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A name for a conversation or one of its nodes."""

    name: str
    """Unique in a journal, and nothing that can be guessed."""
    conversation_id: int
    node_id: int | None = None
    """None: the conversation itself."""
    note: Mapping[str, Any] = field(default_factory=dict)


def write_label(connection: sqlite3.Connection, label: Label) -> None:
    """
    Keep a label.

    Raises:
        UnknownConversationError: It has been deleted.
        UnknownNodeError: The node is not in it.
    """
    touch(connection, label.conversation_id, datetime.now(UTC))
    require_node(connection, label.conversation_id, label.node_id)
    note = json.dumps(dict(label.note), allow_nan=False)
    connection.execute(
        "INSERT OR REPLACE INTO labels (label, conversation_id, node_id, note) VALUES (?, ?, ?, ?)",
        (label.name, label.conversation_id, label.node_id, note),
    )


def read_label(connection: sqlite3.Connection, name: str, namespace: str) -> Label | None:
    """Return a label of a conversation in a namespace; None where there is none."""
    row = connection.execute(
        "SELECT l.label, l.conversation_id, l.node_id, l.note FROM labels l "
        "JOIN conversations c ON c.id = l.conversation_id WHERE l.label = ? AND c.namespace = ?",
        (name, namespace),
    ).fetchone()
    return None if row is None else _label(row)


def labels_of(connection: sqlite3.Connection, conversation_id: int) -> list[Label]:
    """Return all labels of a conversation."""
    rows = connection.execute(
        "SELECT label, conversation_id, node_id, note FROM labels WHERE conversation_id = ?",
        (conversation_id,),
    ).fetchall()
    return [_label(row) for row in rows]


def _label(row: tuple[Any, ...]) -> Label:
    name, conversation_id, node_id, note = row
    return Label(name=name, conversation_id=conversation_id, node_id=node_id, note=json.loads(note))

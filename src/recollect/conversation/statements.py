"""
What the journal says to its tables, one noun at a time.

Each function is part of somebody else's transaction; none begins or ends one.
"""

import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any

from recollect.conversation.records import ConversationInfo, ConversationRecord, require_name
from recollect.conversation.rows import (
    CONVERSATION_COLUMNS,
    conversation_info,
    text_to_keep,
    time_text,
)
from recollect.conversation.schema import NODE_FORMAT
from recollect.errors import NameTakenError, UnknownConversationError, UnknownNodeError


def conversation_infos(
    connection: sqlite3.Connection, path: Path, only_id: int | None = None, *, namespace: str = ""
) -> list[ConversationInfo]:
    """
    Return what a list says of all conversations of a namespace, or of one; last used first.

    Raises:
        StoreCorruptError: What is there is not what was written.
    """
    tips: dict[int, list[str]] = {}
    for conversation_id, tip in connection.execute(
        "SELECT conversation_id, name FROM tips WHERE ?1 IS NULL OR conversation_id = ?1 "
        "ORDER BY name",
        (only_id,),
    ):
        tips.setdefault(conversation_id, []).append(tip)
    columns = ", ".join(f"c.{column}" for column in CONVERSATION_COLUMNS.split(", "))
    rows = connection.execute(
        f"SELECT {columns}, "  # noqa: S608 - names of ours, no values
        "count(CASE WHEN n.role = 'assistant' THEN 1 END), coalesce(sum("
        "length(CAST(n.content AS BLOB)) + coalesce(length(n.token_ids), 0)), 0) "
        "FROM conversations c LEFT JOIN nodes n ON n.conversation_id = c.id "
        "WHERE c.id = ?1 OR (?1 IS NULL AND c.namespace = ?2) "
        "GROUP BY c.id ORDER BY c.updated_at DESC, c.id DESC",
        (only_id, namespace),
    )
    return [
        conversation_info(
            row, turns=turns, tips=tuple(tips.get(row[0], ())), size_bytes=size_bytes, path=path
        )
        for *row, turns, size_bytes in rows
    ]


def insert_conversation(
    connection: sqlite3.Connection,
    conversation: ConversationRecord,
    name: str | None = None,
    *,
    find_free: bool = False,
) -> int:
    """
    Write a conversation without its nodes and return its id.

    Args:
        name: None: its own.
        find_free: Add a number to a name that is taken.

    Raises:
        NameTakenError: Another conversation goes by that name.
        ConversationError: That cannot be a name.
    """
    wanted = require_name(name if name is not None else conversation.name)
    if find_free:
        wanted = _free_name(connection, wanted)
    require_free(connection, wanted)
    created = connection.execute(
        "INSERT INTO conversations "
        "(name, created_at, updated_at, model, fingerprint, format, namespace) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            wanted,
            time_text(conversation.created_at),
            time_text(conversation.updated_at),
            text_to_keep(conversation.model),
            conversation.fingerprint,
            NODE_FORMAT,
            conversation.namespace,
        ),
    ).lastrowid
    assert created is not None, "an insert gives an id"
    return created


def _free_name(connection: sqlite3.Connection, wanted: str) -> str:
    taken = {
        name
        for (name,) in connection.execute(
            "SELECT name FROM conversations WHERE name GLOB ?", (f"{wanted}*",)
        )
    }
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def require_free(connection: sqlite3.Connection, name: str, *, but: int | None = None) -> None:
    """
    Check that no conversation has a name, other than the one with the id *but*.

    Raises:
        NameTakenError: One has.
    """
    found = connection.execute("SELECT id FROM conversations WHERE name = ?", (name,)).fetchone()
    if found is not None and found[0] != but:
        raise NameTakenError(f"There is a conversation {name!r} already: take another name.")


def find_conversation(
    connection: sqlite3.Connection, name_or_id: str | int, namespace: str
) -> tuple[Any, ...]:
    """
    Return the row of a conversation, in `CONVERSATION_COLUMNS`.

    Raises:
        UnknownConversationError: There is none in that namespace.
    """
    column = "name" if isinstance(name_or_id, str) else "id"
    row: tuple[Any, ...] | None = None
    if not isinstance(name_or_id, str) or name_or_id.isprintable():
        row = connection.execute(
            f"SELECT {CONVERSATION_COLUMNS} FROM conversations "  # noqa: S608
            f"WHERE {column} = ? AND namespace = ?",
            (name_or_id, namespace),
        ).fetchone()
    if row is None:
        raise UnknownConversationError(
            f"There is no conversation {name_or_id!r}: `recollect conversations` lists them."
        )
    return row


def touch(connection: sqlite3.Connection, conversation_id: int, now: datetime) -> None:
    """
    Note that a conversation was used.

    Raises:
        UnknownConversationError: It has been deleted.
    """
    changed = connection.execute(
        "UPDATE conversations SET updated_at = ? WHERE id = ?", (time_text(now), conversation_id)
    ).rowcount
    if not changed:
        raise UnknownConversationError(
            "This conversation has been deleted meanwhile: begin a new one."
        )


def require_node(connection: sqlite3.Connection, conversation_id: int, node_id: int | None) -> None:
    """
    Check that a node, or the root, is of a conversation.

    Raises:
        UnknownNodeError: It is not.
    """
    found = connection.execute(
        "SELECT 1 FROM nodes WHERE conversation_id = ? AND id = ?", (conversation_id, node_id)
    ).fetchone()
    if node_id is not None and found is None:
        raise UnknownNodeError(
            f"This conversation has no node {node_id} in the journal: load it again."
        )


def tips_of(connection: sqlite3.Connection, conversation_id: int) -> list[tuple[str, int | None]]:
    """Return the names of a conversation's tips, sorted, and where each stands."""
    return connection.execute(
        "SELECT name, node_id FROM tips WHERE conversation_id = ? ORDER BY name",
        (conversation_id,),
    ).fetchall()


def write_tip(
    connection: sqlite3.Connection, conversation_id: int, name: str, node_id: int | None
) -> None:
    """
    Have a tip stand at a node of its conversation, or at the root.

    Raises:
        ConversationError: That cannot be its name.
    """
    connection.execute(
        "INSERT OR REPLACE INTO tips (conversation_id, name, node_id) VALUES (?, ?, ?)",
        (conversation_id, require_name(name, "tip"), node_id),
    )

"""
What the journal says to its tables, one noun at a time.

Each function is part of somebody else's transaction; none begins or ends one.
"""

import sqlite3
from datetime import UTC, datetime
from pathlib import Path

from recollect.conversation.records import ConversationInfo, ConversationRecord, require_name
from recollect.conversation.rows import (
    CONVERSATION_COLUMNS,
    Row,
    conversation_info,
    next_id,
    text_to_keep,
    time_text,
)
from recollect.conversation.schema import NODE_FORMAT
from recollect.conversation.sealing import Place, Sealing
from recollect.errors import NameTakenError, UnknownConversationError, UnknownNodeError


def empty_record(name: str, *, model: str, fingerprint: str, namespace: str) -> ConversationRecord:
    """Return a conversation that begins now."""
    now = datetime.now(UTC)
    return ConversationRecord(
        name=name,
        created_at=now,
        updated_at=now,
        model=model,
        fingerprint=fingerprint,
        namespace=namespace,
    )


def conversation_infos(
    connection: sqlite3.Connection,
    sealing: Sealing,
    path: Path,
    only_id: int | None = None,
    *,
    namespace: str = "",
) -> list[ConversationInfo]:
    """
    Return what a list says of all conversations of a namespace, or of one; last used first.

    Raises:
        StoreCorruptError: What is there is not what was written.
    """
    tips: dict[int, tuple[str, ...]] = {}
    for (conversation_id,) in connection.execute(
        "SELECT DISTINCT conversation_id FROM tips WHERE ?1 IS NULL OR conversation_id = ?1",
        (only_id,),
    ).fetchall():
        tips[conversation_id] = tuple(read_tips(connection, sealing, conversation_id))
    columns = ", ".join(f"c.{column}" for column in CONVERSATION_COLUMNS.split(", "))
    rows = connection.execute(
        f"SELECT {columns}, "  # noqa: S608 - names of ours, no values
        "count(CASE WHEN n.role = 'assistant' THEN 1 END), coalesce(sum("
        "length(CAST(n.content AS BLOB)) + coalesce(length(n.token_ids), 0)), 0) - "
        "?3 * (count(n.content) + count(n.token_ids)) "
        "FROM conversations c LEFT JOIN nodes n ON n.conversation_id = c.id "
        "WHERE c.id = ?1 OR (?1 IS NULL AND c.namespace = ?2) "
        "GROUP BY c.id ORDER BY c.updated_at DESC, c.id DESC",
        (only_id, namespace, sealing.overhead_bytes),
    )
    return [
        conversation_info(
            open_conversation(sealing, row),
            turns=turns,
            tips=tips.get(row[0], ()),
            size_bytes=size_bytes,
            path=path,
        )
        for *row, turns, size_bytes in rows
    ]


def read_tips(
    connection: sqlite3.Connection, sealing: Sealing, conversation_id: int
) -> dict[str, int | None]:
    """
    Return the named tips of a conversation in their order, and at which nodes they stand.

    Raises:
        StoreCorruptError: One is not what was written.
    """
    rows = connection.execute(
        "SELECT name, node_id FROM tips WHERE conversation_id = ?", (conversation_id,)
    )
    tips = {read_tip(sealing, conversation_id, *row): row[1] for row in rows}
    return dict(sorted(tips.items()))


def read_tip(sealing: Sealing, conversation_id: int, kept: str | bytes, node_id: int | None) -> str:
    """Return the name of a tip; raises as `read_tips` does."""
    what = f"a tip of conversation {conversation_id}"
    return sealing.read_text(kept, _tip_place(conversation_id, node_id), what)


def open_conversation(sealing: Sealing, row: Row) -> Row:
    """
    Return a row of `CONVERSATION_COLUMNS` with the names in it as they were given.

    Raises:
        StoreCorruptError: They are not what was written.
    """
    conversation_id, name, created_at, updated_at, model, fingerprint, *rest = row
    what = f"conversation {conversation_id}"
    name = sealing.read_text(name, _name_place(conversation_id), what)
    model = sealing.read_text(model, _model_place(conversation_id, fingerprint), what)
    return (conversation_id, name, created_at, updated_at, model, fingerprint, *rest)


def seal_conversation(
    connection: sqlite3.Connection, row: Row, plain: Sealing, sealing: Sealing
) -> None:
    """Seal the names in a plain row of `CONVERSATION_COLUMNS`, and its tips."""
    conversation_id, name, _, _, model, fingerprint, *_ = open_conversation(plain, row)
    tips = read_tips(connection, plain, conversation_id)
    write_name(connection, sealing, conversation_id, name)
    write_model(connection, sealing, conversation_id, model, fingerprint)
    connection.execute("DELETE FROM tips WHERE conversation_id = ?", (conversation_id,))
    for tip, node_id in tips.items():
        write_tip(connection, sealing, conversation_id, tip, node_id)


def insert_conversation(
    connection: sqlite3.Connection,
    sealing: Sealing,
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
        wanted = _free_name(connection, sealing, wanted)
    require_free(connection, sealing, wanted)
    created = next_id(connection, "conversations")
    model = text_to_keep(conversation.model)
    connection.execute(
        f"INSERT INTO conversations ({CONVERSATION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
        (
            created,
            sealing.seal(wanted, _name_place(created)),
            time_text(conversation.created_at),
            time_text(conversation.updated_at),
            sealing.seal(model, _model_place(created, conversation.fingerprint)),
            conversation.fingerprint,
            NODE_FORMAT,
            conversation.namespace,
        ),
    )
    return created


def write_name(
    connection: sqlite3.Connection, sealing: Sealing, conversation_id: int, name: str
) -> None:
    """Give a conversation a name that is free."""
    connection.execute(
        "UPDATE conversations SET name = ? WHERE id = ?",
        (sealing.seal(name, _name_place(conversation_id)), conversation_id),
    )


def write_model(
    connection: sqlite3.Connection,
    sealing: Sealing,
    conversation_id: int,
    model: str,
    fingerprint: str,
) -> None:
    """Note with which model a conversation goes on."""
    kept = sealing.seal(text_to_keep(model), _model_place(conversation_id, fingerprint))
    connection.execute(
        "UPDATE conversations SET model = ?, fingerprint = ? WHERE id = ?",
        (kept, fingerprint, conversation_id),
    )


def _ids_by_name(connection: sqlite3.Connection, sealing: Sealing) -> dict[str, int]:
    """Return all conversations; sealed names can be compared only when they are open."""
    return {
        sealing.read_text(name, _name_place(found), f"conversation {found}"): found
        for found, name in connection.execute("SELECT id, name FROM conversations")
    }


def _free_name(connection: sqlite3.Connection, sealing: Sealing, wanted: str) -> str:
    taken = _ids_by_name(connection, sealing)
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def require_free(
    connection: sqlite3.Connection, sealing: Sealing, name: str, *, but: int | None = None
) -> None:
    """
    Check that no conversation has a name, other than the one with the id *but*.

    Raises:
        NameTakenError: One has.
    """
    if _ids_by_name(connection, sealing).get(name, but) != but:
        raise NameTakenError(f"There is a conversation {name!r} already: take another name.")


def find_conversation(
    connection: sqlite3.Connection, sealing: Sealing, name_or_id: str | int, namespace: str
) -> Row:
    """
    Return the row of a conversation, in `CONVERSATION_COLUMNS`, with its names open.

    Raises:
        UnknownConversationError: There is none in that namespace.
    """
    wanted = (
        _ids_by_name(connection, sealing).get(name_or_id)
        if isinstance(name_or_id, str)
        else name_or_id
    )
    row: Row | None = connection.execute(
        f"SELECT {CONVERSATION_COLUMNS} FROM conversations WHERE id = ? AND namespace = ?",  # noqa: S608
        (wanted, namespace),
    ).fetchone()
    if row is None:
        raise UnknownConversationError(
            f"There is no conversation {name_or_id!r}: `recollect conversations` lists them."
        )
    return open_conversation(sealing, row)


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


def write_tip(
    connection: sqlite3.Connection,
    sealing: Sealing,
    conversation_id: int,
    name: str,
    node_id: int | None,
) -> None:
    """
    Have a tip stand at a node of its conversation, or at the root.

    Raises:
        ConversationError: That cannot be its name.
    """
    require_name(name, "tip")
    remove_tip(connection, sealing, conversation_id, name)
    connection.execute(
        "INSERT INTO tips (conversation_id, name, node_id) VALUES (?, ?, ?)",
        (conversation_id, sealing.seal(name, _tip_place(conversation_id, node_id)), node_id),
    )


def remove_tip(
    connection: sqlite3.Connection, sealing: Sealing, conversation_id: int, name: str
) -> bool:
    """Forget a tip, but not where it stood; return whether there was one of that name."""
    found = [
        kept
        for kept, at in connection.execute(
            "SELECT name, node_id FROM tips WHERE conversation_id = ?", (conversation_id,)
        ).fetchall()
        if read_tip(sealing, conversation_id, kept, at) == name
    ]
    for kept in found:
        connection.execute(
            "DELETE FROM tips WHERE conversation_id = ? AND name = ?", (conversation_id, kept)
        )
    return bool(found)


def _name_place(conversation_id: int) -> Place:
    return ("conversations", "name", conversation_id)


def _model_place(conversation_id: int, fingerprint: str) -> Place:
    return ("conversations", "model", conversation_id, fingerprint)


def _tip_place(conversation_id: int, node_id: int | None) -> Place:
    return ("tips", "name", conversation_id, node_id)

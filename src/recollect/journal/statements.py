"""
What the journal says to its tables, one noun at a time.

Each function is part of somebody else's transaction; none begins or ends one.
"""

import json
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from recollect.errors import NameTakenError, UnknownConversationError, UnknownNodeError
from recollect.journal.records import (
    ConversationInfo,
    ConversationRecord,
    Page,
    is_whole,
    require_name,
)
from recollect.journal.rows import (
    CONVERSATION_COLUMNS,
    INFO_COLUMNS,
    Place,
    Row,
    Sealing,
    conversation_info,
    next_id,
    text_to_keep,
    time_text,
)
from recollect.journal.schema import NODE_FORMAT


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
    namespace: str,
    page: Page | None = None,
) -> list[ConversationInfo]:
    """
    Return what a list says of all conversations of a namespace, or of a page; last used first.

    Reads one row for each conversation that it returns and one for each tip of those, and no text.

    Raises:
        UnknownConversationError: The page comes after a conversation that is not there.
        StoreCorruptError: What is there is not what was written.
    """
    after, order, limit = "", "DESC", -1  # no limit, to SQLite
    values: list[object] = [namespace]
    if page is not None:
        limit = page.limit
        order = "DESC" if page.newest_first else "ASC"
        if page.after is not None:
            after = f"AND (updated_at, id) {'<' if page.newest_first else '>'} (?, ?) "
            values += [_used_at(connection, page.after, namespace), page.after]
    rows = connection.execute(
        f"SELECT {INFO_COLUMNS} FROM conversations WHERE namespace = ? {after}"  # noqa: S608
        f"ORDER BY updated_at {order}, id {order} LIMIT ?",
        (*values, limit),
    ).fetchall()
    return _infos(connection, sealing, path, rows)


def conversation_info_of(
    connection: sqlite3.Connection, sealing: Sealing, path: Path, conversation_id: int
) -> ConversationInfo:
    """
    Return what a list says of one conversation, in whatever namespace.

    Raises:
        UnknownConversationError: There is none of that id.
        StoreCorruptError: As `conversation_infos`.
    """
    rows = connection.execute(
        f"SELECT {INFO_COLUMNS} FROM conversations WHERE id = ?",  # noqa: S608
        (conversation_id,),
    ).fetchall()
    if not rows:
        raise _unknown(conversation_id)
    return _infos(connection, sealing, path, rows)[0]


def _infos(
    connection: sqlite3.Connection, sealing: Sealing, path: Path, rows: Sequence[Row]
) -> list[ConversationInfo]:
    """Return what a list says of rows of `INFO_COLUMNS`."""
    tips: dict[int, list[str]] = {}
    ids = json.dumps([row[0] for row in rows])
    for conversation_id, name, node_id in connection.execute(
        "SELECT conversation_id, name, node_id FROM tips "
        "WHERE conversation_id IN (SELECT value FROM json_each(?))",
        (ids,),
    ):
        tip = read_tip(sealing, conversation_id, name, node_id)
        tips.setdefault(conversation_id, []).append(tip)
    return [
        conversation_info(
            open_conversation(sealing, row), tips=tuple(sorted(tips.get(row[0], ()))), path=path
        )
        for row in rows
    ]


def _used_at(connection: sqlite3.Connection, conversation_id: int, namespace: str) -> str:
    row = connection.execute(
        "SELECT updated_at FROM conversations WHERE id = ? AND namespace = ?",
        (conversation_id, namespace),
    ).fetchone()
    if row is None:
        raise _unknown(conversation_id)
    return str(row[0])


def _unknown(name_or_id: str | int) -> UnknownConversationError:
    return UnknownConversationError(
        f"There is no conversation {name_or_id!r}: `recollect conversations` lists them."
    )


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


def _id_by_name(connection: sqlite3.Connection, sealing: Sealing, name: str) -> int | None:
    """Return the conversation of that name; None where there is none."""
    if sealing.is_on:
        return _ids_by_name(connection, sealing).get(name)
    if not is_whole(name):  # which SQLite could not even be asked for
        return None
    row = connection.execute("SELECT id FROM conversations WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def _free_name(connection: sqlite3.Connection, sealing: Sealing, wanted: str) -> str:
    """
    Return a name that no conversation has: *wanted*, or that with a number.

    Numbers are given one after the other, so a free one is found by doubling and then by halving: a
    server that begins thousands on one day does not look for each at all of those before.
    """
    taken = _ids_by_name(connection, sealing) if sealing.is_on else None

    def name(number: int) -> str:
        return wanted if number == 1 else f"{wanted}-{number}"

    def is_taken(number: int) -> bool:
        if taken is not None:
            return name(number) in taken
        return _id_by_name(connection, sealing, name(number)) is not None

    if not is_taken(1):
        return wanted
    low, high = 1, 2
    while is_taken(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_taken(middle) else (low, middle)
    return name(high)


def require_free(
    connection: sqlite3.Connection, sealing: Sealing, name: str, *, but: int | None = None
) -> None:
    """
    Check that no conversation has a name, other than the one with the id *but*.

    Raises:
        NameTakenError: One has.
    """
    if _id_by_name(connection, sealing, name) not in {None, but}:
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
        _id_by_name(connection, sealing, name_or_id) if isinstance(name_or_id, str) else name_or_id
    )
    row: Row | None = connection.execute(
        f"SELECT {CONVERSATION_COLUMNS} FROM conversations WHERE id = ? AND namespace = ?",  # noqa: S608
        (wanted, namespace),
    ).fetchone()
    if row is None:
        raise _unknown(name_or_id)
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
        raise _deleted()


def conversation_names(
    connection: sqlite3.Connection, sealing: Sealing, conversation_id: int
) -> tuple[str, str]:
    """
    Return what a conversation is called, and the label that it has had from the first.

    Raises:
        StoreCorruptError: The name is not what was written.
    """
    name, label = connection.execute(
        "SELECT name, label FROM conversations WHERE id = ?", (conversation_id,)
    ).fetchone()
    what = f"conversation {conversation_id}"
    return sealing.read_text(name, _name_place(conversation_id), what), str(label)


def delete_conversation(connection: sqlite3.Connection, conversation_id: int) -> None:
    """Delete a conversation with all that belongs to it."""
    for statement in (
        "DELETE FROM labels WHERE conversation_id = ?",
        "DELETE FROM tips WHERE conversation_id = ?",
        # All nodes in one statement: their references to each other are checked at its end.
        "DELETE FROM nodes WHERE conversation_id = ?",
        "DELETE FROM conversations WHERE id = ?",
    ):
        connection.execute(statement, (conversation_id,))


def require_conversation(connection: sqlite3.Connection, conversation_id: int) -> None:
    """
    Check that a conversation is there.

    Raises:
        UnknownConversationError: It has been deleted.
    """
    found = connection.execute("SELECT 1 FROM conversations WHERE id = ?", (conversation_id,))
    if found.fetchone() is None:
        raise _deleted()


def _deleted() -> UnknownConversationError:
    return UnknownConversationError(
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

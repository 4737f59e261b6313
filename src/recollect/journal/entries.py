"""
What somebody says, as the journal keeps it: messages and the tip that moves with them, or nothing.

Each function is part of somebody else's transaction. Knows the order of the statements, not their SQL.

Names that a server gives out for conversations and their nodes, and what it remembers of each.

Each function is part of somebody else's transaction. Knows no protocol: a note is any JSON object.

Turn a plain journal into an encrypted one, all of it or nothing.

A second step, after the transaction, removes what the file and its log still hold of the plain one.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from recollect.errors import ConfigError
from recollect.journal.database import Database, corrupt_error
from recollect.journal.records import (
    Entry,
    TakenBack,
    Written,
    is_whole,
    is_writable,
    mended,
    require_writable,
)
from recollect.journal.rows import (
    CONVERSATION_COLUMNS,
    NODE_COLUMNS,
    Place,
    Sealing,
    insert_node,
    is_sound,
    seal_node,
)
from recollect.journal.statements import (
    conversation_names,
    delete_conversation,
    read_tips,
    require_conversation,
    require_node,
    seal_conversation,
    touch,
    write_model,
    write_tip,
)

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


def write_entry(
    connection: sqlite3.Connection, sealing: Sealing, conversation_id: int, entry: Entry
) -> Written:
    """
    Write an entry.

    Raises:
        UnknownConversationError: The conversation has been deleted.
        UnknownNodeError: The parent is not in it.
        ConversationError: A text, a note or the name of a tip cannot be kept.
    """
    now = datetime.now(UTC)
    touch(connection, conversation_id, now)
    require_node(connection, conversation_id, entry.parent_id)
    if entry.model is not None:
        name, fingerprint = entry.model
        write_model(connection, sealing, conversation_id, name, fingerprint)
    last, ids = entry.parent_id, list[int]()
    for node in entry.nodes:
        last = insert_node(connection, sealing, conversation_id, last, node, now)
        ids.append(last)
    tip = entry.tip
    tip_was = None
    if tip is not None:
        tips = read_tips(connection, sealing, conversation_id)
        if entry.leaves_others:
            tip = _own_tip(tips, tip, entry.seen)
        tip_was = tips.get(tip, entry.parent_id)
        write_tip(connection, sealing, conversation_id, tip, last)
    for other, number in entry.tips.items():
        at = None if number is None else ids[number]
        write_tip(connection, sealing, conversation_id, other, at)
    name, label = conversation_names(connection, sealing, conversation_id)
    if entry.note is not None:
        note = entry.note(ids)
        write_label(
            connection, sealing, Label(name=label, conversation_id=conversation_id, note=note)
        )
    return Written(
        conversation_id=conversation_id, name=name, ids=tuple(ids), tip=tip, tip_was=tip_was
    )


def remove_entry(
    connection: sqlite3.Connection,
    sealing: Sealing,
    conversation_id: int,
    ids: Sequence[int],
    tip: str | None,
    back_to: int | None,
    *,
    began: bool,
) -> TakenBack:
    """Let nodes go that nothing has come of; see `Journal.take_back`."""
    if tip is not None and read_tips(connection, sealing, conversation_id).get(tip) == ids[-1]:
        write_tip(connection, sealing, conversation_id, tip, back_to)
    if _is_used(connection, conversation_id, ids):
        return "stays"
    # All in one statement: their references to each other are checked at its end.
    connection.execute(
        "DELETE FROM nodes WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(list(ids)),)
    )
    left = connection.execute(
        "SELECT 1 FROM nodes WHERE conversation_id = ?1 "
        "UNION ALL SELECT 1 FROM labels WHERE conversation_id = ?1",
        (conversation_id,),
    ).fetchone()
    if not began or left is not None:
        return "gone"
    delete_conversation(connection, conversation_id)
    return "conversation gone"


def _is_used(connection: sqlite3.Connection, conversation_id: int, ids: Sequence[int]) -> bool:
    """Return whether something was written after nodes, or stands at one of them."""
    newest = connection.execute(
        "SELECT max(id) FROM nodes WHERE conversation_id = ?", (conversation_id,)
    ).fetchone()[0]
    named = connection.execute(
        "SELECT 1 FROM tips WHERE conversation_id = ?1 AND node_id >= ?2 "
        "UNION ALL SELECT 1 FROM labels WHERE conversation_id = ?1 AND node_id >= ?2",
        (conversation_id, ids[0]),
    ).fetchone()
    return newest != ids[-1] or named is not None


def _own_tip(tips: dict[str, int | None], tip: str, seen: int | None) -> str:
    """Return *tip* where it stands as it was seen, else the name of a branch that there is not yet."""
    if tips.get(tip, seen) == seen:
        return tip
    number = 2
    while f"{tip}-{number}" in tips:
        number += 1
    return f"{tip}-{number}"


def match_key(database: Database, sealing: Sealing, *, convert: bool) -> None:
    """
    Make sure that a journal is encrypted where there is a key, and only there.

    A plain one is encrypted at once while it is empty, and later only when somebody says so: anybody
    could have put it there. Killed at any moment, this goes on where it was called the next time.

    Raises:
        ConfigError: It is encrypted, and there is no key or another one; or it is not, and there is.
        StoreCorruptError: A row is not as it was written. Nothing was changed.
        StoreBusyError: Another program uses it; what it held before is still in the file.
    """
    with database.reading() as connection:
        is_encrypted = sealing.read_mark(connection)
    if not sealing.is_on:
        return
    if not is_encrypted:
        with database.writing() as connection:
            if not sealing.read_mark(connection):  # else another process was faster
                if not convert:
                    _require_empty(connection, database.path)
                _seal_all(connection, sealing, database.path)
                sealing.mark(connection)
    _clean(database)


def _require_empty(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("SELECT 1 FROM conversations").fetchone() is not None:
        raise ConfigError(
            f"{path} is not encrypted, and its folder is: if you know where it comes from, "
            "`recollect encrypt` converts it; else move it away."
        )


def _seal_all(connection: sqlite3.Connection, sealing: Sealing, path: Path) -> None:
    plain = Sealing(path, None)
    conversations = connection.execute(f"SELECT {CONVERSATION_COLUMNS} FROM conversations")  # noqa: S608
    for row in conversations.fetchall():
        seal_conversation(connection, row, plain, sealing)
    seal_labels(connection, plain, sealing)
    for (node_id,) in connection.execute("SELECT id FROM nodes").fetchall():
        row = connection.execute(
            f"SELECT {NODE_COLUMNS} FROM nodes WHERE id = ?",  # noqa: S608
            (node_id,),
        ).fetchone()
        if not is_sound(row):
            raise corrupt_error(path, f"node {node_id} is not as it was written")
        seal_node(connection, sealing, row)


def _clean(database: Database) -> None:
    """Remove the plain text that freed pages and the log still hold, once."""
    with database.reading() as connection:
        is_clean = connection.execute("SELECT is_clean FROM encryption").fetchone()[0]
    if not is_clean:
        database.rewrite()
        with database.writing() as connection:
            connection.execute("UPDATE encryption SET is_clean = 1")

"""
What somebody says, as the journal keeps it: messages and the tip that moves with them, or nothing.

Each function is part of somebody else's transaction. Knows the order of the statements, not their SQL.
"""

import json
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime

from recollect.conversation.labels import Label, write_label
from recollect.conversation.records import Entry, TakenBack, Written
from recollect.conversation.rows import insert_node
from recollect.conversation.sealing import Sealing
from recollect.conversation.statements import (
    conversation_names,
    delete_conversation,
    read_tips,
    require_node,
    touch,
    write_model,
    write_tip,
)


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

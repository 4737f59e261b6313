"""
Look through a journal for anything that cannot be.

Reads only; does not know how the rows came to be written.
"""

import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from recollect.conversation.labels import LABEL_COLUMNS, open_label
from recollect.conversation.rows import CONVERSATION_COLUMNS, NODE_COLUMNS, is_sound, read_node
from recollect.conversation.sealing import Sealing
from recollect.conversation.statements import open_conversation, read_tip
from recollect.errors import StoreCorruptError

_WRONG_COUNTS: Final = (
    "SELECT c.id FROM conversations c LEFT JOIN nodes n ON n.conversation_id = c.id GROUP BY c.id "
    "HAVING c.turns != count(CASE WHEN n.role = 'assistant' THEN 1 END) OR c.size_bytes != coalesce("
    "sum(length(CAST(n.content AS BLOB)) - ?1 + coalesce(length(n.token_ids) - ?1, 0)), 0)"
)
"""Finds conversations of which a list would say other numbers than their messages have; takes the
bytes that a seal adds."""

_RULES: Final = {
    "SELECT n.id FROM nodes n LEFT JOIN nodes p ON p.id = n.parent_id WHERE n.parent_id "
    "IS NOT NULL AND (p.id IS NULL OR p.conversation_id != n.conversation_id)": (
        "node {} hangs under a node that is not in its conversation"
    ),
    "SELECT id FROM nodes WHERE parent_id >= id": "node {} is not younger than its parent",
    "SELECT id FROM nodes WHERE token_ids IS NOT NULL AND role != 'assistant'": (
        "node {} has token ids and is no reply"
    ),
    "SELECT id FROM nodes WHERE length(token_ids) % 4 != 0": "node {} has a part of a token id",
    "SELECT id FROM nodes WHERE conversation_id NOT IN (SELECT id FROM conversations)": (
        "node {} is of no conversation"
    ),
    "SELECT t.name FROM tips t LEFT JOIN nodes n ON n.id = t.node_id AND n.conversation_id = "
    "t.conversation_id WHERE t.node_id IS NOT NULL AND n.id IS NULL": "tip {!r} stands at no node",
    "SELECT name FROM tips WHERE conversation_id NOT IN (SELECT id FROM conversations)": (
        "tip {!r} is of no conversation"
    ),
}
"""A query that finds what breaks a rule, and what to say of it. No parent is as old as its child
means that there is no cycle."""


def problems(connection: sqlite3.Connection, sealing: Sealing) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong; nothing for a sound journal."""
    found = list(_problems(connection, sealing))
    yield from found
    if not found:  # else the numbers follow from what was found
        for (what,) in connection.execute(_WRONG_COUNTS, (sealing.overhead_bytes,)):
            yield f"conversation {what} has other messages than its row counts"


def _problems(connection: sqlite3.Connection, sealing: Sealing) -> Iterator[str]:
    for (found,) in connection.execute("PRAGMA integrity_check"):
        if found != "ok":
            yield f"SQLite: {found}"
    for query, sentence in _RULES.items():
        for (what,) in connection.execute(query):
            yield sentence.format("(encrypted)" if isinstance(what, bytes) else what)
    for row in connection.execute(f"SELECT {NODE_COLUMNS} FROM nodes"):  # noqa: S608
        if not is_sound(row):
            yield f"node {row[0]} is not as it was written"
        elif sealing.is_on and not _opens(partial(read_node, row, sealing)):
            yield f"node {row[0]} does not open with the key"
    yield from _other_values(connection, sealing)


def _other_values(connection: sqlite3.Connection, sealing: Sealing) -> Iterator[str]:
    """Yield a sentence for each name and note that is not what was written; these have no checksum."""
    wrong = "does not open with the key" if sealing.is_on else "is not as it was written"
    for row in connection.execute(f"SELECT {CONVERSATION_COLUMNS} FROM conversations"):  # noqa: S608
        if not _opens(partial(open_conversation, sealing, row)):
            yield f"a name of conversation {row[0]} {wrong}"
    for row in connection.execute("SELECT conversation_id, name, node_id FROM tips"):
        if not _opens(partial(read_tip, sealing, *row)):
            yield f"a tip of conversation {row[0]} {wrong}"
    for row in connection.execute(f"SELECT {LABEL_COLUMNS} FROM labels"):  # noqa: S608
        if not _opens(partial(open_label, sealing, row)):
            yield f"the label {row[0]} {wrong}"


def _opens(read: Callable[[], object]) -> bool:
    try:
        read()
    except StoreCorruptError:
        return False
    return True

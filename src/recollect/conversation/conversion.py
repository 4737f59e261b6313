"""
Turn a plain journal into an encrypted one, all of it or nothing.

A second step, after the transaction, removes what the file and its log still hold of the plain one.
"""

import sqlite3
from pathlib import Path

from recollect.conversation.database import Database, corrupt_error
from recollect.conversation.labels import seal_labels
from recollect.conversation.rows import CONVERSATION_COLUMNS, NODE_COLUMNS, is_sound, seal_node
from recollect.conversation.sealing import Sealing
from recollect.conversation.statements import seal_conversation
from recollect.errors import ConfigError


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

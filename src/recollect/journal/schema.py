"""
The tables of the journal, version by version, and how an older file becomes a current one.

Knows SQL and nothing of what is written into the tables.
"""

import sqlite3
from collections.abc import Callable, Sequence
from typing import Final

from recollect.encryption import OVERHEAD_BYTES

Migration = Callable[[sqlite3.Connection], None]
"""Brings the tables from one version to the next, inside a transaction that is not its own."""

APPLICATION_ID: Final = 0x7265_636F
"""`reco`: tells a journal from any other SQLite file."""
NODE_FORMAT: Final = 1
"""How a conversation's nodes are encoded: token ids as little-endian int32, usage as JSON."""

_FIRST_TABLES: Final = (
    """
    CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        created_at TEXT NOT NULL,  -- ISO 8601, UTC, always with microseconds: sorts as text
        updated_at TEXT NOT NULL,
        model TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        format INTEGER NOT NULL
    )
    """,
    # Ids grow from parent to child, so a cycle cannot be written. AUTOINCREMENT: an id is never
    # given again, not even after its conversation was deleted. The long columns come last, so
    # that the others are read without them.
    """
    CREATE TABLE nodes (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation_id INTEGER NOT NULL REFERENCES conversations (id),
        parent_id INTEGER CHECK (parent_id < id),  -- NULL under the root
        role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant')),
        finish_reason TEXT,
        created_at TEXT NOT NULL,
        fingerprint TEXT,
        checksum INTEGER NOT NULL,
        usage TEXT,  -- JSON
        token_ids BLOB,
        content TEXT NOT NULL,
        CHECK (token_ids IS NULL OR (role = 'assistant' AND length(token_ids) % 4 = 0)),
        UNIQUE (conversation_id, id),
        FOREIGN KEY (conversation_id, parent_id) REFERENCES nodes (conversation_id, id)
    )
    """,
    # Without it, deleting a conversation looks through all nodes once for each that goes.
    "CREATE INDEX children ON nodes (conversation_id, parent_id)",
    """
    CREATE TABLE tips (
        conversation_id INTEGER NOT NULL REFERENCES conversations (id),
        name TEXT NOT NULL,
        node_id INTEGER,  -- NULL at the root
        PRIMARY KEY (conversation_id, name),
        FOREIGN KEY (conversation_id, node_id) REFERENCES nodes (conversation_id, id)
    ) WITHOUT ROWID
    """,
    # As above, for the tips' foreign key.
    "CREATE INDEX tips_of_nodes ON tips (conversation_id, node_id)",
)


def _create_tables(connection: sqlite3.Connection) -> None:
    # One by one: `executescript` would end the transaction.
    for statement in _FIRST_TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


# A check cannot be altered, so the table is made anew. Source: "Making Other Kinds Of Table Schema
# Changes" in SQLite's documentation of ALTER TABLE; references to `nodes` go by name and stay.
_TOOLS: Final = (
    """
    CREATE TABLE new_nodes (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation_id INTEGER NOT NULL REFERENCES conversations (id),
        parent_id INTEGER CHECK (parent_id < id),  -- NULL under the root
        role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant', 'tool')),
        finish_reason TEXT,
        created_at TEXT NOT NULL,
        fingerprint TEXT,
        checksum INTEGER NOT NULL,
        usage TEXT,  -- JSON
        links TEXT,  -- JSON: how it hangs together with calls of tools
        token_ids BLOB,
        content TEXT NOT NULL,
        CHECK (token_ids IS NULL OR (role = 'assistant' AND length(token_ids) % 4 = 0)),
        UNIQUE (conversation_id, id),
        FOREIGN KEY (conversation_id, parent_id) REFERENCES nodes (conversation_id, id)
    )
    """,
    """
    INSERT INTO new_nodes
    SELECT id, conversation_id, parent_id, role, finish_reason, created_at, fingerprint, checksum,
        usage, NULL, token_ids, content
    FROM nodes
    """,
    # The largest id ever given, which can be that of a node that was deleted.
    "DELETE FROM sqlite_sequence WHERE name = 'new_nodes'",
    "INSERT INTO sqlite_sequence SELECT 'new_nodes', seq FROM sqlite_sequence WHERE name = 'nodes'",
    "DROP TABLE nodes",
    "ALTER TABLE new_nodes RENAME TO nodes",
    "CREATE INDEX children ON nodes (conversation_id, parent_id)",
)


def _let_tools_speak(connection: sqlite3.Connection) -> None:
    for statement in _TOOLS:
        connection.execute(statement)


def _add_namespaces_and_labels(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE conversations ADD COLUMN namespace TEXT NOT NULL DEFAULT ''")
    # Names that a server gives out. A table of its own, so that one can come and go without
    # touching what was said.
    connection.execute(
        """
        CREATE TABLE labels (
            label TEXT PRIMARY KEY,
            conversation_id INTEGER NOT NULL REFERENCES conversations (id),
            node_id INTEGER,  -- NULL: of the conversation itself
            note TEXT NOT NULL  -- JSON
        ) WITHOUT ROWID
        """
    )
    connection.execute("CREATE INDEX labels_of_conversations ON labels (conversation_id, node_id)")


def _add_encryption(connection: sqlite3.Connection) -> None:
    # One row in an encrypted journal, none in another. What is sealed lies in the columns that it
    # always had, as a BLOB; they are NOT NULL and of no type that refuses one.
    connection.execute(
        """
        CREATE TABLE encryption (
            mark BLOB NOT NULL,  -- opens with the right key
            is_clean INTEGER NOT NULL  -- whether the file holds nothing any more of what it was before
        )
        """
    )


# What a list says of a conversation follows from its nodes, whoever writes them: also a process with an
# earlier version, which had the file open when it was brought to this one.
_SEAL_BYTES: Final = f"{OVERHEAD_BYTES} * (SELECT count(*) FROM encryption)"  # noqa: S608 - no value
_NODE_BYTES: Final = (
    "length(CAST({node}.content AS BLOB)) + coalesce(length({node}.token_ids), 0) - "
    "(1 + ({node}.token_ids IS NOT NULL)) * " + _SEAL_BYTES
)
_LIST_TRIGGERS: Final = (
    f"""
    CREATE TRIGGER count_new_nodes AFTER INSERT ON nodes BEGIN
        UPDATE conversations SET turns = turns + (NEW.role = 'assistant'),
            size_bytes = size_bytes + {_NODE_BYTES.format(node="NEW")}
        WHERE id = NEW.conversation_id;
    END
    """,  # noqa: S608 - as above
    f"""
    CREATE TRIGGER count_deleted_nodes AFTER DELETE ON nodes BEGIN
        UPDATE conversations SET turns = turns - (OLD.role = 'assistant'),
            size_bytes = size_bytes - ({_NODE_BYTES.format(node="OLD")})
        WHERE id = OLD.conversation_id;
    END
    """,  # noqa: S608 - as above
    """
    CREATE TRIGGER label_conversations AFTER INSERT ON conversations WHEN NEW.label IS NULL BEGIN
        UPDATE conversations SET label = 'conv_' || lower(hex(randomblob(16))) WHERE id = NEW.id;
    END
    """,
)


def _add_what_lists_say(connection: sqlite3.Connection) -> None:
    # So that a list reads one row a conversation and no text, and that asking for it writes nothing:
    # each conversation has the name that a server gives out for it from its first moment.
    for column in (
        "label TEXT",  # unique by an index; NULL in no row
        "turns INTEGER NOT NULL DEFAULT 0",  # replies, in all branches
        "size_bytes INTEGER NOT NULL DEFAULT 0",  # of texts and token ids, without their seals
    ):
        connection.execute(f"ALTER TABLE conversations ADD COLUMN {column}")
    connection.execute(
        "UPDATE conversations SET label = coalesce((SELECT min(l.label) FROM labels l "
        "WHERE l.conversation_id = conversations.id AND l.node_id IS NULL), "
        "'conv_' || lower(hex(randomblob(16)))), "
        "turns = (SELECT count(*) FROM nodes n WHERE n.conversation_id = conversations.id "
        "AND n.role = 'assistant')"
    )
    all_bytes = f"SELECT coalesce(sum({_NODE_BYTES.format(node='n')}), 0) FROM nodes n"  # noqa: S608 - as above
    connection.execute(
        f"UPDATE conversations SET size_bytes = ({all_bytes} WHERE n.conversation_id = conversations.id)"  # noqa: S608
    )
    connection.execute("CREATE UNIQUE INDEX conversations_by_label ON conversations (label)")
    connection.execute(
        "CREATE INDEX conversations_by_use ON conversations (namespace, updated_at, id)"
    )
    for statement in _LIST_TRIGGERS:
        connection.execute(statement)


MIGRATIONS: Final[tuple[Migration, ...]] = (
    _create_tables,
    _let_tools_speak,
    _add_namespaces_and_labels,
    _add_encryption,
    _add_what_lists_say,
)
"""The n-th brings a file from version n to n + 1; what has been released is never changed."""


def version(connection: sqlite3.Connection) -> int:
    """Return the version of the tables; 0: there are none yet."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def is_foreign(connection: sqlite3.Connection) -> bool:
    """Return whether the file holds tables that are not a journal's."""
    if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
        return False
    return connection.execute("SELECT 1 FROM sqlite_master").fetchone() is not None


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """
    Bring the tables to the newest version: all the way, or not at all.

    Of several processes that open the file at once, one does it.
    """
    if version(connection) >= len(migrations):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for number in range(version(connection), len(migrations)):
            migrations[number](connection)
            connection.execute(f"PRAGMA user_version = {number + 1}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise

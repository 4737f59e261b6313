"""
The tables of the journal, and the migrations from each version of them to the next.

Knows SQL, but not the values in the tables.
"""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache
from typing import Final

from recollect.encryption import OVERHEAD_BYTES

Migration = Callable[[sqlite3.Connection], None]
"""Changes the tables from one version to the next. The caller begins and ends the transaction."""

APPLICATION_ID: Final = 0x7265_636F
"""The letters `reco`; SQLite keeps it in the file's header, where it tells a journal from other files."""
NODE_FORMAT: Final = 1
"""Version of how a conversation's nodes are encoded: token ids as little-endian int32, usage as JSON."""

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
    # A child's id is larger than its parent's, so a cycle cannot be written. AUTOINCREMENT never reuses an
    # id, not even that of a deleted node. The long columns come last, because SQLite reads a row from its
    # start and need not read them for the others.
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
    # For the foreign key of `parent_id`: without it SQLite scans all nodes for each one it deletes.
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
    # For the foreign key of `tips.node_id`, which is checked when a node is deleted.
    "CREATE INDEX tips_of_nodes ON tips (conversation_id, node_id)",
)


def _create_tables(connection: sqlite3.Connection) -> None:
    # Not with `executescript`, which would commit the transaction.
    for statement in _FIRST_TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


# SQLite cannot alter a CHECK constraint, so the table is copied. Source: "Making Other Kinds Of Table
# Schema Changes" in SQLite's documentation of ALTER TABLE. Foreign keys refer to `nodes` by its name.
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
        links TEXT,  -- JSON: the tool calls that it makes or answers
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
    # AUTOINCREMENT's counter: the largest id ever given, possibly to a node that was deleted since.
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
    # Names that a server gives to conversations and nodes, in a table of their own so that adding or
    # deleting one changes no node.
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
    # The table has one row in an encrypted journal and none in a plain one. Encrypted values are BLOBs in
    # the columns that hold the plain values otherwise.
    connection.execute(
        """
        CREATE TABLE encryption (
            mark BLOB NOT NULL,  -- a known text, encrypted: tells whether a key is the right one
            is_clean INTEGER NOT NULL  -- whether no plain text is left in free pages and in the log
        )
        """
    )


# Triggers keep the columns `turns`, `size_bytes` and `label` right. A process of an earlier version that has
# the file open during the migration goes on writing without knowing these columns.
_SEAL_BYTES: Final = f"{OVERHEAD_BYTES} * (SELECT count(*) FROM encryption)"  # noqa: S608 - no value
"""Bytes that encryption adds to a value: 0 in a plain journal."""
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
    # A list of conversations reads one row for each and no texts. The label is given when a conversation is
    # created, so that listing conversations writes nothing.
    for column in (
        "label TEXT",  # unique by an index, and never NULL after the trigger has run
        "turns INTEGER NOT NULL DEFAULT 0",  # replies, in all branches
        "size_bytes INTEGER NOT NULL DEFAULT 0",  # of texts and token ids, as if they were plain
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


# The index of `journal.search`: all groups of three characters of each plain message, without their places.
# It holds no text of its own. FTS5 only marks what is deleted; `purge_index` overwrites it.
INDEX: Final = "search_index"
_INDEX: Final = (
    f"CREATE VIRTUAL TABLE {INDEX} USING fts5(content, content = 'nodes', content_rowid = 'id', "
    "detail = none, columnsize = 0, tokenize = 'trigram')"
)
_FORGET: Final = (
    f"INSERT INTO {INDEX} ({INDEX}, rowid, content) VALUES ('delete', OLD.id, OLD.content)"  # noqa: S608 - no value
)
_LEARN: Final = f"INSERT INTO {INDEX} (rowid, content) VALUES (NEW.id, NEW.content)"  # noqa: S608 - no value
_IS_PLAIN: Final = "typeof({row}.content) = 'text'"
"""Encrypted values are BLOBs, and nothing of them goes into the index."""
# FTS5 reads a text up to its first NUL. So messages with one are found by this index, whatever the words.
HAS_NUL: Final = "typeof(content) = 'text' AND instr(content, char(0)) > 0"
_NUL_INDEX: Final = f"CREATE INDEX nodes_with_nul ON nodes (id) WHERE {HAS_NUL}"
_INDEX_TRIGGERS: Final = (
    f"""
    CREATE TRIGGER index_new_nodes AFTER INSERT ON nodes WHEN {_IS_PLAIN.format(row="NEW")} BEGIN
        {_LEARN};
    END
    """,
    f"""
    CREATE TRIGGER index_deleted_nodes AFTER DELETE ON nodes WHEN {_IS_PLAIN.format(row="OLD")} BEGIN
        {_FORGET};
    END
    """,
    f"""
    CREATE TRIGGER index_former_texts AFTER UPDATE OF content ON nodes
    WHEN {_IS_PLAIN.format(row="OLD")} BEGIN
        {_FORGET};
    END
    """,
    f"""
    CREATE TRIGGER index_changed_texts AFTER UPDATE OF content ON nodes
    WHEN {_IS_PLAIN.format(row="NEW")} BEGIN
        {_LEARN};
    END
    """,
)


def _add_search(connection: sqlite3.Connection) -> None:
    if not can_index():
        return  # messages are then searched one by one
    connection.execute(_INDEX)
    connection.execute(
        f"INSERT INTO {INDEX} (rowid, content) "  # noqa: S608 - no value
        f"SELECT id, content FROM nodes WHERE {_IS_PLAIN.format(row='nodes')}"
    )
    for statement in (_NUL_INDEX, *_INDEX_TRIGGERS):
        connection.execute(statement)


@cache
def can_index() -> bool:
    """Return whether this SQLite has FTS5 with trigrams: it is 3.34 or later, and built with FTS5."""
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute("CREATE VIRTUAL TABLE one USING fts5(text, tokenize = 'trigram')")
        except sqlite3.OperationalError:
            return False
    return True


def has_index(connection: sqlite3.Connection) -> bool:
    """Return whether the file has an index, which this SQLite may be unable to use."""
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (INDEX,))
    return found.fetchone() is not None


def purge_index(connection: sqlite3.Connection, *, whole: bool = False) -> None:
    """
    Overwrite what the index has of deleted messages, which FTS5 only marks; or all that it has.

    Rewrites the index, which takes about 15 µs for each message in the journal (LOG.md, 2026-11-27).
    """
    if has_index(connection):
        command = "delete-all" if whole else "optimize"
        connection.execute(f"INSERT INTO {INDEX} ({INDEX}) VALUES (?)", (command,))  # noqa: S608 - no value


MOST_CHANGES: Final = 10_000
"""Notes of what has changed; the oldest go first. About 1 MB, and hours of many conversations."""

# What changes is noted by triggers, in the transaction that changes it: so whoever watches hears of each
# change once, in order, whichever process made it. A value of `name` is sealed where that of `tips` is.
_CHANGES: Final = (
    """
    CREATE TABLE changes (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        conversation_id INTEGER NOT NULL,
        node_id INTEGER,
        name,  -- of a branch, as in `tips`; of a deleted conversation its label
        namespace TEXT  -- of a deleted conversation
    )
    """,
    f"""
    CREATE TRIGGER forget_changes AFTER INSERT ON changes BEGIN
        DELETE FROM changes WHERE id <= NEW.id - {MOST_CHANGES};
    END
    """,  # noqa: S608 - no value
    """
    CREATE TRIGGER change_new_conversation AFTER INSERT ON conversations BEGIN
        INSERT INTO changes (kind, conversation_id) VALUES ('conversation.created', NEW.id);
    END
    """,
    """
    CREATE TRIGGER change_conversation AFTER UPDATE OF name, model ON conversations BEGIN
        INSERT INTO changes (kind, conversation_id) VALUES ('conversation.updated', NEW.id);
    END
    """,
    # The names of its branches go with it.
    """
    CREATE TRIGGER change_deleted_conversation AFTER DELETE ON conversations BEGIN
        DELETE FROM changes WHERE conversation_id = OLD.id;
        INSERT INTO changes (kind, conversation_id, name, namespace)
        VALUES ('conversation.deleted', OLD.id, OLD.label, OLD.namespace);
    END
    """,
    """
    CREATE TRIGGER change_new_node AFTER INSERT ON nodes BEGIN
        INSERT INTO changes (kind, conversation_id, node_id)
        VALUES ('message.created', NEW.conversation_id, NEW.id);
    END
    """,
    """
    CREATE TRIGGER change_deleted_node AFTER DELETE ON nodes BEGIN
        INSERT INTO changes (kind, conversation_id, node_id)
        VALUES ('message.deleted', OLD.conversation_id, OLD.id);
    END
    """,
    """
    CREATE TRIGGER change_tip AFTER INSERT ON tips BEGIN
        INSERT INTO changes (kind, conversation_id, node_id, name)
        VALUES ('tip.set', NEW.conversation_id, NEW.node_id, NEW.name);
    END
    """,
    """
    CREATE TRIGGER change_dropped_tip AFTER DELETE ON tips BEGIN
        INSERT INTO changes (kind, conversation_id, node_id, name)
        VALUES ('tip.dropped', OLD.conversation_id, OLD.node_id, OLD.name);
    END
    """,
    """
    CREATE TRIGGER change_label AFTER INSERT ON labels BEGIN
        INSERT INTO changes (kind, conversation_id, node_id)
        VALUES ('label.set', NEW.conversation_id, NEW.node_id);
    END
    """,
    """
    CREATE TRIGGER change_dropped_label AFTER DELETE ON labels BEGIN
        INSERT INTO changes (kind, conversation_id, node_id)
        VALUES ('label.set', OLD.conversation_id, OLD.node_id);
    END
    """,
)


def _note_changes(connection: sqlite3.Connection) -> None:
    for statement in _CHANGES:
        connection.execute(statement)


MIGRATIONS: Final[tuple[Migration, ...]] = (
    _create_tables,
    _let_tools_speak,
    _add_namespaces_and_labels,
    _add_encryption,
    _add_what_lists_say,
    _add_search,
    _note_changes,
)
"""The n-th, counted from 0, brings a file from version n to n + 1. A released one is never changed."""


def version(connection: sqlite3.Connection) -> int:
    """Return the version of the tables; 0 if the file has none yet."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def is_foreign(connection: sqlite3.Connection) -> bool:
    """Return whether the file has tables and is not a journal."""
    if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
        return False
    return connection.execute("SELECT 1 FROM sqlite_master").fetchone() is not None


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """
    Bring the tables to the newest version, in one transaction.

    If several processes open the file at once, the first to get the lock migrates it.
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

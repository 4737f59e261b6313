"""
The SQL of one transaction on the journal: conversations, their nodes, branches and labels.

`Journal` begins and ends the transaction. Nothing here knows sessions, models or protocols.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from recollect.errors import NameTakenError, UnknownConversationError, UnknownNodeError
from recollect.journal.records import (
    ConversationInfo,
    ConversationRecord,
    Entry,
    Label,
    NewNode,
    NodeRecord,
    Page,
    StoredConversation,
    TakenBack,
    Written,
    is_whole,
    require_name,
)
from recollect.journal.rows import (
    CONVERSATION_COLUMNS,
    INFO_COLUMNS,
    LABEL_COLUMNS,
    NODE_COLUMNS,
    Row,
    Sealing,
    conversation_info,
    conversation_row,
    is_sound,
    label_row,
    model_cell,
    name_cell,
    node_row,
    open_conversation,
    read_label,
    read_name,
    read_node,
    read_tip,
    sealed_node_row,
    stored_conversation,
    text_to_keep,
    time_text,
    tip_cell,
)

_NODE_VALUES: Final = ", ".join("?" * len(NODE_COLUMNS.split(", ")))
_NODE_SETTERS: Final = ", ".join(f"{name} = ?" for name in NODE_COLUMNS.split(", ")[1:])
_TIPS: Final = "SELECT name, node_id FROM tips WHERE conversation_id = ?"
_LABEL_ROW: Final = "l.label, l.conversation_id, l.node_id, l.note"
"""`LABEL_COLUMNS`, where `labels` is joined as `l`."""


class Statements:
    """
    What one transaction reads and writes.

    Valid as long as its transaction, on that transaction's thread. It owns nothing: the connection
    belongs to `Database`, the cipher to `Sealing`.
    """

    def __init__(self, connection: sqlite3.Connection, sealing: Sealing) -> None:
        self.connection: Final = connection
        self.sealing: Final = sealing

    # Conversations

    def infos(self, namespace: str, page: Page | None = None) -> list[ConversationInfo]:
        """
        Return the list entries of a namespace's conversations, or of one page of them.

        The last used comes first, unless the page says otherwise. Reads one row for each conversation that is
        returned and one for each of its branches, and no texts.

        Raises:
            UnknownConversationError: The page comes after a conversation that does not exist.
            StoreCorruptError: A row is not what was written.
        """
        after, order, limit = "", "DESC", -1  # SQLite takes -1 for no limit
        values: list[object] = [namespace]
        if page is not None:
            limit = page.limit
            order = "DESC" if page.newest_first else "ASC"
            if page.after is not None:
                after = f"AND (updated_at, id) {'<' if page.newest_first else '>'} (?, ?) "
                values += [self._used_at(page.after, namespace), page.after]
        return self._infos(
            f"WHERE namespace = ? {after}ORDER BY updated_at {order}, id {order} LIMIT ?",
            *values,
            limit,
        )

    def info(self, conversation_id: int) -> ConversationInfo:
        """
        Return the list entry of one conversation, whatever its namespace.

        Raises:
            UnknownConversationError: No conversation has that id.
            StoreCorruptError: A row is not what was written.
        """
        infos = self._infos("WHERE id = ?", conversation_id)
        if not infos:
            raise _unknown(conversation_id)
        return infos[0]

    def _infos(self, which: str, *values: object) -> list[ConversationInfo]:
        rows = self._all(f"SELECT {INFO_COLUMNS} FROM conversations {which}", *values)  # noqa: S608
        tips: dict[int, list[str]] = {}
        for conversation_id, name, node_id in self._all(
            "SELECT conversation_id, name, node_id FROM tips "
            "WHERE conversation_id IN (SELECT value FROM json_each(?))",
            json.dumps([row[0] for row in rows]),
        ):
            tip = read_tip(conversation_id, name, node_id, self.sealing)
            tips.setdefault(conversation_id, []).append(tip)
        return [
            conversation_info(
                open_conversation(row, self.sealing),
                tuple(sorted(tips.get(row[0], ()))),
                self.sealing,
            )
            for row in rows
        ]

    def _used_at(self, conversation_id: int, namespace: str) -> str:
        row = self._one(
            "SELECT updated_at FROM conversations WHERE id = ? AND namespace = ?",
            conversation_id,
            namespace,
        )
        if row is None:
            raise _unknown(conversation_id)
        return str(row[0])

    def find(self, name_or_id: str | int, namespace: str) -> Row:
        """
        Return the row of a conversation, in `CONVERSATION_COLUMNS`, with its names unsealed.

        Raises:
            UnknownConversationError: The namespace has no such conversation.
            StoreCorruptError: The row is not what was written.
        """
        wanted = self._id_by_name(name_or_id) if isinstance(name_or_id, str) else name_or_id
        row = self._one(
            f"SELECT {CONVERSATION_COLUMNS} FROM conversations WHERE id = ? AND namespace = ?",  # noqa: S608
            wanted,
            namespace,
        )
        if row is None:
            raise _unknown(name_or_id)
        return open_conversation(row, self.sealing)

    def load(self, name_or_id: str | int, namespace: str) -> StoredConversation:
        """
        Return a whole conversation.

        Raises:
            UnknownConversationError: The namespace has no such conversation.
            StoreVersionError: A newer version wrote its nodes.
            StoreCorruptError: A row is not what was written.
        """
        row = self.find(name_or_id, namespace)
        return stored_conversation(row, tuple(self.nodes(row[0])), self.tips(row[0]), self.sealing)

    def insert_conversation(
        self,
        conversation: ConversationRecord,
        name: str | None = None,
        *,
        find_free: bool = False,
    ) -> int:
        """
        Write a conversation without its nodes and return its id.

        Args:
            conversation: Its nodes and branches are ignored.
            name: The name to write; None: that of *conversation*.
            find_free: Whether to add a number to a name that is taken.

        Raises:
            NameTakenError: Another conversation has that name.
            ConversationError: The name is not one that `require_name` accepts.
        """
        wanted = require_name(name if name is not None else conversation.name)
        if find_free:
            wanted = self._free_name(wanted)
        self.require_free(wanted)
        new_id = self._next_id("conversations")
        self._run(
            f"INSERT INTO conversations ({CONVERSATION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            *conversation_row(new_id, wanted, conversation, self.sealing),
        )
        return new_id

    def write_name(self, conversation_id: int, name: str) -> None:
        """Rename a conversation; the caller has checked that the name is free."""
        sealed = self.sealing.seal(name, name_cell(conversation_id))
        self._run("UPDATE conversations SET name = ? WHERE id = ?", sealed, conversation_id)

    def write_model(self, conversation_id: int, model: str, fingerprint: str) -> None:
        """Write the name and the fingerprint of the model that a conversation goes on with."""
        cell = model_cell(conversation_id, fingerprint)
        self._run(
            "UPDATE conversations SET model = ?, fingerprint = ? WHERE id = ?",
            self.sealing.seal(text_to_keep(model), cell),
            fingerprint,
            conversation_id,
        )

    def delete_conversation(self, conversation_id: int) -> None:
        """Delete a conversation with its nodes, branches and labels."""
        for statement in (
            "DELETE FROM labels WHERE conversation_id = ?",
            "DELETE FROM tips WHERE conversation_id = ?",
            # All nodes in one statement: SQLite checks their references to each other at its end.
            "DELETE FROM nodes WHERE conversation_id = ?",
            "DELETE FROM conversations WHERE id = ?",
        ):
            self._run(statement, conversation_id)

    def require_free(self, name: str, *, but: int | None = None) -> None:
        """
        Check that no conversation has a name, except the one with the id *but*.

        Raises:
            NameTakenError: Another one has it.
        """
        if self._id_by_name(name) not in {None, but}:
            raise NameTakenError(f"There is a conversation {name!r} already: take another name.")

    def _ids_by_name(self) -> dict[str, int]:
        """Return the ids of all conversations by name. Sealed names have to be decrypted to be compared."""
        return {
            read_name(name, found, self.sealing): found
            for found, name in self._all("SELECT id, name FROM conversations")
        }

    def _id_by_name(self, name: str) -> int | None:
        if self.sealing.is_on:
            return self._ids_by_name().get(name)
        if not is_whole(name):  # SQLite accepts no lone surrogates
            return None
        row = self._one("SELECT id FROM conversations WHERE name = ?", name)
        return None if row is None else int(row[0])

    def _free_name(self, wanted: str) -> str:
        """
        Return *wanted*, or *wanted* with the lowest number that makes it free.

        Numbers are given in order, so a binary search finds the lowest free one. A server begins thousands of
        conversations on one day, and need not try all earlier numbers for each.
        """
        taken = self._ids_by_name() if self.sealing.is_on else None

        def name(number: int) -> str:
            return wanted if number == 1 else f"{wanted}-{number}"

        def is_taken(number: int) -> bool:
            if taken is not None:
                return name(number) in taken
            return self._id_by_name(name(number)) is not None

        if not is_taken(1):
            return wanted
        low, high = 1, 2
        while is_taken(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_taken(middle) else (low, middle)
        return name(high)

    # Nodes

    def insert_node(
        self,
        conversation_id: int,
        parent_id: int | None,
        node: NewNode | NodeRecord,
        created_at: datetime,
    ) -> int:
        """
        Write a node and return its new id.

        Raises:
            ConversationError: Its text holds a lone surrogate.
        """
        node_id = self._next_id("nodes")
        row = node_row(node_id, conversation_id, parent_id, node, created_at, self.sealing)
        self._run(f"INSERT INTO nodes ({NODE_COLUMNS}) VALUES ({_NODE_VALUES})", *row)  # noqa: S608
        return node_id

    def nodes(self, conversation_id: int) -> Iterator[NodeRecord]:
        """
        Yield the nodes of a conversation, parents first.

        Raises:
            StoreCorruptError: A row is not what was written.
        """
        seen: set[int | None] = {None}
        for row in self.connection.execute(
            f"SELECT {NODE_COLUMNS} FROM nodes WHERE conversation_id = ? ORDER BY id",  # noqa: S608
            (conversation_id,),
        ):
            if not is_sound(row):
                raise self.sealing.not_as_written(f"node {row[0]}")
            node = read_node(row, self.sealing)
            if node.parent_id not in seen:
                raise self.sealing.corrupt(f"node {node.parent_id} is missing")
            seen.add(node.id)
            yield node

    def node_ids(self, conversation_id: int) -> list[int]:
        """Return the ids of the nodes of a conversation, in the order in which they were written."""
        rows = self._all(
            "SELECT id FROM nodes WHERE conversation_id = ? ORDER BY id", conversation_id
        )
        return [node_id for (node_id,) in rows]

    def require_node(self, conversation_id: int, node_id: int | None) -> None:
        """
        Check that a node belongs to a conversation; None, the root, always does.

        Raises:
            UnknownNodeError: It does not.
        """
        found = self._one(
            "SELECT 1 FROM nodes WHERE conversation_id = ? AND id = ?", conversation_id, node_id
        )
        if node_id is not None and found is None:
            raise UnknownNodeError(
                f"This conversation has no node {node_id} in the journal: load it again."
            )

    def write_entry(self, conversation_id: int, entry: Entry) -> Written:
        """
        Write an entry: its nodes, and what it says of branches, model and note.

        Raises:
            UnknownConversationError: The conversation was deleted.
            UnknownNodeError: The parent is not a node of the conversation.
            ConversationError: A text, a note or the name of a branch cannot be written.
        """
        now = datetime.now(UTC)
        if not self._run(
            "UPDATE conversations SET updated_at = ? WHERE id = ?", time_text(now), conversation_id
        ):
            raise _deleted()
        self.require_node(conversation_id, entry.parent_id)
        if entry.model is not None:
            self.write_model(conversation_id, *entry.model)
        last, ids = entry.parent_id, list[int]()
        for node in entry.nodes:
            last = self.insert_node(conversation_id, last, node, now)
            ids.append(last)
        tip, tip_was = entry.tip, None
        if tip is not None:
            tips = self.tips(conversation_id)
            if entry.leaves_others:
                tip = _own_tip(tips, tip, entry.seen)
            tip_was = tips.get(tip, entry.parent_id)
            self.write_tip(conversation_id, tip, last)
        for other, number in entry.tips.items():
            self.write_tip(conversation_id, other, None if number is None else ids[number])
        name, label = self._one(
            "SELECT name, label FROM conversations WHERE id = ?", conversation_id
        ) or (b"", "")
        name = read_name(name, conversation_id, self.sealing)
        if entry.note is not None:
            note = entry.note(ids)
            self.write_label(Label(name=label, conversation_id=conversation_id, note=note))
        return Written(
            conversation_id=conversation_id, name=name, ids=tuple(ids), tip=tip, tip_was=tip_was
        )

    def take_back(
        self,
        conversation_id: int,
        ids: Sequence[int],
        *,
        tip: str | None,
        back_to: int | None,
        began: bool,
    ) -> TakenBack:
        """Delete nodes that nothing refers to; see `Journal.take_back`."""
        if tip is not None and self.tips(conversation_id).get(tip) == ids[-1]:
            self.write_tip(conversation_id, tip, back_to)
        if self._is_used(conversation_id, ids):
            return "stays"
        # All in one statement: SQLite checks their references to each other at its end.
        self._run(
            "DELETE FROM nodes WHERE id IN (SELECT value FROM json_each(?))", json.dumps(list(ids))
        )
        left = self._one(
            "SELECT 1 FROM nodes WHERE conversation_id = ?1 "
            "UNION ALL SELECT 1 FROM labels WHERE conversation_id = ?1",
            conversation_id,
        )
        if not began or left is not None:
            return "gone"
        self.delete_conversation(conversation_id)
        return "conversation gone"

    def _is_used(self, conversation_id: int, ids: Sequence[int]) -> bool:
        """Return whether anything was written after nodes, or a branch or label names one of them."""
        named = self._one(
            "SELECT 1 FROM tips WHERE conversation_id = ?1 AND node_id >= ?2 "
            "UNION ALL SELECT 1 FROM labels WHERE conversation_id = ?1 AND node_id >= ?2",
            conversation_id,
            ids[0],
        )
        newest = self._one("SELECT max(id) FROM nodes WHERE conversation_id = ?", conversation_id)
        return named is not None or newest != (ids[-1],)

    # Branches, which the tables call tips

    def tips(self, conversation_id: int) -> dict[str, int | None]:
        """
        Return the node at which each branch of a conversation stands, by name and sorted by it.

        Raises:
            StoreCorruptError: A name is not what was written.
        """
        tips = self._all(_TIPS, conversation_id)
        return dict(
            sorted((read_tip(conversation_id, name, at, self.sealing), at) for name, at in tips)
        )

    def write_tip(self, conversation_id: int, name: str, node_id: int | None) -> None:
        """
        Move a branch to a node of its conversation, None being the root; create it if it does not exist.

        Raises:
            ConversationError: The name is not one that `require_name` accepts.
        """
        require_name(name, "branch")
        self.remove_tip(conversation_id, name)
        sealed = self.sealing.seal(name, tip_cell(conversation_id, node_id))
        self._run(
            "INSERT INTO tips (conversation_id, name, node_id) VALUES (?, ?, ?)",
            conversation_id,
            sealed,
            node_id,
        )

    def remove_tip(self, conversation_id: int, name: str) -> bool:
        """Delete a branch, but none of its nodes; return whether it existed."""
        found = False
        for sealed, at in self._all(_TIPS, conversation_id):
            if read_tip(conversation_id, sealed, at, self.sealing) == name:
                self._run(
                    "DELETE FROM tips WHERE conversation_id = ? AND name = ?",
                    conversation_id,
                    sealed,
                )
                found = True
        return found

    # Labels

    def write_label(self, label: Label) -> None:
        """
        Write a label, and replace the label of that name if there is one.

        Raises:
            UnknownConversationError: The conversation was deleted.
            UnknownNodeError: The node is not one of the conversation.
            ConversationError: The note is not JSON that `require_writable` accepts.
        """
        if self._one("SELECT 1 FROM conversations WHERE id = ?", label.conversation_id) is None:
            raise _deleted()
        self.require_node(label.conversation_id, label.node_id)
        self._run(
            f"INSERT OR REPLACE INTO labels ({LABEL_COLUMNS}) VALUES (?, ?, ?, ?)",  # noqa: S608
            *label_row(label, self.sealing),
        )

    def find_label(self, name: str, namespace: str) -> Label | None:
        """
        Return the label of that name, of a conversation in a namespace; None if there is none.

        Each conversation has one label from its creation on, which is in its own row. Its note is empty until
        something is noted.
        """
        if not is_whole(name):  # SQLite accepts no lone surrogates
            return None
        row = self._one(
            f"SELECT {_LABEL_ROW} FROM labels l JOIN conversations c ON c.id = l.conversation_id "  # noqa: S608
            "WHERE l.label = ? AND c.namespace = ?",
            name,
            namespace,
        )
        if row is not None:
            return read_label(row, self.sealing)
        row = self._one(
            "SELECT id FROM conversations WHERE label = ? AND namespace = ?", name, namespace
        )
        return None if row is None else Label(name=name, conversation_id=row[0])

    def labels(self, conversation_id: int) -> list[Label]:
        """Return all labels of a conversation and of its nodes."""
        rows = self._all(
            f"SELECT {LABEL_COLUMNS} FROM labels WHERE conversation_id = ?",  # noqa: S608
            conversation_id,
        )
        return [read_label(row, self.sealing) for row in rows]

    def notes(self, conversation_ids: Sequence[int]) -> dict[int, Mapping[str, Any]]:
        """Return the notes of conversations by id; those without a note are left out."""
        rows = self._all(
            f"SELECT {_LABEL_ROW} FROM conversations c JOIN labels l ON l.label = c.label "  # noqa: S608
            "WHERE c.id IN (SELECT value FROM json_each(?))",
            json.dumps(list(conversation_ids)),
        )
        labels = [read_label(row, self.sealing) for row in rows]
        return {label.conversation_id: label.note for label in labels}

    def delete_label(self, name: str) -> None:
        """Delete a label, but not the node or the conversation that it names."""
        self._run("DELETE FROM labels WHERE label = ?", name)

    # Encryption

    def seal_all(self, plain: Sealing) -> None:
        """
        Encrypt every value of a plain journal that reveals what was said.

        Args:
            plain: A sealing without a cipher, which reads the journal as it is.

        Raises:
            StoreCorruptError: A row is not what was written.
        """
        source = Statements(self.connection, plain)
        for row in self._all(f"SELECT {CONVERSATION_COLUMNS} FROM conversations"):  # noqa: S608
            conversation_id, name, _, _, model, fingerprint, *_ = open_conversation(row, plain)
            tips = source.tips(conversation_id)
            self.write_name(conversation_id, name)
            self.write_model(conversation_id, model, fingerprint)
            self._run("DELETE FROM tips WHERE conversation_id = ?", conversation_id)
            for tip, node_id in tips.items():
                self.write_tip(conversation_id, tip, node_id)
        for row in self._all(f"SELECT {LABEL_COLUMNS} FROM labels"):  # noqa: S608
            name, *_, note = label_row(read_label(row, plain), self.sealing)
            self._run("UPDATE labels SET note = ? WHERE label = ?", note, name)
        for (node_id,) in self._all("SELECT id FROM nodes"):
            (row,) = self._all(f"SELECT {NODE_COLUMNS} FROM nodes WHERE id = ?", node_id)  # noqa: S608
            if not is_sound(row):
                raise self.sealing.not_as_written(f"node {node_id}")
            _, *sealed = sealed_node_row(row, self.sealing)
            self._run(f"UPDATE nodes SET {_NODE_SETTERS} WHERE id = ?", *sealed, node_id)  # noqa: S608
        self._run("DELETE FROM changes")  # they have names of branches as these were

    def _next_id(self, table: str) -> int:
        """
        Return the id that the next row of a table gets, which no row has had before.

        It has to be known before the row is written, because sealed values are bound to it. Nobody takes it
        meanwhile, since only one transaction writes at a time.
        """
        row = self._one("SELECT seq FROM sqlite_sequence WHERE name = ?", table)
        return 1 if row is None else int(row[0]) + 1

    def _one(self, sql: str, *values: object) -> Row | None:
        row: Row | None = self.connection.execute(sql, values).fetchone()
        return row

    def _all(self, sql: str, *values: object) -> list[Row]:
        return self.connection.execute(sql, values).fetchall()

    def _run(self, sql: str, *values: object) -> int:
        """Run a statement that writes; return how many rows it changed."""
        return self.connection.execute(sql, values).rowcount


def _own_tip(tips: Mapping[str, int | None], tip: str, seen: int | None) -> str:
    """Return *tip* if it stands at the node *seen*, else a name for a new branch: *tip* with a number."""
    if tips.get(tip, seen) == seen:
        return tip
    number = 2
    while f"{tip}-{number}" in tips:
        number += 1
    return f"{tip}-{number}"


def _unknown(name_or_id: str | int) -> UnknownConversationError:
    return UnknownConversationError(
        f"There is no conversation {name_or_id!r}: `recollect conversations` lists them."
    )


def _deleted() -> UnknownConversationError:
    return UnknownConversationError(
        "This conversation has been deleted meanwhile: begin a new one."
    )

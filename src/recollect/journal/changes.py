"""
What has changed in a journal since somebody last looked, whichever process changed it.

Triggers note each change in the transaction that makes it (`schema`). Here these notes become values,
with the names by which a server's clients know messages. Nothing is written.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from recollect.journal.records import NodeRecord, StoredConversation
from recollect.journal.rows import NODE_COLUMNS, Row, is_sound, read_name, read_node, read_tip
from recollect.journal.schema import MOST_CHANGES
from recollect.journal.statements import Statements

ChangeKind = Literal[
    "conversation.created",
    "conversation.updated",
    "conversation.deleted",
    "message.created",
    "message.renamed",
    "message.deleted",
    "branch.moved",
    "branch.deleted",
]

MOST_READ: Final = 500
"""Notes that are read at once; a reader that is told of more reads again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of one conversation."""

    kind: ChangeKind
    namespace: str
    conversation: str
    """The label of the conversation: the id by which a server's clients know it."""
    name: str | None = None
    """What a conversation is called now; None in all other changes."""
    item: str | None = None
    """The message, or where a branch stands; None: at the root."""
    was: str | None = None
    """What the message was called before."""
    parent: str | None = None
    """What a new message follows; None: the root."""
    branch: str | None = None
    """The branch that moved, or that a new message is on; None: no branch moved to it."""
    node: NodeRecord | None = None
    """A new message."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Some changes in their order, and where to go on."""

    changes: Sequence[Change]
    last: int
    """The number of the last note that was read."""
    is_whole: bool = True
    """Whether nothing between the last look and this one was forgotten."""
    is_all: bool = True
    """Whether there was nothing more to read."""


def item_name(label: str, number: int) -> str:
    """Return the id of a message: the *number*-th, counted from 1, of the conversation with a label."""
    return f"msg_{label.removeprefix('conv_')}_{number}"


def response_item(label: str) -> str:
    """Return the id of the message that a response is, by the label of the response."""
    return f"msg_{label.removeprefix('resp_')}"


def response_of(sql: Statements, conversation_id: int, node_id: int) -> str | None:
    """Return the label of the response that a message is, the last by name of several; None: it is none."""
    query = "SELECT label FROM labels WHERE conversation_id = ? AND node_id = ? ORDER BY label DESC LIMIT 1"
    row: Row | None = sql.connection.execute(query, (conversation_id, node_id)).fetchone()
    return None if row is None else row[0]


NamesOf = tuple[str | None, dict[int, str]]
"""The label of a conversation, None where it is gone, and ids of messages by those in the journal."""


def names_of(sql: Statements, conversation_id: int, node_ids: Sequence[int]) -> NamesOf:
    """Return by which ids a server's clients know a conversation and some of its messages."""
    query = "SELECT label FROM conversations WHERE id = ?"
    row: Row | None = sql.connection.execute(query, (conversation_id,)).fetchone()
    if row is None:
        return None, {}
    names = _Names(sql)
    return row[0], {one: names.item(conversation_id, row[0], one) for one in node_ids}


class _Names:
    """Names of messages, in one transaction."""

    def __init__(self, sql: Statements) -> None:
        self._sql = sql
        self._counted: dict[int, tuple[int, int]] = {}
        """By conversation, the message that was counted last, and its number."""

    def item(self, conversation_id: int, label: str, node_id: int) -> str:
        """Return the id of a message by which a server's clients know it."""
        response = response_of(self._sql, conversation_id, node_id)
        if response is not None:
            return response_item(response)
        return item_name(label, self.number(conversation_id, node_id))

    def number(self, conversation_id: int, node_id: int) -> int:
        """
        Return how many messages of a conversation there are up to one.

        Counts from the message that was asked for before: changes that follow each other are mostly about
        messages that do, and to count from the first one takes long in a conversation of thousands.
        """
        before, number = self._counted.get(conversation_id, (0, 0))
        first, last = sorted((before, node_id))
        query = "SELECT count(*) FROM nodes WHERE conversation_id = ? AND id > ? AND id <= ?"
        (count,) = self._sql.connection.execute(query, (conversation_id, first, last)).fetchone()
        number += int(count) if node_id > before else -int(count)
        self._counted[conversation_id] = node_id, number
        return number


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A whole conversation as it was after a change."""

    conversation: StoredConversation
    responses: Mapping[int, str]
    """The labels of those messages that are responses, by their ids."""
    change: int
    """The number of the last note when it was read, or found to be as it was."""


def snapshot(
    sql: Statements, conversation_id: int, namespace: str, known: Snapshot | None
) -> Snapshot:
    """
    Return a conversation as it is now.

    Args:
        sql: The transaction.
        conversation_id: Of the conversation.
        namespace: Whose it is.
        known: As it was before. Where nothing has changed since, no row of it is read, and what is returned
            has the same conversation.

    Raises:
        UnknownConversationError: The namespace has no such conversation.
        StoreCorruptError, StoreVersionError: As `Statements.load`.
    """
    last = last_change(sql)
    if known is not None and _is_unchanged(sql, conversation_id, known.change, last):
        return replace(known, change=last)
    query = (
        "SELECT node_id, label FROM labels WHERE conversation_id = ? AND node_id IS NOT NULL "
        "ORDER BY label"
    )
    return Snapshot(
        conversation=sql.load(conversation_id, namespace),
        responses=dict(sql.connection.execute(query, (conversation_id,)).fetchall()),
        change=last,
    )


def _is_unchanged(sql: Statements, conversation_id: int, since: int, last: int) -> bool:
    """Return whether no note after *since* is about a conversation; False where notes were forgotten."""
    if not 0 <= last - since <= MOST_CHANGES:
        return False
    query = "SELECT 1 FROM changes WHERE id > ? AND conversation_id = ? LIMIT 1"
    return sql.connection.execute(query, (since, conversation_id)).fetchone() is None


def last_change(sql: Statements) -> int:
    """Return the number of the last note; 0: there was none."""
    query = "SELECT seq FROM sqlite_sequence WHERE name = 'changes'"
    row: Row | None = sql.connection.execute(query).fetchone()
    return 0 if row is None else int(row[0])


def changes_after(sql: Statements, after: int, namespaces: Collection[str]) -> Changes:
    """
    Return what has changed in some namespaces since the note number *after*.

    Raises:
        StoreCorruptError: A row is not what was written.
    """
    last = last_change(sql)
    # Some notes were forgotten, or the file is another one by now.
    if last - after > MOST_CHANGES or last < after:
        return Changes((), last, is_whole=False)
    rows = sql.connection.execute(
        "SELECT c.id, c.kind, c.conversation_id, c.node_id, c.name, coalesce(v.namespace, c.namespace), "
        "coalesce(v.label, c.name), v.name FROM changes c LEFT JOIN conversations v "
        "ON v.id = c.conversation_id WHERE c.id > ? ORDER BY c.id LIMIT ?",
        (after, MOST_READ),
    ).fetchall()
    is_all = len(rows) < MOST_READ
    # A branch moves by two notes in a row, and its second one must not be read by itself.
    while not is_all and len(rows) > 1 and rows[-1][1] == "tip.dropped":
        rows.pop()
    if rows:
        last = int(rows[-1][0])
    return Changes(_Reading(sql, rows, namespaces).changes(), last, is_all=is_all)


class _Reading:
    """The notes of one transaction on their way to changes."""

    def __init__(self, sql: Statements, rows: Sequence[Row], namespaces: Collection[str]) -> None:
        self._sql = sql
        self._names = _Names(sql)
        self._rows = [row for row in rows if row[5] in namespaces]
        self._tips = [
            (number, row[2], row[3], self._branch(row))
            for number, row in enumerate(self._rows)
            if row[1] == "tip.set" and row[7] is not None
        ]
        self._begun = {row[2] for row in self._rows if row[1] == "conversation.created"}
        self._new = {row[3] for row in self._rows if row[1] == "message.created"}

    def changes(self) -> list[Change]:
        """Return the changes, without those that were undone by a later one or say nothing new."""
        found: list[Change] = []
        for number, row in enumerate(self._rows):
            change = self._change(number, row)
            if change is not None and (not found or change != found[-1]):
                found.append(change)
        return found

    def _change(self, number: int, row: Row) -> Change | None:
        _, kind, conversation_id, node_id, _, namespace, label, sealed = row
        if kind == "conversation.deleted":
            return Change(kind=kind, namespace=namespace, conversation=label)
        if sealed is None:  # deleted since, which a later note says
            return None
        if kind in ("tip.set", "tip.dropped"):
            return self._moved(number, row)
        if node_id is not None:
            return self._about_message(number, row)
        if kind == "label.set" and conversation_id in self._begun:
            return None  # a note of what is new
        name = read_name(sealed, conversation_id, self._sql.sealing)
        told: ChangeKind = (
            "conversation.created" if kind == "conversation.created" else "conversation.updated"
        )
        return Change(kind=told, namespace=namespace, conversation=label, name=name)

    def _about_message(self, number: int, row: Row) -> Change | None:
        _, kind, conversation_id, node_id, _, namespace, label, _ = row
        if kind == "message.created":
            return self._message(number, row)
        if kind == "label.set":
            return self._renamed(row)
        item = item_name(label, self._names.number(conversation_id, node_id) + 1)
        return Change(kind=kind, namespace=namespace, conversation=label, item=item)

    def _message(self, number: int, row: Row) -> Change | None:
        conversation_id, node_id = row[2], row[3]
        query = f"SELECT {NODE_COLUMNS} FROM nodes WHERE id = ?"  # noqa: S608 - no value
        stored = self._sql.connection.execute(query, (node_id,)).fetchone()
        if stored is None:  # taken back since
            return None
        if not is_sound(stored):
            raise self._sql.sealing.not_as_written(f"node {node_id}")
        node = read_node(stored, self._sql.sealing)
        branch = next(
            (
                name
                for at, whose, tip, name in self._tips
                if at > number and whose == conversation_id and tip is not None and tip >= node_id
            ),
            None,
        )
        return Change(
            kind="message.created",
            namespace=row[5],
            conversation=row[6],
            item=self._item(row, node_id),
            parent=self._item(row, node.parent_id),
            branch=branch,
            node=node,
        )

    def _renamed(self, row: Row) -> Change | None:
        """Return what a message is called now; None where its own change says so."""
        if row[3] in self._new:
            return None
        was = item_name(row[6], self._names.number(row[2], row[3]))
        return Change(
            kind="message.renamed",
            namespace=row[5],
            conversation=row[6],
            item=self._item(row, row[3]),
            was=was,
        )

    def _moved(self, number: int, row: Row) -> Change | None:
        """Return where a branch stands; None where a later note of this reading says so."""
        branch = self._branch(row)
        if any(
            at > number and whose == row[2] and name == branch for at, whose, _, name in self._tips
        ):
            return None
        is_set = row[1] == "tip.set"
        return Change(
            kind="branch.moved" if is_set else "branch.deleted",
            namespace=row[5],
            conversation=row[6],
            branch=branch,
            item=self._item(row, row[3]),
        )

    def _branch(self, row: Row) -> str:
        return read_tip(row[2], row[4], row[3], self._sql.sealing)

    def _item(self, row: Row, node_id: int | None) -> str | None:
        if node_id is None:
            return None
        return self._names.item(row[2], row[6], node_id)

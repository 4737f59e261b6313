"""
The journal: conversations on disk, so that a turn that was reported finished survives whatever comes.

Knows no model and no session. `Statements` has the SQL, `Database` the transactions and the file,
`Sealing` the cipher; here is what one call does, and the audit of the whole file. At the end: the
history of what was typed into chats, which must forget a conversation that is deleted. It has the
format of prompt_toolkit's `FileHistory`: a line `# TIME`, then each line of an entry after a `+`.
"""

import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from recollect import config, files
from recollect.encryption import Cipher
from recollect.errors import ConfigError, StoreCorruptError, StoreError, UnknownConversationError
from recollect.journal import changes as noted
from recollect.journal.changes import Changes, NamesOf, Snapshot
from recollect.journal.database import BUSY_TIMEOUT_S, Database
from recollect.journal.records import (
    ConversationInfo,
    ConversationRecord,
    Entry,
    Hit,
    Label,
    NewNode,
    NodeRecord,
    Page,
    StoredConversation,
    TakenBack,
    Written,
    require_name,
)
from recollect.journal.rows import (
    CONVERSATION_COLUMNS,
    LABEL_COLUMNS,
    NODE_COLUMNS,
    Sealing,
    is_sound,
    open_conversation,
    read_label,
    read_node,
    read_tip,
)
from recollect.journal.schema import purge_index
from recollect.journal.search import Query, Search, find_hits
from recollect.journal.statements import Statements

JOURNAL_NAME: Final = "conversations.sqlite3"


class Journal:
    """
    All conversations of a user, with all their branches.

    Owns one file. Any number of threads and processes may use it at once: each call is one
    transaction, ids come from the file, and what two of them say after the same node becomes two
    branches. A call that raises has changed nothing.

    Invariants:
        1. The file is sound, as SQLite sees it.
        2. The parent of a node is an older node of the same conversation.
        3. Only replies have token ids.
        4. Nodes and tips belong to conversations, and tips stand at nodes of theirs.
        5. What is read is what was written: each node has a checksum.
        6. With a cipher, texts, token ids, usage, tool calls, notes and names lie sealed in the file.
    """

    def __init__(self, database: Database, sealing: Sealing) -> None:
        self._database = database
        self._sealing = sealing

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        cipher: Cipher | None = None,
        convert: bool = False,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> Self:
        """
        Return the journal in a file, which is created or brought to the newest version if needed.

        Args:
            path: Usually `JOURNAL_NAME` in `config.home()`. A new file and its folder can be read
                by their owner only.
            cipher: Of the folder that it is in, if that is encrypted. A new one is, then.
            convert: Encrypt a plain one, for good, so that nothing of it stays in the file.
            busy_timeout_s: How long each call waits for others that use the file.

        Raises:
            StoreBusyError: Somebody else holds it.
            StoreCorruptError: It is damaged, or something else. It was left as it is.
            StoreVersionError: A newer version wrote it. It was left as it is.
            ConfigError: It is encrypted, and there is no key or another one; or it is plain, there
                is a key, and it is not to be converted.
            StoreError: It cannot be opened.
        """
        sealing = Sealing(path, cipher)
        database = Database(path, busy_timeout_s=busy_timeout_s)
        try:
            _match_key(database, sealing, convert=convert)
        except BaseException:
            database.close()
            raise
        return cls(database, sealing)

    @property
    def path(self) -> Path:
        """Return where the file is."""
        return self._database.path

    def conversations(
        self, namespace: str = "", *, page: Page | None = None
    ) -> list[ConversationInfo]:
        """
        Return all conversations of a namespace, or a page of them; the one that was used last first.

        Reads no text of theirs, so it costs the same however much was said.

        Raises:
            UnknownConversationError: The page comes after a conversation that is not there.
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return sql.infos(namespace, page)

    def info(self, conversation_id: int) -> ConversationInfo:
        """
        Return what a list says of one conversation, in whatever namespace.

        Raises:
            UnknownConversationError: There is none of that id.
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return sql.info(conversation_id)

    def find(self, name: str, *, namespace: str = "") -> ConversationInfo | None:
        """
        Return what a list says of a conversation of a namespace; None where none has that name.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            try:
                return sql.info(sql.find(name, namespace)[0])
            except UnknownConversationError:
                return None

    def create(
        self, name: str | None = None, *, model: str, fingerprint: str, namespace: str = ""
    ) -> ConversationInfo:
        """
        Begin a conversation.

        Args:
            name: None: today's date, with a number where there is such a one already.
            model: What the user calls the model.
            fingerprint: Of that model.
            namespace: Who may see it. Names are unique across all of them.

        Raises:
            NameTakenError: Another conversation goes by that name.
            ConversationError: That cannot be a name.
            StoreError: It cannot be written.
        """
        empty = _empty(name, model, fingerprint, namespace)
        with self._writing() as sql:
            return sql.info(sql.insert_conversation(empty, find_free=name is None))

    def begin(
        self,
        name: str | None,
        entry: Entry,
        *,
        model: str,
        fingerprint: str,
        namespace: str = "",
        deadline: float | None = None,
    ) -> Written:
        """
        Begin a conversation with something in it, all of it or nothing.

        Args:
            name, model, fingerprint, namespace: As for `create`.
            entry: Its beginning.
            deadline: When not to wait for others any longer, by `time.monotonic`; None: after
                the time that `open` was told.

        Raises:
            NameTakenError, ConversationError, StoreError: As `create` does.
        """
        empty = _empty(name, model, fingerprint, namespace)
        with self._writing(deadline) as sql:
            conversation_id = sql.insert_conversation(empty, find_free=name is None)
            return sql.write_entry(conversation_id, entry)

    def add(
        self, conversation: ConversationRecord, name: str | None = None, *, find_free: bool = False
    ) -> ConversationInfo:
        """
        Keep a whole conversation, as an import gives it; its nodes get ids of this journal.

        Args:
            conversation: Its order of nodes stays, so its branches stay in their order.
            name: None: its own.
            find_free: Whether to add a number to a name that is taken.

        Raises:
            NameTakenError, ConversationError, StoreError: As `create` does.
        """
        with self._writing() as sql:
            conversation_id = sql.insert_conversation(conversation, name, find_free=find_free)
            ids: dict[int | None, int | None] = {None: None}
            for node in conversation.nodes:
                parent_id = ids[node.parent_id]
                ids[node.id] = sql.insert_node(conversation_id, parent_id, node, node.created_at)
            for tip, node_id in conversation.tips.items():
                sql.write_tip(conversation_id, tip, ids[node_id])
            return sql.info(conversation_id)

    def append(
        self,
        conversation_id: int,
        parent_id: int | None,
        nodes: Sequence[NewNode | NodeRecord],
        *,
        tip: str | None = None,
    ) -> list[int]:
        """
        Keep a turn; it is on the disk when this returns.

        Args:
            conversation_id: Of the conversation.
            parent_id: The node that the first one follows; None: the root.
            nodes: Each follows the one before it; of one that is kept already, a copy is.
            tip: Its name, to have it stand at the last of them.

        Returns:
            Their ids, each larger than any that was given before.

        Raises:
            UnknownConversationError: It has been deleted.
            UnknownNodeError: The parent is not in it.
            ConversationError: A text, or the tip's name, cannot be kept.
            StoreError: It cannot be written.
        """
        entry = Entry(nodes=nodes, parent_id=parent_id, tip=tip)
        return list(self.write(conversation_id, entry).ids)

    def write(
        self, conversation_id: int, entry: Entry, *, deadline: float | None = None
    ) -> Written:
        """
        Keep an entry; it is on the disk when this returns.

        Args:
            conversation_id: Of the conversation.
            entry: What is written; without nodes, the tip alone moves, to the parent.
            deadline: As in `begin`.

        Raises:
            UnknownConversationError, UnknownNodeError, ConversationError, StoreError: As `append`.
        """
        with self._writing(deadline) as sql:
            return sql.write_entry(conversation_id, entry)

    def take_back(
        self,
        conversation_id: int,
        ids: Sequence[int],
        *,
        tip: str | None,
        back_to: int | None,
        began: bool,
    ) -> TakenBack:
        """
        Let nodes go again that were written last, and that nothing has come of.

        Where others have written since, or have named such a node, the nodes stay: they have been
        seen. The tip goes back in any case, unless somebody has moved it.

        Args:
            conversation_id: Of the conversation.
            ids: Of the nodes, each the parent of the next.
            tip: Which was moved to the last of them; None: none was.
            back_to: Where it stood before; None is the root.
            began: Whether the conversation began with them, and goes with them.

        Raises:
            StoreError: It cannot be written.
        """
        with self._writing() as sql:
            return sql.take_back(conversation_id, ids, tip=tip, back_to=back_to, began=began)

    def set_tip(self, conversation_id: int, name: str, node_id: int | None) -> None:
        """
        Have a tip stand at a node, or at the root for None; it is made if there is none.

        Raises:
            UnknownConversationError, UnknownNodeError, ConversationError, StoreError: As `append`.
        """
        self.write(conversation_id, Entry(nodes=(), parent_id=node_id, tip=name))

    def drop_tip(self, conversation_id: int, name: str) -> bool:
        """
        Forget a tip, but nothing that was said; return whether there was one of that name.

        Raises:
            StoreError: It cannot be written.
        """
        with self._writing() as sql:
            return sql.remove_tip(conversation_id, name)

    def load(self, name_or_id: str | int, *, namespace: str = "") -> StoredConversation:
        """
        Return a whole conversation, by its name or its id.

        Raises:
            UnknownConversationError: There is none in that namespace.
            StoreCorruptError: What is there is not what was written.
            StoreVersionError: A newer version wrote it.
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return sql.load(name_or_id, namespace)

    def snapshot(
        self, conversation_id: int, *, namespace: str = "", known: Snapshot | None = None
    ) -> Snapshot:
        """
        Return a whole conversation as it is now; *known*, if nothing has changed since, without reading it.

        Raises:
            UnknownConversationError, StoreCorruptError, StoreVersionError, StoreError: As `load`.
        """
        with self._reading() as sql:
            return noted.snapshot(sql, conversation_id, namespace, known)

    def rename(self, name_or_id: str | int, name: str) -> None:
        """
        Give a conversation another name.

        Raises:
            UnknownConversationError: There is none to rename.
            NameTakenError, ConversationError, StoreError: As `create` does.
        """
        require_name(name)
        with self._writing() as sql:
            conversation_id = sql.find(name_or_id, "")[0]
            sql.require_free(name, but=conversation_id)
            sql.write_name(conversation_id, name)

    def delete(self, name_or_id: str | int, *, namespace: str = "") -> None:
        """
        Delete a conversation with all its branches, and overwrite what it said in the file.

        What was typed of it at a terminal goes from the history beside the file, too.

        Raises:
            UnknownConversationError: There is none in that namespace.
            StoreError: The file or the history cannot be written. Nothing was deleted.
        """
        with self._writing() as sql:
            conversation_id = sql.find(name_or_id, namespace)[0]
            if not namespace:  # only the user of this machine types here
                self._forget_typed(sql, conversation_id)
            sql.delete_conversation(conversation_id)
            purge_index(sql.connection)
        # Until the log is cut, it still holds the pages as they were.
        self._database.empty_log()

    def _forget_typed(self, sql: Statements, conversation_id: int) -> None:
        """Remove from the history of what was typed what a conversation says, as far as it can be read."""
        path = self.path.with_name(config.HISTORY_NAME)
        if not path.exists():
            return
        said = []
        with suppress(StoreCorruptError):  # a damaged conversation can be deleted all the same
            for node in sql.nodes(conversation_id):
                if node.role in ("user", "system"):
                    said.append(node.content)
        forget_typed(path, said)

    def node_ids(self, conversation_id: int) -> list[int]:
        """
        Return the ids of all messages of a conversation, in the order in which they were kept.

        Empty where it was deleted. Reads no text.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return sql.node_ids(conversation_id)

    def tips(self, conversation_id: int) -> dict[str, int | None]:
        """
        Return where the tips of a conversation stand; None is the root.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return sql.tips(conversation_id)

    def search(
        self, words: str, *, namespace: str = "", limit: int = 20, after: int | None = None
    ) -> list[Hit]:
        """
        Return the messages that have all of some words, in all conversations and branches, the newest first.

        Words are found inside of others and whatever their case; a phrase is put in double quotation marks.
        An index narrows down which messages are read. In an encrypted journal, and where all words have one
        or two characters, each message is read until there are enough hits. Others can write meanwhile.

        Args:
            words: What is searched for; any text is valid that has a word in it.
            namespace: Whose conversations are searched.
            limit: Most hits to return, at least 1.
            after: The `node_id` of the last hit of the page before; None: this is the first page.

        Raises:
            InvalidParameterError: There is no word, or more than `search.MOST_WORDS`; there is no such limit.
            StoreCorruptError: A message that was read is not what was written.
            StoreError: The file cannot be read.
        """
        return find_hits(self._reading, Query.parse(words), namespace, limit, after)

    def numbered_node(self, conversation_id: int, number: int) -> int | None:
        """
        Return the id of a conversation's message by its number, as `Hit.number`; None: there is none.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return Search(sql).numbered_node(conversation_id, number)

    def set_label(self, label: Label) -> None:
        """
        Give a conversation, or a node of it, a name for others; it replaces one of that name.

        Raises:
            UnknownConversationError, UnknownNodeError, StoreError: As `append`.
        """
        with self._writing() as sql:
            sql.write_label(label)

    def find_label(self, name: str, *, namespace: str = "") -> Label | None:
        """
        Return a label of a conversation in a namespace; None where there is none.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return sql.find_label(name, namespace)

    def labels(self, conversation_id: int) -> list[Label]:
        """
        Return all labels of a conversation and of its nodes.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return sql.labels(conversation_id)

    def notes(self, conversation_ids: Sequence[int]) -> dict[int, Mapping[str, Any]]:
        """
        Return what is noted of conversations themselves, by their ids; only where something is.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return sql.notes(conversation_ids)

    def delete_label(self, name: str) -> None:
        """
        Forget a label, but not what it named.

        Raises:
            StoreError: It cannot be written.
        """
        with self._writing() as sql:
            sql.delete_label(name)

    def version(self) -> int:
        """
        Return a number that is another one after each change by anybody but this object.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._database.reading() as connection:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

    def last_change(self) -> int:
        """
        Return the number of the last change that was noted.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return noted.last_change(sql)

    def changes(self, after: int, namespaces: Collection[str]) -> Changes:
        """
        Return what anybody has changed in some namespaces since a change of that number.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return noted.changes_after(sql, after, namespaces)

    def names(self, conversation_id: int, node_ids: Sequence[int]) -> NamesOf:
        """
        Return by which ids a server's clients know a conversation and some of its messages.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return noted.names_of(sql, conversation_id, node_ids)

    def check(self) -> list[str]:
        """
        Look through everything for what breaks the invariants; slow for a large journal.

        Returns:
            A sentence for each fault; empty for a sound journal.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as sql:
            return list(_problems(sql))

    def wait(self) -> None:
        """
        Wait until nobody else writes; another one may begin at once.

        Raises:
            StoreError: It does not come free, or cannot be written at all.
        """
        with self._writing():
            pass

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        self._database.close()

    @contextmanager
    def _reading(self) -> Iterator[Statements]:
        with self._database.reading() as connection:
            self._sealing.require_unchanged(connection)
            yield Statements(connection, self._sealing)

    @contextmanager
    def _writing(self, deadline: float | None = None) -> Iterator[Statements]:
        with self._database.writing(deadline) as connection:
            self._sealing.require_unchanged(connection)
            yield Statements(connection, self._sealing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _empty(name: str | None, model: str, fingerprint: str, namespace: str) -> ConversationRecord:
    """Return a conversation that begins now; without a name it gets that of the user's date."""
    now = datetime.now(UTC)
    return ConversationRecord(
        name=now.astimezone().date().isoformat() if name is None else name,
        created_at=now,
        updated_at=now,
        model=model,
        fingerprint=fingerprint,
        namespace=namespace,
    )


def _match_key(database: Database, sealing: Sealing, *, convert: bool) -> None:
    """
    Make sure that a journal is encrypted if there is a key, and only then.

    A plain one is encrypted at once while it is empty, and later only if the caller says so: anybody
    could have put it there. Where this was killed, the next call goes on from there.

    Raises:
        ConfigError: It is encrypted, and there is no key or another one; or it is plain, and there is.
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
                is_empty = connection.execute("SELECT 1 FROM conversations").fetchone() is None
                if not convert and not is_empty:
                    raise ConfigError(
                        f"{database.path} is not encrypted, and its folder is: if you know where it "
                        "comes from, `recollect encrypt` converts it; else move it away."
                    )
                Statements(connection, sealing).seal_all(Sealing(database.path, None))
                purge_index(connection, whole=True)
                sealing.mark(connection)
    # Once more, outside of the transaction: freed pages and the log still hold the plain text.
    with database.reading() as connection:
        is_clean = connection.execute("SELECT is_clean FROM encryption").fetchone()[0]
    if not is_clean:
        database.rewrite()
        with database.writing() as connection:
            connection.execute("UPDATE encryption SET is_clean = 1")


_WRONG_COUNTS: Final = (
    "SELECT c.id FROM conversations c LEFT JOIN nodes n ON n.conversation_id = c.id GROUP BY c.id "
    "HAVING c.turns != count(CASE WHEN n.role = 'assistant' THEN 1 END) OR c.size_bytes != coalesce("
    "sum(length(CAST(n.content AS BLOB)) - ?1 + coalesce(length(n.token_ids) - ?1, 0)), 0)"
)
"""Finds conversations whose row counts other messages than they have; takes the bytes that a seal adds."""

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
    "t.conversation_id WHERE t.node_id IS NOT NULL AND n.id IS NULL": "branch {!r} stands at no node",
    "SELECT name FROM tips WHERE conversation_id NOT IN (SELECT id FROM conversations)": (
        "tip {!r} is of no conversation"
    ),
}
"""A query that finds what breaks a rule, and the sentence for it. Parents that are older than their
children cannot form a cycle."""


def _problems(sql: Statements) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong; nothing for a sound journal."""
    found = list(_wrong_rows(sql))
    yield from found
    if not found:  # else the counts are wrong because of what was found
        for (what,) in sql.connection.execute(_WRONG_COUNTS, (sql.sealing.overhead_bytes,)):
            yield f"conversation {what} has other messages than its row counts"


def _wrong_rows(sql: Statements) -> Iterator[str]:
    execute, sealing = sql.connection.execute, sql.sealing
    pages = [found for (found,) in execute("PRAGMA integrity_check")]
    yield from (f"SQLite: {found}" for found in pages if found != "ok")
    for query, sentence in _RULES.items():
        for (what,) in execute(query):
            yield sentence.format("(encrypted)" if isinstance(what, bytes) else what)
    wrong = "does not open with the key" if sealing.is_on else "is not as it was written"
    for row in execute(f"SELECT {NODE_COLUMNS} FROM nodes"):  # noqa: S608
        if not is_sound(row):
            yield f"node {row[0]} is not as it was written"
        elif sealing.is_on and not _opens(read_node, row, sealing):
            yield f"node {row[0]} {wrong}"
    # The others have no checksum: a seal tells, or that the value has another type.
    for row in execute(f"SELECT {CONVERSATION_COLUMNS} FROM conversations"):  # noqa: S608
        if not _opens(open_conversation, row, sealing):
            yield f"a name of conversation {row[0]} {wrong}"
    for row in execute("SELECT conversation_id, name, node_id FROM tips"):
        if not _opens(read_tip, *row, sealing):
            yield f"a branch of conversation {row[0]} {wrong}"
    for row in execute(f"SELECT {LABEL_COLUMNS} FROM labels"):  # noqa: S608
        if not _opens(read_label, row, sealing):
            yield f"the label {row[0]} {wrong}"


def _opens(read: Callable[..., object], *row: Any) -> bool:
    try:
        read(*row)
    except StoreCorruptError:
        return False
    return True


QUOTES: Final = '"""'
"""Around a message of several lines, as it is typed."""
_COMMAND: Final = "/"
_TEXT: Final = b"+"


def is_open(text: str) -> bool:
    """Return whether a message that begins with `\"\"\"` has not ended yet."""
    start = text.lstrip()
    if not start.startswith(QUOTES):
        return False
    return not start[len(QUOTES) :].rstrip().endswith(QUOTES)


def unquote(text: str) -> str:
    """Return a message without the `\"\"\"` around it, if it has any."""
    inner = text.strip()
    if not inner.startswith(QUOTES) or is_open(text):
        return text
    return inner[len(QUOTES) : -len(QUOTES)].strip("\n")


def forget_typed(path: Path, messages: Iterable[str]) -> int:
    """
    Remove the entries of a history that said one of the messages, also by a command; return how many.

    The file is replaced as a whole, or left as it is. A line that another chat appends at the same
    moment may be lost.

    Raises:
        StoreError: It cannot be read or replaced. It is as it was.
    """
    try:
        with files.open_regular(path) as file:
            entries = list(_entries(file))
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _unusable(path, error) from error
    # What UTF-8 cannot spell was written as a question mark.
    said = {text.strip().encode("utf-8", "replace").decode() for text in messages}
    kept = [lines for lines in entries if said.isdisjoint(_said_by(lines))]
    if len(kept) < len(entries):
        _replace(path, b"".join(line for lines in kept for line in lines))
    return len(entries) - len(kept)


def remove_history(path: Path) -> None:
    """
    Delete a history, and what a rewrite that was killed has left beside it.

    Raises:
        OSError: One cannot be deleted.
    """
    for file in (path, *path.parent.glob(f"{path.name}.new-*")):
        file.unlink(missing_ok=True)


def _entries(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines of each entry, with the time and blank lines before its text."""
    entry: list[bytes] = []
    for line in lines:
        if entry and entry[-1].startswith(_TEXT) and not line.startswith(_TEXT):
            yield entry
            entry = []
        entry.append(line)
    if entry:
        yield entry


def _said_by(lines: Iterable[bytes]) -> set[str]:
    """Return what an entry may have said: its text, or what follows a command such as `/edit 2`."""
    text = b"".join(line[1:] for line in lines if line.startswith(_TEXT)).decode("utf-8", "replace")
    said = {unquote(text).strip()}
    if text.startswith(_COMMAND):
        rest = text.partition(" ")[2].strip()
        said |= {rest, rest.partition(" ")[2].strip()}
    return said - {""}


def _replace(path: Path, content: bytes) -> None:
    """Give the file other content, all of it or nothing, for its owner alone."""
    new = path.with_name(f"{path.name}.new-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise _unusable(path, error) from error
    finally:
        with suppress(OSError):
            new.unlink()


def _unusable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be changed ({error.strerror}), and it shows what was typed: allow it, or "
        "delete that file; nothing was changed."
    )

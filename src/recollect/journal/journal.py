"""
Conversations on disk: a turn that was reported finished is there, whatever happens next.

Knows no model and no session: it keeps what it is given and gives it back.

Look through a journal for anything that cannot be.

Reads only; does not know how the rows came to be written.

The file of what was typed into chats: its entries, and how some of them are forgotten.

The format is that of prompt_toolkit's `FileHistory`, which appends to it: a line `# TIME`, then each
line of an entry after a `+`. Knows no terminal.
"""

import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from recollect import config, files
from recollect.encryption import Cipher
from recollect.errors import StoreCorruptError, StoreError, UnknownConversationError
from recollect.journal.database import BUSY_TIMEOUT_S, Database
from recollect.journal.entries import (
    LABEL_COLUMNS,
    Label,
    labels_of,
    match_key,
    notes_of,
    open_label,
    read_label,
    remove_entry,
    write_entry,
    write_label,
)
from recollect.journal.records import (
    ConversationInfo,
    ConversationRecord,
    Entry,
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
    NODE_COLUMNS,
    Sealing,
    insert_node,
    is_sound,
    read_node,
    read_node_ids,
    read_nodes,
    stored_conversation,
)
from recollect.journal.statements import (
    conversation_info_of,
    conversation_infos,
    delete_conversation,
    empty_record,
    find_conversation,
    insert_conversation,
    open_conversation,
    read_tip,
    read_tips,
    remove_tip,
    require_free,
    write_name,
    write_tip,
)

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


QUOTES: Final = '"""'
_COMMAND: Final = "/"
_TEXT: Final = b"+"


def is_open(text: str) -> bool:
    """Return whether a message is still inside a block that `\"\"\"` began."""
    start = text.lstrip()
    if not start.startswith(QUOTES):
        return False
    return not start[len(QUOTES) :].rstrip().endswith(QUOTES)


def unquote(text: str) -> str:
    """Return what is inside the block, or the text as it is where there is none."""
    inner = text.strip()
    if not inner.startswith(QUOTES) or is_open(text):
        return text
    return inner[len(QUOTES) : -len(QUOTES)].strip("\n")


def forget(path: Path, messages: Iterable[str]) -> int:
    """
    Remove the entries that said one of the messages, by a command too; return how many went.

    The file is replaced as a whole, or left as it is. A line that another chat appends in the same
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


def remove(home_file: Path) -> None:
    """
    Delete the file, with what a rewrite that was killed has left beside it.

    Raises:
        OSError: One cannot be deleted.
    """
    for path in (home_file, *home_file.parent.glob(f"{home_file.name}.new-*")):
        path.unlink(missing_ok=True)


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
            match_key(database, sealing, convert=convert)
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
        with self._reading() as connection:
            return conversation_infos(connection, self._sealing, self.path, namespace, page)

    def info(self, conversation_id: int) -> ConversationInfo:
        """
        Return what a list says of one conversation, in whatever namespace.

        Raises:
            UnknownConversationError: There is none of that id.
            StoreError: The file cannot be read.
        """
        with self._reading() as connection:
            return conversation_info_of(connection, self._sealing, self.path, conversation_id)

    def find(self, name: str, *, namespace: str = "") -> ConversationInfo | None:
        """
        Return what a list says of a conversation of a namespace; None where none has that name.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as connection:
            try:
                row = find_conversation(connection, self._sealing, name, namespace)
            except UnknownConversationError:
                return None
            return conversation_info_of(connection, self._sealing, self.path, row[0])

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
        empty = empty_record(
            _today() if name is None else name,
            model=model,
            fingerprint=fingerprint,
            namespace=namespace,
        )
        with self._writing() as connection:
            conversation_id = insert_conversation(
                connection, self._sealing, empty, find_free=name is None
            )
            return conversation_info_of(connection, self._sealing, self.path, conversation_id)

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
        empty = empty_record(
            _today() if name is None else name,
            model=model,
            fingerprint=fingerprint,
            namespace=namespace,
        )
        with self._writing(deadline) as connection:
            conversation_id = insert_conversation(
                connection, self._sealing, empty, find_free=name is None
            )
            return write_entry(connection, self._sealing, conversation_id, entry)

    def add(self, conversation: ConversationRecord, name: str | None = None) -> ConversationInfo:
        """
        Keep a whole conversation, as an import gives it; its nodes get ids of this journal.

        Args:
            conversation: Its order of nodes stays, so its branches stay in their order.
            name: None: its own.

        Raises:
            NameTakenError, ConversationError, StoreError: As `create` does.
        """
        with self._writing() as connection:
            conversation_id = insert_conversation(connection, self._sealing, conversation, name)
            ids: dict[int | None, int | None] = {None: None}
            for node in conversation.nodes:
                parent_id = ids[node.parent_id]
                ids[node.id] = insert_node(
                    connection,
                    self._sealing,
                    conversation_id,
                    parent_id,
                    node,
                    node.created_at,
                )
            for tip, node_id in conversation.tips.items():
                write_tip(connection, self._sealing, conversation_id, tip, ids[node_id])
            return conversation_info_of(connection, self._sealing, self.path, conversation_id)

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
        with self._writing(deadline) as connection:
            return write_entry(connection, self._sealing, conversation_id, entry)

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
        with self._writing() as connection:
            return remove_entry(
                connection, self._sealing, conversation_id, ids, tip, back_to, began=began
            )

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
        with self._writing() as connection:
            return remove_tip(connection, self._sealing, conversation_id, name)

    def load(self, name_or_id: str | int, *, namespace: str = "") -> StoredConversation:
        """
        Return a whole conversation, by its name or its id.

        Raises:
            UnknownConversationError: There is none in that namespace.
            StoreCorruptError: What is there is not what was written.
            StoreVersionError: A newer version wrote it.
            StoreError: The file cannot be read.
        """
        with self._reading() as connection:
            row = find_conversation(connection, self._sealing, name_or_id, namespace)
            nodes = tuple(read_nodes(connection, self._sealing, row[0], self.path))
            tips = read_tips(connection, self._sealing, row[0])
            return stored_conversation(row, nodes, tips, self.path)

    def rename(self, name_or_id: str | int, name: str) -> None:
        """
        Give a conversation another name.

        Raises:
            UnknownConversationError: There is none to rename.
            NameTakenError, ConversationError, StoreError: As `create` does.
        """
        require_name(name)
        with self._writing() as connection:
            conversation_id = find_conversation(connection, self._sealing, name_or_id, "")[0]
            require_free(connection, self._sealing, name, but=conversation_id)
            write_name(connection, self._sealing, conversation_id, name)

    def delete(self, name_or_id: str | int, *, namespace: str = "") -> None:
        """
        Delete a conversation with all its branches, and overwrite what it said in the file.

        What was typed of it at a terminal goes from the history beside the file, too.

        Raises:
            UnknownConversationError: There is none in that namespace.
            StoreError: The file or the history cannot be written. Nothing was deleted.
        """
        with self._writing() as connection:
            conversation_id = find_conversation(connection, self._sealing, name_or_id, namespace)[0]
            if not namespace:  # others than the user of this machine have typed nothing here
                self._forget_typed(connection, conversation_id)
            delete_conversation(connection, conversation_id)
        # Until the log is cut, it still holds the pages as they were.
        self._database.empty_log()

    def _forget_typed(self, connection: sqlite3.Connection, conversation_id: int) -> None:
        """Remove from the history of what was typed what a conversation says, as far as it can be read."""
        path = self.path.with_name(config.HISTORY_NAME)
        if not path.exists():
            return
        said = []
        with suppress(StoreCorruptError):  # a damaged conversation can be deleted all the same
            for node in read_nodes(connection, self._sealing, conversation_id, self.path):
                if node.role in ("user", "system"):
                    said.append(node.content)
        forget(path, said)

    def node_ids(self, conversation_id: int) -> list[int]:
        """
        Return the ids of all messages of a conversation, in the order in which they were kept.

        Empty where it was deleted. Reads no text.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as connection:
            return read_node_ids(connection, conversation_id)

    def tips(self, conversation_id: int) -> dict[str, int | None]:
        """
        Return where the tips of a conversation stand; None is the root.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as connection:
            return read_tips(connection, self._sealing, conversation_id)

    def set_label(self, label: Label) -> None:
        """
        Give a conversation, or a node of it, a name for others; it replaces one of that name.

        Raises:
            UnknownConversationError, UnknownNodeError, StoreError: As `append`.
        """
        with self._writing() as connection:
            write_label(connection, self._sealing, label)

    def find_label(self, name: str, *, namespace: str = "") -> Label | None:
        """
        Return a label of a conversation in a namespace; None where there is none.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as connection:
            return read_label(connection, self._sealing, name, namespace)

    def labels(self, conversation_id: int) -> list[Label]:
        """
        Return all labels of a conversation and of its nodes.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as connection:
            return labels_of(connection, self._sealing, conversation_id)

    def notes(self, conversation_ids: Sequence[int]) -> dict[int, Mapping[str, Any]]:
        """
        Return what is noted of conversations themselves, by their ids; only where something is.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as connection:
            return notes_of(connection, self._sealing, conversation_ids)

    def delete_label(self, name: str) -> None:
        """
        Forget a label, but not what it named.

        Raises:
            StoreError: It cannot be written.
        """
        with self._writing() as connection:
            connection.execute("DELETE FROM labels WHERE label = ?", (name,))

    def check(self) -> list[str]:
        """
        Look through everything for what breaks the invariants; slow for a large journal.

        Returns:
            A sentence for each fault; empty for a sound journal.

        Raises:
            StoreError: The file cannot be read.
        """
        with self._reading() as connection:
            return list(problems(connection, self._sealing))

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
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._database.reading() as connection:
            self._sealing.require_unchanged(connection)
            yield connection

    @contextmanager
    def _writing(self, deadline: float | None = None) -> Iterator[sqlite3.Connection]:
        with self._database.writing(deadline) as connection:
            self._sealing.require_unchanged(connection)
            yield connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _today() -> str:
    """Return the user's date."""
    return datetime.now().astimezone().date().isoformat()

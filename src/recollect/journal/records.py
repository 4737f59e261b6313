"""
What is saved of a conversation, as plain values, and the rules that names, texts and notes must obey.

Pure: no database, no file, no clock. Branches are called tips here, as in the tables.
"""

import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from reprlib import Repr
from typing import Any, Final, Literal

from recollect.errors import ConversationError, InvalidParameterError
from recollect.types import FinishReason, Role, ToolLinks

ROLES: Final[tuple[Role, ...]] = ("system", "user", "assistant", "tool")
FINISH_REASONS: Final[tuple[FinishReason, ...]] = ("stop", "length", "cancelled")
DEFAULT_TIP: Final = "main"
MAX_NAME: Final = 100
"""Most characters of the name of a conversation or branch: names are typed and shown in tables."""
MAX_TOKEN_ID: Final = 2**31 - 1
"""Largest token id: token ids are stored as int32."""
MAX_NOTE_DEPTH: Final = 128
"""
Most lists and objects inside each other in a note.

FastAPI's encoder needs about three nested calls for each and raises a RecursionError at 300. Descriptions of
tools, which notes hold, have about ten.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewNode:
    """A message that is to be saved."""

    role: Role
    content: str
    token_ids: Sequence[int] | None = None
    """The token ids that the model chose, `(tokens,)`; None for messages that no model generated."""
    finish_reason: FinishReason | None = None
    usage: Mapping[str, Any] | None = None
    """As `Usage.to_dict` returns it. It is stored and returned unchanged, with the fields of any version."""
    fingerprint: str | None = None
    """Fingerprint of the model that generated the token ids, which mean other texts to other models."""
    links: ToolLinks | None = None
    """What belongs to it beside its text; None: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A saved message with its place in the tree; other fields as in `NewNode`."""

    id: int
    """At least 1, and larger than the parent's. In a journal it is unique, and never given again."""
    parent_id: int | None
    """None: the root."""
    role: Role
    content: str
    token_ids: tuple[int, ...] | None
    finish_reason: FinishReason | None
    usage: dict[str, Any] | None
    created_at: datetime
    fingerprint: str | None
    links: ToolLinks | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationRecord:
    """
    A whole conversation, from the journal or from a file.

    Invariants:
        1. Parents come before their children, and have smaller ids.
        2. Only replies have token ids.
        3. Each tip is the id of a node, or None for the root.
    """

    name: str
    created_at: datetime
    updated_at: datetime
    model: str
    """Name of the model that the conversation goes on with, as the user gave it."""
    fingerprint: str
    """Fingerprint of that model."""
    nodes: tuple[NodeRecord, ...] = ()
    tips: dict[str, int | None] = field(default_factory=dict)
    """Ids of the nodes at which the branches stand, by the branches' names."""
    namespace: str = ""
    """Who may read it; empty: the user of this machine."""

    @property
    def turns(self) -> int:
        """Return the number of replies, in all branches."""
        return sum(node.role == "assistant" for node in self.nodes)

    def path(self, node_id: int | None) -> list[NodeRecord]:
        """Return the nodes from the first message to the node *node_id*; an empty list for None, the root."""
        by_id = {node.id: node for node in self.nodes}
        path = []
        while node_id is not None:
            path.append(by_id[node_id])
            node_id = path[-1].parent_id
        return path[::-1]

    def leaves(self) -> list[NodeRecord]:
        """Return the nodes without children, the oldest first."""
        parents = {node.parent_id for node in self.nodes}
        return [node for node in self.nodes if node.id not in parents]

    def default_tip(self) -> int | None:
        """Return the id of the node at which `main` stands, or of the newest node if there is no `main`."""
        newest = self.nodes[-1].id if self.nodes else None
        return self.tips.get(DEFAULT_TIP, newest)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredConversation(ConversationRecord):
    """A whole conversation from the journal, with its id there."""

    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationInfo:
    """An entry of a list of conversations, which is read without any text of theirs."""

    id: int
    name: str
    created_at: datetime
    updated_at: datetime
    model: str
    fingerprint: str
    turns: int
    """Number of replies, in all branches."""
    tips: tuple[str, ...]
    """Names of its branches, sorted."""
    size_bytes: int
    """Bytes of all its texts and token ids."""
    label: str
    """The id by which a server's clients know it: drawn at random, and never changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is to be written into a conversation in one transaction."""

    nodes: Sequence[NewNode | NodeRecord]
    """A path: each node follows the one before it. A `NodeRecord` is copied, and gets a new id."""
    parent_id: int | None = None
    """The node that the first one follows; None: the root."""
    tip: str | None = None
    """The branch that is moved to the last of the nodes; None: none is moved."""
    seen: int | None = None
    """The node at which the writer last saw that branch; None: the root."""
    leaves_others: bool = False
    """Whether a branch that another writer has moved away from *seen* stays where it is. The nodes then get a
    new branch, whose name is that of `tip` with a number."""
    tips: Mapping[str, int | None] = field(default_factory=dict)
    """Further branches, of a new conversation: for each name the index in `nodes` of the node at which it
    stands; None: the root."""
    model: tuple[str, str] | None = None
    """Name and fingerprint of the model that the conversation goes on with; None: these do not change."""
    note: Callable[[Sequence[int]], Mapping[str, Any]] | None = None
    """Called with the ids of the nodes; returns the conversation's new note. None: it does not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The result of writing an `Entry`."""

    conversation_id: int
    name: str
    """Name of the conversation, which another program may have changed."""
    ids: tuple[int, ...]
    """Ids of the nodes, each larger than any that was given before."""
    tip: str | None
    """The branch that stands at the last of them; None: none was moved."""
    tip_was: int | None
    """The node at which that branch stood before; None: the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which part of a list to read, that is ordered by when conversations were last used."""

    limit: int
    """Most conversations on the page; -1: all that follow."""
    after: int | None = None
    """The id of the last conversation of the page before; None: this is the first page."""
    newest_first: bool = True

    def __post_init__(self) -> None:
        if self.limit != -1:
            require_limit(self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A message that a search has found."""

    conversation: str
    """Name of its conversation."""
    branch: str | None
    """A branch that the message is in, `main` where that is one; None: what no branch leads to any more."""
    role: Role
    snippet: str
    """The part of its text around the first word that was found, in one line."""
    created_at: datetime
    conversation_id: int
    node_id: int
    label: str
    """The id by which a server's clients know the conversation."""
    number: int
    """Which message of its conversation it is, in the order of writing; the first is 1."""
    node_label: str | None
    """The id by which a server's clients know the reply, if it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """The id by which a server's clients know a conversation or one of its nodes."""

    name: str
    """Unique in a journal, and random, so that it cannot be guessed."""
    conversation_id: int
    node_id: int | None = None
    """None: it names the conversation itself."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """What the server remembers of it: a JSON object that `require_writable` accepts."""


TakenBack = Literal["stays", "gone", "conversation gone"]
"""
The result of taking nodes back.

They stay if anything refers to them. Otherwise they are deleted, and with them their conversation if they
began it and nothing else is in it.
"""


def require_writable(value: object, what: str) -> None:
    """
    Check that a value can be written as JSON in UTF-8.

    Args:
        value: What `json.loads` could have returned.
        what: The subject of the error's sentence.

    Raises:
        ConversationError: A text in it holds a lone surrogate, a number is not finite, or it is nested
            more than `MAX_NOTE_DEPTH` deep.
    """
    found = _unwritable(value)
    if found is not None:
        raise ConversationError(f"{what} cannot be saved, {found}.")


def is_writable(value: object) -> bool:
    """Return whether `require_writable` accepts a value."""
    return _unwritable(value) is None


def mended(value: Any, depth: int = MAX_NOTE_DEPTH) -> Any:
    """
    Return a copy of a JSON value that `require_writable` accepts.

    Lone surrogates become question marks; infinities, NaN and what is nested deeper than *depth* become null.
    """
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, dict | list):
        return value
    if not depth:
        return None
    if isinstance(value, dict):
        return {mended(key): mended(one, depth - 1) for key, one in value.items()}
    return [mended(one, depth - 1) for one in value]


def _unwritable(value: object) -> str | None:
    """Return why `require_writable` refuses a value, with a remedy; None if it does not."""
    pending: list[tuple[object, int]] = [(value, 0)]
    while pending:
        one, depth = pending.pop()
        if isinstance(one, str) and not is_whole(one):
            return "a text in it holds half a character: remove that"
        if isinstance(one, float) and not math.isfinite(one):
            return f"{one} is no number that JSON has: give a finite one"
        if isinstance(one, Mapping | list | tuple):
            if depth == MAX_NOTE_DEPTH:
                return f"it is nested more than {MAX_NOTE_DEPTH} deep: flatten it"
            inner = [*one.keys(), *one.values()] if isinstance(one, Mapping) else one
            pending += [(item, depth + 1) for item in inner]
    return None


def is_whole(text: str) -> bool:
    """Return whether a text is valid Unicode, that is without lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def briefly(value: object) -> str:
    """Return a value as an error quotes it: a file has texts of megabytes, and an error is a sentence."""
    short = Repr()
    short.maxstring = short.maxlong = short.maxother = _MOST_QUOTED
    short.maxlist = short.maxdict = 1
    return short.repr(value)


_MOST_QUOTED: Final = 120
"""Characters: as long as a name may be, with its quotation marks."""


def require_limit(limit: int) -> int:
    """
    Return *limit* if a page can have so many entries.

    Raises:
        InvalidParameterError: It is below 1.
    """
    if limit < 1:
        raise InvalidParameterError(f"limit is {limit}: give 1 or more.", param="limit")
    return limit


def require_name(name: str, what: str = "conversation") -> str:
    """
    Return *name* if a conversation, a branch or a pin can have it.

    Args:
        name: The name.
        what: What is to have it, for the error.

    Raises:
        ConversationError: It is empty, longer than `MAX_NAME`, holds characters that cannot be printed, has a
            space at an end, or begins with a minus sign, which commands take for an option.
    """
    sound = 0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()
    if not sound or name.startswith("-"):
        raise ConversationError(
            f"{briefly(name)} cannot be the name of a {what}: take 1 to {MAX_NAME} printable characters "
            "without spaces at the ends or a minus sign before them."
        )
    return name


def require_text(content: str) -> bytes:
    """
    Return a message as UTF-8.

    Raises:
        ConversationError: It holds a lone surrogate, half of a character, which UTF-8 cannot represent.
    """
    try:
        return content.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"Character {error.start} of the message is half a character, which cannot be saved: "
            "remove it, or give the text as UTF-8."
        ) from None


def links_to_dict(links: ToolLinks) -> dict[str, Any]:
    """Return links as a JSON object without empty fields."""
    fields = {
        "call_ids": list(links.call_ids) or None,
        "tool_call_id": links.tool_call_id,
        "name": links.name,
        "reasoning": links.reasoning,
        "format": links.format,
        "arguments": list(links.arguments) or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def links_from_dict(fields: Mapping[str, Any]) -> ToolLinks:
    """Return the links in a JSON object that `links_to_dict` made."""
    return ToolLinks(
        tuple(fields.get("call_ids", ())),
        fields.get("tool_call_id"),
        fields.get("name"),
        fields.get("reasoning"),
        format=fields.get("format"),
        arguments=tuple(fields.get("arguments", ())),
    )


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Return ids `(n,)` as little-endian int32, 4 n bytes."""
    assert all(0 <= token_id <= MAX_TOKEN_ID for token_id in token_ids), "a token id out of range"
    return struct.pack(f"<{len(token_ids)}i", *token_ids)


def unpack_token_ids(blob: bytes) -> tuple[int, ...]:
    """Return the ids `(n,)` in 4 n bytes of little-endian int32."""
    return struct.unpack(f"<{len(blob) // 4}i", blob)


def checksum(*values: str | int | float | bytes | None) -> int:
    """
    Return the CRC-32 of values as SQLite returns them.

    SQLite detects damage to its pages' structure, but not to the values in them. Type and length are hashed
    before each value, so that moving bytes from one value to the next changes the checksum.
    """
    crc = 0
    for value in values:
        part = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        crc = zlib.crc32(f"{type(value).__name__} {len(part)} ".encode(), crc)
        crc = zlib.crc32(part, crc)
    return crc

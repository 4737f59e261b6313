"""
What is kept of a conversation: plain values, and the rules that hold for them.

Pure: no database, no file, no clock. Knows neither sessions nor token ids' meaning.
"""

import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

from recollect.errors import ConversationError
from recollect.types import FinishReason, Role, ToolLinks

ROLES: Final[tuple[Role, ...]] = ("system", "user", "assistant", "tool")
FINISH_REASONS: Final[tuple[FinishReason, ...]] = ("stop", "length", "cancelled")
DEFAULT_TIP: Final = "main"
MAX_NAME: Final = 100
"""Most characters of a name: it is typed on command lines and drawn in tables."""
MAX_TOKEN_ID: Final = 2**31 - 1
"""Token ids are kept as little-endian int32."""
MAX_NOTE_DEPTH: Final = 128
"""Most lists and objects inside each other in what is noted of a conversation. FastAPI's encoder takes
about three calls for each and ends in a RecursionError at 300; JSON schemas of tools have ten or so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewNode:
    """A message that is to be kept."""

    role: Role
    content: str
    token_ids: Sequence[int] | None = None
    """What the model generated, `(tokens,)`; None for what it did not write."""
    finish_reason: FinishReason | None = None
    usage: Mapping[str, Any] | None = None
    """As `Usage.to_dict` gives it: kept and given back as it is, whatever fields a version has."""
    fingerprint: str | None = None
    """Of the model that generated the token ids: with another one they mean something else."""
    links: ToolLinks | None = None
    """How it hangs together with calls of tools; None where it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A message that is kept, in its place."""

    id: int
    """1 or more, larger than its parent's; in the journal no two nodes have the same, ever."""
    parent_id: int | None
    """None: it hangs under the root."""
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
    A whole conversation, wherever it is kept.

    Invariants:
        1. Parents come before their children, and have smaller ids.
        2. Only replies have token ids.
        3. Each tip is a node, or None for the root.
    """

    name: str
    created_at: datetime
    updated_at: datetime
    model: str
    """What the user calls the model that it is held with."""
    fingerprint: str
    """Of that model."""
    nodes: tuple[NodeRecord, ...] = ()
    tips: dict[str, int | None] = field(default_factory=dict)
    namespace: str = ""
    """Who may see it; empty: the user of this machine."""

    @property
    def turns(self) -> int:
        """Return the number of replies, in all branches."""
        return sum(node.role == "assistant" for node in self.nodes)

    def path(self, node_id: int | None) -> list[NodeRecord]:
        """Return the nodes from the first message to that one; none for the root."""
        by_id = {node.id: node for node in self.nodes}
        path = []
        while node_id is not None:
            path.append(by_id[node_id])
            node_id = path[-1].parent_id
        return path[::-1]

    def leaves(self) -> list[NodeRecord]:
        """Return the nodes that nothing follows, the oldest first."""
        parents = {node.parent_id for node in self.nodes}
        return [node for node in self.nodes if node.id not in parents]

    def default_tip(self) -> int | None:
        """Return where the main tip stands, or the newest node where there is no such tip."""
        newest = self.nodes[-1].id if self.nodes else None
        return self.tips.get(DEFAULT_TIP, newest)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredConversation(ConversationRecord):
    """A whole conversation as the journal holds it."""

    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationInfo:
    """What a list says of a conversation."""

    id: int
    name: str
    created_at: datetime
    updated_at: datetime
    model: str
    fingerprint: str
    turns: int
    """Replies, in all branches."""
    tips: tuple[str, ...]
    """Their names, sorted."""
    size_bytes: int
    """Of texts and token ids."""
    label: str
    """The name that a server gives out for it: drawn at random, and never another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is to be written after a node of a conversation, all of it or nothing."""

    nodes: Sequence[NewNode | NodeRecord]
    """Each follows the one before it; of one that is kept already, a copy is."""
    parent_id: int | None = None
    """The node that the first one follows; None: the root."""
    tip: str | None = None
    """The tip that stands at the last of them then; None: none moves."""
    seen: int | None = None
    """Where whoever writes has seen that tip; None is the root."""
    leaves_others: bool = False
    """Whether a tip that stands elsewhere than *seen* is left to whoever has moved it: what is
    written becomes a branch of its own then, whose name begins with the tip's."""
    tips: Mapping[str, int | None] = field(default_factory=dict)
    """More tips, for a conversation that begins: which of the nodes each stands at, counted from 0;
    None is the root."""
    model: tuple[str, str] | None = None
    """With which model the conversation goes on, and that model's fingerprint; None: with the same."""
    note: Callable[[Sequence[int]], Mapping[str, Any]] | None = None
    """Returns what is noted of the conversation then, from the ids of the nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What came of an `Entry`."""

    conversation_id: int
    name: str
    """What the conversation is called now: somebody may have renamed it."""
    ids: tuple[int, ...]
    """Of the nodes, each larger than any that was given before."""
    tip: str | None
    """The tip that stands at the last of them."""
    tip_was: int | None
    """Where that tip stood before; None is the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A part of a list of conversations, which is in the order in which they were used."""

    limit: int
    """Most conversations in it."""
    after: int | None = None
    """The id of the conversation that it comes after; None: it is the first page."""
    newest_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A name for a conversation or one of its nodes, which a server gives out."""

    name: str
    """Unique in a journal, and impossible to guess."""
    conversation_id: int
    node_id: int | None = None
    """None: it names the conversation itself."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """Any JSON object: what the server remembers of it."""


TakenBack = Literal["stays", "gone", "conversation gone"]
"""What came of nodes that were taken back: somebody has seen them, or they are gone, with everything."""


def require_writable(value: object, what: str) -> None:
    """
    Check that a JSON value could be written out again, wherever it is shown.

    Raises:
        ConversationError: A text in it holds half a character, a number is none, or it is nested more
            than `MAX_NOTE_DEPTH` deep.
    """
    found = _unwritable(value)
    if found is not None:
        raise ConversationError(f"{what} cannot be saved, {found}.")


def is_writable(value: object) -> bool:
    """Return whether `require_writable` takes a JSON value."""
    return _unwritable(value) is None


def mended(value: Any, depth: int = MAX_NOTE_DEPTH) -> Any:
    """Return a JSON value as near to it as can be written out: see `require_writable`."""
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
    """Return what keeps a JSON value from being written out; None where nothing does."""
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
    """Return whether a text can be written at all: it holds no half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_name(name: str, what: str = "conversation") -> str:
    """
    Return *name* where a conversation or a tip can have it.

    Raises:
        ConversationError: It cannot be typed, or not be told from another.
    """
    sound = 0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()
    if not sound or name.startswith("-"):
        raise ConversationError(
            f"{name!r} cannot be the name of a {what}: take 1 to {MAX_NAME} printable characters "
            "without spaces at the ends or a minus sign before them."
        )
    return name


def require_text(content: str) -> bytes:
    """
    Return a message as UTF-8.

    Raises:
        ConversationError: It holds half a character (a lone surrogate), which no file can hold.
    """
    try:
        return content.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"Character {error.start} of the message is half a character, which cannot be saved: "
            "remove it, or give the text as UTF-8."
        ) from None


def links_to_dict(links: ToolLinks) -> dict[str, Any]:
    """Return links as plain JSON values, without those that say nothing."""
    fields = {
        "call_ids": list(links.call_ids) or None,
        "tool_call_id": links.tool_call_id,
        "name": links.name,
    }
    return {name: value for name, value in fields.items() if value is not None}


def links_from_dict(fields: Mapping[str, Any]) -> ToolLinks:
    """Return the links in plain JSON values of ours."""
    return ToolLinks(
        tuple(fields.get("call_ids", ())), fields.get("tool_call_id"), fields.get("name")
    )


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Return ids `(n,)` as n little-endian int32."""
    assert all(0 <= token_id <= MAX_TOKEN_ID for token_id in token_ids), "a token id out of range"
    return struct.pack(f"<{len(token_ids)}i", *token_ids)


def unpack_token_ids(blob: bytes) -> tuple[int, ...]:
    """Return the ids `(n,)` in 4 n bytes."""
    return struct.unpack(f"<{len(blob) // 4}i", blob)


def checksum(*values: str | int | float | bytes | None) -> int:
    """
    Return the CRC-32 of values as SQLite holds them.

    SQLite sees damage to its own structure, not to what is written in it. Type and length go in
    before each value, so nothing can move from one to the next unseen.
    """
    crc = 0
    for value in values:
        part = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        crc = zlib.crc32(f"{type(value).__name__} {len(part)} ".encode(), crc)
        crc = zlib.crc32(part, crc)
    return crc

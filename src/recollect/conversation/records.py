"""
What is kept of a conversation: plain values, and the rules that hold for them.

Pure: no database, no file, no clock. Knows neither sessions nor token ids' meaning.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from recollect.errors import ConversationError
from recollect.types import FinishReason, Role, ToolLinks

ROLES: Final[tuple[Role, ...]] = ("system", "user", "assistant", "tool")
FINISH_REASONS: Final[tuple[FinishReason, ...]] = ("stop", "length", "cancelled")
DEFAULT_TIP: Final = "main"
MAX_NAME: Final = 100
"""Most characters of a name: it is typed on command lines and drawn in tables."""
MAX_TOKEN_ID: Final = 2**31 - 1
"""Token ids are kept as little-endian int32."""


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
            f"Character {error.start} of the message is half a character, which cannot be kept: "
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

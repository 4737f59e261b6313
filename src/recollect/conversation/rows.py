"""
Conversations and their nodes as rows of the journal's tables, and back.

Each node's row has a checksum over everything in it. Knows columns, not transactions.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from recollect.conversation.database import corrupt_error
from recollect.conversation.records import (
    ConversationInfo,
    NewNode,
    NodeRecord,
    StoredConversation,
    checksum,
    links_from_dict,
    links_to_dict,
    pack_token_ids,
    require_text,
    unpack_token_ids,
)
from recollect.conversation.schema import NODE_FORMAT
from recollect.errors import StoreVersionError

_CHECKED: Final = (
    "conversation_id, parent_id, role, finish_reason, created_at, fingerprint, usage, token_ids, "
    "content"
)
_INSERT: Final = (
    f"INSERT INTO nodes ({_CHECKED}, links, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
)
NODE_COLUMNS: Final = f"id, checksum, {_CHECKED}, links"
CONVERSATION_COLUMNS: Final = (
    "id, name, created_at, updated_at, model, fingerprint, format, namespace"
)


def time_text(moment: datetime) -> str:
    """Return a moment in UTC as the tables hold it."""
    return moment.isoformat(timespec="microseconds")


def text_to_keep(name: str) -> str:
    """Return the name of a model, which can be a path of any bytes, as text that can be kept."""
    return name.encode(errors="replace").decode()


def insert_node(
    connection: sqlite3.Connection,
    conversation_id: int,
    parent_id: int | None,
    node: NewNode | NodeRecord,
    created_at: datetime,
) -> int:
    """
    Write a node and return the id that it got.

    Raises:
        ConversationError: Its text cannot be kept.
    """
    require_text(node.content)
    usage = None if node.usage is None else json.dumps(dict(node.usage), allow_nan=False)
    token_ids = None if node.token_ids is None else pack_token_ids(node.token_ids)
    values = (
        conversation_id,
        parent_id,
        node.role,
        node.finish_reason,
        time_text(created_at),
        node.fingerprint,
        usage,
        token_ids,
        node.content,
    )
    links = None if node.links is None else json.dumps(links_to_dict(node.links))
    summed = _checksum(values, links)
    node_id = connection.execute(_INSERT, (*values, links, summed)).lastrowid
    assert node_id is not None, "an insert gives an id"
    return node_id


def read_nodes(
    connection: sqlite3.Connection, conversation_id: int, path: Path
) -> Iterator[NodeRecord]:
    """
    Yield the nodes of a conversation, parents first.

    Raises:
        StoreCorruptError: What is there is not what was written.
    """
    rows = connection.execute(
        f"SELECT {NODE_COLUMNS} FROM nodes WHERE conversation_id = ? ORDER BY id",  # noqa: S608
        (conversation_id,),
    )
    seen: set[int | None] = {None}
    for row in rows:
        if not is_sound(row):
            raise corrupt_error(path, f"node {row[0]} is not as it was written")
        node = _node(row)
        if node.parent_id not in seen:
            raise corrupt_error(path, f"node {node.parent_id} is missing")
        seen.add(node.id)
        yield node


def is_sound(row: tuple[Any, ...]) -> bool:
    """Return whether a row of `NODE_COLUMNS` is what was written."""
    return bool(row[1] == _checksum(row[2:-1], row[-1]))


def _checksum(values: tuple[Any, ...], links: str | None) -> int:
    """Return the checksum of a row; one without links has that of version 1, which had no such column."""
    return checksum(*values) if links is None else checksum(*values, links)


def _node(row: tuple[Any, ...]) -> NodeRecord:
    node_id, _, _, parent_id, role, finish, created_at, fingerprint, usage, token_ids, text = row[
        :-1
    ]
    links = row[-1]
    return NodeRecord(
        id=node_id,
        parent_id=parent_id,
        role=role,
        content=text,
        token_ids=None if token_ids is None else unpack_token_ids(token_ids),
        finish_reason=finish,
        usage=None if usage is None else json.loads(usage),
        created_at=datetime.fromisoformat(created_at),
        fingerprint=fingerprint,
        links=None if links is None else links_from_dict(json.loads(links)),
    )


def conversation_info(
    row: tuple[Any, ...], *, turns: int, tips: tuple[str, ...], size_bytes: int, path: Path
) -> ConversationInfo:
    """
    Return what a list says of a row of `CONVERSATION_COLUMNS`.

    Raises:
        StoreCorruptError: It holds no times.
    """
    conversation_id, name, created_at, updated_at, model, fingerprint, *_ = row
    return ConversationInfo(
        id=conversation_id,
        name=name,
        created_at=_moment(created_at, path),
        updated_at=_moment(updated_at, path),
        model=model,
        fingerprint=fingerprint,
        turns=turns,
        tips=tips,
        size_bytes=size_bytes,
    )


def stored_conversation(
    row: tuple[Any, ...],
    nodes: tuple[NodeRecord, ...],
    tips: Mapping[str, int | None],
    path: Path,
) -> StoredConversation:
    """
    Return a conversation from its row of `CONVERSATION_COLUMNS` and what belongs to it.

    Raises:
        StoreVersionError: A newer version wrote its nodes.
        StoreCorruptError: It holds no times, or a tip stands at no node of it.
    """
    conversation_id, name, created_at, updated_at, model, fingerprint, node_format, namespace = row
    if node_format > NODE_FORMAT:
        raise StoreVersionError(
            f"A newer recollect wrote the conversation {name!r}: update recollect to read it."
        )
    ids = {None, *(node.id for node in nodes)}
    for tip, node_id in tips.items():
        if node_id not in ids:
            raise corrupt_error(path, f"the tip {tip!r} of {name!r} stands at no node of it")
    return StoredConversation(
        id=conversation_id,
        name=name,
        created_at=_moment(created_at, path),
        updated_at=_moment(updated_at, path),
        model=model,
        fingerprint=fingerprint,
        nodes=nodes,
        tips=dict(tips),
        namespace=namespace,
    )


def _moment(text: str, path: Path) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise corrupt_error(path, f"{text!r} is no time") from None

"""
Which token ids replies had, by the name of their place in a conversation.

A client that sends a conversation as text sends replies as text, and encoding that again may give
other ids than were generated: whose KV is there then would not be found. A process remembers the
ids; here they outlive it. Functions over a `DiskStore`; no state of their own.
"""

import heapq
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import numpy as np

from recollect.kv.blocks import Key, disguised_key, namespace_key
from recollect.kv.environment import Transaction
from recollect.kv.record import Refused, Sealer, opened, with_checksum

if TYPE_CHECKING:  # which writes its replies anew where an earlier version named them
    from recollect.kv.disk import DiskStore

_HEAD: Final = struct.Struct("<Qd?xxxI")
"""Checksum, last used (Unix seconds), whether what follows is sealed, tokens."""
_CHECKED: Final = 8
_MOST: Final = 100_000
_BUDGET_EACH: Final = 1 << 16
"""Of the store's bytes for each reply that may be remembered; one takes a few thousand at most."""
_GIVEN_UP: Final = 1 / 4
"""Of all, once there are too many: looking for the oldest reads all of them."""


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A reply as it was generated."""

    text: str
    token_ids: tuple[int, ...]


def reply_name(store: "DiskStore", fingerprint: str, namespace: str, message_key: bytes) -> Key:
    """
    Return the name of a reply in its place.

    Args:
        store: In an encrypted one names tell nobody else which text they are of.
        fingerprint: Of the model whose ids they are.
        namespace: Who may find it.
        message_key: `Node.key`: a hash of all that was said, up to the reply.
    """
    root = namespace_key(fingerprint, namespace, store.root_secret)
    name = blake2b(root + message_key, digest_size=32, person=b"recollect reply").digest()
    return disguised_key(name, store.chain_secret) if store.chain_secret else name


def remember(store: "DiskStore", replies: Mapping[Key, StoredReply]) -> None:
    """
    Keep replies, and give up those used longest ago where there are too many.

    Raises:
        StoreFullError: There is no room. Nothing was changed.
        StoreError: The files cannot be written. Nothing was changed.
    """
    table = store.env.table("replies")
    with store.env.writing() as txn:
        for name, reply in replies.items():
            txn.put(name, _packed(name, reply, store.clock(), store.sealer), db=table)
        most = max(1, min(_MOST, store.budget_bytes // _BUDGET_EACH))
        count = txn.stat(table)["entries"]
        if count > most:
            _give_up(store, txn, count - most + int(most * _GIVEN_UP))


def recall(store: "DiskStore", name: Key) -> StoredReply | None:
    """
    Return the reply of that name; None where there is none, or not as it was written.

    Raises:
        StoreError: The files cannot be read.
    """
    with store.env.reading() as txn:
        stored = txn.get(name, db=store.env.table("replies"))
        if stored is None:
            return None
        try:
            return _unpacked(name, bytes(stored), store.sealer)
        except Refused:
            return None


def resealed(name: Key, new_name: Key, stored: bytes, sealer: Sealer) -> bytes | None:
    """Return a stored reply as it is stored under another name; None where it does not open."""
    try:
        reply = _unpacked(name, stored, sealer)
    except Refused:
        return None
    return _packed(new_name, reply, _last_used(stored), sealer)


def _packed(name: Key, reply: StoredReply, last_used: float, sealer: Sealer | None) -> bytes:
    ids: bytes = np.asarray(reply.token_ids, "<i4").tobytes()
    content = ids + reply.text.encode("utf-8", "surrogatepass")
    if sealer is not None:
        content = sealer.seal(content, context=b"reply" + name)
    head = _HEAD.pack(0, last_used, sealer is not None, len(reply.token_ids))
    return with_checksum(name, head[_CHECKED:] + content)


def _unpacked(name: Key, stored: bytes, sealer: Sealer | None) -> StoredReply:
    if len(stored) < _HEAD.size:
        raise Refused("truncated")
    if stored != with_checksum(name, stored[_CHECKED:]):
        raise Refused("checksum")
    _, _, is_sealed, count = _HEAD.unpack_from(stored)
    content = bytes(opened(memoryview(stored)[_HEAD.size :], is_sealed, b"reply" + name, sealer))
    if len(content) < 4 * count:
        raise Refused("truncated")
    ids = np.frombuffer(content[: 4 * count], "<i4").tolist()
    return StoredReply(content[4 * count :].decode("utf-8", "surrogatepass"), tuple(ids))


def _give_up(store: "DiskStore", txn: Transaction, count: int) -> None:
    table = store.env.table("replies")
    ages = ((_last_used(bytes(value)), bytes(name)) for name, value in txn.cursor(table))
    for _, name in heapq.nsmallest(count, ages):
        txn.delete(name, db=table)


def _last_used(stored: bytes) -> float:
    """Return when a reply was kept; what is no reply goes first."""
    return 0.0 if len(stored) < _HEAD.size else float(_HEAD.unpack_from(stored)[1])

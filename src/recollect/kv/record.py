"""
How blocks, entries, replies and pins lie on disk, byte by byte, and by which names.

The name of a block stands for the whole prefix that it ends. It is the same in memory, on disk, and in
files that are carried elsewhere; `chained_key` makes it. An entry is what is known of a block without
reading it. Pure: hashes, packs and unpacks; knows neither the database nor who asks.
docs/store-format.md is the same contract in words.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import xxhash

from recollect.errors import StoreCorruptError
from recollect.types import MissReason

FORMAT: Final = 1
"""Layout of a block; another number is another layout, and a miss."""

Buffer = bytes | bytearray | memoryview

_MAGIC: Final = b"RKVB"
# magic, format, whether sealed, tokens, payload bytes, identity, checksum
_HEADER: Final = struct.Struct("<4sBBxxIQ16s16s")
_CHECKED: Final = _HEADER.size - 16  # the header up to its checksum
# checksum, last used (Unix seconds), stored bytes, parent, identity, whether sealed, digests, tokens
_ENTRY: Final = struct.Struct("<QdQ32s16sBBxxI")
# checksum, last used (Unix seconds), whether what follows is sealed, tokens
_REPLY: Final = struct.Struct("<Qd?xxxI")
_CHECKSUM_BYTES: Final = 8
"""Before an entry and a reply, over everything after them."""
_SEALED_PIN: Final = b"\x01"
"""First byte of an encrypted pin; a plain one is JSON."""
KEY_BYTES: Final = 32
"""Length of a block's name."""

Key = bytes
"""The name of a block, or of the root of a namespace."""

DIGEST_BYTES: Final = 4
"""Length of the digest of a block up to one token. Two different ones are equal once in 4 billion cases."""
MOST_DIGESTS: Final = 96
"""Digests per block. LMDB sorts values of at most 511 bytes: these, and a name of 32 bytes after them."""

_CHAIN: Final = b"recollect block"
"""Sets the names of blocks apart from whatever else is hashed with the same secret."""


def chained_key(parent: Key, token_ids: Sequence[int], secret: bytes = b"") -> Key:
    """
    Return the name of a prefix: a hash of the prefix before its last block, and that block's tokens.

    The first parent is the name of a namespace, so nothing is shared across namespaces.

    Args:
        parent: The name of what the block follows.
        token_ids: Its tokens, shape `(n,)`.
        secret: At most 64 bytes. Names lie on the disk for all to read; without the secret, nobody can
            try out which tokens lead from one to another.
    """
    content = parent + np.asarray(token_ids, np.int64).tobytes()
    person = _CHAIN if secret else b""  # names of plain stores and portable files stay as they were
    return blake2b(content, digest_size=32, key=secret, person=person).digest()


def chained_keys(
    root: Key, token_ids: Sequence[int], block_size: int, secret: bytes = b""
) -> list[Key]:
    """Return the names of a prefix's blocks in order; the last may hold a part of one."""
    keys = [root]
    for start in range(0, len(token_ids), block_size):
        keys.append(chained_key(keys[-1], token_ids[start : start + block_size], secret))
    return keys[1:]


def disguised_key(key: Key, secret: bytes) -> Key:
    """
    Return a name to store in place of one that was made without the secret, and cannot be traced to it.

    No block has it, because each has tokens.
    """
    return chained_key(key, (), secret)


def branch_digests(parent: Key, token_ids: Sequence[int], secret: bytes = b"") -> bytes:
    """
    Return a short digest for each leading part of a block, one after the other: the disk sorts by them.

    Two blocks after the same one share as many leading digests as they share leading tokens. So in this
    order, the block that has the most in common with some tokens is a neighbour of these.

    Args:
        parent: The name of what the block follows.
        token_ids: Its tokens, shape `(n,)`; those after the first `MOST_DIGESTS` do not count.
        secret: At most 64 bytes. With it, digests tell only how many tokens two blocks have in common,
            and not which.
    """
    state = blake2b(parent, digest_size=DIGEST_BYTES, key=secret, person=b"recollect branch")
    digests = bytearray()
    for token in np.asarray(token_ids[:MOST_DIGESTS], np.int64):
        state.update(token.tobytes())
        digests += state.copy().digest()
    return bytes(digests)


def namespace_key(fingerprint: str, namespace: str = "", secret: bytes = b"") -> Key:
    """
    Return the name of a namespace, which is the first parent of its blocks.

    It stands for what KV depends on besides tokens, and for who may see it.

    Args:
        fingerprint: Of model, runtime and precision.
        namespace: Who shares.
        secret: At most 64 bytes. Without it, nobody can try out whose name it is.
    """
    content = f"{len(fingerprint)}:{fingerprint}:{namespace}".encode()
    return blake2b(content, digest_size=32, key=secret).digest()


@dataclass(frozen=True, slots=True)
class Names:
    """How the prefixes of one engine are named, in memory as in its store."""

    fingerprint: str
    """Of model, runtime and precision."""
    root_secret: bytes = b""
    """As `namespace_key` takes it."""
    chain_secret: bytes = b""
    """As `chained_key` takes it."""

    def root(self, namespace: str) -> Key:
        """Return the name of a namespace."""
        return namespace_key(self.fingerprint, namespace, self.root_secret)

    def after(self, parent: Key, token_ids: Sequence[int]) -> Key:
        """Return the name of the prefix that ends with these tokens in the block after *parent*."""
        return chained_key(parent, token_ids, self.chain_secret)


class Sealer(Protocol):
    """Encrypts what is stored; authenticates the context with it, so that two values cannot be swapped."""

    @property
    def name_secret(self) -> bytes:
        """Return 32 bytes to mix into the names of prefixes, so that they tell nothing of the text."""

    def seal(self, plain: bytes | memoryview, *, context: bytes) -> bytes:
        """Return the encrypted bytes."""

    def open(self, sealed: bytes | memoryview, *, context: bytes) -> bytes:
        """
        Return the plain bytes.

        Raises:
            StoreCorruptError: They are not what was sealed under that context.
        """


class Refused(Exception):  # noqa: N818 - never leaves kv/: a miss is a result, not an error
    """A stored value is not what was written, or belongs to something else."""

    def __init__(self, reason: MissReason) -> None:
        super().__init__(reason)
        self.reason: Final = reason


@dataclass(frozen=True, slots=True)
class Identity:
    """What the bytes of a block depend on besides its tokens and those before it."""

    fingerprint: str
    """Fingerprint of weights, tokenizer and template."""
    runtime: str
    """Runtime with its version and profile."""
    kv_format: str
    """Element types and shapes of a block in all layers."""

    def digest(self) -> bytes:
        """Return 16 bytes that stand for the identity."""
        return xxhash.xxh3_128_digest(self.text().encode())

    def text(self) -> str:
        """Return the identity as one text."""
        return "\0".join((self.fingerprint, self.runtime, self.kv_format))


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a stored block without reading it."""

    key: Key
    parent: Key
    """The block before, or the root of a namespace."""
    identity: bytes
    token_ids: tuple[int, ...]
    last_used: float
    """Unix time in seconds."""
    stored_bytes: int
    """What it takes in the file, in whole pages."""
    digests: bytes = b""
    """`branch_digests` of its tokens; empty where they were encrypted when format 1 became 2."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A prefix that is not evicted until somebody unpins it."""

    name: str
    tail: Key
    """Its last block."""
    tokens: int
    identity: str
    """`Identity.digest()` of its KV, in hex."""
    created: float
    """Unix time in seconds."""
    about: dict[str, Any]
    """JSON values for whoever pinned it."""


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A reply as the model generated it."""

    text: str
    token_ids: tuple[int, ...]


def pack_block(
    key: Key, identity: bytes, tokens: int, payload: Buffer, sealer: Sealer | None
) -> bytearray:
    """
    Return a block as it is stored.

    Args:
        key: The name of the prefix that the block ends; part of the checksum, so that a block under
            another key is refused.
        identity: `Identity.digest()`.
        tokens: How many of its slots hold KV.
        payload: The block's bytes of all layers.
        sealer: Encrypts the payload; None: it is stored as it is.
    """
    if sealer is not None:
        payload = sealer.seal(memoryview(payload), context=b"block" + key + identity)
    packed = bytearray(_HEADER.size + len(payload))
    packed[_HEADER.size :] = payload
    _HEADER.pack_into(
        packed, 0, _MAGIC, FORMAT, sealer is not None, tokens, len(payload), identity, b""
    )
    packed[_CHECKED : _HEADER.size] = _checksum(key, memoryview(packed))
    return packed


def unpack_block(
    key: Key, identity: bytes, tokens: int, stored: memoryview, sealer: Sealer | None
) -> Buffer:
    """
    Return the payload of a stored block; a view into *stored* where it is not sealed.

    Raises:
        Refused: It is damaged, or of another key, model, runtime, precision or format.
    """
    if len(stored) < _HEADER.size:
        raise Refused("truncated")
    magic, version, sealed, count, length, whose, checksum = _HEADER.unpack_from(stored)
    if magic != _MAGIC or version != FORMAT:
        raise Refused("format")
    if len(stored) != _HEADER.size + length:
        raise Refused("truncated")
    if checksum != _checksum(key, stored):
        raise Refused("checksum")
    if whose != identity or count != tokens:
        raise Refused("identity")
    return _opened(stored[_HEADER.size :], bool(sealed), b"block" + key + identity, sealer)


def pack_entry(entry: Entry, sealer: Sealer | None) -> bytes:
    """Return an entry as it is stored."""
    tokens: bytes = np.asarray(entry.token_ids, "<i4").tobytes()
    if sealer is not None:
        tokens = sealer.seal(tokens, context=b"entry" + entry.key)
    head = _ENTRY.pack(
        0,
        entry.last_used,
        entry.stored_bytes,
        entry.parent,
        entry.identity,
        sealer is not None,
        len(entry.digests) // DIGEST_BYTES,
        len(entry.token_ids),
    )
    return _with_checksum(entry.key, head[_CHECKSUM_BYTES:] + entry.digests + tokens)


def unpack_entry(key: Key, stored: Buffer, sealer: Sealer | None) -> Entry:
    """
    Return a stored entry.

    Raises:
        Refused: It is damaged, or of another key.
    """
    head = entry_head(key, stored)
    rest = memoryview(stored)[_ENTRY.size + len(head.digests) :]
    packed = _opened(rest, head.is_sealed, b"entry" + key, sealer)
    if len(packed) != 4 * head.tokens:
        raise Refused("truncated")
    tokens = tuple(np.frombuffer(packed, "<i4").tolist())
    return Entry(
        key, head.parent, head.identity, tokens, head.last_used, head.stored_bytes, head.digests
    )


class EntryHead(NamedTuple):
    """An entry without its tokens, which can be read without the key."""

    last_used: float
    stored_bytes: int
    parent: Key
    identity: bytes
    is_sealed: bool
    tokens: int
    digests: bytes


def entry_head(key: Key, stored: Buffer) -> EntryHead:
    """
    Return the head of a stored entry.

    Raises:
        Refused: It is damaged, or of another key.
    """
    stored = _sound(key, stored, _ENTRY.size)
    _, last_used, size, parent, identity, sealed, count, tokens = _ENTRY.unpack_from(stored)
    digests = stored[_ENTRY.size : _ENTRY.size + count * DIGEST_BYTES]
    return EntryHead(last_used, size, parent, identity, bool(sealed), tokens, digests)


def touched(key: Key, stored: Buffer, last_used: float) -> bytes:
    """Return a stored entry with another time of use; it is not decrypted."""
    stored = bytes(stored)
    return _with_checksum(key, struct.pack("<d", last_used) + stored[_CHECKSUM_BYTES + 8 :])


def entry_size(tokens: int) -> int:
    """Return about how many bytes an entry takes, to be counted."""
    return _ENTRY.size + 4 * tokens + DIGEST_BYTES * min(tokens, MOST_DIGESTS)


def pack_reply(name: Key, reply: StoredReply, last_used: float, sealer: Sealer | None) -> bytes:
    """Return a reply as it is stored under a name; *last_used* is a Unix time in seconds."""
    ids: bytes = np.asarray(reply.token_ids, "<i4").tobytes()
    content = ids + reply.text.encode("utf-8", "surrogatepass")
    if sealer is not None:
        content = sealer.seal(content, context=b"reply" + name)
    head = _REPLY.pack(0, last_used, sealer is not None, len(reply.token_ids))
    return _with_checksum(name, head[_CHECKSUM_BYTES:] + content)


def unpack_reply(name: Key, stored: Buffer, sealer: Sealer | None) -> StoredReply:
    """
    Return a stored reply.

    Raises:
        Refused: It is damaged, of another name, or does not open.
    """
    stored = _sound(name, stored, _REPLY.size)
    _, _, is_sealed, count = _REPLY.unpack_from(stored)
    content = bytes(_opened(memoryview(stored)[_REPLY.size :], is_sealed, b"reply" + name, sealer))
    if len(content) < 4 * count:
        raise Refused("truncated")
    ids = np.frombuffer(content[: 4 * count], "<i4").tolist()
    return StoredReply(content[4 * count :].decode("utf-8", "surrogatepass"), tuple(ids))


def reply_last_used(stored: Buffer) -> float:
    """Return when a reply was stored, as a Unix time; 0 for bytes that are no reply."""
    return 0.0 if len(stored) < _REPLY.size else float(_REPLY.unpack_from(stored)[1])


def pin_key(name: str, sealer: Sealer | None) -> bytes:
    """Return the key of a pin: its name, or in an encrypted store a hash with the store's secret."""
    if sealer is None:
        return name.encode()
    return blake2b(name.encode(), digest_size=32, key=sealer.name_secret, person=b"pin").digest()


def pack_pin(key: bytes, pin: Pin, sealer: Sealer | None) -> bytes:
    """Return a pin as it is stored; its tail is never encrypted, because eviction needs it."""
    value = json.dumps(asdict(pin) | {"tail": pin.tail.hex()}).encode()
    if sealer is None:
        return value
    return _SEALED_PIN + pin.tail + sealer.seal(value, context=b"pin" + key + pin.tail)


def unpack_pin(key: bytes, stored: bytes, sealer: Sealer | None) -> Pin | None:
    """Return a stored pin; None where it is damaged, or encrypted and does not open with this key."""
    if is_sealed_pin(stored):
        if sealer is None:
            return None
        tail, sealed = stored[1 : 1 + KEY_BYTES], stored[1 + KEY_BYTES :]
        try:
            stored = sealer.open(sealed, context=b"pin" + key + tail)
        except StoreCorruptError:
            return None
    try:
        fields = json.loads(stored)
        return Pin(**fields | {"tail": bytes.fromhex(fields["tail"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def is_sealed_pin(stored: Buffer) -> bool:
    """Return whether a stored pin is encrypted."""
    return bytes(stored[:1]) == _SEALED_PIN


def pinned_tail(stored: bytes) -> Key | None:
    """Return the last block of a pinned prefix, without the key; None where the pin is damaged."""
    if is_sealed_pin(stored):
        return stored[1 : 1 + KEY_BYTES]
    pin = unpack_pin(b"", stored, None)
    return None if pin is None else pin.tail


def _opened(stored: memoryview, sealed: bool, context: bytes, sealer: Sealer | None) -> Buffer:
    """
    Return what was stored, decrypted.

    Raises:
        Refused: It was not sealed under that context, or is plain where it has to be sealed.
    """
    if sealed != (sealer is not None):  # anybody can have put plain bytes among encrypted ones
        raise Refused("sealed")
    if sealer is None:
        return stored
    try:
        return sealer.open(stored, context=context)
    except StoreCorruptError:
        raise Refused("sealed") from None


def _checksum(key: Key, stored: memoryview) -> bytes:
    """Return the checksum of a stored block: over its key, its header and its payload."""
    state = xxhash.xxh3_128(key)
    state.update(stored[:_CHECKED])
    state.update(stored[_HEADER.size :])
    return state.digest()


def _sound(key: Key, stored: Buffer, least_bytes: int) -> bytes:
    """
    Return the bytes of an entry or a reply whose checksum holds.

    Raises:
        Refused: They are fewer than *least_bytes*, or the checksum does not hold under that key.
    """
    stored = bytes(stored)
    if len(stored) < least_bytes:
        raise Refused("truncated")
    if stored != _with_checksum(key, stored[_CHECKSUM_BYTES:]):
        raise Refused("checksum")
    return stored


def _with_checksum(key: Key, rest: bytes) -> bytes:
    """Return a value with its checksum under that key, 8 bytes, before it."""
    state = xxhash.xxh3_64(key)
    state.update(rest)
    return struct.pack("<Q", state.intdigest()) + rest

"""
What a store notes beside its blocks: bytes in all, whose they are, what is pinned, what goes first.

Functions inside a transaction of `DiskStore`; no state of its own.

Which layout a store has, and how a plain one of an earlier version gets that of this one.

Knows entries and what follows what; neither budgets nor what is pinned. An encrypted one is written
anew, by `resealing`.
"""

import heapq
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, Final

from recollect.errors import StoreBusyError, StoreCorruptError, StoreVersionError
from recollect.kv.blocks import Key, branch_digests
from recollect.kv.environment import Environment, Tables, Transaction
from recollect.kv.record import (
    Entry,
    EntryHead,
    Identity,
    Refused,
    Sealer,
    entry_head,
    pack_entry,
    unpack_entry,
)

_BYTES: Final = b"bytes"
_SAVED: Final = b"saved:"
_SEALED: Final = b"\x01"
"""What a sealed pin begins with; a plain one is JSON."""
_KEY_BYTES: Final = 32
"""Of the name of a block."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A prefix that is kept until somebody lets it go."""

    name: str
    tail: Key
    """Its last block."""
    tokens: int
    identity: str
    """Hex digest of what its KV is of."""
    created: float
    """Unix time in seconds."""
    about: dict[str, Any]
    """What whoever pinned it wants to know again, as JSON values."""


def total_bytes(txn: Transaction, env: Tables) -> int:
    """Return what all blocks take."""
    return int.from_bytes(txn.get(_BYTES, b"", db=env.table("info")), "little")


def add_bytes(txn: Transaction, env: Tables, change: int) -> None:
    """Count bytes that came, or went."""
    total = max(0, total_bytes(txn, env) + change)
    txn.put(_BYTES, total.to_bytes(8, "little"), db=env.table("info"))


def note_identity(txn: Transaction, env: Tables, identity: Identity) -> None:
    """Note in words what the digest in blocks and entries stands for."""
    digest, table = identity.digest(), env.table("identities")
    if txn.get(digest, db=table) is None:
        txn.put(digest, json.dumps(asdict(identity)).encode(), db=table)


@dataclass(frozen=True, slots=True)
class Savings:
    """What the tier was good for."""

    tokens: int = 0
    """Restored instead of computed."""
    seconds: float = 0.0
    """That computing them would have taken longer."""
    compute_s_per_token: float | None = None
    """As measured last."""


def savings(txn: Transaction, env: Tables, identity: bytes) -> Savings:
    """Return what the tier was good for so far, with one model, runtime and precision."""
    stored = bytes(txn.get(_SAVED + identity, b"{}", db=env.table("info")))
    try:
        return Savings(**json.loads(stored))
    except (ValueError, TypeError, RecursionError):
        return Savings()  # it is damaged, and counted anew from here on


def add_savings(txn: Transaction, env: Tables, identity: bytes, more: Savings) -> None:
    """Count what one process saved."""
    known = savings(txn, env, identity)
    total = Savings(
        known.tokens + more.tokens,
        known.seconds + more.seconds,
        more.compute_s_per_token or known.compute_s_per_token,
    )
    txn.put(_SAVED + identity, json.dumps(asdict(total)).encode(), db=env.table("info"))


def put_pin(txn: Transaction, env: Tables, pin: Pin, sealer: Sealer | None) -> None:
    """Keep a prefix from eviction; a pin of the same name is replaced."""
    key = _pin_key(pin.name, sealer)
    txn.put(key, _packed_pin(key, pin, sealer), db=env.table("pins"))


def add_pin(txn: Transaction, env: Tables, pin: Pin, sealer: Sealer | None) -> bool:
    """Keep a prefix from eviction; return whether nothing of that name was pinned."""
    if txn.get(_pin_key(pin.name, sealer), db=env.table("pins")) is not None:
        return False
    put_pin(txn, env, pin, sealer)
    return True


def drop_pin(txn: Transaction, env: Tables, name: str, sealer: Sealer | None) -> bool:
    """Let a prefix be evicted again; return whether it was pinned."""
    return bool(txn.delete(_pin_key(name, sealer), db=env.table("pins")))


def find_pin(txn: Transaction, env: Tables, name: str, sealer: Sealer | None) -> Pin | None:
    """Return the pin of that name."""
    key = _pin_key(name, sealer)
    value = txn.get(key, db=env.table("pins"))
    return None if value is None else _unpacked_pin(key, bytes(value), sealer)


def pins(txn: Transaction, env: Tables, sealer: Sealer | None) -> list[Pin]:
    """Return all pins, by name; those that do not open are left out, and stay pinned."""
    opened = (_unpacked_pin(key, value, sealer) for key, value in _stored_pins(txn, env))
    return sorted((pin for pin in opened if pin is not None), key=lambda pin: pin.name)


def seal_pins(txn: Transaction, env: Tables, sealer: Sealer) -> None:
    """Seal the pins that are plain: an earlier version wrote them so in an encrypted store, too."""
    plain = [one for one in _stored_pins(txn, env) if not one[1].startswith(_SEALED)]
    for key, value in plain:
        txn.delete(key, db=env.table("pins"))
        pin = _unpacked_pin(key, value, None)
        if pin is not None:
            add_pin(txn, env, pin, sealer)


def has_plain_pins(txn: Transaction, env: Tables) -> bool:
    """Return whether a pin is not sealed."""
    return any(not value.startswith(_SEALED) for _, value in _stored_pins(txn, env))


def pinned_tails(txn: Transaction, env: Tables) -> set[Key]:
    """Return the last blocks of what is pinned, which can be read without the key."""
    found = (_pinned_tail(value) for _, value in _stored_pins(txn, env))
    return {tail for tail in found if tail is not None}


def pinned_keys(txn: Transaction, env: Tables) -> set[Key]:
    """Return all blocks of what is pinned."""
    return _with_prefixes(txn, env, pinned_tails(txn, env))


def _with_prefixes(txn: Transaction, env: Tables, tails: Iterable[Key]) -> set[Key]:
    """Return the stored ones of some blocks, with all that they follow."""
    keys: set[Key] = set()
    table = env.table("entries")
    for tail in tails:
        key = tail
        while key not in keys and (head := sound_head(key, txn.get(key, db=table))) is not None:
            keys.add(key)
            key = head.parent
    return keys


def sound_head(key: Key, stored: bytes | memoryview | None) -> EntryHead | None:
    """Return the head of a stored entry; None where there is none, or a damaged one."""
    try:
        return None if stored is None else entry_head(key, stored)
    except Refused:
        return None


def heads(txn: Transaction, env: Tables) -> dict[Key, EntryHead]:
    """Return the heads of all entries that are as they were written."""
    read = ((bytes(key), value) for key, value in txn.cursor(env.table("entries")))
    return {key: head for key, value in read if (head := sound_head(key, value)) is not None}


def remove_damaged(txn: Transaction, env: Tables, keys: Collection[Key]) -> int:
    """
    Remove blocks whose entries tell neither what they follow nor their size; return how many were there.

    Reads all that follows what and counts all anew, once for however many they are.
    """
    gone = set(keys)
    if not gone:
        return 0
    table = env.table("siblings")
    for parent, row in [(bytes(parent), bytes(row)) for parent, row in txn.cursor(table)]:
        if row[-_KEY_BYTES:] in gone:
            txn.delete(parent, row, db=table)
    for key in gone:
        txn.delete(key, db=env.table("blocks"))
    removed = [key for key in gone if txn.delete(key, db=env.table("entries"))]
    recount(txn, env)
    return len(removed)


def recount(txn: Transaction, env: Tables) -> None:
    """Derive anew what all blocks take."""
    total = sum(head.stored_bytes for head in heads(txn, env).values())
    txn.put(_BYTES, total.to_bytes(8, "little"), db=env.table("info"))


def tails_first(
    txn: Transaction, env: Tables, also_keep: Iterable[Key] = ()
) -> Iterator[tuple[Key, int]]:
    """
    Yield (key, bytes) in the order in which blocks are given up; whoever takes one removes it.

    The least recently used first, and always tails before what they follow, so that what survives
    is the longest prefix. What is pinned is never among them, nor *also_keep* and what that follows.
    """
    known = heads(txn, env)
    keep = pinned_keys(txn, env) | _with_prefixes(txn, env, also_keep)
    followers = dict.fromkeys(known, 0)
    for head in known.values():
        if head.parent in followers:
            followers[head.parent] += 1
    used = {key: head.last_used for key, head in known.items()}
    heap = [(used[key], key) for key, count in followers.items() if not count and key not in keep]
    heapq.heapify(heap)
    while heap:
        last_used, key = heapq.heappop(heap)
        yield key, known[key].stored_bytes
        parent = known[key].parent
        if parent in followers:
            followers[parent] -= 1
            used[parent] = max(used[parent], last_used)  # a prefix was in use when its tail was
            if not followers[parent] and parent not in keep:
                heapq.heappush(heap, (used[parent], parent))


def _pin_key(name: str, sealer: Sealer | None) -> bytes:
    """Return under what a pin lies: its name, or a hash of that which nobody can guess at."""
    if sealer is None:
        return name.encode()
    return blake2b(name.encode(), digest_size=32, key=sealer.name_secret, person=b"pin").digest()


def _packed_pin(key: bytes, pin: Pin, sealer: Sealer | None) -> bytes:
    """Return a pin as it is stored: as JSON, or sealed but for its tail, which eviction needs."""
    value = json.dumps(asdict(pin) | {"tail": pin.tail.hex()}).encode()
    if sealer is None:
        return value
    return _SEALED + pin.tail + sealer.seal(value, context=_pin_context(key, pin.tail))


def _unpacked_pin(key: bytes, value: bytes, sealer: Sealer | None) -> Pin | None:
    """Return a stored pin; None where it is damaged, or sealed and does not open under this key."""
    if not value.startswith(_SEALED):
        return _pin_of(value)
    if sealer is None:
        return None
    context = _pin_context(key, value[1 : 1 + _KEY_BYTES])
    try:
        return _pin_of(sealer.open(value[1 + _KEY_BYTES :], context=context))
    except StoreCorruptError:
        return None


def _pinned_tail(value: bytes) -> Key | None:
    if value.startswith(_SEALED):
        return value[1 : 1 + _KEY_BYTES]
    pin = _pin_of(value)
    return None if pin is None else pin.tail


def _pin_of(value: bytes) -> Pin | None:
    """Return the pin in JSON of ours; None: it is damaged."""
    try:
        fields = json.loads(value)
        return Pin(**fields | {"tail": bytes.fromhex(fields["tail"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _stored_pins(txn: Transaction, env: Tables) -> list[tuple[bytes, bytes]]:
    return [(bytes(key), bytes(value)) for key, value in txn.cursor(env.table("pins"))]


def _pin_context(key: bytes, tail: Key) -> bytes:
    return b"pin" + key + tail


TABLES: Final = ("blocks", "entries", "siblings", "pins", "identities", "info", "replies")
FORMAT: Final = 3
"""Of the tables; up to 2 the names of blocks in an encrypted store were hashes without its secret."""
PLAIN_FORMAT: Final = 2
"""Of a store that is not encrypted; 1 had no order among the blocks that follow the same one."""
_FORMAT: Final = b"format"
_UNORDERED: Final = b"unordered"
"""Noted by versions that knew format 2, where tokens could not be opened."""
_EARLIER_TABLE: Final = "children"
"""Of format 1, in the place of `siblings`."""
_LATER: Final = b"KV store of a later format"


def digests_of(entry: Entry, sealer: Sealer | None) -> bytes:
    """Return the place of a block among those that follow the same one."""
    secret = b"" if sealer is None else sealer.name_secret
    return branch_digests(entry.parent, entry.token_ids, secret)


def names_are_open(txn: Transaction, env: Tables) -> bool:
    """Return whether there are names of blocks that anybody can try tokens against."""
    named = sum(txn.stat(env.table(name))["entries"] for name in ("entries", "pins"))
    return bool(named) and format_of(txn, env) < FORMAT


def note_format(txn: Transaction, env: Tables) -> None:
    """Note in a new file that it has this layout, and let versions that know format 1 refuse it."""
    txn.put(_EARLIER_TABLE.encode(), _LATER)
    txn.delete(_UNORDERED, db=env.table("info"))
    txn.put(_FORMAT, FORMAT.to_bytes(8, "little"), db=env.table("info"))


def bring_up_to_date(env: Environment, sealer: Sealer | None) -> None:
    """
    Give a store the layout of this version, in one transaction; all blocks stay.

    One that cannot be written stays as it is: whole blocks are found in any layout.

    Raises:
        StoreVersionError: A later version wrote it; nothing was changed.
        StoreBusyError: It is encrypted, of an earlier version, and open in this process without the
            key, so that it could not be written anew; nothing was changed.
        StoreError: It cannot be written; nothing was changed.
    """
    wanted = PLAIN_FORMAT if sealer is None else FORMAT
    with env.reading() as txn:
        is_done = format_of(txn, env) >= wanted
        has_names = sealer is not None and names_are_open(txn, env)
    if is_done or env.is_read_only:
        return
    if has_names:
        raise StoreBusyError(
            f"The KV store in {env.folder} has to be rewritten once for this version, and is open "
            "in this program: close it there first."
        )
    with env.writing() as txn:
        found = format_of(txn, env)
        if found < wanted:  # another process may have been faster
            if not found:
                _order_all(txn, env)
                env.replace_table(txn, _EARLIER_TABLE, _LATER)
            txn.put(_FORMAT, wanted.to_bytes(8, "little"), db=env.table("info"))


def format_of(txn: Transaction, env: Tables) -> int:
    """
    Return the number of a store's layout; 0: the first, or nothing was written yet.

    Raises:
        StoreVersionError: It is a later one than is known here.
    """
    found = int.from_bytes(txn.get(_FORMAT, b"", db=env.table("info")), "little")
    if found > FORMAT:
        where = f" in {env.folder}" if isinstance(env, Environment) else ""
        raise StoreVersionError(
            f"A newer version of recollect wrote the KV store{where}: use that one, set "
            "RECOLLECT_HOME elsewhere, or do without it (--kv-disk 0)."
        )
    return found


def _order_all(txn: Transaction, env: Environment) -> None:
    """Note for each block what it follows, and where among its siblings, unless that is sealed."""
    entries, siblings = env.table("entries"), env.table("siblings")
    stored = [(bytes(key), bytes(value)) for key, value in txn.cursor(entries)]
    for key, value in stored:
        try:
            head = entry_head(key, value)
        except Refused:
            continue  # it is found to be damaged, and goes, when it is next asked for
        ordered = _ordered(key, value)
        if ordered is not None:
            txn.put(key, pack_entry(ordered, None), db=entries)
        digests = b"" if ordered is None else ordered.digests
        txn.put(head.parent, digests + key, db=siblings, dupdata=True)


def _ordered(key: Key, stored: bytes) -> Entry | None:
    """Return an entry with its digests; None where its tokens are sealed."""
    try:
        entry = unpack_entry(key, stored, None)
    except Refused:
        return None
    return replace(entry, digests=digests_of(entry, None))

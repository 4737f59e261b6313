"""
The tables of a store as one transaction sees them: blocks, what follows what, byte counts, pins.

Keeps together what belongs together, such as an entry, its block and its place among siblings. Knows
neither budgets nor what to read or write when.
"""

import heapq
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

from recollect.kv.environment import Transaction
from recollect.kv.record import (
    DIGEST_BYTES,
    KEY_BYTES,
    Entry,
    EntryHead,
    Identity,
    Key,
    Pin,
    Refused,
    Sealer,
    branch_digests,
    chained_key,
    entry_head,
    is_sealed_pin,
    pack_entry,
    pack_pin,
    pin_key,
    pinned_tail,
    unpack_block,
    unpack_entry,
    unpack_pin,
)
from recollect.types import common_prefix_length

TABLES: Final = ("blocks", "entries", "siblings", "pins", "identities", "info", "replies")
FORMAT: Final = 3
"""Layout of the tables; up to 2 the names of blocks in an encrypted store were hashes without its secret."""
PLAIN_FORMAT: Final = 2
"""Layout of a store that is not encrypted; 1 had no order among the blocks that follow the same one."""
_FORMAT: Final = b"format"
_BYTES: Final = b"bytes"
_SAVED: Final = b"saved:"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Savings:
    """What the store has saved so far."""

    tokens: int = 0
    """Tokens that were restored instead of computed."""
    seconds: float = 0.0
    """How much longer computing them would have taken."""
    compute_s_per_token: float | None = None
    """What computing a token cost when it was last measured."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What a store has of one model, runtime and precision."""

    identity: Identity
    blocks: int
    tokens: int
    stored_bytes: int
    last_used: float
    """Unix time in seconds; 0 where there are no blocks."""
    savings: Savings


class Tables:
    """
    The tables of a store in one transaction.

    Belongs to whoever began the transaction and ends with it; values are views that end with it, too.
    Nothing here is atomic by itself: the transaction is.
    """

    __slots__ = ("_handles", "_sealer", "txn")

    def __init__(self, txn: Transaction, handles: Mapping[str, Any], sealer: Sealer | None) -> None:
        """
        Take a transaction.

        Args:
            txn: For writing where anything here is to be changed.
            handles: The open tables by name; one may be missing in a store of an earlier version.
            sealer: Encrypts entries and pins; None: they are stored as they are.
        """
        self.txn: Final = txn
        self._handles: Final = handles
        self._sealer: Final = sealer

    def __contains__(self, table: str) -> bool:
        """Return whether there is a table of that name."""
        return table in self._handles

    def get(self, table: str, key: bytes) -> memoryview | None:
        """Return a value; None where there is none."""
        value: memoryview | None = self.txn.get(key, db=self._handles[table])
        return value

    def put(self, table: str, key: bytes, value: bytes | bytearray) -> None:
        """Set a value; where a key has several, add one."""
        self.txn.put(key, value, db=self._handles[table])

    def delete(self, table: str, key: bytes, value: bytes = b"") -> bool:
        """Delete a key, or one of its values where it has several; return whether it was there."""
        return bool(self.txn.delete(key, value, db=self._handles[table]))

    def empty(self, table: str) -> None:
        """Delete everything in a table."""
        self.txn.drop(self._handles[table], delete=False)

    def count(self, table: str) -> int:
        """Return how many values there are; 0 where there is no such table."""
        if table not in self:
            return 0
        count: int = self.txn.stat(self._handles[table])["entries"]
        return count

    def rows(self, table: str) -> Iterator[tuple[bytes, memoryview]]:
        """Yield all keys and values in order; none where there is no such table."""
        if table in self:
            for key, value in self.txn.cursor(self._handles[table]):
                yield bytes(key), value

    def format(self) -> int:
        """Return the number of the layout; 0: the first one, or nothing was written yet."""
        return int.from_bytes(self.get("info", _FORMAT) or b"", "little")

    def set_format(self, number: int) -> None:
        """Note the number of the layout."""
        self.put("info", _FORMAT, number.to_bytes(8, "little"))

    def names_are_open(self) -> bool:
        """Return whether there are names of blocks that anybody can try tokens against."""
        return bool(self.count("entries") + self.count("pins")) and self.format() < FORMAT

    def has_block(self, key: Key) -> bool:
        """Return whether a block has an entry, sound or not."""
        return self.get("entries", key) is not None

    def head(self, key: Key) -> EntryHead | None:
        """Return the head of an entry; None where there is none, or a damaged one."""
        stored = self.get("entries", key)
        try:
            return None if stored is None else entry_head(key, stored)
        except Refused:
            return None

    def heads(self) -> dict[Key, EntryHead]:
        """Return the heads of all entries that are sound. Reads all entries."""
        heads = {}
        for key, stored in self.rows("entries"):
            try:
                heads[key] = entry_head(key, stored)
            except Refused:
                continue
        return heads

    def entry(self, key: Key) -> Entry | None:
        """
        Return an entry; None where there is none.

        Raises:
            Refused: It is damaged, or does not open.
        """
        stored = self.get("entries", key)
        return None if stored is None else unpack_entry(key, stored, self._sealer)

    def digests(self, parent: Key, token_ids: Iterable[int]) -> bytes:
        """Return the place of a block among those that follow the same one."""
        secret = b"" if self._sealer is None else self._sealer.name_secret
        return branch_digests(parent, tuple(token_ids), secret)

    def put_block(self, entry: Entry, packed: bytes | bytearray) -> None:
        """Store a block with its entry and its place among siblings, and count its bytes."""
        self.put("blocks", entry.key, packed)
        self.put("entries", entry.key, pack_entry(entry, self._sealer))
        self.put("siblings", entry.parent, entry.digests + entry.key)
        self.add_bytes(entry.stored_bytes)

    def remove(self, key: Key) -> bool:
        """Remove a block whose entry is sound; return whether it is one."""
        head = self.head(key)
        if head is None:
            return False
        self.delete("entries", key)
        self.delete("blocks", key)
        self.delete("siblings", head.parent, head.digests + key)
        self.add_bytes(-head.stored_bytes)
        return True

    def remove_all(self, keys: Collection[Key]) -> int:
        """Remove blocks, damaged ones too; return how many were there."""
        lost = {key for key in keys if not self.remove(key)}
        return len(keys) - len(lost) + self._remove_damaged(lost)

    def _remove_damaged(self, keys: set[Key]) -> int:
        """
        Remove blocks whose entries tell neither what they follow nor their size; return how many were there.

        Reads all of `siblings` and counts all bytes anew, once for however many blocks.
        """
        if not keys:
            return 0
        for parent, row in [(parent, bytes(row)) for parent, row in self.rows("siblings")]:
            if row[-KEY_BYTES:] in keys:
                self.delete("siblings", parent, row)
        for key in keys:
            self.delete("blocks", key)
        removed = [key for key in keys if self.delete("entries", key)]
        self.recount()
        return len(removed)

    def followers(self, key: Key) -> list[Key]:
        """Return the blocks that follow a block or a root directly."""
        cursor = self.txn.cursor(self._handles["siblings"])
        if not cursor.set_key(key):
            return []
        return [bytes(row)[-KEY_BYTES:] for row in cursor.iternext_dup()]

    def with_followers(self, keys: Iterable[Key]) -> list[Key]:
        """Return blocks and all that follow them, each once."""
        found: dict[Key, None] = {}
        pending = list(keys)
        while pending:
            key = pending.pop()
            if key not in found:
                found[key] = None
                pending += self.followers(key)
        return list(found)

    def neighbours(self, parent: Key, digests: bytes) -> list[bytes]:
        """Return the rows at or after a place, and before it, in the order of what follows a block."""
        cursor = self.txn.cursor(self._handles["siblings"])
        rows: list[bytes] = []
        if cursor.set_range_dup(parent, digests):
            rows.append(bytes(cursor.value()))
            if cursor.prev_dup():
                rows.append(bytes(cursor.value()))
        elif cursor.set_key(parent) and cursor.last_dup():
            rows.append(bytes(cursor.value()))
        return rows

    def parts(self, parent: Key, token_ids: Sequence[int], chain_secret: bytes) -> list[Key]:
        """
        Return the stored blocks after *parent* whose tokens begin these, and are fewer, the shortest first.

        What lies in order between a part and the block begins with the part, too: so a part is no
        longer than what the block has in common with one of its neighbours.
        """
        digests = self.digests(parent, token_ids)
        rows = self.neighbours(parent, digests)
        shared = max((common_prefix_length(row, digests) for row in rows), default=0)
        most = min(len(token_ids) - 1, shared // DIGEST_BYTES)
        parts = (token_ids[:count] for count in range(1, most + 1))
        keys = [chained_key(parent, part, chain_secret) for part in parts]
        return [key for key in keys if self.has_block(key)]

    def follows(self, entry: Entry) -> bool:
        """Return whether the block before an entry's own has it among what follows it."""
        row = entry.digests + entry.key
        return bool(self.txn.cursor(self._handles["siblings"]).set_key_dup(entry.parent, row))

    def total_bytes(self) -> int:
        """Return what all blocks take, as it was counted."""
        return int.from_bytes(self.get("info", _BYTES) or b"", "little")

    def add_bytes(self, change: int) -> None:
        """Add to what all blocks take; a negative number takes away."""
        self._set_total(max(0, self.total_bytes() + change))

    def recount(self) -> None:
        """Derive from the entries what all blocks take."""
        self._set_total(sum(head.stored_bytes for head in self.heads().values()))

    def _set_total(self, total: int) -> None:
        self.put("info", _BYTES, total.to_bytes(8, "little"))

    def note_identity(self, identity: Identity) -> None:
        """Note in words what the digest in blocks and entries stands for."""
        digest = identity.digest()
        if self.get("identities", digest) is None:
            self.put("identities", digest, json.dumps(asdict(identity)).encode())

    def identities(self) -> dict[bytes, Identity]:
        """Return what the digests stand for; damaged ones are left out."""
        read = ((key, _of_json(Identity, value)) for key, value in self.rows("identities"))
        return {digest: identity for digest, identity in read if identity is not None}

    def savings(self, digest: bytes) -> Savings:
        """Return what was saved with one model, runtime and precision; damage is counted anew from 0."""
        stored = self.get("info", _SAVED + digest)
        return (None if stored is None else _of_json(Savings, stored)) or Savings()

    def add_savings(self, digest: bytes, more: Savings) -> None:
        """Add what one process saved."""
        known = self.savings(digest)
        total = Savings(
            known.tokens + more.tokens,
            known.seconds + more.seconds,
            more.compute_s_per_token or known.compute_s_per_token,
        )
        self.put("info", _SAVED + digest, json.dumps(asdict(total)).encode())

    def find_pin(self, name: str) -> Pin | None:
        """Return the pin of that name; None where there is none, or it does not open."""
        key = pin_key(name, self._sealer)
        stored = self.get("pins", key)
        return None if stored is None else unpack_pin(key, bytes(stored), self._sealer)

    def add_pin(self, pin: Pin) -> bool:
        """Protect a prefix from eviction; return whether the name was free."""
        key = pin_key(pin.name, self._sealer)
        if self.get("pins", key) is not None:
            return False
        self.put("pins", key, pack_pin(key, pin, self._sealer))
        return True

    def drop_pin(self, name: str) -> bool:
        """Allow a prefix to be evicted again; return whether it was pinned."""
        return self.delete("pins", pin_key(name, self._sealer))

    def pins(self) -> list[Pin]:
        """Return all pins by name; one that does not open is left out, and still protects its prefix."""
        opened = (unpack_pin(key, bytes(value), self._sealer) for key, value in self.rows("pins"))
        return sorted((pin for pin in opened if pin is not None), key=lambda pin: pin.name)

    def has_plain_pins(self) -> bool:
        """Return whether a pin is not encrypted."""
        return any(not is_sealed_pin(value) for _, value in self.rows("pins"))

    def seal_pins(self) -> None:
        """Encrypt the pins that an earlier version, or a program without the key, wrote as plain text."""
        for key, value in [(key, bytes(value)) for key, value in self.rows("pins")]:
            if not is_sealed_pin(value):
                self.delete("pins", key)
                pin = unpack_pin(key, value, None)
                if pin is not None:
                    self.add_pin(pin)

    def pinned_tails(self) -> set[Key]:
        """Return the last blocks of what is pinned, which can be read without the key."""
        found = (pinned_tail(bytes(value)) for _, value in self.rows("pins"))
        return {tail for tail in found if tail is not None}

    def pinned_keys(self) -> set[Key]:
        """Return all blocks of what is pinned."""
        return self._with_prefixes(self.pinned_tails())

    def _with_prefixes(self, tails: Iterable[Key]) -> set[Key]:
        """Return those of some blocks that are stored, with all that they follow."""
        keys: set[Key] = set()
        for tail in tails:
            key = tail
            while key not in keys and (head := self.head(key)) is not None:
                keys.add(key)
                key = head.parent
        return keys

    def to_evict(
        self, wanted_bytes: int, also_keep: Iterable[Key] = ()
    ) -> Iterator[tuple[Key, int]]:
        """
        Yield (key, bytes) of the blocks to evict for so many bytes; the caller removes each.

        The least recently used comes first, and a tail always before what it follows, so that the
        longest prefix survives. Pinned prefixes are left out, and so are *also_keep* and what they
        follow. Reads all entries.
        """
        if wanted_bytes <= 0:
            return
        known = self.heads()
        keep = self.pinned_keys() | self._with_prefixes(also_keep)
        followers = dict.fromkeys(known, 0)
        for head in known.values():
            if head.parent in followers:
                followers[head.parent] += 1
        used = {key: head.last_used for key, head in known.items()}
        heap = [
            (used[key], key) for key, count in followers.items() if not count and key not in keep
        ]
        heapq.heapify(heap)
        while heap and wanted_bytes > 0:
            last_used, key = heapq.heappop(heap)
            yield key, known[key].stored_bytes
            wanted_bytes -= known[key].stored_bytes
            parent = known[key].parent
            if parent in followers:
                followers[parent] -= 1
                used[parent] = max(used[parent], last_used)  # a prefix was in use when its tail was
                if not followers[parent] and parent not in keep:
                    heapq.heappush(heap, (used[parent], parent))

    def holdings(self) -> list[Holding]:
        """Return what is stored by model, the last used first."""
        found = []
        heads = self.heads().values()
        for digest, identity in self.identities().items():
            own = [head for head in heads if head.identity == digest]
            found.append(
                Holding(
                    identity=identity,
                    blocks=len(own),
                    tokens=sum(head.tokens for head in own),
                    stored_bytes=sum(head.stored_bytes for head in own),
                    last_used=max((head.last_used for head in own), default=0.0),
                    savings=self.savings(digest),
                )
            )
        return sorted(found, key=lambda holding: -holding.last_used)

    def problems(self, chain_secret: bytes) -> Iterator[tuple[Key, str]]:
        """
        Yield (key, sentence) for each block that is not as it was written, and (b"", …) for wrong counts.

        Verifies the invariants of `DiskStore`. Reads everything.

        Args:
            chain_secret: That of the store, which the names of blocks depend on.
        """
        known = {key for key, _ in self.rows("entries")}
        total = sum(head.stored_bytes for head in self.heads().values())
        for key in sorted(known):
            wrong = self._block_problem(key, chain_secret)
            if wrong is not None:
                yield key, wrong
        for key, _ in self.rows("blocks"):
            if key not in known:
                yield key, "a block that nothing is known of"
        for _, row in self.rows("siblings"):
            if (child := bytes(row)[-KEY_BYTES:]) not in known:
                yield child, "is known to follow another block, and is not there"
        counted = self.total_bytes()
        if counted != total:
            yield b"", f"{counted:,} bytes are counted, and there are {total:,}"

    def _block_problem(self, key: Key, chain_secret: bytes) -> str | None:
        try:
            entry = self.entry(key)
            assert entry is not None, "the key is one of the table's"
            if chained_key(entry.parent, entry.token_ids, chain_secret) != key:
                return "its tokens do not give its name"
            stored = self.get("blocks", key)
            if stored is None:
                return "has no block"
            unpack_block(key, entry.identity, len(entry.token_ids), stored, self._sealer)
        except Refused as refused:
            return f"is not as it was written ({refused.reason})"
        if entry.digests not in (b"", self.digests(entry.parent, entry.token_ids)):
            return "its place among those after the same block is wrong"
        # A store of format 1 that cannot be written has no such table.
        if "siblings" in self and not self.follows(entry):
            return "is not known to the block before it"
        return None


def _of_json(make: Callable[..., T], stored: memoryview) -> T | None:
    """Return what was stored as JSON fields; None where it is damaged."""
    try:
        return make(**json.loads(bytes(stored)))
    except (ValueError, TypeError, RecursionError):
        return None

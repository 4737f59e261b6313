"""
Blocks on disk, found by the name of the prefix that they end: the tier below memory.

Knows keys, tokens and bytes; neither the runtime that the bytes are for nor when to read or write.
"""

import heapq
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

from recollect.errors import StoreFullError
from recollect.kv import accounts
from recollect.kv.accounts import TABLES, bring_up_to_date, names_are_open
from recollect.kv.blocks import (
    DIGEST_BYTES,
    Key,
    branch_digests,
    chained_key,
    disguised_key,
    namespace_key,
)
from recollect.kv.environment import Environment, Transaction, translated
from recollect.kv.record import (
    Buffer,
    Entry,
    Identity,
    Refused,
    Sealer,
    StoredReply,
    entry_size,
    pack_block,
    pack_entry,
    pack_reply,
    reply_last_used,
    touched,
    unpack_block,
    unpack_entry,
    unpack_reply,
)
from recollect.kv.rewriting import Resealing
from recollect.types import MissReason, common_prefix_length

STORE_FOLDER: Final = "kv"

PAGE_BYTES: Final = 4096
_PAGE_HEAD: Final = 16
"""What LMDB puts before a value that has pages of its own. Source: lmdb, mdb.c, PAGEHDRSZ."""
_LIVE_SHARE: Final = 7 / 8
"""Of the budget; the rest is for pages that LMDB has not taken back yet, so the file stays within it."""
_LEAST_SHARE: Final = 1 / 2
"""Of the budget, for what is live, however large the file has become."""
_EVICT_SHARE: Final = 1 / 16
"""Of the budget, given up beyond what is needed: looking for what to give up reads all entries."""
RESERVED_BYTES: Final = 256 << 20
"""Room on the disk that is left to others."""

_MOST_REPLIES: Final = 100_000
_BYTES_PER_REPLY: Final = 1 << 16
"""One reply may be remembered for so many bytes of the budget; it takes a few thousand at most."""
_REPLIES_EVICTED: Final = 1 / 4
"""Share of the replies that are evicted at once: finding the oldest reads all of them."""


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A block to be stored."""

    key: Key
    parent: Key
    follows_root: bool
    """Whether the parent is the root of a namespace, which is not stored."""
    token_ids: tuple[int, ...]
    payload: Buffer


@dataclass(frozen=True, slots=True)
class Found:
    """The longest stored continuation of a prefix."""

    entries: list[Entry]
    last_tokens: int = 0
    """Leading tokens of the last entry that match: all, or a part of it."""
    is_all: bool = True
    """Whether there is no more than that."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a write has done."""

    stored: set[Key]
    """Of the blocks given, those that are on disk now."""
    blocks: int
    """That are new."""
    stored_bytes: int
    """That they take."""


class DiskStore:
    """
    What of KV lies in a folder, for all models, namespaces and processes.

    Safe from any thread. Every value is checked when it is read, and what is not as it was written
    is a miss with a counted reason.

    Invariants (`disk_audit.problems` verifies them):
        1. An entry's key is the chained hash of its parent and its tokens.
        2. An entry's parent is an entry or a root, and has it among what follows it, in the place
           that its digests give.
        3. An entry has a block, whose checksum holds under its key.
        4. The bytes that are counted are those of all entries.
    """

    def __init__(
        self,
        folder: Path,
        *,
        budget_bytes: int,
        sealer: Sealer | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder: Final = folder
        self.budget_bytes: Final = budget_bytes
        self.misses: Counter[MissReason] = Counter()
        """By reason, in this process."""
        self.evicted_blocks = 0
        self._refused: set[Key] = set()
        self._sealer = sealer
        self.clock: Final = clock
        self._env = Environment.open(
            folder,
            least_bytes=budget_bytes,
            tables=TABLES,
            upgrade=None if sealer is None else Resealing(sealer, self._free_bytes),
        )
        try:
            bring_up_to_date(self._env, sealer)
            with self._env.reading() as txn:
                names_are_keyed = not names_are_open(txn, self._env)
            self.root_secret: Final = b"" if sealer is None else sealer.name_secret
            """For the names of namespaces, `namespace_key`."""
            self.chain_secret: Final = self.root_secret if names_are_keyed else b""
            """For the names of blocks, `chained_key`; none where an earlier version gave them."""
            self._seal_pins()
            self._ceiling = max(budget_bytes, self._env.file_bytes)
        except BaseException:
            self._env.close()
            raise

    @property
    def env(self) -> Environment:
        """Return the files, for accounts and audits."""
        return self._env

    @property
    def sealer(self) -> Sealer | None:
        """Return what encrypts; None: nothing does."""
        return self._sealer

    def close(self) -> None:
        """Give the files back."""
        self._env.close()

    def find(
        self,
        after: Key,
        token_ids: Sequence[int],
        *,
        block_size: int,
        inside_block: bool,
        most: int | None = None,
    ) -> Found:
        """
        Return the blocks that continue a prefix: whole ones, then one of which a part matches.

        Args:
            after: The name of the prefix, or of a root.
            token_ids: What follows it, shape `(n,)`.
            block_size: Tokens in a whole block.
            inside_block: Whether a part of a block may be reused.
            most: How many blocks to look for; None: as many as there are.

        Raises:
            StoreError: The files cannot be read.
        """
        entries: list[Entry] = []
        start = 0
        with self._env.reading() as txn:
            while start + block_size <= len(token_ids):
                if len(entries) == most:
                    return Found(entries, block_size if entries else 0, is_all=False)
                key = chained_key(after, token_ids[start : start + block_size], self.chain_secret)
                entry = self._entry(txn, key)
                if entry is None:
                    break
                entries.append(entry)
                after, start = key, start + block_size
            rest = token_ids[start : start + block_size]
            best, longest = self._best_child(txn, after, rest) if inside_block else (None, 0)
        if best is not None:
            return Found([*entries, best], longest)
        return Found(entries, block_size if entries else 0)

    def read(
        self, identity: Identity, entries: Sequence[Entry], take: Callable[[int, Buffer], None]
    ) -> int:
        """
        Hand the payloads of blocks to *take*, in order and each checked; return how many were right.

        Stops at the first that is not.

        Args:
            identity: What they have to be of.
            entries: What `find` returned.
            take: Called with (index, payload); the payload is a view that ends with the call.

        Raises:
            StoreError: The files cannot be read.
        """
        digest = identity.digest()
        with self._env.reading() as txn:
            for number, entry in enumerate(entries):
                stored = txn.get(entry.key, db=self._env.table("blocks"))
                if stored is None:
                    self._refuse(entry.key, "missing")
                    return number
                try:
                    count = len(entry.token_ids)
                    payload = unpack_block(entry.key, digest, count, stored, self._sealer)
                except Refused as refused:
                    self._refuse(entry.key, refused.reason)
                    return number
                take(number, payload)
        return len(entries)

    def write(self, identity: Identity, blocks: Sequence[NewBlock]) -> Written:
        """
        Store blocks that are not there yet, parents first; then keep to the budget.

        A block whose parent is not stored is left out: nothing could find it.

        Raises:
            StoreFullError: There is no room, or the disk has none. Nothing was changed.
            StoreError: The files cannot be written. Nothing was changed.
        """
        with self._env.reading() as txn:
            new = [block for block in blocks if not self._is_stored(txn, block.key)]
        packed = {block.key: self._packed(identity, block) for block in new}
        needed = sum(stored_bytes(len(value)) for value in packed.values())
        if self._free_bytes() < needed:
            raise StoreFullError(f"The disk of {self.folder} is nearly full: make room on it.")
        if needed:
            # Pages that were given up are free for the next transaction, not for the same one.
            self._make_room(needed, {block.parent for block in new})
        return self._write(identity, blocks, packed)

    def reply_name(self, fingerprint: str, namespace: str, message_key: bytes) -> Key:
        """
        Return the name of a reply: its place in a conversation, for one model and one namespace.

        In an encrypted store the name does not tell others which text it is of.

        Args:
            fingerprint: Of the model whose token ids they are.
            namespace: Who may find it.
            message_key: `Node.key`: a hash of all that was said, up to the reply.
        """
        root = namespace_key(fingerprint, namespace, self.root_secret)
        name = blake2b(root + message_key, digest_size=32, person=b"recollect reply").digest()
        return disguised_key(name, self.chain_secret) if self.chain_secret else name

    def remember(self, replies: Mapping[Key, StoredReply]) -> None:
        """
        Store the token ids of replies, and evict the oldest replies where there are too many.

        A client that sends a conversation as text sends replies as text, and encoding that again may
        give other ids than were generated, so that their KV would not be found.

        Raises:
            StoreFullError: There is no room. Nothing was changed.
            StoreError: The files cannot be written. Nothing was changed.
        """
        table, now = self._env.table("replies"), self.clock()
        with self._env.writing() as txn:
            for name, reply in replies.items():
                txn.put(name, pack_reply(name, reply, now, self._sealer), db=table)
            most = max(1, min(_MOST_REPLIES, self.budget_bytes // _BYTES_PER_REPLY))
            excess = txn.stat(table)["entries"] - most
            if excess > 0:
                ages = ((reply_last_used(value), bytes(name)) for name, value in txn.cursor(table))
                for _, name in heapq.nsmallest(excess + int(most * _REPLIES_EVICTED), ages):
                    txn.delete(name, db=table)

    def recall(self, name: Key) -> StoredReply | None:
        """
        Return the reply of that name; None where there is none, or it is not as it was written.

        Raises:
            StoreError: The files cannot be read.
        """
        with self._env.reading() as txn:
            stored = txn.get(name, db=self._env.table("replies"))
            try:
                return None if stored is None else unpack_reply(name, stored, self._sealer)
            except Refused:
                return None

    def touch(self, keys: Iterable[Key]) -> None:
        """
        Note that blocks were used, and so what they follow.

        Raises:
            StoreError: The files cannot be written.
        """
        now, entries = self.clock(), self._env.table("entries")
        with self._env.writing() as txn:
            for key in keys:
                stored = txn.get(key, db=entries)
                if stored is not None:
                    txn.put(key, touched(key, stored, now), db=entries)

    def take_refused(self) -> set[Key]:
        """Return the keys of blocks that were not as they were written, once; they are best removed."""
        refused, self._refused = self._refused, set()
        return refused

    def remove(self, keys: Iterable[Key]) -> int:
        """
        Remove blocks and all that follow them; return how many.

        Raises:
            StoreError: The files cannot be written.
        """
        with self._env.writing() as txn:
            return self._remove_all(txn, self._with_followers(txn, keys))

    def evict(self, wanted_bytes: int) -> int:
        """
        Give up the least recently used tails until that many bytes are free; return the bytes.

        Raises:
            StoreError: The files cannot be written.
        """
        with self._env.writing() as txn:
            return self._evict(txn, wanted_bytes)

    def clear(self, *, pinned: bool = False) -> int:
        """
        Remove everything but what is pinned, or that too; return how many blocks were.

        Raises:
            StoreError: The files cannot be written.
        """
        with self._env.writing() as txn:
            keep = set() if pinned else accounts.pinned_keys(txn, self._env)
            if pinned:
                txn.drop(self._env.table("pins"), delete=False)
            keys = [bytes(key) for key, _ in txn.cursor(self._env.table("entries"))]
            going = [key for key in keys if key not in keep]
            self._remove_all(txn, going)
            txn.drop(self._env.table("replies"), delete=False)
            return len(going)

    def _seal_pins(self) -> None:
        if self._sealer is None or self._env.is_read_only:
            return
        with self._env.reading() as txn:
            has_plain = accounts.has_plain_pins(txn, self._env)
        if has_plain:
            with self._env.writing() as txn:
                accounts.seal_pins(txn, self._env, self._sealer)

    def _free_bytes(self) -> int:
        """Return how much of the disk may be taken."""
        with translated(self.folder):
            return shutil.disk_usage(self.folder).free - RESERVED_BYTES

    def _packed(self, identity: Identity, block: NewBlock) -> bytearray:
        count = len(block.token_ids)
        return pack_block(block.key, identity.digest(), count, block.payload, self._sealer)

    def _write(
        self, identity: Identity, blocks: Sequence[NewBlock], packed: dict[Key, bytearray]
    ) -> Written:
        stored: set[Key] = set()
        sizes: list[int] = []
        with self._env.writing() as txn:
            accounts.note_identity(txn, self._env, identity)
            pinned = cache(lambda: accounts.pinned_tails(txn, self._env))  # reads all pins
            for block in blocks:
                if self._is_stored(txn, block.key):
                    stored.add(block.key)
                elif block.key not in packed:
                    continue  # another process has given it up meanwhile
                elif block.follows_root or self._is_stored(txn, block.parent):
                    sizes.append(self._put(txn, identity, block, packed[block.key], pinned))
                    stored.add(block.key)
            excess = accounts.total_bytes(txn, self._env) - self._most_bytes()
            if excess > 0:  # another process wrote meanwhile
                self._evict(txn, excess + int(self.budget_bytes * _EVICT_SHARE))
                stored = {key for key in stored if self._is_stored(txn, key)}
        return Written(stored, len(sizes), sum(sizes))

    def _most_bytes(self) -> int:
        """
        Return what blocks may take.

        Less where the file has outgrown its budget since it was opened: values need pages in a row,
        and free ones may not be. It grows no more once enough are free.
        """
        outgrown = max(0, self._env.file_bytes - self._ceiling)
        least, most = (int(self.budget_bytes * share) for share in (_LEAST_SHARE, _LIVE_SHARE))
        return max(least, most - outgrown)

    def _make_room(self, needed: int, parents: set[Key]) -> None:
        """
        Give up as much as a write needs, but nothing of what it follows.

        Raises:
            StoreFullError: That is not enough.
        """
        most = self._most_bytes()
        with self._env.reading() as txn:
            excess = accounts.total_bytes(txn, self._env) + needed - most
        if excess <= 0:
            return
        freed = 0
        if needed <= most:
            with self._env.writing() as txn:
                wanted = excess + int(self.budget_bytes * _EVICT_SHARE)
                freed = self._evict(txn, wanted, keep=parents)
        if freed < excess:
            raise StoreFullError(
                f"The KV store in {self.folder} is full: {needed:,} bytes more are needed, and "
                f"{self.budget_bytes:,} are all it may take: give it more room (--kv-disk)."
            )

    def _put(
        self,
        txn: Transaction,
        identity: Identity,
        block: NewBlock,
        packed: bytearray,
        pinned: Callable[[], set[Key]],
    ) -> int:
        """Store one block in place of those that it covers; return what it takes."""
        digests = self._digests(block.parent, block.token_ids)
        for part in self._parts(txn, block, digests):
            if part not in pinned():
                self._remove(txn, part)
        size = stored_bytes(len(packed)) + entry_size(len(block.token_ids))
        entry = Entry(
            key=block.key,
            parent=block.parent,
            identity=identity.digest(),
            token_ids=block.token_ids,
            last_used=self.clock(),
            stored_bytes=size,
            digests=digests,
        )
        txn.put(block.key, packed, db=self._env.table("blocks"))
        txn.put(block.key, pack_entry(entry, self._sealer), db=self._env.table("entries"))
        txn.put(block.parent, digests + block.key, db=self._env.table("siblings"), dupdata=True)
        accounts.add_bytes(txn, self._env, size)
        return size

    def _is_stored(self, txn: Transaction, key: Key) -> bool:
        return txn.get(key, db=self._env.table("entries")) is not None

    def _entry(self, txn: Transaction, key: Key) -> Entry | None:
        """Return what is known of a block; None, and counted, where it is not what was written."""
        stored = txn.get(key, db=self._env.table("entries"))
        if stored is None:
            return None
        try:
            entry = unpack_entry(key, stored, self._sealer)
        except Refused as refused:
            self._refuse(key, refused.reason)
            return None
        if chained_key(entry.parent, entry.token_ids, self.chain_secret) != key:
            self._refuse(key, "key")
            return None
        return entry

    def _refuse(self, key: Key, reason: MissReason) -> None:
        self.misses[reason] += 1
        self._refused.add(key)

    def _digests(self, parent: Key, token_ids: Sequence[int]) -> bytes:
        return branch_digests(parent, token_ids, self.root_secret)

    def _followers(self, txn: Transaction, key: Key) -> list[Key]:
        cursor = txn.cursor(self._env.table("siblings"))
        if not cursor.set_key(key):
            return []
        return [bytes(row)[-len(key) :] for row in cursor.iternext_dup()]

    def _neighbours(self, txn: Transaction, parent: Key, digests: bytes) -> list[bytes]:
        """Return what lies before and after a place in the order of what follows a block."""
        cursor = txn.cursor(self._env.table("siblings"))
        rows: list[bytes] = []
        if cursor.set_range_dup(parent, digests):
            rows.append(bytes(cursor.value()))
            if cursor.prev_dup():
                rows.append(bytes(cursor.value()))
        elif cursor.set_key(parent) and cursor.last_dup():
            rows.append(bytes(cursor.value()))
        return rows

    def _best_child(
        self, txn: Transaction, parent: Key, token_ids: Sequence[int]
    ) -> tuple[Entry | None, int]:
        """
        Return the block after *parent* that begins with the most of these tokens, and how many.

        It is a neighbour of the tokens in order, so this reads two entries, however many there are.
        """
        best: Entry | None = None
        longest = 0
        if not token_ids or not self._env.has_table("siblings"):
            return best, longest
        for row in self._neighbours(txn, parent, self._digests(parent, token_ids)):
            entry = self._entry(txn, row[-len(parent) :])
            length = 0 if entry is None else common_prefix_length(token_ids, entry.token_ids)
            if length > longest:
                best, longest = entry, length
        return best, longest

    def _parts(self, txn: Transaction, block: NewBlock, digests: bytes) -> list[Key]:
        """
        Return the stored blocks whose tokens begin a new one's, and are fewer.

        What lies in order between a part and the block begins with the part, too: so a part is no
        longer than what the block has in common with one of its neighbours.
        """
        rows = self._neighbours(txn, block.parent, digests)
        shared = max((common_prefix_length(row, digests) for row in rows), default=0)
        most = min(len(block.token_ids) - 1, shared // DIGEST_BYTES)
        parts = (block.token_ids[:count] for count in range(1, most + 1))
        keys = [chained_key(block.parent, part, self.chain_secret) for part in parts]
        return [key for key in keys if self._is_stored(txn, key)]

    def _with_followers(self, txn: Transaction, keys: Iterable[Key]) -> list[Key]:
        """Return blocks and all that follow them, each once."""
        found: dict[Key, None] = {}
        pending = list(keys)
        while pending:
            key = pending.pop()
            if key not in found:
                found[key] = None
                pending += self._followers(txn, key)
        return list(found)

    def _remove_all(self, txn: Transaction, keys: Collection[Key]) -> int:
        """Remove blocks, damaged ones too; return how many were there."""
        lost = [key for key in keys if not self._remove(txn, key)]
        return len(keys) - len(lost) + accounts.remove_damaged(txn, self._env, lost)

    def _remove(self, txn: Transaction, key: Key) -> bool:
        """Remove a block whose entry is sound; return whether it is one."""
        head = accounts.sound_head(key, txn.get(key, db=self._env.table("entries")))
        if head is None:
            return False
        txn.delete(key, db=self._env.table("entries"))
        txn.delete(key, db=self._env.table("blocks"))
        txn.delete(head.parent, head.digests + key, db=self._env.table("siblings"))
        accounts.add_bytes(txn, self._env, -head.stored_bytes)
        return True

    def _evict(self, txn: Transaction, wanted_bytes: int, *, keep: Iterable[Key] = ()) -> int:
        freed = 0
        for key, size in accounts.tails_first(txn, self._env, keep):
            if freed >= wanted_bytes:
                break
            self.evicted_blocks += self._remove(txn, key)
            freed += size
        return freed


def stored_bytes(value_bytes: int) -> int:
    """Return what a value of that many bytes takes in the file, in whole pages."""
    return -(-(value_bytes + _PAGE_HEAD) // PAGE_BYTES) * PAGE_BYTES

"""
Blocks of KV on disk, found by the name of the prefix that they end; with pins and replies.

Keeps to a budget, checks what is read, and counts misses. Knows keys, tokens and bytes; neither the
runtime that the bytes are for nor when to read or write. How the tables hang together is in `tables`.
"""

import heapq
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from recollect import config
from recollect.errors import StoreFullError
from recollect.kv.environment import DATA, Environment, translated
from recollect.kv.record import (
    Buffer,
    Entry,
    Identity,
    Key,
    Pin,
    Refused,
    Sealer,
    StoredReply,
    chained_key,
    disguised_key,
    entry_size,
    namespace_key,
    pack_block,
    pack_reply,
    reply_last_used,
    touched,
    unpack_block,
    unpack_reply,
)
from recollect.kv.tables import TABLES, Holding, Tables
from recollect.kv.upgrade import Resealing, bring_up_to_date
from recollect.types import MissReason, common_prefix_length

STORE_FOLDER: Final = "kv"

PAGE_BYTES: Final = 4096
_PAGE_HEAD: Final = 16
"""What LMDB puts before a value that has pages of its own. Source: lmdb, mdb.c, PAGEHDRSZ."""
_SPARE_BYTES: Final = 16 << 20
"""Room beyond the file: LMDB writes new pages before it gives up old ones, also to remove a block."""
_LIVE_SHARE: Final = 7 / 8
"""Share of the budget for blocks; the rest is for pages that LMDB cannot use again yet, so that the
file stays within the budget."""
_LEAST_SHARE: Final = 1 / 2
"""Share of the budget that blocks may take however large the file has become."""
_EVICT_SHARE: Final = 1 / 16
"""Share of the budget that is evicted beyond what is needed, since choosing reads all entries."""
RESERVED_BYTES: Final = 256 << 20
"""Room that is left free on the disk for others."""

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
    """How many leading tokens of the last entry match: all of them, or a part."""
    is_all: bool = True
    """Whether nothing more is stored; False where the search ended at *most* blocks."""


@dataclass(frozen=True, slots=True)
class StoredSize:
    """How much of a pinned prefix is stored."""

    blocks: int
    tokens: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a write has done."""

    stored: set[Key]
    """Those of the given blocks that are on disk now."""
    blocks: int
    """How many of them are new."""
    stored_bytes: int
    """What the new ones take."""


class DiskStore:
    """
    The KV in a folder, of all models, namespaces and processes.

    Safe from any thread. Every value is checked when it is read; one that is not as it was written is a
    miss with a counted reason.

    Each method raises `StoreError` where the files cannot be read or written; one that writes has changed
    nothing then.

    Invariants (`problems` verifies them):
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
        """Misses of this process by reason."""
        self.evicted_blocks = 0
        self._refused: set[Key] = set()
        self.sealer: Final = sealer
        """Encrypts what is stored; None: nothing does."""
        self.clock: Final = clock
        self.env: Final = Environment.open(
            folder,
            least_bytes=budget_bytes,
            tables=TABLES,
            upgrade=None if sealer is None else Resealing(sealer, self._free_bytes),
        )
        try:
            bring_up_to_date(self.env, sealer)
            with self.reading() as tables:
                names_are_keyed = not tables.names_are_open()
            self.root_secret: Final = b"" if sealer is None else sealer.name_secret
            """For the names of namespaces, `namespace_key`."""
            self.chain_secret: Final = self.root_secret if names_are_keyed else b""
            """For the names of blocks, `chained_key`; none where an earlier version gave them."""
            self._ceiling = max(budget_bytes, self.env.file_bytes)
        except BaseException:
            self.env.close()
            raise

    def close(self) -> None:
        """Give the files back; the store must not be used afterwards."""
        self.env.close()

    @contextmanager
    def reading(self) -> Iterator[Tables]:
        """Show one state of the tables."""
        with self.env.reading() as txn:
            yield Tables(txn, self.env.tables, self.sealer)

    @contextmanager
    def writing(self) -> Iterator[Tables]:
        """
        Change the tables, all or nothing; what was written is on the disk when this returns.

        Raises:
            StoreFullError: There is no room; nothing was changed.
        """
        with self.env.writing() as txn:
            yield Tables(txn, self.env.tables, self.sealer)

    def find(
        self,
        after: Key,
        token_ids: Sequence[int],
        *,
        block_size: int,
        inside_block: bool,
        whole_tails: bool = False,
        most: int | None = None,
    ) -> Found:
        """
        Return the blocks that continue a prefix: whole ones, then one of which a part matches.

        Args:
            after: The name of the prefix, or of a root.
            token_ids: What follows it, shape `(n,)`.
            block_size: Tokens in a whole block.
            inside_block: Whether a part of a block may be reused.
            whole_tails: Whether, where that is not so, a block that is not full may be reused with all of
                its tokens.
            most: How many blocks to look for; None: as many as there are.
        """
        entries: list[Entry] = []
        start = 0
        with self.reading() as tables:
            while start + block_size <= len(token_ids):
                if len(entries) == most:
                    return Found(entries, block_size if entries else 0, is_all=False)
                key = chained_key(after, token_ids[start : start + block_size], self.chain_secret)
                entry = self._entry(tables, key)
                if entry is None:
                    break
                entries.append(entry)
                after, start = key, start + block_size
            rest = token_ids[start : start + block_size]
            best, longest = None, 0
            if inside_block or whole_tails:
                search = self._best_child if inside_block else self._longest_part
                best, longest = search(tables, after, rest)
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
            identity: The identity that they have to have.
            entries: What `find` returned.
            take: Called with (index, payload); the payload is a view that ends with the call.
        """
        digest = identity.digest()
        with self.reading() as tables:
            for number, entry in enumerate(entries):
                stored = tables.get("blocks", entry.key)
                if stored is None:
                    self._refuse(entry.key, "missing")
                    return number
                try:
                    count = len(entry.token_ids)
                    payload = unpack_block(entry.key, digest, count, stored, self.sealer)
                except Refused as refused:
                    self._refuse(entry.key, refused.reason)
                    return number
                take(number, payload)
        return len(entries)

    def write(
        self, identity: Identity, blocks: Sequence[NewBlock], *, keep_parts: bool = False
    ) -> Written:
        """
        Store blocks that are not there yet, parents first; then keep to the budget.

        A block whose parent is not stored is left out: nothing could find it. A block takes the place of
        those that hold a part of its tokens, unless *keep_parts*.

        Raises:
            StoreFullError: There is no room, or the disk has none. Nothing was changed.
        """
        with self.reading() as tables:
            new = [block for block in blocks if not tables.has_block(block.key)]
        packed = {block.key: self._packed(identity, block) for block in new}
        needed = sum(stored_bytes(len(value)) for value in packed.values())
        if self._free_bytes() < needed:
            raise StoreFullError(f"The disk of {self.folder} is nearly full: make room on it.")
        if needed:
            # In a transaction of its own: LMDB uses the pages of what is evicted only in later ones.
            self._make_room(needed, {block.parent for block in new})
        return self._write(identity, blocks, packed, keep_parts)

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
        """
        now = self.clock()
        with self.writing() as tables:
            for name, reply in replies.items():
                tables.put("replies", name, pack_reply(name, reply, now, self.sealer))
            most = max(1, min(_MOST_REPLIES, self.budget_bytes // _BYTES_PER_REPLY))
            excess = tables.count("replies") - most
            if excess > 0:
                ages = ((reply_last_used(value), name) for name, value in tables.rows("replies"))
                for _, name in heapq.nsmallest(excess + int(most * _REPLIES_EVICTED), ages):
                    tables.delete("replies", name)

    def recall(self, name: Key) -> StoredReply | None:
        """Return the reply of that name; None where there is none, or it is not as it was written."""
        with self.reading() as tables:
            stored = tables.get("replies", name)
            try:
                return None if stored is None else unpack_reply(name, stored, self.sealer)
            except Refused:
                return None

    def touch(self, keys: Iterable[Key]) -> None:
        """Note that blocks were used, and so what they follow."""
        now = self.clock()
        with self.writing() as tables:
            for key in keys:
                stored = tables.get("entries", key)
                if stored is not None:
                    tables.put("entries", key, touched(key, stored, now))

    def take_refused(self) -> set[Key]:
        """Return each key of a block that was not as it was written, once, for the caller to remove."""
        refused, self._refused = self._refused, set()
        return refused

    def remove(self, keys: Iterable[Key]) -> int:
        """Remove blocks and all that follow them; return how many."""
        with self.writing() as tables:
            return tables.remove_all(tables.with_followers(keys))

    def evict(self, wanted_bytes: int) -> int:
        """Evict the least recently used tails until that many bytes are free; return how many are."""
        with self.writing() as tables:
            return self._evict(tables, wanted_bytes)

    def clear(self, *, pinned: bool = False) -> int:
        """
        Remove all replies and all blocks that are not pinned, with *pinned* those too; return how many.
        """
        with self.writing() as tables:
            keep = set() if pinned else tables.pinned_keys()
            if pinned:
                tables.empty("pins")
            going = [key for key, _ in tables.rows("entries") if key not in keep]
            tables.remove_all(going)
            tables.empty("replies")
            return len(going)

    def pins(self) -> list[Pin]:
        """Return all pins by name."""
        with self.reading() as tables:
            return tables.pins()

    def find_pin(self, name: str) -> Pin | None:
        """Return the pin of that name; None where there is none."""
        with self.reading() as tables:
            return tables.find_pin(name)

    def add_pin(self, pin: Pin) -> bool:
        """
        Protect a prefix from eviction, which may not be stored yet; return whether the name was free.
        """
        with self.writing() as tables:
            return tables.add_pin(pin)

    def drop_pin(self, name: str) -> bool:
        """Allow a prefix to be evicted again; return whether it was pinned."""
        with self.writing() as tables:
            return tables.drop_pin(name)

    def drop_pins(self, about: Mapping[str, Any]) -> list[str]:
        """Drop all pins that were made with these values; return their names."""
        with self.writing() as tables:
            pins = tables.pins()
            names = [pin.name for pin in pins if about.items() <= pin.about.items()]
            for name in names:
                tables.drop_pin(name)
            return names

    def size_of(self, pin: Pin) -> StoredSize:
        """Return how much of a pinned prefix is stored: all of it, unless something was damaged."""
        heads = []
        with self.reading() as tables:
            key = pin.tail
            while (head := tables.head(key)) is not None:
                heads.append(head)
                key = head.parent
        return StoredSize(
            blocks=len(heads),
            tokens=sum(head.tokens for head in heads),
            stored_bytes=sum(head.stored_bytes for head in heads),
        )

    def pinned_bytes(self) -> int:
        """Return what all pinned prefixes take, shared blocks counted once."""
        with self.reading() as tables:
            heads = (tables.head(key) for key in tables.pinned_keys())
            return sum(head.stored_bytes for head in heads if head is not None)

    def has_blocks(self, keys: Iterable[Key]) -> bool:
        """Return whether each of these blocks has an entry; none is read."""
        with self.reading() as tables:
            return all(tables.has_block(key) for key in keys)

    def holdings(self) -> list[Holding]:
        """Return what is stored by model, the last used first."""
        with self.reading() as tables:
            return tables.holdings()

    def problems(self) -> Iterator[tuple[Key, str]]:
        """
        Yield (key, sentence) for each block that is not as it was written, and (b"", …) for wrong counts.

        Verifies the invariants. Reads everything.
        """
        with self.reading() as tables:
            yield from tables.problems(self.chain_secret)

    def remove_wrong(self, keys: Iterable[Key]) -> int:
        """
        Remove blocks with all that follows them, and count all bytes anew; return how many were removed.

        What follows a block that is gone could not be found any more.

        Args:
            keys: Of what is wrong, as `problems` yields them; the empty one stands for the counts.
        """
        removed = self.remove({key for key in keys if key})
        with self.writing() as tables:
            tables.recount()
        return removed

    def _free_bytes(self) -> int:
        """Return how much of the disk may be taken."""
        with translated(self.folder):
            return shutil.disk_usage(self.folder).free - RESERVED_BYTES

    def _packed(self, identity: Identity, block: NewBlock) -> bytearray:
        count = len(block.token_ids)
        return pack_block(block.key, identity.digest(), count, block.payload, self.sealer)

    def _write(
        self,
        identity: Identity,
        blocks: Sequence[NewBlock],
        packed: dict[Key, bytearray],
        keep_parts: bool,
    ) -> Written:
        stored: set[Key] = set()
        sizes: list[int] = []
        with self.writing() as tables:
            tables.note_identity(identity)
            pinned = cache(tables.pinned_tails)  # reads all pins
            for block in blocks:
                if tables.has_block(block.key):
                    stored.add(block.key)
                elif block.key not in packed:
                    continue  # another process has evicted it meanwhile
                elif block.follows_root or tables.has_block(block.parent):
                    content = packed[block.key]
                    sizes.append(self._put(tables, identity, block, content, pinned, keep_parts))
                    stored.add(block.key)
            excess = tables.total_bytes() - self._most_bytes()
            if excess > 0:  # another process wrote meanwhile
                self._evict(tables, excess + int(self.budget_bytes * _EVICT_SHARE))
                stored = {key for key in stored if tables.has_block(key)}
        return Written(stored, len(sizes), sum(sizes))

    def _most_bytes(self) -> int:
        """
        Return how many bytes blocks may take.

        Less where the file has outgrown its budget since it was opened: a value needs pages in a row,
        and those that are free may not be. Once enough are free, the file grows no more.
        """
        outgrown = max(0, self.env.file_bytes - self._ceiling)
        least, most = (int(self.budget_bytes * share) for share in (_LEAST_SHARE, _LIVE_SHARE))
        return max(least, most - outgrown)

    def _make_room(self, needed: int, parents: set[Key]) -> None:
        """
        Evict as much as a write needs, but nothing of what it follows.

        Raises:
            StoreFullError: That is not enough.
        """
        most = self._most_bytes()
        with self.reading() as tables:
            excess = tables.total_bytes() + needed - most
        if excess <= 0:
            return
        freed = 0
        if needed <= most:
            with self.writing() as tables:
                wanted = excess + int(self.budget_bytes * _EVICT_SHARE)
                freed = self._evict(tables, wanted, keep=parents)
        if freed < excess:
            raise StoreFullError(
                f"The KV store in {self.folder} is full: {needed:,} bytes more are needed, and "
                f"{self.budget_bytes:,} are all it may take: give it more room (--kv-disk)."
            )

    def _put(
        self,
        tables: Tables,
        identity: Identity,
        block: NewBlock,
        packed: bytearray,
        pinned: Callable[[], set[Key]],
        keep_parts: bool,
    ) -> int:
        """Store a block in the place of those that hold a part of its tokens; return the bytes it takes."""
        if not keep_parts:
            for part in tables.parts(block.parent, block.token_ids, self.chain_secret):
                if part not in pinned():
                    tables.remove(part)
        size = stored_bytes(len(packed)) + entry_size(len(block.token_ids))
        entry = Entry(
            key=block.key,
            parent=block.parent,
            identity=identity.digest(),
            token_ids=block.token_ids,
            last_used=self.clock(),
            stored_bytes=size,
            digests=tables.digests(block.parent, block.token_ids),
        )
        tables.put_block(entry, packed)
        return size

    def _entry(self, tables: Tables, key: Key) -> Entry | None:
        """Return the entry of a block; None where there is none, or a miss was counted for it."""
        try:
            entry = tables.entry(key)
        except Refused as refused:
            self._refuse(key, refused.reason)
            return None
        if entry is None:
            return None
        if chained_key(entry.parent, entry.token_ids, self.chain_secret) != key:
            self._refuse(key, "key")
            return None
        return entry

    def _refuse(self, key: Key, reason: MissReason) -> None:
        self.misses[reason] += 1
        self._refused.add(key)

    def _best_child(
        self, tables: Tables, parent: Key, token_ids: Sequence[int]
    ) -> tuple[Entry | None, int]:
        """
        Return the block after *parent* that begins with the most of these tokens, and how many.

        It is a neighbour of the tokens in order, so this reads two entries, however many there are.
        """
        best: Entry | None = None
        longest = 0
        if not token_ids or "siblings" not in tables:
            return best, longest
        for row in tables.neighbours(parent, tables.digests(parent, token_ids)):
            entry = self._entry(tables, row[-len(parent) :])
            length = 0 if entry is None else common_prefix_length(token_ids, entry.token_ids)
            if length > longest:
                best, longest = entry, length
        return best, longest

    def _longest_part(
        self, tables: Tables, parent: Key, token_ids: Sequence[int]
    ) -> tuple[Entry | None, int]:
        """Return the longest block after *parent* all of whose tokens begin these, and how many they are."""
        if not token_ids or "siblings" not in tables:
            return None, 0
        exact = chained_key(parent, token_ids, self.chain_secret)
        for key in (exact, *reversed(tables.parts(parent, token_ids, self.chain_secret))):
            entry = self._entry(tables, key)
            if entry is not None:
                return entry, len(entry.token_ids)
        return None, 0

    def _evict(self, tables: Tables, wanted_bytes: int, *, keep: Iterable[Key] = ()) -> int:
        freed = 0
        for key, size in tables.to_evict(wanted_bytes, keep):
            self.evicted_blocks += tables.remove(key)
            freed += size
        return freed


def stored_bytes(value_bytes: int) -> int:
    """Return what a value of that many bytes takes in the file, in whole pages."""
    return -(-(value_bytes + _PAGE_HEAD) // PAGE_BYTES) * PAGE_BYTES


def is_there(folder: Path) -> bool:
    """Return whether there is a store in a folder."""
    return (folder / DATA).is_file()


def open_existing(folder: Path, sealer: Sealer | None) -> DiskStore:
    """
    Return the store in a folder; the caller closes it.

    Raises:
        StoreError: It cannot be opened.
    """
    with translated(folder):
        room = (folder / DATA).stat().st_size + _SPARE_BYTES
        budget = max(config.default_kv_disk_bytes(folder), room)
    return DiskStore(folder, budget_bytes=budget, sealer=sealer)

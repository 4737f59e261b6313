"""
Check the pages of an LMDB file before the library follows pointers in them that may be damaged.

LMDB trusts what it reads: a wrong offset or size ends the process with a segmentation fault. Values are
not checked, since they have checksums of their own in `record`.
Source of the layout: lmdb, mdb.c, MDB_page, MDB_node, MDB_db and MDB_meta, on a 64-bit system.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

_META: Final = struct.Struct("=QHHHHIIQQ48s48sQQ")
# page number, pad, flags, lower, upper; magic, format, address, map size, free tree, main tree,
# last page, transaction
_MAGIC: Final = 0xBEEFC0DE
_TREE: Final = struct.Struct("=IHHQQQQQ")
"""Page size (in a meta page), flags, depth, branch pages, leaf pages, overflow pages, entries, root."""
_HEAD: Final = struct.Struct("=QHHHH")
_HEADS: Final = np.dtype(
    [("number", "=u8"), ("pad", "=u2"), ("flags", "=u2"), ("lower", "=u2"), ("upper", "=u2")]
)
_BIG_HEAD: Final = struct.Struct("=QHHI")
"""The same of the first page of a value that has pages of its own; at the end their number."""
_NODE_BYTES: Final = 8
_BRANCH: Final = 1
_LEAF: Final = 2
_OVERFLOW: Final = 4
_SUBPAGE_FLAGS: Final = (0x42, 0x52)
"""A page inside a value, for few values of one key: leaf, sub-page, and perhaps dirty."""
_NOTHING: Final = 2**64 - 1
"""The root of a tree without entries."""
_PAGES_AT_ONCE: Final = 256
"""One megabyte. Page by page, numpy takes a hundred times as long for each."""
_DEEPEST: Final = 32
"""Source: lmdb, mdb.c, CURSOR_STACK."""
_BIG: Final = 1
_TREE_FLAG: Final = 2
_SEVERAL: Final = 4
"""Flags of a node: its value has pages of its own, is a tree, is one of several of its key."""

Numbers = npt.NDArray[np.int64]


class DamagedPagesError(Exception):
    """The file is not one that LMDB can read safely; never leaves kv/."""


def walk(data: Path, transaction: int, *, values: bool = False) -> bool:
    """
    Check every page that one state of a file uses; return whether that state could be found.

    Reads the pages of trees, a thousandth of what a store has, which is enough before reading.

    Args:
        data: The file.
        transaction: The number of the state; the caller has a transaction open that shows it, so that
            its pages stay.
        values: Whether to read the head of each value with pages of its own, too: LMDB follows it when
            it removes the value.

    Raises:
        DamagedPagesError: A page, a pointer or a size is wrong.
        OSError: The file cannot be read.
    """
    if struct.calcsize("P") != 8:  # a 32-bit system, which is rare, has another layout
        return True
    descriptor = os.open(data, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        page_bytes = _page_bytes(descriptor)
        for number in (0, 1):
            meta = _META.unpack(_read(descriptor, number * page_bytes, _META.size))
            if meta[-1] == transaction and meta[5] == _MAGIC:
                one = _Walk(descriptor, page_bytes, last_page=meta[-2], values=values)
                one.run(free=meta[-4], main=meta[-3])
                return True
        return False
    finally:
        os.close(descriptor)


def _page_bytes(descriptor: int) -> int:
    meta = _META.unpack(_read(descriptor, 0, _META.size))
    page_bytes: int = _TREE.unpack(meta[9])[0]
    if meta[5] != _MAGIC or page_bytes not in (1 << power for power in range(9, 17)):
        raise DamagedPagesError("its first page is none of LMDB's")
    return page_bytes


def _read(descriptor: int, start: int, size: int) -> bytes:
    os.lseek(descriptor, start, os.SEEK_SET)
    content = os.read(descriptor, size)
    if len(content) != size:
        raise DamagedPagesError("it ends too early")
    return content


@dataclass(frozen=True, slots=True)
class _Pages:
    """Some pages of one kind, and all nodes on them as columns."""

    content: npt.NDArray[np.uint8]
    """Shape `(pages, bytes)`."""
    page: Numbers
    """Of each node, which row of `content` it is on."""
    value: Numbers
    """Where its value begins there, if it has one; its key ends there."""
    flags: Numbers
    size: Numbers
    """Bytes of its value; of a branch, the lower 32 bits of the page it points to."""

    def bytes_of(self, node: int, size: int) -> bytes:
        """Return the first bytes of a node's value."""
        start = int(self.value[node])
        return self.content[self.page[node], start : start + size].tobytes()


class _Walk:
    """One pass over all pages of a state; each may be used once."""

    def __init__(self, descriptor: int, page_bytes: int, last_page: int, *, values: bool) -> None:
        self._descriptor = descriptor
        self._values = values
        self._page_bytes = page_bytes
        self._pages = min(last_page + 1, os.fstat(descriptor).st_size // page_bytes)
        """How many pages there may be; the last ones of a file may never have been written."""
        self._last_page = last_page
        if self._pages < 2:
            raise DamagedPagesError("it ends too early")
        self._seen = bytearray(self._pages)
        # Pages still to be looked at, by the levels from there on, and whether of the free list.
        self._pending: dict[tuple[int, bool], list[int]] = {}
        self._free: list[npt.NDArray[np.uint64]] = []

    def run(self, *, free: bytes, main: bytes) -> None:
        self._take(0, 2)
        self._add_tree(main, is_free_list=False)
        self._add_tree(free, is_free_list=True)
        while self._pending:
            kind, numbers = self._pending.popitem()
            for start in range(0, len(numbers), _PAGES_AT_ONCE):
                self._look_at(numbers[start : start + _PAGES_AT_ONCE], *kind)
        self._check_free()

    def _take(self, number: int, count: int) -> None:
        """Count pages as used, once."""
        if number + count > self._pages:
            raise DamagedPagesError(f"page {number} is beyond its end")
        if any(self._seen[number : number + count]):
            raise DamagedPagesError(f"page {number} is used twice")
        self._seen[number : number + count] = b"\1" * count

    def _add_tree(self, packed: bytes, *, is_free_list: bool) -> None:
        _, _, depth, *_, root = _TREE.unpack(packed)
        if (root == _NOTHING) != (depth == 0) or depth > _DEEPEST:
            raise DamagedPagesError("a tree has a wrong depth")
        if root != _NOTHING:
            self._pending.setdefault((depth, is_free_list), []).append(root)

    def _look_at(self, numbers: list[int], levels: int, is_free_list: bool) -> None:
        read = []
        for number in numbers:
            self._take(number, 1)
            read.append(_read(self._descriptor, number * self._page_bytes, self._page_bytes))
        content = np.frombuffer(b"".join(read), np.uint8).reshape(len(numbers), -1)
        heads = content[:, : _HEAD.size].copy().view(_HEADS)[:, 0]
        kind = _LEAF if levels == 1 else _BRANCH
        if (heads["number"] != numbers).any() or (heads["flags"] != kind).any():
            raise DamagedPagesError("a page is not what it should be")
        pages = _nodes(content, heads)
        if levels == 1:
            self._leaves(pages, is_free_list)
        else:
            children = pages.size | pages.flags << 32
            self._pending.setdefault((levels - 1, is_free_list), []).extend(children.tolist())

    def _leaves(self, pages: _Pages, is_free_list: bool) -> None:
        is_known = np.zeros(len(pages.flags), bool)
        for flags in (0, _BIG, _TREE_FLAG, _SEVERAL, _TREE_FLAG | _SEVERAL):
            is_known |= pages.flags == flags
        in_page = np.where(pages.flags == _BIG, 8, pages.size)
        if not is_known.all() or (pages.value + in_page > self._page_bytes).any():
            raise DamagedPagesError("a value does not fit its page")
        for node in np.flatnonzero((pages.flags != 0) | is_free_list).tolist():
            value = pages.bytes_of(node, int(in_page[node]))
            flags = int(pages.flags[node])
            if flags == _BIG:
                value = self._big(value, int(pages.size[node]), is_read=is_free_list)
            elif flags & _TREE_FLAG:
                if len(value) != _TREE.size:
                    raise DamagedPagesError("a tree has a wrong size")
                self._add_tree(value, is_free_list=False)
            elif flags == _SEVERAL:
                _check_subpage(value)
            if is_free_list:
                self._note_free(value)

    def _big(self, value: bytes, size: int, *, is_read: bool) -> bytes:
        """Count the pages of a value that has its own; return the value with *is_read*, else nothing."""
        (first,) = struct.unpack("=Q", value)
        count = -(-(size + _HEAD.size) // self._page_bytes)
        self._take(first, count)
        start = first * self._page_bytes
        if self._values or is_read:
            head = _read(self._descriptor, start, _BIG_HEAD.size)
            there, _, flags, pages = _BIG_HEAD.unpack(head)
            if (there, flags, pages) != (first, _OVERFLOW, count):
                raise DamagedPagesError("a page is not what it should be")
        return _read(self._descriptor, start + _HEAD.size, size) if is_read else b""

    def _note_free(self, value: bytes) -> None:
        if len(value) < 8 or len(value) % 8:
            raise DamagedPagesError("a list of free pages has a wrong size")
        count, *_ = struct.unpack_from("=Q", value)
        if count != len(value) // 8 - 1:
            raise DamagedPagesError("a list of free pages has a wrong length")
        self._free.append(np.frombuffer(value, "=u8", offset=8))

    def _check_free(self) -> None:
        """Check that no free page is in use, or free twice: LMDB would use it for two things at once."""
        free = np.concatenate([np.empty(0, np.uint64), *self._free])
        if free.size and (free.max() > self._last_page or np.unique(free).size != free.size):
            raise DamagedPagesError("pages are free that are not there, or twice")
        used = np.frombuffer(self._seen, np.uint8)
        if used[free[free < self._pages].astype(np.int64)].any():
            raise DamagedPagesError("a page is free and in use")


def _nodes(content: npt.NDArray[np.uint8], heads: npt.NDArray[np.void]) -> _Pages:
    """
    Return the nodes of some pages, whose heads and keys are within them.

    Raises:
        DamagedPagesError: One is not, or a page has none.
    """
    page_bytes = content.shape[1]
    lower, upper = heads["lower"].astype(np.int64), heads["upper"].astype(np.int64)
    if ((lower <= _HEAD.size) | (lower > upper) | (upper > page_bytes) | (lower % 2 > 0)).any():
        raise DamagedPagesError("a page has wrong bounds")
    counts = (lower - _HEAD.size) // 2
    page = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
    shorts = content[:, : page_bytes // 2 * 2].view("=u2")
    start = shorts[page, _HEAD.size // 2 + place].astype(np.int64)
    if ((start < upper[page]) | (start > page_bytes - _NODE_BYTES) | (start % 2 > 0)).any():
        raise DamagedPagesError("a page has a wrong offset")
    low, high, flags, key = (
        shorts[page, start // 2 + number].astype(np.int64) for number in range(4)
    )
    value = start + _NODE_BYTES + key
    if (value > page_bytes).any():
        raise DamagedPagesError("a key does not fit its page")
    return _Pages(content, page, value, flags, low | high << 16)


def _check_subpage(value: bytes) -> None:
    """Check a page inside a value, which has keys alone."""
    content = np.frombuffer(value, np.uint8).reshape(1, -1)
    if len(value) < _HEAD.size:
        raise DamagedPagesError("a page inside a value is too short")
    heads = content[:, : _HEAD.size].copy().view(_HEADS)[:, 0]
    if heads["flags"][0] not in _SUBPAGE_FLAGS:
        raise DamagedPagesError("a page inside a value is not what it should be")
    _nodes(content, heads)

"""
Walk the pages of an LMDB file, before the library follows pointers in them that may be damaged.

LMDB trusts what it reads: an offset or a size that is wrong takes the whole process away with a
segmentation fault. Values are not looked at; whoever stored them has checksums for that.
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
_DEEPEST: Final = 32
"""Source: lmdb, mdb.c, CURSOR_STACK."""
_BIG: Final = 1
_TREE_FLAG: Final = 2
_SEVERAL: Final = 4
"""Flags of a node: its value has pages of its own, is a tree, is one of several of its key."""

Shorts = npt.NDArray[np.uint16]


class DamagedPagesError(Exception):
    """The file is not one that LMDB can read safely; never leaves kv/."""


def walk(data: Path, transaction: int, *, values: bool = False) -> bool:
    """
    Look at every page that one state of a file uses; return whether that state could be found.

    Reads the pages of trees, a thousandth of what a store has. That is enough for whoever only reads.

    Args:
        data: The file.
        transaction: Which state; the caller has a transaction that shows it, so its pages stay.
        values: Whether to read the head of each value with pages of its own, too: LMDB follows it
            where a value is removed.

    Raises:
        DamagedPagesError: A page, a pointer or a size is wrong.
        OSError: The file cannot be read.
    """
    if struct.calcsize("P") != 8:  # the layout is another, and such systems are rare
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
class _Nodes:
    """The nodes of a page, as columns."""

    starts: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    """Bytes of each key."""
    flags: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    """Bytes of each value; of a branch, the lower 32 bits of the page it points to."""


class _Walk:
    """One pass over all pages of a state; each may be used once."""

    def __init__(self, descriptor: int, page_bytes: int, last_page: int, *, values: bool) -> None:
        self._descriptor = descriptor
        self._values = values
        self._page_bytes = page_bytes
        self._pages = min(last_page + 1, os.fstat(descriptor).st_size // page_bytes)
        """That may be used: the last ones of a file may never have been written."""
        self._last_page = last_page
        if self._pages < 2:
            raise DamagedPagesError("it ends too early")
        self._seen = bytearray(self._pages)
        self._pending: list[tuple[int, int, bool]] = []  # page, levels from there on, is free list
        self._free: list[npt.NDArray[np.uint64]] = []

    def run(self, *, free: bytes, main: bytes) -> None:
        self._take(0, 2)
        self._add_tree(main, is_free_list=False)
        self._add_tree(free, is_free_list=True)
        while self._pending:
            number, levels, is_free_list = self._pending.pop()
            self._take(number, 1)
            page = _read(self._descriptor, number * self._page_bytes, self._page_bytes)
            self._page(page, number, levels, is_free_list)
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
            self._pending.append((root, depth, is_free_list))

    def _page(self, page: bytes, number: int, levels: int, is_free_list: bool) -> None:
        there, _, flags, *_ = _HEAD.unpack_from(page)
        if there != number or flags != (_LEAF if levels == 1 else _BRANCH):
            raise DamagedPagesError(f"page {number} is not what it should be")
        nodes = _nodes(page, number)
        if levels > 1:
            if np.any(nodes.starts + _NODE_BYTES + nodes.keys > len(page)):
                raise DamagedPagesError(f"a key on page {number} is too long")
            children = nodes.sizes | nodes.flags << 32
            self._pending += [(child, levels - 1, is_free_list) for child in children.tolist()]
            return
        self._leaf(page, number, nodes, is_free_list)

    def _leaf(self, page: bytes, number: int, nodes: _Nodes, is_free_list: bool) -> None:
        is_big = nodes.flags == _BIG
        known = (0, _BIG, _TREE_FLAG, _SEVERAL, _TREE_FLAG | _SEVERAL)
        values = nodes.starts + _NODE_BYTES + nodes.keys
        ends = values + np.where(is_big, 8, nodes.sizes)
        if not np.isin(nodes.flags, known).all() or np.any(ends > len(page)):
            raise DamagedPagesError(f"a value on page {number} is too long")
        for index in np.flatnonzero(nodes.flags | is_free_list).tolist():
            start, size, flags = int(values[index]), int(nodes.sizes[index]), nodes.flags[index]
            value = page[start : int(ends[index])]
            if flags == _BIG:
                value = self._big(value, size, is_read=is_free_list)
            elif flags & _TREE_FLAG:
                if size != _TREE.size:
                    raise DamagedPagesError(f"a tree on page {number} has a wrong size")
                self._add_tree(value, is_free_list=False)
            elif flags == _SEVERAL:
                _check_subpage(value, number)
            if is_free_list:
                self._note_free(value)

    def _big(self, value: bytes, size: int, *, is_read: bool) -> bytes:
        """Count the pages of a value that has its own; return the value where it is asked for."""
        (first,) = struct.unpack("=Q", value)
        count = -(-(size + _HEAD.size) // self._page_bytes)
        self._take(first, count)
        start = first * self._page_bytes
        if self._values or is_read:
            head = _read(self._descriptor, start, _BIG_HEAD.size)
            there, _, flags, pages = _BIG_HEAD.unpack(head)
            if (there, flags, pages) != (first, _OVERFLOW, count):
                raise DamagedPagesError(f"page {first} is not what it should be")
        return _read(self._descriptor, start + _HEAD.size, size) if is_read else b""

    def _note_free(self, value: bytes) -> None:
        if len(value) < 8 or len(value) % 8:
            raise DamagedPagesError("a list of free pages has a wrong size")
        count, *_ = struct.unpack_from("=Q", value)
        if count != len(value) // 8 - 1:
            raise DamagedPagesError("a list of free pages has a wrong length")
        self._free.append(np.frombuffer(value, "=u8", offset=8))

    def _check_free(self) -> None:
        """Check that what is free is not in use, or free twice: it would be given to two at once."""
        free = np.concatenate([np.empty(0, np.uint64), *self._free])
        if free.size and (free.max() > self._last_page or np.unique(free).size != free.size):
            raise DamagedPagesError("pages are free that are not there, or twice")
        used = np.frombuffer(self._seen, np.uint8)
        if used[free[free < self._pages].astype(np.int64)].any():
            raise DamagedPagesError("a page is free and in use")


def _nodes(page: bytes, number: int) -> _Nodes:
    """
    Return the nodes of a page, all of whose heads are within it.

    Raises:
        DamagedPagesError: One is not, or there are none.
    """
    *_, lower, upper = _HEAD.unpack_from(page)
    if not (_HEAD.size < lower <= upper <= len(page)) or lower % 2:
        raise DamagedPagesError(f"page {number} has wrong bounds")
    starts = np.frombuffer(page, "=u2", (lower - _HEAD.size) // 2, _HEAD.size).astype(np.int64)
    if np.any(starts < upper) or np.any(starts > len(page) - _NODE_BYTES) or np.any(starts % 2):
        raise DamagedPagesError(f"page {number} has a wrong offset")
    shorts = np.frombuffer(page, "=u2", len(page) // 2).astype(np.int64)
    low, high, flags, keys = (shorts[starts // 2 + place] for place in range(4))
    return _Nodes(starts, keys, flags, low | high << 16)


def _check_subpage(value: bytes, number: int) -> None:
    if len(value) < _HEAD.size or _HEAD.unpack_from(value)[2] not in _SUBPAGE_FLAGS:
        raise DamagedPagesError(f"a part of page {number} is not what it should be")
    nodes = _nodes(value, number)
    if np.any(nodes.starts + _NODE_BYTES + nodes.keys > len(value)):
        raise DamagedPagesError(f"a key on page {number} is too long")

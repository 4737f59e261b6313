"""The store against a set of prefixes, in any order of operations, by two who have it open."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from recollect.encryption import Cipher
from recollect.kv.disk import DiskStore, Found, NewBlock
from recollect.kv.record import Buffer, Identity, Key, Pin, chained_key, namespace_key
from recollect.kv.tables import Tables
from recollect.types import common_prefix_length

SIZE: Final = 3
IDENTITY: Final = Identity("weights", "runtime", "format")
NAMES: Final = st.sampled_from(["a", "b"])
IDS: Final = st.lists(st.integers(0, 1), min_size=1, max_size=10)
WHICH: Final = st.integers(0, 40)
Ids = tuple[int, ...]
Replay = Callable[[type[RuleBasedStateMachine], str], None]


def root_of(name: str, secret: bytes) -> Key:
    return namespace_key("weights", name, secret)


def blocks_of(name: str, ids: list[int], secret: bytes) -> list[NewBlock]:
    """Return the blocks of a history, the last one perhaps in part; a payload is all tokens up to its end."""
    made: list[NewBlock] = []
    parent = root_of(name, secret)
    for start in range(0, len(ids), SIZE):
        tokens = tuple(ids[start : start + SIZE])
        key = chained_key(parent, tokens, secret)
        payload = bytes([ord(name), *ids[: start + len(tokens)]])
        made.append(NewBlock(key, parent, start == 0, tokens, payload))
        parent = key
    return made


class DiskMachine(RuleBasedStateMachine):
    """
    `stored` is the dumb model: for each block the whole history that it ends.

    What is found for a history must be the longest of its beginnings that the model has, and what is
    read must be what was written for exactly these tokens.
    """

    sealer: Cipher | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.secret = b"" if self.sealer is None else self.sealer.name_secret
        self.stores = [self._opened(), self._opened()]
        self.stored: dict[Key, tuple[str, Ids]] = {}
        self.pinned: dict[str, Key] = {}
        self.turn = 0

    @property
    def store(self) -> DiskStore:
        """Return one of the two, in turn."""
        self.turn += 1
        return self.stores[self.turn % 2]

    @rule(name=NAMES, ids=IDS)
    def write(self, name: str, ids: list[int]) -> None:
        blocks = blocks_of(name, ids, self.secret)
        written = self.store.write(IDENTITY, blocks)
        assert written.stored == {block.key for block in blocks}
        for number, block in enumerate(blocks):
            if block.key not in self.stored:
                self._replace_parts(block)
                self.stored[block.key] = (name, tuple(ids[: number * SIZE + len(block.token_ids)]))

    @rule(name=NAMES, ids=IDS)
    def write_without_what_it_follows(self, name: str, ids: list[int]) -> None:
        last = blocks_of(name, ids, self.secret)[-1]
        written = self.store.write(IDENTITY, [last])
        can = last.follows_root or last.parent in self.stored
        assert (last.key in written.stored) == (can or last.key in self.stored)
        if can and last.key not in self.stored:
            self._replace_parts(last)
            self.stored[last.key] = (name, tuple(ids))

    @rule(name=NAMES, ids=IDS, inside=st.booleans())
    def find_and_read(self, name: str, ids: list[int], inside: bool) -> None:
        root = root_of(name, self.secret)
        found = self.store.find(root, ids, block_size=SIZE, inside_block=inside)
        count = len(found.entries)
        length = max(0, count - 1) * SIZE + found.last_tokens
        assert length == self._known(name, ids, inside)
        taken: list[bytes] = []

        def take(_: int, payload: Buffer) -> None:
            taken.append(bytes(payload))

        assert self.store.read(IDENTITY, found.entries, take) == count
        for number, payload in enumerate(taken):
            end = min(length, (number + 1) * SIZE)
            assert payload[0] == ord(name)
            assert list(payload[1 : 1 + end]) == ids[:end]

    @precondition(lambda self: self.stored)
    @rule(which=WHICH)
    def remove(self, which: int) -> None:
        key = self._one(which)
        whose, start = self.stored[key]
        gone = {key} | {
            other
            for other, (owner, history) in self.stored.items()
            if len(start) % SIZE == 0
            and owner == whose
            and len(history) > len(start)
            and history[: len(start)] == start
        }
        assert self.store.remove([key, b"never stored".ljust(32)]) == len(gone)
        for one in gone:
            del self.stored[one]

    @precondition(lambda self: self.stored)
    @rule(name=NAMES, which=WHICH)
    def pin(self, name: str, which: int) -> None:
        key, store = self._one(which), self.store
        assert store.drop_pin(name) == (name in self.pinned)
        assert store.add_pin(Pin(name, key, 1, "", 0.0, {}))
        self.pinned[name] = key

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        assert self.store.drop_pin(name) == (name in self.pinned)
        self.pinned.pop(name, None)

    @rule(wanted=st.integers(1, 20_000))
    def evict(self, wanted: int) -> None:
        kept = self._beginnings(self.pinned.values())
        self.store.evict(wanted)
        left = self._on_disk()
        assert kept <= left <= set(self.stored), "what is pinned stays, and nothing else comes"
        for key in left:
            assert self._beginnings([key]) <= left, "a tail goes before what it follows"
        self.stored = {key: self.stored[key] for key in left}

    @rule()
    def clear(self) -> None:
        kept = self._beginnings(self.pinned.values())
        assert self.store.clear() == len(self.stored) - len(kept)
        self.stored = {key: self.stored[key] for key in kept}

    @rule(name=NAMES, ids=IDS)
    def touch(self, name: str, ids: list[int]) -> None:
        self.store.touch([block.key for block in blocks_of(name, ids, self.secret)])

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.stores[which].close()
        self.stores[which] = self._opened()

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert list(self.stores[0].problems()) == []
        assert self._on_disk() == set(self.stored)
        assert sum(self.stores[0].misses.values()) == 0

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        self.folder.cleanup()

    def _one(self, which: int) -> Key:
        return sorted(self.stored)[which % len(self.stored)]

    def _opened(self) -> DiskStore:
        folder = Path(self.folder.name) / "kv"
        return DiskStore(folder, budget_bytes=16 << 20, sealer=self.sealer)

    def _on_disk(self) -> set[Key]:
        with self.stores[1].reading() as tables:
            return set(tables.heads())

    def _replace_parts(self, block: NewBlock) -> None:
        """Forget the parts that a longer block begins with, as the store does."""
        for key, (name, history) in list(self.stored.items()):
            tokens = history[(len(history) - 1) // SIZE * SIZE :]
            follows = chained_key(block.parent, tokens, self.secret) == key
            is_part = (
                len(tokens) < len(block.token_ids) and block.token_ids[: len(tokens)] == tokens
            )
            if follows and is_part and key not in self.pinned.values():
                assert name in ("a", "b")
                del self.stored[key]

    def _beginnings(self, keys: Iterable[Key]) -> set[Key]:
        """Return the blocks that the histories of these pass through."""
        wanted: set[Key] = set()
        for key in keys:
            if key in self.stored:
                name, history = self.stored[key]
                wanted |= {block.key for block in blocks_of(name, list(history), self.secret)}
        return wanted

    def _known(self, name: str, ids: list[int], inside: bool) -> int:
        """Return how many leading tokens the model has, by whole blocks and a part of one more."""
        histories = {history for owner, history in self.stored.values() if owner == name}
        whole = 0
        while whole + SIZE <= len(ids) and tuple(ids[: whole + SIZE]) in histories:
            whole += SIZE
        if not inside:
            return whole
        after = [
            h
            for h in histories
            if whole < len(h) <= whole + SIZE and h[:whole] == tuple(ids[:whole])
        ]
        return max([whole, *(common_prefix_length(h, ids) for h in after)])


class SealedDiskMachine(DiskMachine):
    """The same where everything is encrypted, and the secret is in every name."""

    sealer = Cipher(bytes(32))


# Each step writes to a disk.
_EXAMPLES: Final = settings().max_examples
TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(max_examples=min(40, _EXAMPLES), stateful_step_count=30)
TestSealedDisk = SealedDiskMachine.TestCase
TestSealedDisk.settings = settings(max_examples=min(20, _EXAMPLES), stateful_step_count=30)


def _forgets_followers(_self: Tables, keys: Iterable[Key]) -> list[Key]:
    return list(keys)


def _takes_any_siblings(self: Tables, parent: Key, digests: bytes) -> list[bytes]:
    return [digests + key for key in self.followers(parent)[:1]]


neighbours = Tables.neighbours


def _looks_behind_alone(self: Tables, parent: Key, digests: bytes) -> list[bytes]:
    return [row for row in neighbours(self, parent, digests) if row[: len(digests)] >= digests]


find = DiskStore.find


def _finds_what_others_said(
    self: DiskStore, after: Key, token_ids: Sequence[int], **options: Any
) -> Found:
    """A prefix that a namespace lacks is taken from the other one."""
    found = find(self, after, token_ids, **options)
    for name in "ab":
        other = find(self, root_of(name, b""), token_ids, **options)
        if not found.entries:
            found = other
    return found


def _counts_nothing(*_: object) -> None:
    return None


FAULTS: dict[str, tuple[object, str, object]] = {
    "orphans": (Tables, "with_followers", _forgets_followers),
    "wrong sibling": (Tables, "neighbours", _takes_any_siblings),
    "no sibling before": (Tables, "neighbours", _looks_behind_alone),
    "wrong account": (Tables, "add_bytes", _counts_nothing),
    "pins forgotten": (Tables, "pinned_keys", lambda *_: set()),
    "another namespace's block": (DiskStore, "find", _finds_what_others_said),
}
EXPECTED = (AssertionError,)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_example(
    fault: str, monkeypatch: pytest.MonkeyPatch, replay: Replay
) -> None:
    replay(DiskMachine, fault)
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(EXPECTED):
        replay(DiskMachine, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, fault_search: Callable[[int], settings]
) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(EXPECTED):
        run_state_machine_as_test(
            DiskMachine, settings=settings(fault_search(1500), stateful_step_count=30)
        )

"""What the store does for one prompt does not grow with what else it has; counted, never timed."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from recollect.kv.disk import DiskStore, NewBlock
from recollect.kv.environment import Environment
from recollect.kv.record import Buffer, Identity, Key, Pin, chained_key, namespace_key

IDENTITY = Identity("weights", "runtime", "f32")
ROOT = namespace_key("weights", "")
SIZE = 32
SYSTEM = tuple(range(SIZE))


def chain(*blocks: tuple[int, ...], after: Key = ROOT) -> list[NewBlock]:
    made: list[NewBlock] = []
    for tokens in blocks:
        key = chained_key(after, tokens)
        made.append(NewBlock(key, after, after == ROOT, tokens, b"kv of a block"))
        after = key
    return made


def chat(number: int) -> tuple[int, ...]:
    """Return the second block of a chat: it shares its first half with 99 others."""
    return (*range(14), number // 100, number % 100, *range(16))


class Counted:
    """A transaction or a cursor that counts what is asked of it, and the bytes that it gives."""

    def __init__(self, inner: Any, counts: Counter[str]) -> None:
        self._inner = inner
        self._counts = counts

    def __iter__(self) -> Iterator[Any]:
        for row in self._inner:
            self._note("row", row)
            yield row

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = getattr(self._inner, name)(*args, **options)
            if name in ("cursor", "iternext_dup"):
                return Counted(result, self._counts)
            self._note(name, result)
            return result

        return call

    def _note(self, name: str, result: Any) -> None:
        self._counts[name] += 1
        self._counts["calls"] += 1
        if isinstance(result, memoryview):
            self._counts["bytes"] += len(result)


Cost = Callable[[Callable[[], object]], Counter[str]]


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> Cost:
    """Return what counts what something asks of LMDB."""

    def counted(ask: Callable[[], object]) -> Counter[str]:
        counts: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            for name in ("reading", "writing"):
                patch.setattr(Environment, name, counting(getattr(Environment, name), counts))
            ask()
        return counts

    return counted


def counting(begin: Any, counts: Counter[str]) -> Any:
    @contextmanager
    def begun(env: Environment) -> Iterator[Any]:
        with begin(env) as txn:
            yield Counted(txn, counts)

    return begun


def with_chats(folder: Path, count: int) -> DiskStore:
    store = DiskStore(folder, budget_bytes=64 << 20)
    (system,) = chain(SYSTEM)
    store.write(IDENTITY, [system])
    for first in range(0, count, 250):
        numbers = range(first, min(first + 250, count))
        blocks = [block for n in numbers for block in chain(chat(n), after=system.key)]
        store.write(IDENTITY, blocks)
    return store


@pytest.mark.slow
def test_a_prompt_reads_as_much_beside_1000_chats_as_beside_100(tmp_path: Path, cost: Cost) -> None:
    few, many = with_chats(tmp_path / "few", 100), with_chats(tmp_path / "many", 1000)
    for tail in ((5,) * SIZE, (*chat(42)[:20], *(99,) * 12), chat(77)):
        prompt = (*SYSTEM, *tail)
        found = [
            cost(partial(store.find, ROOT, prompt, block_size=SIZE, inside_block=True))
            for store in (few, many)
        ]
        assert found[0]["calls"] <= 12
        assert found[1]["calls"] <= 12
        assert found[1]["bytes"] <= 3000
    assert few.find(ROOT, (*SYSTEM, *chat(42)[:20]), block_size=SIZE, inside_block=True).last_tokens
    few.close()
    many.close()


@pytest.mark.slow
def test_the_best_of_1000_chats_is_found(tmp_path: Path) -> None:
    store = with_chats(tmp_path, 1000)
    for number in (0, 7, 99, 100, 555, 999):
        for length in (13, 15, 16, 31):
            prompt = (*SYSTEM, *chat(number)[:length], *(777,) * (SIZE - length))
            found = store.find(ROOT, prompt, block_size=SIZE, inside_block=True)
            assert found.last_tokens == length
    store.close()


@pytest.mark.slow
def test_a_chat_is_written_as_cheaply_beside_1000_as_beside_100(tmp_path: Path, cost: Cost) -> None:
    few, many = with_chats(tmp_path / "few", 100), with_chats(tmp_path / "many", 1000)
    (new,) = chain(chat(5000), after=chain(SYSTEM)[0].key)
    found = [cost(partial(store.write, IDENTITY, [new])) for store in (few, many)]
    assert found[1]["calls"] <= found[0]["calls"] + 2
    assert found[0]["calls"] <= 30
    few.close()
    many.close()


@pytest.mark.slow
def test_a_chat_is_removed_as_cheaply_beside_1000_as_beside_100(tmp_path: Path, cost: Cost) -> None:
    few, many = with_chats(tmp_path / "few", 100), with_chats(tmp_path / "many", 1000)
    key = chain(SYSTEM, chat(50))[-1].key
    found = [cost(partial(store.remove, [key])) for store in (few, many)]
    assert found[0]["calls"] == found[1]["calls"]
    few.close()
    many.close()


@pytest.mark.slow
def test_damaged_entries_are_removed_in_one_pass_over_all(tmp_path: Path, cost: Cost) -> None:
    """Of those nobody knows what they follow; a pass for each would be a square of them."""
    calls = []
    for damaged in (10, 100):
        store = with_chats(tmp_path / str(damaged), 500)
        keys = [chain(SYSTEM, chat(n))[-1].key for n in range(damaged)]
        with store.env.writing() as txn:
            for key in keys:
                txn.put(key, b"damaged", db=store.env.tables["entries"])
        calls.append(cost(partial(store.remove, keys))["calls"])
        assert list(store.problems()) == []
        assert store.holdings()[0].blocks == 501 - damaged
        store.close()
    assert calls[1] <= calls[0] + 90 * 10


LONG = 2000
"""Blocks of a conversation of 64,000 tokens."""


def long_chain() -> list[NewBlock]:
    return chain(*((n % 1000, n // 1000, *range(SIZE - 2)) for n in range(LONG)))


def found_blocks(store: DiskStore, blocks: list[NewBlock]) -> int:
    ids = [token for block in blocks for token in block.token_ids]
    entries = store.find(ROOT, ids, block_size=SIZE, inside_block=True).entries

    def take(_: int, payload: Buffer) -> None:
        assert bytes(payload) == b"kv of a block"

    return store.read(IDENTITY, entries, take)


@pytest.mark.parametrize("table", ["entries", "blocks"])
@pytest.mark.slow
def test_a_bit_that_flips_early_in_64000_tokens_costs_what_follows_it_alone(
    tmp_path: Path, table: str
) -> None:
    store = DiskStore(tmp_path / "kv", budget_bytes=64 << 20)
    blocks, other = long_chain(), chain((7,) * SIZE, (8,) * SIZE)
    store.write(IDENTITY, [*blocks, *other])
    assert found_blocks(store, blocks) == LONG
    _flip_a_bit(store, table, blocks[3].key)
    assert found_blocks(store, blocks) == 3
    assert store.take_refused() == {blocks[3].key}
    assert store.remove([blocks[3].key]) == LONG - 3
    assert found_blocks(store, other) == 2
    assert list(store.problems()) == []
    store.write(IDENTITY, blocks)
    assert found_blocks(store, blocks) == LONG
    store.close()


@pytest.mark.slow
def test_a_long_chain_that_is_damaged_is_repaired(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv", budget_bytes=64 << 20)
    blocks = long_chain()
    store.write(IDENTITY, blocks)
    _flip_a_bit(store, "blocks", blocks[1].key)
    wrong = [key for key, _ in store.problems()]
    assert wrong == [blocks[1].key]
    assert store.remove_wrong(wrong) == LONG - 1
    assert found_blocks(store, blocks) == 1
    assert list(store.problems()) == []
    store.close()


@pytest.mark.slow
def test_a_long_chain_can_be_pinned_counted_and_evicted(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv", budget_bytes=64 << 20)
    blocks = long_chain()
    store.write(IDENTITY, blocks)
    pin = Pin("all", blocks[-1].key, SIZE * LONG, IDENTITY.digest().hex(), 0.0, {})
    assert store.add_pin(pin)
    assert store.size_of(pin).blocks == LONG
    assert store.evict(1 << 40) == 0
    assert store.drop_pin("all")
    assert store.evict(1 << 40) > 0
    assert found_blocks(store, blocks) == 0
    store.close()


@pytest.mark.slow
def test_a_step_of_a_long_restore_does_not_look_at_all_of_the_rest(
    tmp_path: Path, cost: Cost
) -> None:
    store = DiskStore(tmp_path / "kv", budget_bytes=64 << 20)
    blocks = long_chain()
    store.write(IDENTITY, blocks)
    ids = [token for block in blocks for token in block.token_ids]

    def some() -> object:
        found = store.find(ROOT, ids, block_size=SIZE, inside_block=True, most=8)
        assert (len(found.entries), found.last_tokens, found.is_all) == (8, SIZE, False)
        return found

    assert cost(some)["calls"] <= 8
    store.close()


def _flip_a_bit(store: DiskStore, table: str, key: Key) -> None:
    with store.env.writing() as txn:
        value = bytearray(txn.get(key, db=store.env.tables[table]))
        value[-1] ^= 1
        txn.put(key, bytes(value), db=store.env.tables[table])

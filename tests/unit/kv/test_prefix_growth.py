"""What the prefix cache does for one prompt or one block does not grow with what else is in it."""

import gc
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType

import pytest

from recollect.engine.audit import check_cache, check_siblings
from recollect.kv.blocks import PUBLIC, BlockPool, CachedBlock, Siblings
from recollect.kv.prefix import PrefixCache
from recollect.kv.record import Names

SIZE = 32
SYSTEM = tuple(range(SIZE))


def calls(work: Callable[[], object]) -> int:
    """
    Return how many calls of functions something takes, those of the interpreter's own included.

    Without those of the garbage collector, which may come at any moment: once a property test has run,
    Hypothesis times each collection by a callback, and that is four calls more.
    """
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # whoever is told of a collection is called, too
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


class Token(int):
    """A token id that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Token.compared += 1
        return int(self) == other

    def __lt__(self, other: int) -> bool:
        Token.compared += 1
        return int(self) < other

    __hash__ = int.__hash__


def comparisons(work: Callable[[], object]) -> int:
    Token.compared = 0
    work()
    return Token.compared


def chat(number: int, length: int = SIZE) -> tuple[int, ...]:
    """Return the second block of a chat: it shares its first half with 99 others."""
    return (*range(14), number // 100, number % 100, *range(16))[:length]


def with_chats(count: int, namespace: str = "") -> tuple[BlockPool, PrefixCache, CachedBlock]:
    """Return a cache with chats that nobody holds, of two blocks over one system prompt."""
    pool = BlockPool(3 * count + 10, SIZE)
    cache = PrefixCache(pool, Names("model"))
    system = left(pool, cache, cache.root(namespace), SYSTEM)
    for number in range(count):
        first = left(pool, cache, system, chat(number))
        left(pool, cache, first, (number, 1, 2))
    return pool, cache, system


def left(
    pool: BlockPool, cache: PrefixCache, after: CachedBlock, tokens: tuple[int, ...]
) -> CachedBlock:
    (block,) = pool.allocate(1)
    cached = cache.insert(after, tokens, block)
    pool.release([block])
    return cached


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param((5,) * SIZE, marks=pytest.mark.slow),
        (*chat(42)[:20], *(99,) * 12),
        pytest.param(chat(77), marks=pytest.mark.slow),
    ],
    ids=["new", "part", "known"],
)
def test_a_prompt_is_compared_with_few_of_10000_chats(tokens: tuple[int, ...]) -> None:
    counted = tuple(Token(token) for token in tokens)
    found = []
    for count in (1000, 10_000):
        _, cache, system = with_chats(count)
        compared = comparisons(lambda: cache.match(system, counted))  # noqa: B023
        called = calls(lambda: cache.match(system, tokens))  # noqa: B023
        found.append((compared, called))
    assert found[1][0] <= found[0][0] + 4 * SIZE, "the logarithm of ten more steps of bisecting"
    assert found[1][1] == found[0][1]
    assert found[1][1] < 60


@pytest.mark.slow
def test_a_block_is_inserted_beside_10000_as_beside_1000() -> None:
    found = []
    for count in (1000, 10_000):
        pool, cache, system = with_chats(count)
        cache.evictable_blocks  # noqa: B018 - what came before is settled
        compared = tuple(Token(token) for token in chat(20_000))
        (block,) = pool.allocate(1)
        inserted = comparisons(lambda: cache.insert(system, compared, block))  # noqa: B023
        found.append((inserted, calls(lambda: left(pool, cache, system, chat(30_000)))))  # noqa: B023
    assert found[1][0] <= found[0][0] + 8 * SIZE
    assert found[1][1] == found[0][1]
    assert found[1][1] < 200


@pytest.mark.slow
def test_giving_up_a_block_and_counting_what_can_go_cost_the_same_with_10000_blocks() -> None:
    found = []
    for count in (500, 5000):
        pool, cache, system = with_chats(count)
        cache.evict(1)  # settles what was inserted
        held = cache.match(system, (*chat(3), 3, 1, 2))
        pool.retain([one.block for one in held.blocks[:1]])
        found.append((calls(lambda: cache.evict(1)), calls(lambda: cache.evictable_blocks)))  # noqa: B023
        assert cache.evictable_blocks == len(cache) - 2
    assert found[1] == found[0]
    assert found[0][0] < 60
    assert found[0][1] < 20


@pytest.mark.slow
def test_emptying_a_full_cache_block_by_block_takes_steps_in_proportion() -> None:
    per_block = []
    for count in (300, 3000):
        _, cache, _ = with_chats(count)
        blocks = len(cache)

        def empty(cache: PrefixCache = cache) -> None:
            while cache.evict(1):
                pass

        per_block.append(calls(empty) / blocks)
        assert len(cache) == 0
    assert per_block[1] <= per_block[0] * 1.1


def test_a_table_over_a_long_prefix_is_taken_note_of_in_one_pass() -> None:
    """2,000 blocks, as of 64,000 tokens."""
    per_block = []
    for length in (200, 2000):
        pool = BlockPool(length + 1, SIZE)
        cache = PrefixCache(pool, Names("model"))
        after, blocks = cache.root(), []
        for number in range(length):
            after = left(pool, cache, after, (number, *range(SIZE - 1)))
            blocks.append(after.block)

        def hold(cache: PrefixCache = cache, pool: BlockPool = pool) -> None:
            assert cache.evictable_blocks == len(blocks)  # noqa: B023
            pool.retain(blocks)  # noqa: B023
            assert cache.evictable_blocks == 0
            pool.release(blocks)  # noqa: B023
            assert cache.evictable_blocks == len(blocks)  # noqa: B023

        per_block.append(calls(hold) / length)
        check_cache(cache)
    assert per_block[1] <= per_block[0] * 1.1


@pytest.mark.slow
def test_what_is_gone_does_not_pile_up() -> None:
    """Parts of blocks that longer ones replace: the engine does that with every turn."""
    pool = BlockPool(4, SIZE)
    cache = PrefixCache(pool, Names("model"))
    held: list[int] = []
    tracemalloc.start()
    for rounds in (200, 1500):
        for number in range(rounds):
            left(pool, cache, cache.root(), (number % 50, 1))
            cache.evictable_blocks  # noqa: B018 - counted, and so put in order
            left(pool, cache, cache.root(), (number % 50, 1, 2))
            cache.evict(4)
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] < held[0] + 20_000
    check_cache(cache)


@pytest.mark.slow
def test_public_prefixes_that_differ_late_are_found_among_10000() -> None:
    found = []
    for count in (1000, 10_000):
        _, cache, system = with_chats(count, PUBLIC)
        for number in range(0, count, 2):
            cache.pin(system.children[chat(number)])
        wanted = (*SYSTEM, *chat(42, 30), 99, 99)
        root = cache.root("somebody")
        match = cache.match(root, wanted)
        assert (len(match.blocks), match.tokens) == (2, SIZE + 30)
        other = cache.root("another")
        found.append(calls(lambda: cache.match(other, wanted)))  # noqa: B023
    assert found[1] == found[0]


def test_the_end_of_a_long_prefix_is_matched_as_cheaply_where_something_is_public() -> None:
    """Each pass asks for what is known beyond what a sequence has."""
    found = []
    for length in (20, 2000):
        pool = BlockPool(length + 10, SIZE)
        cache = PrefixCache(pool, Names("model"))
        cache.pin(left(pool, cache, cache.root(PUBLIC), SYSTEM))
        after = cache.root("somebody")
        for number in range(length):
            after = left(pool, cache, after, (number, *range(SIZE - 1)))
        found.append(calls(lambda: cache.match(after, SYSTEM)))  # noqa: B023
    assert found[1] == found[0]


def test_siblings_are_found_in_any_order() -> None:
    siblings = Siblings()
    made = {}
    for tokens in [(3, 1), (1,), (1, 2, 3), (2, 9), (1, 2)]:
        made[tokens] = siblings[tokens] = CachedBlock(b"", None, tokens, 0)
    check_siblings(siblings)
    assert siblings.nearest((1, 2, 4)) in [(made[1, 2, 3], 2), (made[1, 2], 2)]
    assert siblings.nearest((7,)) == (None, 0)
    assert siblings.nearest((1, 2)) == (made[1, 2], 2)
    assert [siblings.cover(one) for one in [(1, 2), (3, 1), (9,)]] == [True, False, False]
    assert siblings.parts_of((1, 2, 3, 4)) == [made[1,], made[1, 2], made[1, 2, 3]]
    assert siblings.parts_of((1, 2)) == [made[1,], made[1, 2]]
    del siblings[1, 2]
    check_siblings(siblings)
    assert siblings.parts_of((1, 2)) == [made[1,]]

"""What one sequence has read is found by all others, and evicted from the end."""

import pytest

from recollect.engine.audit import check_cache
from recollect.kv import accounts
from recollect.kv.blocks import PUBLIC, BlockPool, CachedBlock
from recollect.kv.prefix import PrefixCache
from recollect.kv.record import Names, chained_key, namespace_key
from recollect.types import Parts

SIZE = 4


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(16, SIZE)


class Cache(PrefixCache):
    """A cache that says which pool its blocks are of."""

    def __init__(self, pool: BlockPool, names: Names, parts: Parts = "cut") -> None:
        super().__init__(pool, names, parts)
        self.pool = pool


@pytest.fixture
def cache(pool: BlockPool) -> Cache:
    return Cache(pool, Names("model"))


@pytest.fixture
def of_whole_blocks() -> Cache:
    return Cache(BlockPool(16, SIZE), Names("model"), "none")


def left(cache: Cache, ids: list[int], namespace: str = "") -> list[CachedBlock]:
    """Leave the blocks of a sequence behind that nobody else holds."""
    after, made = cache.root(namespace), []
    for start in range(0, len(ids), SIZE):
        (block,) = cache.pool.allocate(1)
        after = cache.insert(after, ids[start : start + SIZE], block)
        cache.pool.release([block])
        made.append(after)
    check_cache(cache)
    return made


def found(cache: Cache, ids: list[int], namespace: str = "") -> int:
    return cache.match(cache.root(namespace), ids).tokens


@pytest.fixture
def of_whole_tails() -> Cache:
    return Cache(BlockPool(16, SIZE), Names("model"), "whole")


def test_a_part_is_kept_and_found_whole_where_it_cannot_be_cut(of_whole_tails: Cache) -> None:
    cache = of_whole_tails
    tails = [
        left(cache, [0, 1, 2, 3, *tail])[-1] for tail in ([4], [4, 5, 6], [4, 7], [4, 5, 6, 8])
    ]
    assert all(tail.in_tree for tail in tails), "no longer block stands for a shorter one"
    for length, expected in ((4, 4), (5, 5), (6, 5), (7, 7)):
        assert found(cache, [*[0, 1, 2, 3, 4, 5, 6, 8][:length], 40]) == expected
    assert found(cache, [0, 1, 2, 3, 4, 5]) == 5
    assert found(cache, [0, 1, 2, 3, 4, 5, 6, 8]) == 8
    assert found(cache, [0, 1]) == 0


def test_a_name_says_all_that_came_before() -> None:
    names = {
        chained_key(chained_key(namespace_key(model, space), first), second)
        for model in ("m", "n")
        for space in ("", "a")
        for first in ([1, 2], [1, 3])
        for second in ([4], [4, 5])
    }
    assert len(names) == 16
    assert namespace_key("ab", "c") != namespace_key("a", "bc")


@pytest.mark.parametrize("length", range(11))
def test_the_longest_known_prefix_is_found_also_inside_a_block(
    cache: Cache, of_whole_blocks: Cache, length: int
) -> None:
    for one in (cache, of_whole_blocks):
        left(one, list(range(10)))
        left(one, [0, 1, 2, 3, 4, 9, 9, 9])
    assert found(cache, [*range(length), 40]) == length
    assert found(of_whole_blocks, [*range(length), 40]) == min(length, 8) // SIZE * SIZE


def test_nothing_is_found_in_another_namespace(cache: Cache) -> None:
    left(cache, [1, 2, 3, 4, 5], "a")
    assert [found(cache, [1, 2, 3, 4, 5], name) for name in ("a", "b", "")] == [5, 0, 0]


def test_the_second_to_compute_a_block_is_given_the_first_ones(
    cache: Cache, pool: BlockPool
) -> None:
    (first,) = left(cache, [1, 2, 3, 4])
    (block,) = pool.allocate(1)
    assert cache.insert(cache.root(), [1, 2, 3, 4], block) is first
    assert pool.references(block) == 1


def test_a_longer_part_takes_the_place_of_a_shorter_one(cache: Cache) -> None:
    left(cache, [1, 2])
    left(cache, [1, 2, 3])
    left(cache, [1])
    assert len(cache) == 1
    left(cache, [1, 2, 3, 4])
    left(cache, [1, 9])
    assert len(cache) == 2
    assert found(cache, [1, 2, 3]) == 3


def test_the_least_recently_used_goes_first_and_tails_before_their_prefixes(
    cache: Cache,
) -> None:
    left(cache, [1] * 8)
    left(cache, [2] * 8)
    left(cache, [3] * 8)
    found(cache, [1] * 4)  # a use of the prefix, not of the tail
    assert cache.evict(1) == 1
    assert [found(cache, [n] * 8) for n in (1, 2, 3)] == [4, 8, 8]
    cache.evict(1)  # the prefix of the first was used before those two were looked up
    assert [found(cache, [n] * 8) for n in (1, 2, 3)] == [0, 8, 8]
    found(cache, [2] * 8)
    cache.evict(2)
    assert [found(cache, [n] * 8) for n in (2, 3)] == [8, 0]
    assert cache.evicted_blocks == 4


def test_what_was_evicted_is_still_known_by_name(
    cache: Cache, pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*ids: int, namespace: str = "") -> int:
        return cache.accounts.computed_tokens(cache.root(namespace), ids)

    left(cache, [*range(10)])
    assert computed(*range(12)) == 8, "whole blocks"
    assert computed(*range(6), 9, 9) == 4
    assert cache.evict(16) == 3 == cache.evicted_blocks
    assert computed(*range(12)) == 8
    assert (computed(0, 1, 2, 9, 4, 5, 6, 7), computed(*range(4, 12))) == (0, 0)
    assert computed(*range(12), namespace="other") == 0
    left(cache, [*range(4)])
    assert computed(*range(12)) == 8, "the first is there, and the second was"
    monkeypatch.setattr(accounts, "MOST_EVICTED_NAMES", 5)
    for number in range(100, 108):
        left(cache, [number] * SIZE)
        cache.evict(16)
        check_cache(cache)
    assert computed(*range(12)) == 0, "forgotten"
    assert computed(*[107] * 4) == 4


def test_what_a_table_holds_is_not_evicted(cache: Cache, pool: BlockPool) -> None:
    first, second = left(cache, [1] * 8)
    pool.retain([first.block])
    assert cache.evictable_blocks == 1
    assert cache.evict(5) == 1
    assert found(cache, [1] * 8) == 4
    pool.release([first.block])
    assert cache.evict(5) == 1
    assert pool.used_blocks == 0
    assert second.block != first.block


def test_what_is_pinned_is_not_evicted_nor_what_it_follows(cache: Cache) -> None:
    _, middle, _ = left(cache, [1] * 12)
    cache.pin(middle)
    cache.pin(middle)
    assert cache.evict(5) == 1
    cache.unpin(middle)
    assert cache.evict(5) == 0
    cache.unpin(middle)
    assert cache.evict(5) == 2
    with pytest.raises(AssertionError, match="more often"):
        cache.unpin(middle)


def test_a_pinned_part_goes_when_it_is_unpinned_and_a_longer_one_has_come(
    cache: Cache,
) -> None:
    (part,) = left(cache, [1, 2])
    cache.pin(part)
    left(cache, [1, 2, 3, 4])
    assert len(cache) == 2
    cache.unpin(part)
    check_cache(cache)
    assert len(cache) == 1
    assert found(cache, [1, 2]) == 2


def test_a_block_can_be_taken_back_by_the_only_one_that_holds_it(
    cache: Cache, pool: BlockPool
) -> None:
    first, second = left(cache, [1] * 6)
    assert not cache.forget(second.block), "nobody asks for it"
    pool.retain([first.block, second.block])
    assert not cache.forget(first.block), "something follows it"
    cache.pin(second)
    assert not cache.forget(second.block), "it is pinned"
    cache.unpin(second)
    pool.retain([second.block])
    assert not cache.forget(second.block), "a third holds it"
    pool.release([second.block])
    assert cache.forget(second.block)
    assert pool.references(second.block) == 1
    check_cache(cache)


def test_what_is_pinned_as_public_is_found_from_every_namespace(
    cache: Cache, of_whole_blocks: Cache
) -> None:
    public = left(cache, [1, 2, 3, 4, 5, 6], PUBLIC)
    wanted = [1, 2, 3, 4, 5, 6, 7, 8]
    assert [found(cache, wanted, name) for name in ("a", "")] == [0, 0], "it is not marked"
    cache.pin(public[-1])
    assert [found(cache, wanted, name) for name in ("a", "")] == [6, 6]
    of_whole_blocks.pin(left(of_whole_blocks, [1, 2, 3, 4, 5, 6], PUBLIC)[-1])
    assert found(of_whole_blocks, wanted, "b") == 4
    assert len(cache) == 2, "there is no second copy"
    check_cache(cache)
    cache.unpin(public[-1])
    assert [found(cache, wanted, name) for name in ("a", "c")] == [6, 0], "who has it keeps it"


def test_what_follows_a_public_prefix_is_found_from_its_own_namespace_alone(
    cache: Cache,
) -> None:
    public = left(cache, [1, 2, 3, 4], PUBLIC)
    cache.pin(public[-1])
    found(cache, [1, 2, 3, 4], "a")
    left(cache, [1, 2, 3, 4, 5, 6, 7, 8], "a")
    names = ("a", "b", "", PUBLIC)
    assert [found(cache, [1, 2, 3, 4, 5, 6, 7, 8], name) for name in names] == [8, 4, 4, 4]


def test_a_client_that_knew_the_beginning_finds_the_rest(cache: Cache) -> None:
    (own,) = left(cache, [1, 2, 3, 4], "a")
    public = left(cache, [1, 2, 3, 4, 5, 6, 7, 8], PUBLIC)
    cache.pin(public[-1])
    match = cache.match(cache.root("a"), [1, 2, 3, 4, 5, 6, 7, 8])
    assert [one.block for one in match.blocks] == [own.block, public[1].block]
    check_cache(cache)


def test_what_is_public_is_looked_up_from_a_root_and_no_further_on(cache: Cache) -> None:
    """A sequence that has begun goes on in its own namespace; the next one finds it."""
    (own,) = left(cache, [1, 2, 3, 4], "a")
    cache.pin(left(cache, [1, 2, 3, 4, 5, 6, 7, 8], PUBLIC)[-1])
    assert cache.match(own, [5, 6, 7, 8]).tokens == 0
    assert not own.children
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8], "a") == 8
    assert cache.match(own, [5, 6, 7, 8]).tokens == 4


def test_a_block_with_two_places_is_free_when_both_are_given_up(
    cache: Cache, pool: BlockPool
) -> None:
    public = left(cache, [1] * 8, PUBLIC)
    cache.pin(public[-1])
    found(cache, [1] * 8, "a")
    assert (cache.evictable_blocks, cache.evict(9)) == (0, 0)
    found(cache, [1] * 8, "a")
    pool.retain([public[0].block])  # as a table does
    cache.unpin(public[-1])
    assert (cache.evictable_blocks, cache.evict(9)) == (1, 1)
    check_cache(cache)
    pool.release([public[0].block])
    assert (cache.evictable_blocks, cache.evict(9)) == (1, 1)
    assert pool.used_blocks == len(cache) == 0


def test_a_second_place_is_not_written_by_itself(pool: BlockPool) -> None:
    new: list[CachedBlock] = []
    cache = Cache(pool, Names("model"))
    cache.on_new = new.append
    public = left(cache, [1] * 4, PUBLIC)
    cache.pin(public[-1])
    found(cache, [1] * 4, "a")
    assert new == public


def test_check_finds_a_block_that_stands_for_two_prefixes(cache: Cache, pool: BlockPool) -> None:
    (ours,) = left(cache, [1] * 4, "a")
    cache.insert(cache.root("b"), [2] * 4, ours.block)
    with pytest.raises(AssertionError, match="two prefixes"):
        check_cache(cache)


def test_check_finds_a_block_that_is_there_twice(cache: Cache) -> None:
    first, second = left(cache, [1] * 8)
    second.block = first.block
    with pytest.raises(AssertionError, match="twice"):
        check_cache(cache)


def test_check_finds_a_wrong_key_and_a_part_that_something_follows(cache: Cache) -> None:
    first, _ = left(cache, [1] * 8)
    first.key = b"wrong"
    with pytest.raises(AssertionError, match="key"):
        check_cache(cache)

"""Pool, prefix cache and tables against a dictionary of prefixes, in any order of operations."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from recollect.engine.audit import check_cache, check_pool, check_sequence
from recollect.engine.sequence import FeedPlan, Memory
from recollect.engine.sequence import Sequence as TokenSequence
from recollect.kv.blocks import PUBLIC, BlockPool, CachedBlock, EvictionOrder, Siblings
from recollect.kv.prefix import Match, PrefixCache
from recollect.kv.record import Names
from recollect.runtime.base import Reuse, RuntimeInfo
from recollect.types import common_prefix_length

NUM_BLOCKS: Final = 16
SIZE: Final = 3
VOCAB: Final = 3
CONTEXT: Final = 10_000
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=7)
NAMESPACES = st.sampled_from(["a", "b", None])
Ids = tuple[int, ...]
Replay = Callable[[type[RuleBasedStateMachine], str], None]
Slot = tuple[object, Ids]
"""What a slot holds, as KV does: whose it is, and all tokens up to its own."""


@dataclass(eq=False)
class Dumb:
    """A history, and how much of it has KV; nothing shared and nothing saved."""

    sequence: TokenSequence
    owner: object
    ids: list[int] = field(default_factory=list)

    @property
    def shares(self) -> bool:
        return isinstance(self.owner, str)

    def holds(self) -> list[Slot]:
        return [(self.owner, tuple(self.ids[: n + 1])) for n in range(self.sequence.computed)]


class PrefixMachine(RuleBasedStateMachine):
    """
    The memory is simulated: what is read through a table must be what was computed for its tokens.

    `left` is the dumb model of the cache: for each namespace the token histories that can be found
    there. `published` is what can be found from everywhere, and `ever` what could be once.
    """

    whole_blocks_only = False
    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.cache = PrefixCache(
            self.pool, Names("fingerprint"), "none" if self.whole_blocks_only else "cut"
        )
        reuse = Reuse(unit=SIZE if self.whole_blocks_only else 1)
        info = RuntimeInfo("simulated", SIZE, SIZE, VOCAB, CONTEXT, reuse=reuse)
        self.shared = Memory(info, self.pool, self.cache)
        self.memory: list[list[Slot | None]] = [[None] * SIZE for _ in range(NUM_BLOCKS)]
        self.alive: list[Dumb] = []
        self.left: dict[object, set[Ids]] = {"a": set(), "b": set(), PUBLIC: set()}
        self.published: list[tuple[Ids, list[CachedBlock]]] = []
        self.ever: set[Ids] = set()
        self.pinned: list[list[CachedBlock]] = []
        self.strangers = itertools.count()

    @initialize(target=tables)
    def first(self) -> Dumb:
        return self._born("a")

    @rule(target=tables, namespace=NAMESPACES)
    def new(self, namespace: str | None) -> Dumb:
        return self._born(namespace)

    @rule(dumb=tables, ids=TOKENS, fails=st.sampled_from([False, False, False, True]))
    def append_and_compute(self, dumb: Dumb, ids: list[int], fails: bool) -> None:
        before, length = dumb.ids[:], dumb.sequence.computed
        dumb.ids += ids
        known = 0
        if dumb.shares and dumb.sequence.computed < len(dumb.ids) - 1:
            begins = (
                dumb.sequence.computed < SIZE
            )  # what is public is looked for when a sequence begins
            known = self._expected(dumb.owner, dumb.ids, public=begins)
            if begins:
                self._match(dumb.owner, dumb.ids)
        dumb.sequence.append(ids)
        gained = dumb.sequence.reuse()
        assert dumb.sequence.computed == max(length, known), (
            "what is known is taken over, and nothing else"
        )
        assert gained == dumb.sequence.computed - length
        start = dumb.sequence.computed
        if start == len(dumb.ids):
            unit = SIZE if self.whole_blocks_only else 1
            start = (start - 1) // unit * unit
        if not self._make_room(dumb, start):
            self.rewind(dumb, len(ids))
            assert dumb.ids == before
            return
        self._compute(dumb, start, fails)

    @rule(dumb=tables)
    def end_of_prompt(self, dumb: Dumb) -> None:
        dumb.sequence.leave_tail()
        self._leaves_tail(dumb)

    @rule(dumb=tables, back=st.integers(0, 9))
    def rewind(self, dumb: Dumb, back: int) -> None:
        length = max(0, len(dumb.ids) - back)
        if length < dumb.sequence.computed:
            self._leaves_tail(dumb)
        dumb.sequence.rewind_to(length)
        del dumb.ids[length:]

    @rule(dumb=tables)
    def park(self, dumb: Dumb) -> None:
        self._leaves_tail(dumb)
        dumb.sequence.park()

    @rule(target=tables, dumb=tables)
    def fork(self, dumb: Dumb) -> Dumb:
        used = self.pool.used_blocks
        other = Dumb(dumb.sequence.fork(), dumb.owner, dumb.ids[:])
        self.alive.append(other)
        assert self.pool.used_blocks == used
        return other

    @rule(dumb=consumes(tables), parks=st.booleans())
    def release(self, dumb: Dumb, parks: bool) -> None:
        """With or without leaving the tail behind, as when it is only forgotten."""
        if parks:
            self.park(dumb)
        dumb.sequence.truncate(0)
        self.alive.remove(dumb)

    @rule(dumb=tables, length=st.integers(0, 12))
    def pin(self, dumb: Dumb, length: int) -> None:
        if not dumb.shares:
            return
        ids = dumb.ids[:length]
        match = self._match(dumb.owner, ids)
        found = match.blocks[-1:]
        for cached in found:
            self.cache.pin(cached)
        self.pinned.append(found)

    @rule(number=st.integers(0, 9))
    def unpin(self, number: int) -> None:
        if self.pinned:
            for cached in self.pinned.pop(number % len(self.pinned)):
                self.cache.unpin(cached)

    @rule(dumb=tables, length=st.integers(0, 9), ids=TOKENS)
    def publish(self, dumb: Dumb, length: int, ids: list[int]) -> None:
        """What is computed as public is found from everywhere, as soon as it is pinned."""
        public = self._born(PUBLIC)
        self.append_and_compute(public, [*dumb.ids[:length], *ids], False)
        self.park(public)
        wanted = public.ids
        self.alive.remove(public)
        match = self._match(PUBLIC, wanted)
        found = match.blocks[-1:]
        for cached in found:
            self.cache.pin(cached)
        if found:
            marked = _history(found[-1])
            assert marked[: len(wanted)] == tuple(wanted[: len(marked)])
            self.published.append((marked, found))
            self.ever.add(marked)

    @rule(number=st.integers(0, 9))
    def unpublish(self, number: int) -> None:
        if self.published:
            for cached in self.published.pop(number % len(self.published))[1]:
                self.cache.unpin(cached)

    @rule(count=st.integers(1, 6))
    def evict(self, count: int) -> None:
        possible = self.cache.evictable_blocks
        expected, freed = self._least_recently_used(count)
        free = self.pool.free_blocks
        evicted = self.cache.evict(count)
        assert evicted == min(count, possible) == freed
        assert self.pool.free_blocks == free + evicted
        assert not {id(cached) for cached in expected} & {id(c) for c in self.cache.blocks()}
        self._forget_what_is_gone()

    @rule(dumb=tables, back=st.integers(0, 5), ids=TOKENS, namespace=st.sampled_from(["a", "b"]))
    def look_up(self, dumb: Dumb, back: int, ids: list[int], namespace: str) -> None:
        wanted = [*dumb.ids[: max(0, len(dumb.ids) - back)], *ids]
        expected = self._expected(namespace, wanted)
        match = self._match(namespace, wanted)
        assert match.tokens == expected
        read = [slot for cached in match.blocks for slot in self.memory[cached.block]]
        read = read[: match.tokens]
        assert self._may_read(namespace, read, wanted)

    @invariant()
    def the_bookkeeping_is_right(self) -> None:
        check_pool(
            self.pool,
            [*(d.sequence.blocks for d in self.alive), [one.block for one in self.cache.blocks()]],
        )
        check_cache(self.cache)
        for dumb in self.alive:
            check_sequence(dumb.sequence)
            assert dumb.sequence.computed <= len(dumb.ids)

    @invariant()
    def every_table_reads_the_kv_of_its_own_history(self) -> None:
        for dumb in self.alive:
            read = [slot for block in dumb.sequence.blocks for slot in self.memory[block]]
            assert self._may_read(dumb.owner, read[: dumb.sequence.computed], dumb.ids)

    @invariant()
    def the_cache_has_what_was_left_and_nothing_else(self) -> None:
        for namespace, histories in self.left.items():
            there = self._histories(namespace)
            assert all(any(one[: len(ids)] == ids for one in there) for ids in histories if ids)
            assert all(any(one[: len(ids)] == ids for one in histories) for ids in there)

    @invariant()
    def nothing_in_the_tree_is_of_another_key(self) -> None:
        """What is below the public root was computed as public, and all else by its own key."""
        for namespace in self.left:
            for ids in self._histories(namespace):
                read = self._read(namespace, ids)
                assert self._may_read(namespace, read, ids)

    @invariant()
    def full_blocks_of_one_prefix_are_one_block(self) -> None:
        blocks: dict[Slot, int] = {}
        for dumb in self.alive:
            for index in range(dumb.sequence.computed // SIZE if dumb.shares else 0):
                prefix = (dumb.owner, tuple(dumb.ids[: (index + 1) * SIZE]))
                assert (
                    blocks.setdefault(prefix, dumb.sequence.blocks[index])
                    == dumb.sequence.blocks[index]
                )

    def _born(self, namespace: str | None) -> Dumb:
        sequence = TokenSequence(self.shared, namespace)
        dumb = Dumb(sequence, next(self.strangers) if namespace is None else namespace)
        self.alive.append(dumb)
        return dumb

    def _make_room(self, dumb: Dumb, start: int) -> bool:
        """Evict as the engine does; return whether there is room now."""
        needed = dumb.sequence.blocks_to_allocate(start, len(dumb.ids))
        short = needed - self.pool.free_blocks
        if short > 0 and self.cache.evict(short) < short and dumb.sequence.take_back(start):
            needed = dumb.sequence.blocks_to_allocate(start, len(dumb.ids))
        self._forget_what_is_gone()
        return needed <= self.pool.free_blocks

    def _compute(self, dumb: Dumb, start: int, fails: bool) -> None:
        copies = dumb.sequence.prepare_write(start, len(dumb.ids))
        if fails:
            for place in range(start, len(dumb.ids)):
                self.memory[dumb.sequence.blocks[place // SIZE]][place % SIZE] = None
            dumb.sequence.truncate(start // SIZE * SIZE)
            return
        for source, target in copies:
            self.memory[target] = self.memory[source][:]
        for place in range(start, len(dumb.ids)):
            slot = (dumb.owner, tuple(dumb.ids[: place + 1]))
            self.memory[dumb.sequence.blocks[place // SIZE]][place % SIZE] = slot
        dumb.sequence.written(FeedPlan(start, len(dumb.ids)), None)
        if dumb.shares:
            self.left[dumb.owner].add(tuple(dumb.ids[: len(dumb.ids) // SIZE * SIZE]))

    def _leaves_tail(self, dumb: Dumb) -> None:
        if dumb.shares and not self.whole_blocks_only:
            self.left[dumb.owner].add(tuple(dumb.ids[: dumb.sequence.computed]))

    def _expected(self, namespace: object, ids: Sequence[int], *, public: bool = True) -> int:
        known = [*self.left[namespace]]
        if public and namespace != PUBLIC:
            known += [one for one, _ in self.published]
        longest = max((common_prefix_length(ids, one) for one in known), default=0)
        return longest // SIZE * SIZE if self.whole_blocks_only else longest

    def _match(self, namespace: object, ids: Sequence[int]) -> Match:
        assert isinstance(namespace, str)
        match = self.cache.match(self.cache.root(namespace), ids)
        for history in [_history(cached) for cached in match.blocks[-1:]]:
            if not any(one[: len(history)] == history for one in self.left[namespace]):
                assert namespace != PUBLIC
                assert any(one[: len(history)] == history for one, _ in self.published)
                self.left[namespace].add(history)  # what is public has a place there now
        return match

    def _read(self, namespace: object, ids: Ids) -> list[Slot | None]:
        """Return what the blocks of a prefix hold that is in the tree, found without `match`."""
        node, start, read = self.cache.root(str(namespace)), 0, list[Slot | None]()
        while start < len(ids):
            node = node.children[ids[start : start + SIZE]]
            read += self.memory[node.block]
            start += SIZE
        return read[: len(ids)]

    def _may_read(self, owner: object, read: list[Slot | None], ids: Sequence[int]) -> bool:
        """Return whether slots hold the KV of a prefix of *ids*, and it is the owner's or was public."""
        for number, slot in enumerate(read, 1):
            prefix = tuple(ids[:number])
            public = isinstance(owner, str) and any(one[:number] == prefix for one in self.ever)
            if slot != (owner, prefix) and not (public and slot == (PUBLIC, prefix)):
                return False
        return True

    def _histories(self, namespace: object) -> set[Ids]:
        """Return what each cached block of a namespace stands for, from the first token on."""
        root = self.cache.root(str(namespace))
        return {_history(cached) for cached in self.cache.blocks() if _root(cached) is root}

    def _forget_what_is_gone(self) -> None:
        for namespace, histories in self.left.items():
            there = self._histories(namespace)
            for ids in list(histories):
                histories.remove(ids)
                histories.add(
                    ids[: max((common_prefix_length(ids, one) for one in there), default=0)]
                )

    def _least_recently_used(self, count: int) -> tuple[list[CachedBlock], int]:
        """
        Return what has to be evicted: again and again the oldest of the places that nothing follows.

        And how many blocks that frees: those that have no place any more.
        """
        there = {id(cached): cached for cached in self.cache.blocks()}
        places = Counter(cached.block for cached in there.values())
        spare = {block for block in places if self.pool.references(block) == places[block]}
        gone: list[CachedBlock] = []
        freed = 0
        while freed < count:
            leaves = [
                cached
                for cached in there.values()
                if not any(id(child) in there for child in cached.children.values())
                and not cached.pins
                and cached.block in spare
            ]
            if not leaves:
                break
            oldest = min(leaves, key=_last_use)
            del there[id(oldest)]
            gone.append(oldest)
            places[oldest.block] -= 1
            freed += places[oldest.block] == 0
        return gone, freed


def _history(cached: CachedBlock) -> Ids:
    """Return what a cached block stands for, from the first token on."""
    return tuple(token for block in cached.path() for token in block.token_ids)


def _root(cached: CachedBlock) -> CachedBlock:
    return cached if cached.parent is None else _root(cached.parent)


def _last_use(cached: CachedBlock) -> int:
    """Return when a block or what follows it was last used."""
    return max([cached.last_used, *(_last_use(child) for child in cached.children.values())])


class WholeBlocksMachine(PrefixMachine):
    """The same where only whole blocks can be shared."""

    whole_blocks_only = True


TestPrefix = PrefixMachine.TestCase
TestPrefixWithWholeBlocksOnly = WholeBlocksMachine.TestCase


# The machine must be able to fail: each of these faults is planted, and has to be found.


def _match_across_namespaces(patch: pytest.MonkeyPatch) -> None:
    root = PrefixCache.root
    patch.setattr(PrefixCache, "root", lambda self, _namespace="": root(self, "all"))


def _pools(patch: pytest.MonkeyPatch) -> dict[PrefixCache, BlockPool]:
    """Return the pool of each cache that is made from here on."""
    pools: dict[PrefixCache, BlockPool] = {}
    init = PrefixCache.__init__

    def noting(self: PrefixCache, pool: BlockPool, *args: Any, **options: Any) -> None:
        init(self, pool, *args, **options)
        pools[self] = pool

    patch.setattr(PrefixCache, "__init__", noting)
    return pools


def _evict_prefixes_first(patch: pytest.MonkeyPatch) -> None:
    pools = _pools(patch)

    def evict(self: PrefixCache, count: int) -> int:
        oldest = sorted(self.blocks(), key=lambda cached: cached.last_used)
        chosen = [c for c in oldest if not c.held][:count]
        for cached in chosen:
            assert cached.parent is not None
            del cached.parent.children[cached.token_ids]
            pools[self].release([cached.block])
        return len(chosen)

    patch.setattr(PrefixCache, "evict", evict)


def _evict_the_latest(patch: pytest.MonkeyPatch) -> None:
    pop = EvictionOrder.pop

    def latest(self: EvictionOrder) -> CachedBlock | None:
        all_of = []
        while (cached := pop(self)) is not None:
            all_of.append(cached)
        for cached in all_of[:-1]:  # back where they were
            self.hold(cached, held=True)
            self.hold(cached, held=False)
        return all_of[-1] if all_of else None

    patch.setattr(EvictionOrder, "pop", latest)


def _evict_pinned(patch: pytest.MonkeyPatch) -> None:
    hold = EvictionOrder.hold

    def forgetful(self: EvictionOrder, cached: CachedBlock, *, held: bool) -> None:
        hold(self, cached, held=held and not cached.pins)

    patch.setattr(EvictionOrder, "hold", forgetful)


def _evict_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    hold = EvictionOrder.hold

    def forgetful(self: EvictionOrder, cached: CachedBlock, *, held: bool) -> None:
        hold(self, cached, held=held and cached.pins > 0)

    patch.setattr(EvictionOrder, "hold", forgetful)


def _skip_the_copy(patch: pytest.MonkeyPatch) -> None:
    """The cached part of a block is written over, because nobody seems to share it."""
    patch.setattr(BlockPool, "is_shared", lambda _self, _block: False)


def _share_a_wrong_block(patch: pytest.MonkeyPatch) -> None:
    """Blocks are taken for the same where their first tokens are."""

    insert = PrefixCache.insert

    def careless(
        self: PrefixCache, after: CachedBlock, ids: Sequence[int], block: int
    ) -> CachedBlock:
        alike = (c for c in after.children.values() if c.token_ids[:-1] == tuple(ids[:-1]))
        wrong = next((c for c in alike if len(c.token_ids) == len(ids)), None)
        return insert(self, after, ids, block) if wrong is None else wrong

    patch.setattr(PrefixCache, "insert", careless)


def _match_a_token_too_many(patch: pytest.MonkeyPatch) -> None:
    match = PrefixCache.match

    def greedy(self: PrefixCache, after: CachedBlock, ids: Sequence[int]) -> Match:
        found = match(self, after, ids)
        part = found.tokens % SIZE
        if not part or part >= len(found.blocks[-1].token_ids) or found.tokens >= len(ids):
            return found
        return Match(found.blocks, found.tokens + 1)

    patch.setattr(PrefixCache, "match", greedy)


def _match_a_block_too_many(patch: pytest.MonkeyPatch) -> None:
    """Where all blocks match so far, whatever follows is taken for the next one."""
    match = PrefixCache.match

    def greedy(self: PrefixCache, after: CachedBlock, ids: Sequence[int]) -> Match:
        found = match(self, after, ids)
        follows = list((found.blocks[-1] if found.blocks else after).children.values())
        if found.tokens % SIZE or found.tokens + SIZE > len(ids) or not follows:
            return found
        wrong = follows[0]
        return Match([*found.blocks, wrong], found.tokens + len(wrong.token_ids))

    patch.setattr(PrefixCache, "match", greedy)


def _keep_two_of_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenSequence, "reuse", lambda _self: 0)


def _publish_what_a_client_goes_on_with(patch: pytest.MonkeyPatch) -> None:
    """What follows a public prefix is inserted where the prefix is public."""
    insert = PrefixCache.insert

    def misplaced(
        self: PrefixCache, after: CachedBlock, ids: Sequence[int], block: int
    ) -> CachedBlock:
        public: CachedBlock | None = self.root(PUBLIC)
        for there in after.path():
            public = public and public.children.get(there.token_ids)
        return insert(self, public or after, ids, block)

    patch.setattr(PrefixCache, "insert", misplaced)


def _share_what_is_not_marked(patch: pytest.MonkeyPatch) -> None:
    insert = PrefixCache.insert

    def marking(
        self: PrefixCache, after: CachedBlock, ids: Sequence[int], block: int
    ) -> CachedBlock:
        cached = insert(self, after, ids, block)
        if _root(cached) is self.root(PUBLIC):
            self.pin(cached)
        return cached

    patch.setattr(PrefixCache, "insert", marking)


def _take_any_key_for_public(patch: pytest.MonkeyPatch) -> None:
    """What the key a has pinned, others find."""
    patch.setattr("recollect.kv.prefix.PUBLIC", "a")


def _ignore_what_is_public(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("recollect.kv.prefix.PUBLIC", "nobody's")


def _hold_a_second_place_without_a_reference(patch: pytest.MonkeyPatch) -> None:
    pools = _pools(patch)
    match = PrefixCache.match

    def unheld(self: PrefixCache, after: CachedBlock, ids: Sequence[int]) -> Match:
        before = Counter(one.block for one in self.blocks())
        found = match(self, after, ids)
        pools[self].release((Counter(one.block for one in self.blocks()) - before).elements())
        return found

    patch.setattr(PrefixCache, "match", unheld)


def _count_a_place_for_a_block(patch: pytest.MonkeyPatch) -> None:
    """What is evicted is taken for free though it has another place."""
    patch.setattr(
        PrefixCache,
        "evictable_blocks",
        property(lambda self: sum(not cached.held for cached in self.blocks())),
    )


def _forget_the_tail(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenSequence, "leave_tail", lambda _self: None)


def _trust_kv_after_a_failure(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        TokenSequence,
        "truncate",
        lambda self, length: setattr(self, "computed", min(len(self.blocks) * SIZE, length + 1)),
    )


def _overlook_who_holds_what(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "take_changed", lambda _self: set[int]())


def _look_at_one_neighbour(patch: pytest.MonkeyPatch) -> None:
    """The block that has the most in common is taken to be the one after, never the one before."""

    def nearest(self: Siblings, ids: Ids) -> tuple[CachedBlock | None, int]:
        after = min((there for there in self if there >= ids), default=None)
        length = common_prefix_length(ids, after or ())
        return (self[after], length) if after and length else (None, 0)

    patch.setattr(Siblings, "nearest", nearest)


def _forget_to_count_up(patch: pytest.MonkeyPatch) -> None:
    """What a block follows is taken for free though the block stays."""

    hold = EvictionOrder.hold

    def forgetful(self: EvictionOrder, cached: CachedBlock, *, held: bool) -> None:
        before = [(above, above.staying_children) for above in cached.path()[:-1]]
        hold(self, cached, held=held)
        for above, count in before:
            above.staying_children = count

    patch.setattr(EvictionOrder, "hold", forgetful)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "matching across namespaces": _match_across_namespaces,
    "evicting prefixes first": _evict_prefixes_first,
    "evicting the latest": _evict_the_latest,
    "evicting what is pinned": _evict_pinned,
    "evicting what is in use": _evict_what_is_in_use,
    "skipping the copy": _skip_the_copy,
    "sharing a wrong block": _share_a_wrong_block,
    "matching a token too many": _match_a_token_too_many,
    "matching a block too many": _match_a_block_too_many,
    "reusing nothing": _keep_two_of_one,
    "publishing what a client goes on with": _publish_what_a_client_goes_on_with,
    "sharing what is not marked": _share_what_is_not_marked,
    "taking any key for public": _take_any_key_for_public,
    "ignoring what is public": _ignore_what_is_public,
    "holding a second place without a reference": _hold_a_second_place_without_a_reference,
    "counting a place for a block": _count_a_place_for_a_block,
    "overlooking who holds what": _overlook_who_holds_what,
    "looking at one neighbour": _look_at_one_neighbour,
    "forgetting to count up": _forget_to_count_up,
    "forgetting the tail": _forget_the_tail,
    "trusting KV after a failure": _trust_kv_after_a_failure,
}


EXPECTED = (AssertionError, ExceptionGroup, KeyError)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_example(
    fault: str, monkeypatch: pytest.MonkeyPatch, replay: Replay
) -> None:
    replay(PrefixMachine, fault)
    FAULTS[fault](monkeypatch)
    with pytest.raises(EXPECTED):
        replay(PrefixMachine, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, fault_search: Callable[[int], settings]
) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(EXPECTED):
        run_state_machine_as_test(PrefixMachine, settings=fault_search(1500))

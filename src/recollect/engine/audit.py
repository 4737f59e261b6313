"""
The audit of the heart: its bookkeeping is derived anew from what exists, and compared.

Each class says its invariants in its docstring; the function for the class verifies them here, in that
order. `Engine.check` runs all of it between two forward passes. This is the only module that reads the
private state of others. It changes nothing, except that pool and cache first do what they have put off.
Every function raises AssertionError where an invariant does not hold.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Several

from recollect.engine.drafts import Drafts
from recollect.engine.scheduler import MOST_CREDIT, MOST_SPARE, Scheduler
from recollect.engine.sequence import Memory, Sequence
from recollect.kv.accounts import MOST_EVICTED_NAMES
from recollect.kv.blocks import BlockPool, CachedBlock, EvictionOrder, Siblings, blocks_for
from recollect.kv.prefix import PrefixCache


def check_memory(memory: Memory, leased: Several[int]) -> None:
    """
    Verify pool, cache, and all sequences that are alive.

    Args:
        memory: What the sequences share.
        leased: Blocks that something besides tables and cache has a reference to.
    """
    with memory.lock:
        alive = [sequence for sequence in memory.sequences if not sequence.closed]
        tables = [sequence.blocks for sequence in alive]
        cached = [node.block for node in memory.cache.blocks()]
        check_pool(memory.pool, [*tables, cached, leased])
        check_cache(memory.cache)
        memory.ends.check()
        for sequence in alive:
            check_sequence(sequence)


def check_pool(pool: BlockPool, tables: Iterable[Several[int]]) -> None:
    """
    Verify the counts of references, and the free list.

    Args:
        pool: The pool.
        tables: The blocks that each table holds; the cache and leases count as tables.
    """
    count = pool.free_blocks  # the pool takes note of what was dropped
    held = Counter(block for table in tables for block in table)
    for block, references in enumerate(pool._references):
        assert references == held[block], (
            f"block {block} counts {references} references and is held {held[block]} times"
        )
    free = sorted(pool._free)
    assert len(set(free)) == count, "a block is on the free list twice"
    expected = [block for block in range(pool.num_blocks) if pool._references[block] == 0]
    assert free == expected, "the free list is not the set of blocks without references"


def check_siblings(siblings: Siblings) -> None:
    """Verify the order of the blocks after the same one."""
    assert sorted(siblings) == siblings._order, "siblings are out of order"


def check_cache(cache: PrefixCache) -> None:
    """Verify the tree, and what the order of eviction knows of it."""
    nodes = list(cache.blocks())
    root_of: dict[CachedBlock | None, CachedBlock | None] = {}
    for cached in nodes:
        root_of[cached] = root_of.get(cached.parent, cached.parent)
    places = Counter((root_of[cached], cached.block) for cached in nodes)
    assert len(places) == len(nodes), "a block is below a root twice"
    counted = Counter(cached for all_of in cache._nodes.values() for cached in all_of)
    assert counted == Counter(nodes), "the nodes are not counted right"
    prefixes: dict[int, list[tuple[int, ...]]] = {}
    for cached in nodes:
        if len(cache._nodes[cached.block]) > 1:
            prefix = [block.token_ids for block in cached.path()]
            same = prefixes.setdefault(cached.block, prefix) == prefix
            assert same, "a block stands for two prefixes"
        _check_node(cache, cached)
    tokens = Counter[str]()
    for cached in nodes:
        tokens[cached.namespace] += len(cached.token_ids)
    counted_tokens = {name: each.tokens for name, each in cache.accounts._traffic.items()}
    assert counted_tokens == dict.fromkeys(counted_tokens, 0) | tokens, "tokens are counted wrong"
    assert len(cache.accounts._evicted) <= MOST_EVICTED_NAMES, "too many names are remembered"
    for node in (*cache._roots.values(), *nodes):
        check_siblings(node.children)
    cache.settle()
    references = {one: cache._pool.references(one.block) for one in nodes}
    held = {one for one in nodes if one.pins or references[one] > len(cache._nodes[one.block])}
    _check_order(cache._order, nodes, held)


def check_sequence(sequence: Sequence) -> None:
    """Verify a history's block table and its chain."""
    assert 0 <= sequence.computed <= len(sequence), "more tokens have KV than there are"
    size = sequence.memory.info.block_size
    covered = blocks_for(sequence.computed + len(sequence._ahead), size)
    is_known = (
        len(sequence) <= sequence.computed + 1
    )  # a token is in the history before it is judged
    assert is_known or not sequence._ahead, "guesses behind what has no KV"
    assert len(sequence.blocks) == covered, "the table does not cover what has KV"
    ours = sequence.blocks[: len(sequence.chain)]
    assert [cached.block for cached in sequence.chain] == ours, "the chain is of other blocks"
    cached = [token for block in sequence.chain for token in block.token_ids]
    assert cached == sequence.tokens(0, len(cached)), "KV of another history"
    full = sequence.computed // size
    shares = sequence.namespace is not None
    assert not shares or len(sequence.chain) == full, "a full block is not in the cache"


def check_scheduler(scheduler: Scheduler) -> None:
    """Verify which tasks wait and run, and what namespaces were fed."""
    tasks, running = scheduler.tasks(), scheduler.running
    assert len(tasks) == len(set(tasks)), "a task is there twice"
    assert len(running) <= scheduler.pace.most_rows, "too many run"
    assert len(running) <= 1 or not any(task.idle for task in running), "idle work"
    spare = [task for task in scheduler.waiting if task.spare and not task.cancelled]
    assert len(spare) <= MOST_SPARE, "too much spare work waits"
    turns = scheduler._turns
    for fed in turns._fed.values():
        assert turns._most - MOST_CREDIT < fed <= turns._most, "an account is out of range"


def check_drafts(drafts: Drafts | None) -> None:
    """
    Verify the invariants of the smaller model that guesses, if there is one.

    Raises:
        AssertionError: One does not hold.
    """
    if drafts is not None and drafts.guesser is not None:
        drafts.guesser.check()


def _check_node(cache: PrefixCache, cached: CachedBlock) -> None:
    parent = cached.parent
    assert parent is not None, "a root is in the tree"
    assert cache._pool.references(cached.block) >= 1, "a free block is in the tree"
    assert cached.in_tree, "a block is under other tokens"
    key = cache.names.after(parent.key, cached.token_ids)
    assert cached.key == key, "a key is wrong"
    full = len(cached.token_ids) == cache._pool.block_size
    assert full or not cached.children, "something follows a block that is not full"
    covered = parent.children.cover(cached.token_ids)
    assert cached.pins or cache.parts == "whole" or not covered, "a part is there twice"
    most = max((child.pins for child in cached.children.values()), default=0)
    assert most <= cached.pins, "a block has fewer pins than one that follows it"
    pinned = cache._pinned.get(parent, Siblings()).get(cached.token_ids)
    assert (pinned is cached) == (cached.pins > 0), "what is pinned is noted wrong"


def _check_order(
    order: EvictionOrder, nodes: Several[CachedBlock], held: Collection[CachedBlock]
) -> None:
    """
    Verify what is known of the nodes that stay, and that all that can be evicted are offered.

    Args:
        order: The order of eviction.
        nodes: All of the tree, parents before children.
        held: Those that are held.
    """
    staying: set[CachedBlock] = set()
    children: Counter[CachedBlock | None] = Counter()
    for cached in reversed(nodes):
        if cached in held or children[cached]:
            staying.add(cached)
            children[cached.parent] += 1
    times: dict[CachedBlock, int] = {}
    for last_used, _, cached in order._heap:
        times[cached] = min(last_used, times.get(cached, last_used))
    for cached in nodes:
        assert cached.held == (cached in held), "nobody was told who holds a node"
        assert cached.staying_children == children[cached], "wrong count of staying children"
        is_offered = times.get(cached, cached.last_used + 1) <= cached.last_used
        assert is_offered or not cached.can_go, "an evictable leaf is not in the heap"
    blocks = Counter(cached.block for cached in staying)
    assert order.staying == blocks, "wrong count of staying blocks"

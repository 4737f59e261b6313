"""What is public is computed once for all namespaces; what follows it is nobody else's."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from recollect.engine.engine import Engine
from recollect.engine.pinning import PublicPrefixes
from recollect.errors import (
    ContextFullError,
    MemoryLimitError,
    MisuseError,
    RuntimeFailure,
    TooShortError,
)
from recollect.kv.blocks import PUBLIC
from recollect.kv.disk import DiskStore
from recollect.runtime.base import Logits

Make = Callable[..., Engine]
Open = Callable[..., DiskStore]

PREFIX = [(7 * place + place * place) % 50 for place in range(22)]
QUESTION = [1, 2, 3, 4, 5, 6, 7, 8, 9]
PROMPT = [*PREFIX, *QUESTION]


def ask(engine: Engine, ids: Sequence[int], namespace: str | None) -> tuple[int, Logits]:
    """Return how many tokens a prompt costs, and the logits after it."""
    sequence = engine.new_sequence(namespace)
    sequence.append(ids)
    engine.compute([sequence])
    fed, logits = sequence.fed_tokens, sequence.logits
    assert logits is not None
    sequence.release()
    engine.check()
    return fed, logits


def cost(engine: Engine, ids: Sequence[int], namespace: str | None) -> int:
    return ask(engine, ids, namespace)[0]


@pytest.mark.parametrize(
    ("whole_blocks_only", "whole_tails"), [(False, False), (True, False), (True, True)]
)
def test_every_namespace_computes_only_what_follows_a_public_prefix(
    make_engine: Make, fresh_logits: Any, whole_blocks_only: bool, whole_tails: bool
) -> None:
    """With a tail that can only be used as a whole too, as a recurrent state is: it is, behind all of it."""
    engine = make_engine(whole_blocks_only=whole_blocks_only, whole_tails=whole_tails)
    made = PublicPrefixes(engine).publish(PREFIX)
    assert (made.tokens, made.computed_tokens) == (22, 22)
    lost = 22 % 4 if whole_blocks_only and not whole_tails else 0
    for namespace in ("a", "b", ""):
        fed, logits = ask(engine, PROMPT, namespace)
        assert fed == len(QUESTION) + lost
        assert np.array_equal(logits, fresh_logits(PROMPT, whole_blocks_only=whole_blocks_only))
    assert cost(engine, PROMPT, None) == len(PROMPT), "who shares with nobody does not here either"


def test_without_the_mark_each_computes_all(engine: Engine) -> None:
    cost(engine, PREFIX, "a")
    assert [cost(engine, PROMPT, name) for name in ("b", "", PUBLIC)] == [len(PROMPT)] * 3


def test_what_one_goes_on_with_is_computed_again_for_another(engine: Engine) -> None:
    PublicPrefixes(engine).publish(PREFIX)
    assert cost(engine, PROMPT, "a") == len(QUESTION)
    assert cost(engine, PROMPT, "a") == 0
    assert [cost(engine, PROMPT, name) for name in ("b", "")] == [len(QUESTION)] * 2
    assert engine.warm_tokens(PROMPT, "c") == engine.warm_tokens(PROMPT, PUBLIC) == len(PREFIX)


def test_who_has_computed_a_part_before_it_was_public_finds_the_rest(
    engine: Engine, fresh_logits: Any
) -> None:
    cost(engine, PREFIX[:9], "a")
    PublicPrefixes(engine).publish(PREFIX)
    fed, logits = ask(engine, PROMPT, "a")
    assert fed == len(QUESTION)
    assert np.array_equal(logits, fresh_logits(PROMPT))


def test_where_a_prompt_parts_from_a_public_prefix_its_beginning_is_reused(
    engine: Engine, fresh_logits: Any
) -> None:
    PublicPrefixes(engine).publish(PREFIX)
    other = [*PREFIX[:10], 49, 48, 47]
    for namespace, expected in (("a", 3), ("a", 0), ("b", 3)):
        fed, logits = ask(engine, other, namespace)
        assert fed == expected
        assert np.array_equal(logits, fresh_logits(other))


def test_what_is_public_stays_in_memory_until_it_is_taken_back(make_engine: Make) -> None:
    engine = make_engine(num_blocks=16)
    public = PublicPrefixes(engine)
    public.publish(PREFIX)
    for number in range(4):
        cost(engine, [49 - number] * 40, "a")
    assert engine.cache.evicted_blocks > 0
    assert cost(engine, PROMPT, "b") == len(QUESTION)
    assert public.unpublish(PREFIX)
    assert not public.unpublish(PREFIX)
    assert cost(engine, PROMPT, "c") == len(PROMPT)
    assert cost(engine, PROMPT, "b") == 0, "who began with it keeps what follows"
    engine.forget()
    assert engine.pool.used_blocks == 0


def test_a_second_time_costs_nothing(engine: Engine) -> None:
    public = PublicPrefixes(engine)
    public.publish(PREFIX)
    assert public.publish(PREFIX).computed_tokens == 0
    public.unpublish(PREFIX)
    assert engine.forget() > 0
    assert engine.pool.used_blocks == 0


def test_many_may_publish_the_same_at_once(engine: Engine) -> None:
    public = PublicPrefixes(engine)
    threads = [threading.Thread(target=public.publish, args=[PREFIX]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cost(engine, PROMPT, "a") == len(QUESTION)
    public.unpublish(PREFIX)
    engine.forget()
    assert engine.pool.used_blocks == 0


def test_idle_work_is_done_and_found(engine: Engine) -> None:
    PublicPrefixes(engine).publish(PREFIX, idle=True)
    assert cost(engine, PROMPT, "a") == len(QUESTION)


def test_half_of_the_memory_may_be_public(make_engine: Make) -> None:
    engine = make_engine(num_blocks=16)
    public = PublicPrefixes(engine)
    public.publish(PREFIX)
    with pytest.raises(MemoryLimitError, match="6 of 8 that may be public"):
        public.publish([9] * 12)
    assert engine.computed_tokens == len(PREFIX)
    public.publish([9] * 8)
    public.unpublish(PREFIX)
    public.publish([8] * 12)


def test_what_is_public_takes_room_once_for_all_who_begin_with_it(make_engine: Make) -> None:
    engine = make_engine(num_blocks=16)
    PublicPrefixes(engine).publish([7] * 32)
    sequences = [engine.new_sequence(name) for name in ("a", "b", "c")]
    for sequence in sequences:
        sequence.append([*[7] * 32, 1, 2, 3])
    passes = engine.forward_passes
    engine.compute(sequences)
    assert engine.forward_passes - passes == 1
    engine.check()


def test_what_fails_leaves_nothing_public(
    make_engine: Make, faults: Any, fresh_logits: Any
) -> None:
    engine = make_engine(num_blocks=128)
    public = PublicPrefixes(engine)
    faults.forward_in = 0
    with pytest.raises(RuntimeFailure):
        public.publish(PREFIX)
    fed, logits = ask(engine, PROMPT, "a")
    assert fed == len(PROMPT)
    assert np.array_equal(logits, fresh_logits(PROMPT))
    with pytest.raises(ContextFullError):
        public.publish([1] * 127 + [2] * 2)
    with pytest.raises(TooShortError, match="2 tokens, and 4 are the least"):
        PublicPrefixes(make_engine(whole_blocks_only=True)).publish([1, 2])
    assert not public.unpublish(PREFIX)
    engine.close()
    with pytest.raises(MisuseError):
        public.publish([3, 4, 5])


# --- on disk


@pytest.fixture
def asked_before(make_engine: Make, open_store: Open) -> None:
    """Leave on disk what a namespace said after a public prefix, and end."""
    engine = make_engine(store=open_store())
    PublicPrefixes(engine).publish(PREFIX)
    cost(engine, PROMPT, "a")
    engine.close()


@pytest.mark.usefixtures("asked_before")
def test_after_a_restart_it_is_public_again_from_disk_and_so_is_what_followed(
    make_engine: Make, open_store: Open, fresh_logits: Any
) -> None:
    engine = make_engine(store=open_store())
    assert PublicPrefixes(engine).publish(PREFIX).computed_tokens <= 1
    before = engine.cache.evictable_blocks
    fed, logits = ask(engine, PROMPT, "a")
    assert fed == 1, "its own continuation is warm"
    assert np.array_equal(logits, fresh_logits(PROMPT))
    assert engine.cache.evictable_blocks - before <= 4, "the prefix itself came from no second copy"
    assert cost(engine, PROMPT, "b") == len(QUESTION)


@pytest.mark.usefixtures("asked_before")
def test_after_a_restart_without_the_mark_it_is_shared_with_nobody_and_nothing_is_lost(
    make_engine: Make, open_store: Open
) -> None:
    engine = make_engine(store=open_store())
    assert [cost(engine, PROMPT, name) for name in ("b", "")] == [len(PROMPT)] * 2
    assert cost(engine, PROMPT, "a") == 1


def test_a_prefix_is_written_for_those_who_went_on_from_it(
    make_engine: Make, open_store: Open
) -> None:
    engine = make_engine(store=open_store())
    PublicPrefixes(engine).publish(PREFIX)
    assert engine.tier is not None
    engine.tier.flush()
    alone = engine.tier.statistics().written_blocks
    engine.warm_tokens(PREFIX, "a")  # a look at it
    cost(engine, [*PREFIX[:20], 1], "b")
    engine.tier.flush()
    assert engine.tier.statistics().written_blocks == 2 * alone

"""What one engine computed, another finds on disk; and whatever is wrong there changes no reply."""

import logging
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from recollect.engine.engine import Engine
from recollect.engine.pinning import pin, unpin
from recollect.engine.sampling import Generator
from recollect.engine.tier import Rates, plan_restore
from recollect.errors import RuntimeFailure, StoreCorruptError, StoreFullError
from recollect.kv.disk import DiskStore, Found
from recollect.kv.record import Entry, Identity, StoredReply
from recollect.runtime.base import Logits
from recollect.types import SamplingParams

Make = Callable[..., Engine]
Open = Callable[..., DiskStore]

PROMPT = [(7 * place + place * place) % 50 for place in range(30)]


def reply(
    engine: Engine, prompt: Sequence[int], *, tokens: int = 6, namespace: str = ""
) -> list[int]:
    generator = Generator(engine, SamplingParams(max_tokens=tokens), namespace=namespace)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    ids = generator.get_sequence()
    generator.close()
    return ids


def logits_after(engine: Engine, ids: Sequence[int], namespace: str = "") -> Logits:
    sequence = engine.new_sequence(namespace)
    sequence.append(ids)
    engine.compute([sequence])
    logits = sequence.logits
    assert logits is not None
    sequence.release()
    return logits


def tier_of(engine: Engine) -> Any:
    assert engine.tier is not None
    return engine.tier


@pytest.fixture
def warm_disk(make_engine: Make, open_store: Open) -> list[int]:
    """Have an engine leave a conversation on disk, and return its token ids."""
    engine = make_engine(store=open_store())
    ids = reply(engine, PROMPT)
    engine.close()
    return ids


@pytest.mark.parametrize("whole_blocks_only", [False, True])
def test_after_a_restart_only_what_is_new_is_computed(
    make_engine: Make, open_store: Open, fresh_logits: Any, whole_blocks_only: bool
) -> None:
    first = make_engine(store=open_store(), whole_blocks_only=whole_blocks_only)
    ids = reply(first, PROMPT)
    first.close()
    second = make_engine(store=open_store(), whole_blocks_only=whole_blocks_only)
    logits = logits_after(second, [*ids, 3, 4])
    assert np.array_equal(logits, fresh_logits([*ids, 3, 4], whole_blocks_only=whole_blocks_only))
    had_kv = len(ids) - 1  # the last token of a reply was never fed
    lost = had_kv % 4 if whole_blocks_only else 0
    assert second.computed_tokens == 1 + 2 + lost
    assert tier_of(second).statistics().restored_tokens == had_kv - lost
    second.check()


def test_what_is_asked_again_computes_one_token(
    make_engine: Make, open_store: Open, warm_disk: list[int]
) -> None:
    engine = make_engine(store=open_store())
    assert reply(engine, PROMPT) == warm_disk
    assert engine.computed_tokens == 1 + 5, "the prompt's last token, and those of the reply"
    engine.check()


def test_where_histories_part_inside_a_block_its_beginning_is_restored(
    make_engine: Make, open_store: Open, warm_disk: list[int], fresh_logits: Any
) -> None:
    engine = make_engine(store=open_store())
    other = [*PROMPT[:18], 49, 48]
    assert np.array_equal(logits_after(engine, other), fresh_logits(other))
    assert engine.computed_tokens == 2
    engine.check()


def test_what_memory_gave_up_comes_back_from_disk(
    make_engine: Make, open_store: Open, fresh_logits: Any
) -> None:
    engine = make_engine(store=open_store(), num_blocks=12)
    reply(engine, PROMPT)
    tier_of(engine).flush()
    other = [49 - token for token in PROMPT]
    reply(engine, other)
    assert engine.cache.evicted_blocks > 4
    tier_of(engine).flush()
    before = engine.computed_tokens
    more = [*PROMPT, 1]  # what comes after the prompt itself is known still
    assert np.array_equal(logits_after(engine, more), fresh_logits(more))
    assert engine.computed_tokens - before == 1
    engine.check()


def test_a_pool_too_small_for_all_takes_what_it_can_hold(
    make_engine: Make, open_store: Open, warm_disk: list[int], fresh_logits: Any
) -> None:
    engine = make_engine(store=open_store(), num_blocks=8)
    assert np.array_equal(logits_after(engine, PROMPT), fresh_logits(PROMPT))
    assert 0 < engine.computed_tokens < 12
    engine.check()


def test_the_same_prompt_under_another_key_is_computed_afresh(
    make_engine: Make, open_store: Open, warm_disk: list[int]
) -> None:
    engine = make_engine(store=open_store())
    logits_after(engine, PROMPT, namespace="another")
    assert engine.computed_tokens == len(PROMPT)
    assert tier_of(engine).statistics().restored_tokens == 0
    sequence = engine.new_sequence(None)
    sequence.append(PROMPT)
    engine.compute([sequence])
    assert sequence.fed_tokens == len(PROMPT), "one that shares nothing takes nothing from disk"


def test_another_model_finds_nothing(
    make_engine: Make, open_store: Open, warm_disk: list[int]
) -> None:
    engine = make_engine(store=open_store(), fingerprint="other weights")
    logits_after(engine, PROMPT)
    assert engine.computed_tokens == len(PROMPT)


def test_another_precision_finds_nothing(
    make_engine: Make, open_store: Open, warm_disk: list[int]
) -> None:
    engine = make_engine(store=open_store(), block_size=8)
    logits_after(engine, PROMPT)
    assert engine.computed_tokens == len(PROMPT)


def test_a_folder_whose_values_claim_another_identity_is_a_miss(
    make_engine: Make, open_store: Open, warm_disk: list[int], fresh_logits: Any
) -> None:
    """As if two precisions had the same names: the values themselves are refused too."""
    store = open_store()
    blocks = store.env.tables["blocks"]
    with store.env.writing() as txn:
        for key, value in [(bytes(k), bytes(v)) for k, v in txn.cursor(blocks)]:
            from recollect.kv.record import pack_block

            other = Identity("", "reference-1", "f16").digest()
            txn.put(key, pack_block(key, other, 4, value[56:], None), db=blocks)
    engine = make_engine(store=store)
    assert np.array_equal(logits_after(engine, PROMPT), fresh_logits(PROMPT))
    assert tier_of(engine).statistics().misses == {"identity": 1}
    assert engine.computed_tokens == len(PROMPT)


@pytest.mark.parametrize("bits", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_flipped_bits_change_no_reply(
    make_engine: Make, open_store: Open, warm_disk: list[int], fresh_logits: Any, bits: int
) -> None:
    """A sample from end to end; that every bit of a value is checked, `test_record` tries out."""
    expected = fresh_logits(warm_disk)
    random_bits = random.Random(20)  # noqa: S311 - which bit, not a secret
    witness = open_store()  # keeps the folder open between engines
    for _ in range(bits):
        table = witness.env.tables[random_bits.choice(["blocks", "entries"])]
        with witness.env.writing() as txn:
            key, value = random_bits.choice(
                [(bytes(k), bytearray(v)) for k, v in txn.cursor(table)]
            )
            bit = random_bits.randrange(len(value) * 8)
            value[bit // 8] ^= 1 << bit % 8
            txn.put(key, bytes(value), db=table)
        engine = make_engine(store=open_store())
        assert np.array_equal(logits_after(engine, warm_disk), expected)
        assert sum(tier_of(engine).statistics().misses.values()) >= 1
        assert engine.computed_tokens > 1
        engine.close()  # writes what was computed anew
        assert list(witness.problems()) == []
    witness.close()


@pytest.mark.slow
def test_truncated_and_swapped_values_are_misses(
    make_engine: Make, open_store: Open, warm_disk: list[int], fresh_logits: Any
) -> None:
    witness = open_store()
    expected = fresh_logits(warm_disk)
    for table_name in ("blocks", "entries"):
        for kind in ("truncated", "empty", "swapped", "longer"):
            table = witness.env.tables[table_name]
            with witness.env.writing() as txn:
                items = [(bytes(k), bytes(v)) for k, v in txn.cursor(table)]
                (key, value), (other_key, other) = items[2], items[-1]
                match kind:
                    case "truncated":
                        txn.put(key, value[: len(value) // 2], db=table)
                    case "empty":
                        txn.put(key, b"", db=table)
                    case "longer":
                        txn.put(key, value + b"\0", db=table)
                    case "swapped":
                        txn.put(key, other, db=table)
                        txn.put(other_key, value, db=table)
            engine = make_engine(store=open_store())
            assert np.array_equal(logits_after(engine, warm_disk), expected), (table_name, kind)
            assert sum(tier_of(engine).statistics().misses.values()) >= 1, (table_name, kind)
            engine.close()
            assert list(witness.problems()) == [], (table_name, kind)
    witness.close()


@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_a_restore_that_fails_half_way_leaves_the_engine_as_it_was(
    make_engine: Make,
    open_store: Open,
    warm_disk: list[int],
    fresh_logits: Any,
    faults: Any,
    caplog: pytest.LogCaptureFixture,
    at: int,
) -> None:
    engine = make_engine(store=open_store())
    engine.wait_until_warm()
    faults.write_in = at
    with caplog.at_level(logging.WARNING, logger="recollect"):
        assert np.array_equal(logits_after(engine, PROMPT), fresh_logits(PROMPT))
    assert engine.computed_tokens == len(PROMPT)
    assert engine.pool.used_blocks == len(engine.cache)
    engine.check()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert tier_of(engine).statistics().misses == {"store": 1}


def test_a_full_disk_turns_the_tier_off_with_one_warning(
    make_engine: Make,
    open_store: Open,
    fresh_logits: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(store=open_store())
    monkeypatch.setattr("recollect.kv.disk.RESERVED_BYTES", 1 << 60)
    with caplog.at_level(logging.WARNING, logger="recollect"):
        for start in range(4):
            prompt = PROMPT[start:]
            assert np.array_equal(logits_after(engine, prompt), fresh_logits(prompt))
            tier_of(engine).flush()
    assert len(caplog.records) == 1
    assert "make room" in caplog.text
    assert "make room" in (tier_of(engine).statistics().error or "")
    engine.check()


def test_branches_over_one_trunk_take_the_disk_of_the_trunk_once(
    make_engine: Make, open_store: Open
) -> None:
    engine = make_engine(store=open_store(), num_blocks=128)
    for branch in range(20):
        logits_after(engine, [*PROMPT[:28], branch])
    tier_of(engine).flush()
    holding = tier_of(engine).store.holdings()[0]
    assert holding.blocks == 7 + 20
    assert holding.tokens == 28 + 20


def test_a_prompt_is_restored_between_the_tokens_of_another(
    make_engine: Make, open_store: Open, warm_disk: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long restore is cut into steps, and the other's tokens come between them."""
    monkeypatch.setattr("recollect.engine.tier.FIRST_BLOCKS", 1)
    monkeypatch.setattr("recollect.engine.tier.MOST_RESTORE_S", 0.0)
    engine = make_engine(store=open_store())
    one, two = engine.new_sequence(), engine.new_sequence()
    one.append([49, 48, 47])
    two.append(warm_disk)
    engine.compute([one, two])
    assert two.fed_tokens == 1
    assert tier_of(engine).statistics().restored_tokens == len(warm_disk) - 1
    engine.check()


def test_what_is_kept_on_purpose_is_there(make_engine: Make, open_store: Open) -> None:
    engine = make_engine(store=open_store())
    logits_after(engine, PROMPT)
    match = pin(engine, PROMPT)
    tier_of(engine).keep(match[-1])
    assert all(block.on_disk for block in match[-1].path())


def entries(count: int, last: int = 4) -> Found:
    made = [
        Entry(bytes([n]), b"", b"", (0,) * (last if n == count - 1 else 4), 0.0, 0)
        for n in range(count)
    ]
    return Found(made, last if count else 0)


@pytest.mark.parametrize(
    ("found", "have", "rates", "room", "most_s", "expected"),
    [
        (entries(0), 0, Rates(), 9, None, (0, True)),
        (entries(3), 0, Rates(), 9, None, (3, True)),
        (entries(1, last=2), 2, Rates(), 9, None, (0, True)),  # memory has as much
        (entries(1, last=3), 2, Rates(), 9, None, (1, True)),
        (entries(3), 0, Rates(), 2, None, (2, True)),  # no room for more
        (entries(3), 0, Rates(), 0, None, (0, True)),
        (entries(3), 0, Rates(0.1, 0.1), 9, None, (3, True)),
        (entries(3), 0, Rates(0.9, 0.1), 9, None, (1, True)),  # computing is faster
        (entries(30), 0, Rates(0.01, 0.1), 99, 0.05, (5, False)),  # others wait
        (entries(30), 0, Rates(), 99, 0.05, (8, False)),  # and nothing is known
        (entries(3), 0, Rates(9.0, 9.0), 9, 0.05, (1, False)),
    ],
)
def test_what_is_read_is_decided_by_gain_room_and_time(
    found: Found,
    have: int,
    rates: Rates,
    room: int,
    most_s: float | None,
    expected: tuple[int, bool],
) -> None:
    plan = plan_restore(found, have=have, block_size=4, rates=rates, room=room, most_s=most_s)
    assert (len(plan.entries), plan.is_all) == expected
    assert plan.entries == found.entries[: len(plan.entries)]


def test_bytes_are_counted_and_nothing_is_written_twice(
    make_engine: Make, open_store: Open, warm_disk: list[int]
) -> None:
    engine = make_engine(store=open_store())
    logits_after(engine, warm_disk[:-1])
    tier_of(engine).flush()
    assert tier_of(engine).statistics().written_blocks == 0
    logits_after(engine, [*warm_disk, 1, 2, 3, 4])
    tier_of(engine).flush()
    statistics = tier_of(engine).statistics()
    assert statistics.written_blocks == 2
    assert statistics.written_bytes > 0


def test_an_engine_that_fails_to_restore_once_still_serves_memory(
    make_engine: Make, open_store: Open, warm_disk: list[int], faults: Any
) -> None:
    engine = make_engine(store=open_store())
    engine.wait_until_warm()
    faults.write_in, faults.error = 0, RuntimeFailure
    logits_after(engine, PROMPT[:9])
    before = engine.computed_tokens
    logits_after(engine, PROMPT)
    assert engine.computed_tokens - before == 1, "and tries the disk again"


def test_a_store_that_cannot_be_read_is_done_without(
    make_engine: Make,
    open_store: Open,
    warm_disk: list[int],
    fresh_logits: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(store=open_store())

    def unreadable(*_: object, **__: object) -> Found:
        raise StoreCorruptError("The KV store is damaged: clear it.")

    monkeypatch.setattr(DiskStore, "find", unreadable)
    with caplog.at_level(logging.WARNING, logger="recollect"):
        for length in (9, 20, 30):
            ids = PROMPT[:length]
            assert np.array_equal(logits_after(engine, ids), fresh_logits(ids))
    assert len(caplog.records) == 1
    assert tier_of(engine).statistics().misses == {"store": 1}
    assert "damaged" in (tier_of(engine).statistics().error or "")


def test_memory_that_is_made_ready_holds_nothing_that_counts(
    make_engine: Make, open_store: Open, warm_disk: list[int], fresh_logits: Any
) -> None:
    engine = make_engine(store=open_store())
    engine.wait_until_warm()
    assert (engine.pool.used_blocks, len(engine.cache), engine.computed_tokens) == (0, 0, 0)
    assert np.array_equal(logits_after(engine, warm_disk), fresh_logits(warm_disk))
    assert engine.computed_tokens == 1
    engine.check()


def test_a_disk_that_has_room_again_is_written_again(
    make_engine: Make,
    open_store: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(store=open_store())
    monkeypatch.setattr("recollect.engine.write_behind.RETRY_S", 0.0)
    with caplog.at_level(logging.WARNING, logger="recollect"):
        with monkeypatch.context() as full:
            full.setattr("recollect.kv.disk.RESERVED_BYTES", 1 << 60)
            for start in range(3):
                logits_after(engine, PROMPT[start:])
                tier_of(engine).flush()
            assert "make room" in (tier_of(engine).statistics().error or "")
        logits_after(engine, [*PROMPT, 1, 2, 3])
        tier_of(engine).flush()
    assert tier_of(engine).statistics().error is None
    assert len(caplog.records) == 1
    match = pin(engine, PROMPT)
    assert all(block.on_disk for block in match[-1].path()), "and what came before it, too"
    unpin(engine, match)


def test_what_is_kept_on_purpose_is_tried_although_the_disk_was_full(
    make_engine: Make, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(store=open_store())
    with monkeypatch.context() as full:
        full.setattr("recollect.kv.disk.RESERVED_BYTES", 1 << 60)
        logits_after(engine, PROMPT)
        tier_of(engine).flush()
        match = pin(engine, PROMPT)
        with pytest.raises(StoreFullError, match="make room"):
            tier_of(engine).keep(match[-1])
    tier_of(engine).keep(match[-1])
    assert all(block.on_disk for block in match[-1].path())


@pytest.mark.slow
def test_a_small_budget_holds_what_it_can(
    make_engine: Make, open_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Much less than is written at once where there is room, and less than all of it."""
    engine = make_engine(store=open_store(budget_bytes=1 << 20), num_blocks=400, context_length=900)
    with caplog.at_level(logging.WARNING, logger="recollect"):
        for first in range(4):
            logits_after(engine, [first, *(place % 50 for place in range(600))])
            tier_of(engine).flush()
    statistics = tier_of(engine).statistics()
    assert (statistics.error, caplog.records) == (None, [])
    assert statistics.evicted_blocks > 0
    engine.close()
    engine = make_engine(store=open_store(budget_bytes=1 << 20), num_blocks=400, context_length=900)
    logits_after(engine, [3, *(place % 50 for place in range(600))])
    assert engine.computed_tokens == 1, "the last one is there"


def test_a_prompt_larger_than_the_budget_keeps_its_beginning(
    make_engine: Make, open_store: Open, fresh_logits: Any
) -> None:
    prompt = [place * 7 % 50 for place in range(1600)]
    engine = make_engine(
        store=open_store(budget_bytes=1 << 20), num_blocks=500, context_length=2000
    )
    logits_after(engine, prompt)
    engine.close()
    engine = make_engine(
        store=open_store(budget_bytes=1 << 20), num_blocks=500, context_length=2000
    )
    assert np.array_equal(logits_after(engine, prompt), fresh_logits(prompt))
    assert 500 <= tier_of(engine).statistics().restored_tokens < 1000
    engine.check()


def test_a_store_that_cannot_be_written_is_read(
    make_engine: Make,
    open_store: Open,
    warm_disk: list[int],
    read_only_disk: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_only_disk()
    with caplog.at_level(logging.WARNING, logger="recollect"):
        engine = make_engine(store=open_store())
        logits_after(engine, [*warm_disk, 3, 4])
        tier_of(engine).flush()
        assert engine.computed_tokens == 3
        tier_of(engine).writer.note_reply(b"name".ljust(32), StoredReply("text", (1, 2)))
        engine.check()
        engine.close()
    assert len(caplog.records) == 1
    assert "can be read and not written" in caplog.text


@pytest.mark.slow
def test_flushes_wait_and_do_not_wake_each_other(
    make_engine: Make, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(store=open_store())
    logits_after(engine, PROMPT)
    may_write, is_writing = threading.Event(), threading.Event()
    write = DiskStore.write

    def slow(self: DiskStore, *given: Any, **options: Any) -> Any:
        is_writing.set()
        assert may_write.wait(30)
        return write(self, *given, **options)

    waits: list[str] = []
    wait = threading.Condition.wait

    def counted(self: threading.Condition, timeout: float | None = None) -> bool:
        if threading.current_thread().name.startswith("flush"):
            waits.append(threading.current_thread().name)
        return wait(self, timeout)

    monkeypatch.setattr(DiskStore, "write", slow)
    monkeypatch.setattr(threading.Condition, "wait", counted)
    flushes = [
        threading.Thread(target=tier_of(engine).flush, name=f"flush {number}")
        for number in range(2)
    ]
    for thread in flushes:
        thread.start()
    assert is_writing.wait(30)
    flushes[0].join(0.3)  # both wait now, and would have woken each other thousands of times
    may_write.set()
    for thread in flushes:
        thread.join()
    assert len(waits) < 10


@pytest.mark.slow
def test_a_conversation_of_64000_tokens_comes_back_from_disk_also_after_damage(
    make_engine: Make, open_store: Open
) -> None:
    prompt = [place * place % 50 for place in range(64_000)]
    options = {"num_blocks": 2100, "block_size": 32, "context_length": 65_000}
    first = make_engine(store=open_store(), **options)
    expected = logits_after(first, prompt)
    first.close()
    witness = open_store()
    damaged = witness.find(
        first.cache.root().key, prompt, block_size=32, inside_block=False, most=3
    ).entries[-1]
    table = witness.env.tables["blocks"]
    with witness.env.writing() as txn:
        value = bytearray(txn.get(damaged.key, db=table))
        value[-1] ^= 1
        txn.put(damaged.key, bytes(value), db=table)
    second = make_engine(store=open_store(), **options)
    assert np.array_equal(logits_after(second, prompt), expected)
    assert second.computed_tokens == 64_000 - 2 * 32
    second.close()
    assert list(witness.problems()) == []
    witness.close()
    third = make_engine(store=open_store(), **options)
    assert np.array_equal(logits_after(third, prompt), expected)
    assert third.computed_tokens == 1
    third.check()

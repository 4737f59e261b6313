"""Claims about `proof/verify.py`: it passes what is right, and finds a single token without KV."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import recollect
from recollect.engine import sequence as sequence_module
from recollect.engine.engine import Engine
from recollect.engine.sequence import Sequence
from recollect.errors import ConfigError
from recollect.kv.disk import DiskStore
from recollect.proof.verify import EXACT_LIMIT, verify
from recollect.runtime.base import Reuse


@pytest.fixture
def model(tmp_path: Path) -> Iterator[recollect.Model]:
    with recollect.load("reference", profile="exact", home=tmp_path, kv_disk=0) as loaded:
        yield loaded


@pytest.mark.slow
def test_what_is_right_passes_without_any_difference(model: recollect.Model) -> None:
    report = verify(model, operations=150)
    assert report.passed
    assert report.largest.logits == 0
    assert sum(report.counts.values()) == 150
    assert set(report.counts) == {
        "append", "fork", "generate", "regenerate", "rewind", "stop", "together",
    }  # fmt: skip


@pytest.mark.slow
def test_with_a_disk_it_restores_too(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv", budget_bytes=64 << 20)
    with recollect.load("reference", profile="exact", home=tmp_path, store=store) as loaded:
        report = verify(loaded, operations=150)
    assert report.passed
    assert report.largest.logits == 0
    assert report.counts["restore"] > 5
    assert report.restored_tokens > 500


@pytest.mark.slow
def test_a_disk_that_gives_wrong_kv_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of each block is wrong, and no checksum would tell."""

    def wrong(_key: bytes, _id: bytes, _n: int, stored: memoryview, _: object) -> bytes:
        payload = bytearray(stored[-1024:])
        payload[16] ^= 1
        return bytes(payload)

    monkeypatch.setattr("recollect.kv.disk.unpack_block", wrong)
    store = DiskStore(tmp_path / "kv", budget_bytes=64 << 20)
    with recollect.load("reference", profile="exact", home=tmp_path, store=store) as loaded:
        report = verify(loaded, operations=60)
    assert report.restored_tokens > 0
    assert not report.passed


@pytest.mark.slow
def test_one_token_without_kv_fails(model: recollect.Model, plant_hole: Callable[[], None]) -> None:
    plant_hole()
    report = verify(model, operations=60)
    assert not report.passed
    assert report.largest.logits > 1000 * EXACT_LIMIT


@pytest.mark.slow
def test_the_same_seed_gives_the_same_operations(model: recollect.Model) -> None:
    first, second = (verify(model, operations=40, seed=3) for _ in range(2))
    assert first.counts == second.counts
    assert verify(model, operations=40, seed=4).counts != first.counts


@pytest.mark.slow
def test_it_leaves_no_sequence_behind(model: recollect.Model) -> None:
    verify(model, operations=30)
    model.engine.check()
    assert model.engine.pool.used_blocks == len(model.engine.cache)


def test_no_operations_prove_nothing(model: recollect.Model) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        verify(model, operations=0)


@pytest.mark.parametrize("context", [1, 2, 3, 12, 25, 47])
def test_a_context_that_is_too_short_is_refused_in_a_sentence(
    context: int, model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "context_length", context)
    with pytest.raises(ConfigError, match="too short"):
        verify(model, operations=10)


@pytest.mark.slow
def test_a_context_of_48_tokens_is_long_enough(
    model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "context_length", 48)
    report = verify(model, operations=150, seed=1)
    assert report.passed
    assert report.largest.logits == 0


Spoil = Callable[[float, Callable[[Sequence], bool]], None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Have a number added to the logits of those computed sequences of which a condition is true."""
    compute = Engine.compute

    def begin(by: float, is_wrong: Callable[[Sequence], bool]) -> None:
        def wrong(engine: Engine, sequences: list[Sequence]) -> None:
            compute(engine, sequences)
            for one in filter(is_wrong, sequences):
                assert one.logits is not None
                one.logits = one.logits + np.float32(by)

        monkeypatch.setattr(Engine, "compute", wrong)

    return begin


def reuses(sequence: Sequence) -> bool:
    """Return whether it is none of those that the proof compares with."""
    return sequence.namespace is not None


def at(
    model: recollect.Model,
    monkeypatch: pytest.MonkeyPatch,
    *,
    context: int,
    windows: tuple[int, ...] = (),
) -> None:
    monkeypatch.setattr(type(model), "context_length", context)
    monkeypatch.setattr(model, "local", replace(model.local, boundaries=windows))


@pytest.mark.slow
def test_what_is_no_number_fails_whatever_comes_after_it(
    model: recollect.Model, spoil: Spoil
) -> None:
    """Every comparison with NaN is false, so that it is easily taken for no difference."""
    first = iter([True])
    spoil(math.nan, lambda one: reuses(one) and next(first, False))
    report = verify(model, operations=20)
    assert not report.passed
    assert report.largest.logits == math.inf


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("context", "windows", "first_wrong", "found", "by"),
    [
        (600, (500,), 501, 500, 1.0),
        (600, (500,), 600, 600, 1.0),
        (600, (500,), 501, 500, math.nan),
        (48, (), 48, 48, 1.0),
        (300, (), 300, 300, 1.0),
    ],
    ids=["beyond a window", "last token", "no number", "last of 48", "last of 300"],
)
def test_a_fault_at_a_boundary_fails(
    context: int,
    windows: tuple[int, ...],
    first_wrong: int,
    found: int,
    by: float,
    model: recollect.Model,
    spoil: Spoil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at(model, monkeypatch, context=context, windows=windows)
    spoil(by, lambda one: reuses(one) and len(one) >= first_wrong)
    report = verify(model, operations=3)
    assert not report.passed
    assert (report.largest.name, report.largest.tokens) == ("boundary", found)


@pytest.mark.parametrize("window", [599, 598, 597])
def test_a_window_just_below_the_context_is_looked_at(
    window: int, model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing goes beyond the context, which the runtime would refuse."""
    at(model, monkeypatch, context=600, windows=(window,))
    compute, longest = Engine.compute, 0

    def measured(engine: Engine, sequences: list[Sequence]) -> None:
        nonlocal longest
        compute(engine, sequences)
        longest = max(longest, *map(len, sequences))

    monkeypatch.setattr(Engine, "compute", measured)
    report = verify(model, operations=1)
    assert report.passed
    assert [around.difference for around in report.boundaries] == [0.0, 0.0]
    assert longest == 600


@pytest.mark.slow
def test_a_hole_only_after_a_rewind_across_a_boundary_fails(
    model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(model, monkeypatch, context=600, windows=(500,))
    plan_feed = sequence_module.plan_feed

    def with_hole(length: int, computed: int, reuse: Reuse) -> sequence_module.FeedPlan:
        plan = plan_feed(length, computed, reuse)
        is_there = 490 <= plan.start < 500 < plan.end
        return replace(plan, start=plan.start + 1) if is_there else plan

    monkeypatch.setattr(sequence_module, "plan_feed", with_hole)
    report = verify(model, operations=3)
    assert not report.passed
    assert report.largest.tokens == 500


def test_what_takes_too_long_is_left_out_before_it_does(model: recollect.Model) -> None:
    report = verify(model, operations=1, boundary_s=0)
    assert report.passed
    (end,) = report.boundaries
    assert (end.tokens, end.difference) == (8192, None)
    assert "--long" in end.left_out
    assert report.computed_tokens < 8192 / 4


def test_a_context_that_memory_does_not_hold_twice_is_left_out(tmp_path: Path) -> None:
    """And what else was found is not lost."""
    with recollect.load(
        "reference", profile="exact", home=tmp_path, kv_disk=0, kv_memory=200_000
    ) as small:
        report = verify(small, operations=5)
    assert report.passed
    (end,) = report.boundaries
    assert (end.tokens, end.difference) == (8192, None)
    assert "--kv-memory" in end.left_out


@pytest.mark.slow
def test_noise_excuses_no_more_than_its_cap(tmp_path: Path, spoil: Spoil) -> None:
    """Where tokens one by one are as wrong as what is reused, the noise control is wrong, too."""
    seen: set[Sequence] = set()

    def is_reused_or_single(one: Sequence) -> bool:
        known = one in seen
        seen.add(one)
        return reuses(one) or known

    with recollect.load("reference", profile="fast", home=tmp_path, kv_disk=0) as loaded:
        spoil(5.0, is_reused_or_single)
        report = verify(loaded, operations=10)
    assert report.noise == pytest.approx(5, abs=0.1)
    assert report.limit < 3
    assert not report.passed


def test_a_tokenizer_that_makes_nothing_is_named(
    model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.tokenizer), "encode", lambda *_, **__: [])
    with pytest.raises(ConfigError, match="no tokens"):
        verify(model, operations=1)

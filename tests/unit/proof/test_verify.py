"""Claims about `proof/verify.py`: it passes what is right, and finds a single token without KV."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import recollect
from recollect.errors import ConfigError
from recollect.kv.disk import DiskStore
from recollect.proof.verify import EXACT_LIMIT, verify


@pytest.fixture
def model(tmp_path: Path) -> Iterator[recollect.Model]:
    with recollect.load("reference", profile="exact", home=tmp_path, kv_disk=0) as loaded:
        yield loaded


def test_what_is_right_passes_without_any_difference(model: recollect.Model) -> None:
    report = verify(model, operations=150)
    assert report.passed
    assert report.largest.logits == 0
    assert sum(report.counts.values()) == 150
    assert set(report.counts) == {
        "append", "fork", "generate", "regenerate", "rewind", "stop", "together",
    }  # fmt: skip


def test_with_a_disk_it_restores_too(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv", budget_bytes=64 << 20)
    with recollect.load("reference", profile="exact", home=tmp_path, store=store) as loaded:
        report = verify(loaded, operations=150)
    assert report.passed
    assert report.largest.logits == 0
    assert report.counts["restore"] > 5
    assert report.restored_tokens > 500


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


def test_one_token_without_kv_fails(model: recollect.Model, plant_hole: Callable[[], None]) -> None:
    plant_hole()
    report = verify(model, operations=60)
    assert not report.passed
    assert report.largest.logits > 1000 * EXACT_LIMIT


def test_the_same_seed_gives_the_same_operations(model: recollect.Model) -> None:
    first, second = (verify(model, operations=40, seed=3) for _ in range(2))
    assert first.counts == second.counts
    assert verify(model, operations=40, seed=4).counts != first.counts


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


def test_a_context_of_48_tokens_is_long_enough(
    model: recollect.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "context_length", 48)
    report = verify(model, operations=150, seed=1)
    assert report.passed
    assert report.largest.logits == 0

"""The proof on the real model: reuse is right to 1e-3, and one token without KV is not."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import recollect
from recollect.kv.disk import DiskStore
from recollect.proof.verify import EXACT_LIMIT, verify

pytestmark = pytest.mark.model
MODEL = os.environ.get("RECOLLECT_TEST_MODEL", "smollm2")


@pytest.fixture
def model(tmp_path: Path) -> Iterator[recollect.Model]:
    """One for each test: what a hole spoils stays in the prefix cache, and on disk."""
    store = DiskStore(tmp_path / "kv", budget_bytes=1 << 30)
    with recollect.load(MODEL, profile="exact", store=store) as loaded:
        yield loaded


def test_random_conversations_equal_a_fresh_prefill(model: recollect.Model) -> None:
    report = verify(model, operations=30, seed=7, boundary_s=1)  # `.ci/run` looks at that, too
    assert report.passed
    assert report.largest.logits < EXACT_LIMIT / 2
    assert report.restored_tokens > 100


def test_a_hole_of_one_token_fails(model: recollect.Model, plant_hole: Callable[[], None]) -> None:
    plant_hole()
    report = verify(model, operations=14, seed=7, boundary_s=1)
    assert not report.passed
    assert report.largest.logits > 10 * EXACT_LIMIT

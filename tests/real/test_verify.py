"""The proof on the real model: reuse is right to 1e-3, and one token without KV is not."""

import os
from collections.abc import Iterator

import pytest

import recollect
from recollect.engine.sequence import Sequence
from recollect.proof.verify import EXACT_LIMIT, verify

pytestmark = pytest.mark.model
MODEL = os.environ.get("RECOLLECT_TEST_MODEL", "smollm2")


@pytest.fixture(scope="module")
def model() -> Iterator[recollect.Model]:
    with recollect.load(MODEL, profile="exact") as loaded:
        yield loaded


def test_random_conversations_equal_a_fresh_prefill(model: recollect.Model) -> None:
    report = verify(model, operations=30, seed=7)
    assert report.passed
    assert report.largest.logits < EXACT_LIMIT / 2


def test_a_hole_of_one_token_fails(model: recollect.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Sequence.append

    def append_after_a_hole(self: Sequence, token_ids: list[int]) -> None:
        pending = len(self) - 1
        was_pending = len(token_ids) > 1 and 0 < self.computed == pending
        append(self, token_ids)
        if was_pending:
            self.kv.prepare_write(pending, pending + 1)
            self.kv.written(self.tokens(0), pending + 1)

    monkeypatch.setattr(Sequence, "append", append_after_a_hole)
    report = verify(model, operations=14, seed=7)
    assert not report.passed
    assert report.largest.logits > 10 * EXACT_LIMIT

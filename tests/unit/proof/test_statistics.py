"""What a list of measurements comes to."""

import pytest

from recollect.proof.bench import summarize


def test_summarizes_known_samples() -> None:
    summary = summarize([4.0, 1.0, 2.0, 9.0])
    assert (summary.count, summary.mean, summary.median) == (4, 4.0, 3.0)
    assert (summary.minimum, summary.maximum) == (1.0, 9.0)
    assert summary.stdev == pytest.approx((38 / 3) ** 0.5)


def test_a_single_sample_has_no_spread() -> None:
    assert summarize([2.5]).stdev == 0.0


def test_nothing_cannot_be_summarized() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize([])

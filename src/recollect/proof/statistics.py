"""
What a list of measurements comes to.

Pure: no clock, no model.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Samples of one quantity, in its own unit."""

    count: int
    mean: float
    median: float
    stdev: float
    """Of the sample; 0 for a single one."""
    minimum: float
    maximum: float


def summarize(samples: Sequence[float]) -> Summary:
    """
    Return mean, median and spread of at least one sample.

    Raises:
        ValueError: There is none.
    """
    if not samples:
        raise ValueError("there are no samples to summarize")
    return Summary(
        count=len(samples),
        mean=statistics.fmean(samples),
        median=statistics.median(samples),
        stdev=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        minimum=min(samples),
        maximum=max(samples),
    )

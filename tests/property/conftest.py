"""How the machines look for planted faults: the same way every time, without shrinking."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings


@pytest.fixture
def fault_search() -> Callable[[int], settings]:
    """Return a maker of settings that try that many examples and stop at the first failure."""

    def make(max_examples: int) -> settings:
        return settings(
            max_examples=max_examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )

    return make

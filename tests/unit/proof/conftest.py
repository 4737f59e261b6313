"""Results of a benchmark with known numbers."""

from collections.abc import Callable

import pytest

from recollect.proof.bench import Case, Iteration, ResponseSample


@pytest.fixture
def response() -> Callable[..., ResponseSample]:
    """Return a maker of responses with a known time."""

    def make(ttft_s: float, decode_s: float = 1.0, *, reused: int = 0) -> ResponseSample:
        return ResponseSample(
            prompt_tokens=100,
            reused_tokens=reused,
            computed_tokens=100 - reused,
            generated_tokens=10,
            ttft_s=ttft_s,
            decode_s=decode_s,
            energy_j=None,
        )

    return make


@pytest.fixture
def iteration(response: Callable[..., ResponseSample]) -> Callable[..., Iteration]:
    """Return a maker of iterations: first-token times of response 2, and the ideal."""

    def make(without_s: float, reuse_s: float, ideal_s: float) -> Iteration:
        return Iteration(
            without=Case(response(2.0), response(without_s)),
            reuse=Case(response(2.0), response(reuse_s, reused=90)),
            ideal_tokens=90,
            ideal_s=ideal_s,
            reuse_went_first=False,
        )

    return make

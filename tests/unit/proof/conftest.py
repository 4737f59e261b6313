"""A fault to plant, and results of a benchmark with known numbers."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from recollect.engine import sequence
from recollect.proof.bench import Case, Iteration
from recollect.proof.timing import ResponseSample

PlanFeed = Callable[..., sequence.FeedPlan]


@pytest.fixture
def plant_hole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """
    Return a switch after which every prompt that is appended to KV leaves out its first token.

    The fault of the best-known implementation, whose own rewind test passes with it.
    """
    plan_feed: PlanFeed = sequence.plan_feed

    def with_hole(length: int, computed: int, *, keep_multiple_of: int = 1) -> sequence.FeedPlan:
        plan = plan_feed(length, computed, keep_multiple_of=keep_multiple_of)
        if plan.start > 0 and plan.end - plan.start > 1:
            plan = replace(plan, start=plan.start + 1)
        return plan

    return lambda: monkeypatch.setattr(sequence, "plan_feed", with_hole)


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

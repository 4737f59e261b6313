"""`verify --engine`: passes what is right, and sees what is not."""

from collections.abc import Callable
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.proof.elsewhere import apart, verify_elsewhere
from recollect.types import TokenLogprob

MakeStub = Callable[..., tuple[Any, str]]


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["vllm", "llama"])
def test_right_reuse_passes(kind: str, make_stub: MakeStub, load: Callable[..., Model]) -> None:
    report = verify_elsewhere(load(f"{kind}={make_stub(kind)[1]}"), operations=12)
    assert report.passed
    assert (report.largest, report.noise, report.different_replies) == (0.0, 0.0, 0)
    assert report.reused_tokens > 1000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vllm", "llama"])
def test_reuse_of_other_kv_fails(
    kind: str, make_stub: MakeStub, load: Callable[..., Model]
) -> None:
    """An engine whose replies depend on what it had in its cache."""
    stub, url = make_stub(kind)
    model = load(f"{kind}={url}")
    stub.spoils_reuse = True
    report = verify_elsewhere(model, operations=12)
    assert not report.passed
    assert report.different_replies > 0


def test_rounding_by_the_length_of_passes_is_measured_and_allowed(
    make_stub: MakeStub, load: Callable[..., Model]
) -> None:
    """As quantized weights do it: a prompt computed anew twice is equal, and reuse is not."""
    stub, url = make_stub("llama")
    model = load(f"llama={url}")
    stub.rounds = 0.3
    report = verify_elsewhere(model, operations=12)
    assert report.passed
    assert 0.1 < report.largest <= report.limit
    assert 0.2 < report.noise <= 0.3


def test_rounding_excuses_no_reuse_of_other_kv(
    make_stub: MakeStub, load: Callable[..., Model]
) -> None:
    stub, url = make_stub("llama")
    model = load(f"llama={url}")
    stub.rounds, stub.spoils_reuse = 0.3, True
    report = verify_elsewhere(model, operations=12)
    assert not report.passed
    assert report.noise <= 0.3 < report.limit < report.largest


def test_the_limit_has_a_cap(make_stub: MakeStub, load: Callable[..., Model]) -> None:
    """An engine that is off by so much when it generates proves nothing by being so again."""
    stub, url = make_stub("llama")
    model = load(f"llama={url}")
    stub.rounds = 20.0
    report = verify_elsewhere(model, operations=12)
    assert report.limit == 2.0
    assert not report.passed


def test_what_was_to_be_computed_anew_and_was_reused_proves_nothing(
    make_stub: MakeStub, load: Callable[..., Model]
) -> None:
    stub, url = make_stub("llama")
    model = load(f"llama={url}")
    stub.reuses_always = True
    report = verify_elsewhere(model, operations=12)
    assert report.found_anew > 0
    assert not report.passed


def test_likely_tokens_that_the_other_reply_does_not_name_are_far_from_it() -> None:
    """Replies whose likeliest tokens have nothing in common differ, though no token can be compared."""
    tops = [
        tuple(TokenLogprob(first + n, b"", -0.1 - n) for n in range(20)) for first in (0, 20, 1)
    ]
    one, other, near = (TokenLogprob(top[0].token_id, b"", -0.1, top) for top in tops)
    same, far = apart([one], [other])
    assert not same
    assert far == pytest.approx(19.0)
    assert apart([one], [one]) == (True, 0.0)
    assert apart([one], [near])[1] == pytest.approx(19.0)


@pytest.mark.slow
def test_an_engine_that_reuses_nothing_fails(
    make_stub: MakeStub, load: Callable[..., Model]
) -> None:
    stub, url = make_stub()
    model = load(f"vllm={url}")
    stub.tells_cached = False
    assert not verify_elsewhere(model, operations=3).passed

"""`verify --engine`: passes what is right, and sees what is not."""

from collections.abc import Callable
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.proof.elsewhere import verify_elsewhere

MakeStub = Callable[..., tuple[Any, str]]


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["vllm", "llama"])
def test_right_reuse_passes(kind: str, make_stub: MakeStub, load: Callable[..., Model]) -> None:
    report = verify_elsewhere(load(f"{kind}={make_stub(kind)[1]}"), operations=12)
    assert report.passed
    assert (report.largest, report.noise, report.different_replies) == (0.0, 0.0, 0)
    assert report.reused_tokens > 1000


@pytest.mark.slow
def test_reuse_of_other_kv_fails(make_stub: MakeStub, load: Callable[..., Model]) -> None:
    """An engine whose replies depend on what it had in its cache."""
    stub, url = make_stub()
    model = load(f"vllm={url}")
    stub.spoils_reuse = True
    report = verify_elsewhere(model, operations=12)
    assert not report.passed
    assert report.different_replies > 0


@pytest.mark.slow
def test_an_engine_that_reuses_nothing_fails(
    make_stub: MakeStub, load: Callable[..., Model]
) -> None:
    stub, url = make_stub()
    model = load(f"vllm={url}")
    stub.tells_cached = False
    assert not verify_elsewhere(model, operations=3).passed

"""What long use computes on an engine elsewhere, and what the same engine computes for a client of texts."""

from collections.abc import Callable
from typing import Any

import pytest

from recollect.conversation.model import Model
from recollect.types import SamplingParams
from resending import Comparison, TextClient, compare
from traces import TRACES, Trace

BLOCK = 16
INSTRUCTIONS = 320
"""Tokens before the first message: where that is edited, another conversation begins, maybe elsewhere."""
PARAMS = SamplingParams(max_tokens=24)
EDITS, AGENT = TRACES[1], TRACES[4]
MakeStub = Callable[..., tuple[Any, str]]
Load = Callable[..., Model]


def held(
    trace: Trace, make_stub: MakeStub, load: Load, *, replicas: int = 1, halves: bool = False
) -> Comparison:
    stubs = [make_stub(context=1 << 15, says_halves=halves) for _ in range(replicas)]
    urls = [url for _, url in stubs]
    model = load(f"vllm={','.join(urls)}")
    client = TextClient(urls, model.tokenizer, model.context_length, "stub")
    return compare(model, client, trace, PARAMS, lambda: sum(stub.computed for stub, _ in stubs))


@pytest.mark.slow
@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_nothing_is_lost_but_blocks_that_are_not_whole(
    trace: Trace, make_stub: MakeStub, load: Load
) -> None:
    """Where texts give the same ids again, both have the same computed, and one of them waits for less."""
    found = held(trace, make_stub, load)
    assert found.front_lost_tokens == 0
    assert found.front_awaited_tokens < found.alone_computed_tokens
    # What was read ahead and taken back may be found again later.
    assert found.front_computed_tokens <= found.alone_computed_tokens
    assert found.alone_computed_tokens <= found.front_computed_tokens + found.front_unused_tokens
    assert 0 <= found.front_unused_tokens <= BLOCK * found.requests


@pytest.mark.slow
@pytest.mark.parametrize("trace", [EDITS, AGENT], ids=lambda trace: trace.name)
def test_edits_and_branches_cost_less_than_where_texts_are_sent_again(
    trace: Trace, make_stub: MakeStub, load: Load
) -> None:
    """A client of texts has replies that no text gives again computed again, wherever it goes on."""
    found = held(trace, make_stub, load, halves=True)
    assert found.front_lost_tokens == 0
    assert found.front_computed_tokens < found.alone_computed_tokens


@pytest.mark.slow
@pytest.mark.parametrize("trace", [EDITS, AGENT], ids=lambda trace: trace.name)
def test_branches_stay_at_the_replica_that_has_their_beginning(
    trace: Trace, make_stub: MakeStub, load: Load
) -> None:
    """Nobody but the front knows what belongs together: a client that asks in turn pays at each replica."""
    found = held(trace, make_stub, load, replicas=2)
    assert found.front_lost_tokens <= (INSTRUCTIONS if trace is EDITS else 0)
    assert found.front_computed_tokens < found.alone_computed_tokens

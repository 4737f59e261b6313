"""Branches that are explored together, by a thread or an event loop, against replies one by one."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest

import recollect
from recollect.types import SamplingParams

pytestmark = pytest.mark.model

HOT = SamplingParams(max_tokens=24, temperature=0.8, seed=11)
PROMPTS = ["Name a river.", "Name a river.", "Why is the sky blue?", "Count to five."]


@pytest.fixture(scope="module")
def model() -> Iterator[recollect.Model]:
    with recollect.load("smollm2", profile="exact", kv_disk=0) as loaded:
        yield loaded


def ids(found: Sequence[recollect.Branch]) -> list[tuple[int, ...] | None]:
    return [None if one.leaf is None else one.leaf.token_ids for one in found]


def test_threads_event_loops_and_replies_one_by_one_give_the_same_ids(
    model: recollect.Model,
) -> None:
    """In `exact`, where a batch computes what a sequence alone does."""
    alone = []
    for number, prompt in enumerate(PROMPTS):
        session = model.session("Be brief.", params=HOT, namespace=f"alone {number}")
        params = SamplingParams(max_tokens=24, temperature=0.8, seed=11 + number)
        alone.append(session.respond(prompt, params=params).node.token_ids)
    together = model.session("Be brief.", params=HOT, namespace="threads")
    assert ids(together.explore(PROMPTS).read().branches) == alone

    async def read() -> None:
        chat = model.session("Be brief.", params=HOT, namespace="loop")
        found = await chat.explore_async(PROMPTS)
        assert ids(found.branches) == alone
        first = await model.session("Be brief.", params=HOT).respond_async(PROMPTS[0])
        assert first.node.token_ids == alone[0]

    asyncio.run(read())
    model.engine.check()


def test_the_trunk_is_computed_once(model: recollect.Model) -> None:
    chat = model.session("A long beginning. " * 60, params=HOT, namespace="trunk")
    before = model.engine.computed_tokens
    found = chat.explore(PROMPTS, keep=0).read()
    trunk = len(chat.typed_ids())
    usage = found.usage
    own = usage.prompt_tokens - len(PROMPTS) * trunk
    assert usage.computed_tokens <= trunk + own
    fed = model.engine.computed_tokens - before
    wrong_guesses = usage.drafted_tokens - usage.accepted_tokens
    assert fed <= usage.computed_tokens + usage.generated_tokens + wrong_guesses

"""Replies that are tried beside each other: one prefix, one batch, and only what is kept stays."""

from dataclasses import replace

import pytest

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.errors import InvalidParameterError
from recollect.types import SamplingParams

HOT = SamplingParams(max_tokens=6, temperature=1.5, seed=1)
SYSTEM = "You are brief. " * 20


@pytest.fixture
def chat(model: Model) -> Session:
    return model.session(SYSTEM, params=HOT)


def settle(model: Model) -> None:
    """Wait until the idle work after the last turn is done, so that what is warm is certain."""
    for task in model.engine.tasks():
        task.wait()


def test_what_leads_to_the_branches_is_computed_once(chat: Session, model: Model) -> None:
    before = model.engine.computed_tokens
    found = chat.explore([f"Question {number}" for number in range(8)]).read()
    trunk = len(model.prompts.encode(chat.path(), "Question ").token_ids)
    prompts = [one.reply.usage.prompt_tokens for one in found.branches if one.reply]
    usage = found.usage
    assert usage.reused_tokens + usage.computed_tokens == usage.prompt_tokens == sum(prompts)
    own = sum(length - trunk for length in prompts)
    assert usage.computed_tokens <= trunk + own + 8 * len("E\nSassistant\n")
    fed = model.engine.computed_tokens - before
    assert fed == usage.computed_tokens + usage.generated_tokens - 8  # a last token is not fed


def test_best_of_n_keeps_the_best_alone(chat: Session) -> None:
    before = len(chat.tree)
    tip = chat.tip
    found = chat.explore(["Hello"] * 4, score=lambda one: -one.index).read()
    assert found.best is found.branches[0]
    assert [one.name for one in found.branches] == ["explore-1", None, None, None]
    assert len(chat.tree) == before + 2
    assert chat.tip is tip
    on = chat.branch("explore-1")
    assert on.tip is found.best.node
    assert on.respond("And now?").usage.reused_tokens > 0


def test_replies_that_would_be_the_same_are_refused(chat: Session) -> None:
    with pytest.raises(InvalidParameterError, match="greedy"):
        chat.explore(["Hello"] * 2, params=replace(HOT, temperature=0.0))

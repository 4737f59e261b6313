"""On a real model a reply after a public prefix is that of a model which shares nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import recollect
from recollect.conversation.model import Model
from recollect.types import SamplingParams

pytestmark = pytest.mark.model

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SYSTEM = (
    "You answer for the library of a small town. It opens at nine and closes at six, on Saturdays "
    "at one, and on Sundays it stays closed. Books are lent for four weeks, films for one. Be brief "
    "and polite, and say so where you do not know something."
)
QUESTIONS = ["When do you open on Saturday?", "For how long may I keep a film?"]


@contextmanager
def loaded() -> Iterator[Model]:
    name = os.environ.get("RECOLLECT_TEST_MODEL", "smollm2")
    with recollect.load(name, profile="exact", kv_memory=256 * 2**20, kv_disk=0) as model:
        yield model
        model.engine.check()


@pytest.fixture(scope="module")
def fresh() -> list[recollect.Reply]:
    """Return each reply of a model that has nothing public, and shares nothing."""
    with loaded() as model:
        return [
            model.session(SYSTEM, params=GREEDY, namespace=f"fresh {number}").respond(question)
            for number, question in enumerate(QUESTIONS)
        ]


def test_replies_after_a_public_prefix_are_those_of_a_fresh_model(
    fresh: list[recollect.Reply],
) -> None:
    with loaded() as model:
        made = model.publish(SYSTEM)
        assert made.computed_tokens == made.tokens > 60
        for namespace in ("a", "b", ""):
            for question, expected in zip(QUESTIONS, fresh, strict=True):
                with model.session(SYSTEM, params=GREEDY, namespace=namespace) as session:
                    reply = session.respond(question)
                assert reply.text == expected.text
                assert reply.usage.reused_tokens >= made.tokens
                assert reply.usage.computed_tokens <= expected.usage.computed_tokens - made.tokens
        assert model.unpublish(SYSTEM)
        with model.session(SYSTEM, params=GREEDY, namespace="c") as session:
            assert session.respond(QUESTIONS[0]).usage.reused_tokens == 0

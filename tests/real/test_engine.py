"""On a real model the same requests give the same tokens alone and together."""

import os
from collections.abc import Iterator

import pytest

import recollect
from recollect.conversation.model import Model
from recollect.engine.decoder import Task
from recollect.engine.sampling import Generator
from recollect.types import SamplingParams

pytestmark = pytest.mark.model

TOKENS = 12
QUESTIONS = [
    "My name is Alex. What is my name?",
    "Name three rivers.",
    "Write a function that reverses a list, in Python. Say nothing else.",
    "Hi",
    "My name is Alex. What is my job?",
    "How many apples do four trees bear, if each bears twelve? Explain each step.",
    "¿Dónde está la biblioteca?",
    "Name three mountains.",
]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    name = os.environ.get("RECOLLECT_TEST_MODEL", "smollm2")
    with recollect.load(name, profile="exact", kv_memory=512 * 2**20, kv_disk=0) as loaded:
        yield loaded
        loaded.engine.check()


class Talk:
    """A greedy reply on the engine's thread."""

    def __init__(self, model: Model, question: str, namespace: str | None) -> None:
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        self._generator = Generator(model.engine, params, namespace=namespace)
        ids = model.tokenizer.encode(
            model.template.render(
                [{"role": "user", "content": question}], add_generation_prompt=True
            )
        )
        self._generator.append_tokens(ids)
        self._prompt = len(ids)
        self._task = Task(self._generator.sequence, self._on_logits)
        model.engine.submit(self._task)

    def _on_logits(self) -> bool:
        self._generator.generate_next_token()
        return not self._generator.is_done()

    def tokens(self) -> list[int]:
        self._task.wait()
        tokens = self._generator.get_sequence()[self._prompt :]
        self._generator.close()
        return tokens


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    """Return each reply by itself, with nothing shared."""
    return [Talk(model, question, None).tokens() for question in QUESTIONS]


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_the_same_requests_give_the_same_tokens_alone_and_at_once(
    model: Model, alone: list[list[int]], at_once: int
) -> None:
    together: list[list[int]] = []
    for start in range(0, len(QUESTIONS), at_once):
        talks = [Talk(model, question, "x") for question in QUESTIONS[start : start + at_once]]
        together += [talk.tokens() for talk in talks]
    assert together == alone
    assert all(len(tokens) == TOKENS for tokens in alone)


def test_together_they_share_their_passes_and_what_they_have_in_common(model: Model) -> None:
    passes, computed = model.engine.forward_passes, model.engine.computed_tokens
    talks = [Talk(model, question, "y") for question in QUESTIONS]
    for talk in talks:
        talk.tokens()
    assert model.engine.forward_passes - passes < 4 * TOKENS
    again = model.engine.computed_tokens
    for question in QUESTIONS:
        Talk(model, question, "y").tokens()
    # No token of a question, and each of a reply but the last.
    assert model.engine.computed_tokens - again == len(QUESTIONS) * (TOKENS - 1)
    assert model.engine.computed_tokens - again < again - computed

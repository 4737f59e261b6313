"""
The rewind test: ask three questions, go back to after the first answer, ask the second again.

A rewind that leaves KV of the forgotten turns behind, or a hole, changes the second answer; one
that is wrong in the same way both times does not, so a fresh prefill is asked as well. Token ids
only; prints nothing.
"""

from dataclasses import dataclass
from typing import Final

from recollect.conversation.model import Model
from recollect.conversation.tree import Tree
from recollect.engine.sampling import Generator
from recollect.types import SamplingParams, common_prefix_length

QUESTIONS: Final = (
    "My name is Alex and I work as a data scientist at Orbital AI. What should I learn next?",
    "What is my name, and where do I work?",
    "Name three rivers in Europe.",
)
MAX_ANSWER_TOKENS: Final = 64
"""Long enough that one wrong KV slot shows in the choice of a token."""


@dataclass(frozen=True, slots=True)
class RewindResult:
    """The second answer three times, as token ids, and what getting there took."""

    length: int
    """Where the history was rewound to: the tokens of Q1 + A1."""
    history_tokens: int
    """How long it was before."""
    answer: tuple[int, ...]
    after_rewind: tuple[int, ...]
    fresh: tuple[int, ...]
    rewind_computed_tokens: int
    """Tokens fed by the rewind itself; 0."""
    again_computed_tokens: int
    """Tokens fed for the second question's second prefill."""

    @property
    def rewind_differs_at(self) -> int | None:
        """Return the first token of A2' that is not A2's; None where equal."""
        return first_difference(self.answer, self.after_rewind)

    @property
    def fresh_differs_at(self) -> int | None:
        """Return the first token of A2 that is not the fresh prefill's; None where equal."""
        return first_difference(self.answer, self.fresh)


def first_difference(first: tuple[int, ...], second: tuple[int, ...]) -> int | None:
    """Return the first place where two answers differ, a missing token included, or None."""
    return None if first == second else common_prefix_length(first, second)


def run_rewind_test(model: Model) -> RewindResult:
    """
    Run the test, greedily.

    Raises:
        ContextFullError: Three turns do not fit the context.
        OutOfBlocksError: Twice the conversation does not fit the KV memory.
    """
    engine = model.engine
    conversation = _Conversation(model)
    try:
        conversation.ask(QUESTIONS[0])
        generator = conversation.generator
        length = len(generator.sequence)
        answer = conversation.ask(QUESTIONS[1])
        second_question = conversation.asked[1]
        conversation.ask(QUESTIONS[2])
        history_tokens = len(generator.sequence)

        computed = engine.computed_tokens
        generator.rewind_to(length)
        rewind_computed = engine.computed_tokens - computed
        history = generator.get_sequence()
        generator.append_tokens(second_question)
        first = _next(generator)
        again_computed = engine.computed_tokens - computed - rewind_computed
        after_rewind = first + _rest(generator)
    finally:
        conversation.generator.close()
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS)
    fresh = Generator(engine, params, namespace=None)  # finds nothing of what was computed
    try:
        fresh.append_tokens(history + second_question)
        fresh_answer = _rest(fresh)
    finally:
        fresh.close()
    return RewindResult(
        length=length,
        history_tokens=history_tokens,
        answer=answer,
        after_rewind=after_rewind,
        fresh=fresh_answer,
        rewind_computed_tokens=rewind_computed,
        again_computed_tokens=again_computed,
    )


class _Conversation:
    """Questions in the form of the model's chat template, over one generator."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tree = Tree()
        self._tip = self._tree.root
        self.generator = Generator(model.engine, SamplingParams(max_tokens=MAX_ANSWER_TOKENS))
        self.asked: list[list[int]] = []
        """The token ids that were appended for each question."""

    def ask(self, question: str) -> tuple[int, ...]:
        """Append a question and return the answer's token ids."""
        prompt = self._model.prompts.encode(self._tip.path(), question).token_ids
        history = self.generator.get_sequence()
        if prompt[: len(history)] == history:
            new = prompt[len(history) :]
        else:  # the template rewrites its past: each question then stands by itself
            new = self._model.prompts.encode([], question).token_ids
        self.generator.append_tokens(new)
        self.asked.append(new)
        answer = _rest(self.generator)
        user = self._tree.add(self._tip, "user", question)
        text = self._model.tokenizer.decode(answer)
        self._tip = self._tree.add(user, "assistant", text, token_ids=answer)
        return answer


def _next(generator: Generator) -> tuple[int, ...]:
    token = generator.generate_next_token()
    return () if token is None else (token,)


def _rest(generator: Generator) -> tuple[int, ...]:
    """Return the tokens from here to the end of the answer."""
    tokens: list[int] = []
    while not generator.is_done():
        tokens += _next(generator)
    return tuple(tokens)

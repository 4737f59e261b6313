"""
The six multi-turn scenarios with their grades, and the rewind test.

Each scenario runs with reuse, with a full prefill every turn, and rewound. The question is what *reuse*
changes, apart from what the *model* gets wrong. So the full prefill of a turn is over the very token ids
that the turn had with reuse, and a difference between the two replies can only come from KV. A grade
says which of the expected facts a reply states, and whether it states a wrong one.

The rewind test asks three questions, goes back to after the first answer and asks the second again. KV
of the forgotten turns that is left behind, or a hole, changes the second answer; a rewind that is wrong
in the same way both times does not, so a fresh prefill is asked as well. Prints nothing.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Final

from recollect.conversation.model import Model
from recollect.conversation.session import Session
from recollect.conversation.tree import Tree
from recollect.conversation.turn import Reply
from recollect.engine.decoder import Decoder
from recollect.engine.reply import ReplyGeneration
from recollect.engine.sampling import Generator
from recollect.types import (
    FinishReason,
    Progress,
    SamplingParams,
    Usage,
    common_prefix_length,
    no_progress,
)

_BULLET: Final = re.compile(r"^\s*(?:[-*+•–]|\d+[.)])\s+\S", re.MULTILINE)  # noqa: RUF001 - models write en dashes
"""A line that begins with a bullet or a number, and says something."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a reply has to say."""

    patterns: tuple[str, ...] = ()
    """Regular expressions, each of which has to occur as whole words or numbers, whatever the case."""
    wrong: tuple[str, ...] = ()
    """Likewise; a reply in which one occurs says the contrary, and states none of the facts."""
    bullets: int | None = None
    """How many bullet lines it has; None: any number."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One expected fact and whether the reply states it."""

    what: str
    recalled: bool


_END: Final = re.compile(r"[!;?\n]|(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bMs)\.(?!\d)|[:—]")
"""Where a statement ends; not at the dot of a title or within a number."""
_DENIAL: Final = re.compile(
    r"\b(?:not|never|no|nor|neither|cannot|unsure|unknown|whether)\b|\w+n['\u2019]t\b"
    r"|\b(?:know|sure|certain|remember|say|tell)(?: me)? if\b",
    re.IGNORECASE,
)
_TURN: Final = re.compile(r"\b(?:but|rather|instead|however|although|only)\b", re.IGNORECASE)
"""After it, what was denied before holds no longer: "not in Munich but in Berlin"."""
_FURTHER: Final = re.compile(r"\b(?:or|nor)\b", re.IGNORECASE)
"""It carries a denial over commas: "not apples, bread, or eggs"."""


def grade(reply: str, expected: Expectation) -> tuple[Fact, ...]:
    """
    Return a verdict for each expected fact, in order; bullets last.

    "Dr. Patel is a biologist" has the word that was asked for, and is no answer to what Alice works
    in: so what a reply must not say counts as well. A fact that a reply denies, asks for or does not
    know is not stated: "it is not 84", "is it 84?", "I don't know whether it is 84", "-84". Only words
    are looked at, so irony and what a reply takes back later are not seen.
    """
    says_wrong = any(_places(pattern, reply) for pattern in expected.wrong)
    facts = [
        Fact(pattern, _is_stated(pattern, reply) and not says_wrong)
        for pattern in expected.patterns
    ]
    if expected.bullets is not None:
        facts.append(Fact(f"{expected.bullets} bullets", count_bullets(reply) == expected.bullets))
    return tuple(facts)


def _places(pattern: str, text: str) -> list[re.Match[str]]:
    """Return where a pattern occurs, and not as a part of a longer word or number."""
    whole = rf"(?<!\w)(?<!\d[,./])(?:{pattern})(?!\w|[,.]\d)"
    return list(re.finditer(whole, text, re.IGNORECASE))


def _is_stated(pattern: str, text: str) -> bool:
    """Return whether a pattern occurs in a statement that does not deny it."""
    return any(not _is_denied(place, text) for place in _places(pattern, text))


def _is_denied(place: re.Match[str], text: str) -> bool:
    ends = [end.end() for end in _END.finditer(text, 0, place.start())]
    before = text[ends[-1] if ends else 0 : place.start()]
    end = _END.search(text, place.end())
    if end is not None and end.group() == "?":
        return True
    is_number = place.group()[0].isdecimal()
    if is_number and re.search(r"(?:[-\u2212]|\b(?:minus|negative)\s+)$", before):
        return True
    denials = list(_DENIAL.finditer(before))
    if not denials:
        return False
    between = before[denials[-1].end() :]
    rest = text[place.start() : None if end is None else end.start()]
    carried = _FURTHER.search(between) or _FURTHER.search(rest)
    return not (_TURN.search(between) or ("," in between and not carried))


def count_bullets(text: str) -> int:
    """Return how many lines are list items, with a bullet or a number."""
    return len(_BULLET.findall(text))


MAX_REPLY_TOKENS: Final = 120
"""Long enough to state every expected fact, short enough that it all takes a minute or two."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A conversation with what the replies are expected to say, by number of the turn from 0."""

    name: str
    prompts: tuple[str, ...]
    expected: dict[int, Expectation]


@dataclass(frozen=True, slots=True)
class GradedReply:
    """A reply in one of the modes."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt and the replies to it."""

    prompt: str
    reuse: GradedReply
    full: GradedReply
    rewound: GradedReply | None
    """The same prompt again after a rewind, for the second turn alone."""

    @property
    def model_wrong(self) -> tuple[str, ...]:
        """Return the facts that are missing with a full prefill too: the model's own mistakes."""
        return tuple(fact.what for fact in self.full.facts if not fact.recalled)

    @property
    def changed_by_reuse(self) -> tuple[str, ...]:
        """Return the modes whose reply is not, token by token, that of the full prefill."""
        modes = {"reuse": self.reuse, "rewound": self.rewound}
        return tuple(
            mode
            for mode, reply in modes.items()
            if reply is not None and reply.token_ids != self.full.token_ids
        )

    def first_difference(self, mode: str) -> int | None:
        """Return the token at which a mode's reply leaves the full prefill's, or None."""
        reply = self.rewound if mode == "rewound" else self.reuse
        if reply is None or reply.token_ids == self.full.token_ids:
            return None
        return common_prefix_length(reply.token_ids, self.full.token_ids)


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """A scenario that was played in all modes."""

    name: str
    turns: tuple[Turn, ...]


def load_scenarios() -> tuple[Scenario, ...]:
    """Return the scenarios that come with the package."""
    text = resources.files("recollect.proof").joinpath("data/scenarios.json").read_text("utf-8")
    return tuple(
        Scenario(entry["name"], tuple(entry["prompts"]), _expected(entry))
        for entry in json.loads(text)["scenarios"]
    )


def play_all(
    model: Model, scenarios: tuple[Scenario, ...], *, progress: Progress = no_progress
) -> Iterator[ScenarioResult]:
    """Play the scenarios one after the other; yield each result when it is there."""
    for number, scenario in enumerate(scenarios):
        progress(scenario.name, number, len(scenarios))
        yield play(model, scenario)


def play(model: Model, scenario: Scenario) -> ScenarioResult:
    """
    Play a scenario in all modes, greedily.

    Raises:
        ContextFullError: The conversation does not fit the context.
        OutOfBlocksError: Twice the conversation does not fit the KV memory.
    """
    params = SamplingParams(max_tokens=MAX_REPLY_TOKENS)
    with model.session(params=params) as session:
        reused, full = [], []
        for number, prompt in enumerate(scenario.prompts):
            expected = scenario.expected.get(number, Expectation())
            reply = session.respond(prompt)
            reused.append(_graded(reply, expected))
            full.append(_full_prefill(model, _prompt_ids(model, reply), params, expected))
        rewound = _rewound(session, scenario)
    turns = tuple(
        Turn(prompt, reused[number], full[number], rewound if number == 1 else None)
        for number, prompt in enumerate(scenario.prompts)
    )
    return ScenarioResult(scenario.name, turns)


def _expected(entry: dict[str, dict[str, list[str]] | dict[str, int]]) -> dict[int, Expectation]:
    patterns, bullets = entry.get("expect", {}), entry.get("expect_bullets", {})
    wrong = entry.get("wrong", {})
    return {
        int(turn): Expectation(
            tuple(patterns.get(turn, ())),  # type: ignore[arg-type]  # JSON of our own
            tuple(wrong.get(turn, ())),  # type: ignore[arg-type]
            bullets.get(turn),  # type: ignore[arg-type]
        )
        for turn in {**patterns, **bullets}
    }


def _graded(reply: Reply, expected: Expectation) -> GradedReply:
    token_ids = reply.node.token_ids
    assert token_ids is not None, "a generated reply has token ids"
    return GradedReply(
        reply.text, token_ids, reply.finish_reason, reply.usage, grade(reply.text, expected)
    )


def _prompt_ids(model: Model, reply: Reply) -> list[int]:
    """Return the token ids that *reply* answered."""
    return model.prompts.encode(reply.node.path()[:-1]).token_ids


def _full_prefill(
    model: Model, prompt_ids: list[int], params: SamplingParams, expected: Expectation
) -> GradedReply:
    """Answer the same ids in blocks of their own, from the first token on."""
    engine = model.engine
    generator = Generator(engine, params, namespace=None)
    try:
        generator.append_tokens(prompt_ids)
        generation = ReplyGeneration(engine, generator, model.tokenizer)
        generation.start()
        text = "".join(generation)
        reason = generation.finish_reason
        assert reason is not None, "a reply that was read to its end has a reason"
        ids = tuple(generation.token_ids)
        return GradedReply(text, ids, reason, generation.usage(), grade(text, expected))
    finally:
        generator.close()


def _rewound(session: Session, scenario: Scenario) -> GradedReply | None:
    """Go back from the end to after the first turn, and ask the second question again."""
    if len(scenario.prompts) < 2:
        return None
    first_reply = next(node for node in session.path() if node.role == "assistant")
    session.rewind(first_reply)
    again = session.respond(scenario.prompts[1])
    return _graded(again, scenario.expected.get(1, Expectation()))


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
    prompt: tuple[int, ...]
    """What the second answer follows."""
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

    def differences(self) -> list[str]:
        """Return a line for each answer that is not A2, naming the first token that differs."""
        lines = []
        if (place := self.rewind_differs_at) is not None:
            lines.append(f"A2' differs from A2 at {self._tokens(place, self.after_rewind)}")
        if (place := self.fresh_differs_at) is not None:
            lines.append(f"a fresh prefill differs from A2 at {self._tokens(place, self.fresh)}")
        return lines

    def _tokens(self, place: int, other: tuple[int, ...]) -> str:
        first, second = (
            str(answer[place]) if place < len(answer) else "the end"
            for answer in (self.answer, other)
        )
        return f"token {place}: {second} instead of {first}"


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
        if isinstance(
            engine, Decoder
        ):  # which tells the cost of a prompt with the last token of the reply
            again_computed = engine.computed_tokens - computed - rewind_computed
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
        prompt=(*history, *second_question),
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
